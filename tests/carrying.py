"""What tests of several systems are made with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.training.bench import Bench
from limbeck.training.engine import Engine
from limbeck.training.method import Method, Phases
from limbeck.training.phases import Phase
from limbeck.training.progress import Voice
from limbeck.training.run import Run
from limbeck.training.trainer import Trainer


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Numbers from N(0, 1), the same for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def carry_out(
    path: Path,
    method: Method,
    laid: Bench,
    look: Callable[[Phase], object] | None = None,
    engine: Engine | None = None,
) -> Run:
    """Carry a method out in a run folder, or go on where it stopped; ``look`` sees each phase."""
    run = Run.open(path) if path.exists() else Run.create(path, {"test": True})
    trainer = Trainer(run, engine or laid.engine, Voice(quiet=True))

    def watched(phases: Phases) -> Phases:
        found = None
        while True:
            try:
                phase = phases.send(found)
            except StopIteration:
                return
            if look is not None:
                look(phase)
            found = yield phase

    laid.seconds = trainer.seconds
    trainer.work(watched(method.phases(laid)))
    return run


def struck(work: Callable[..., Any], at: int) -> Callable[..., Any]:
    """A function that fails when it is called so many times; the audit's call counts."""
    calls = []

    def failing(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("the power went")
        return work(*given)

    return failing


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the same tensors, bit for bit, under the same names."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
