"""What the first batch tells: each loss term's value, its share of the gradient, the memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.training.phases import Update
from limbeck.training.progress import Voice
from limbeck.training.task import Batch

_OPTIMISER_COPIES = {"sgd": 1, "adam": 2, "adamw": 2, "rmsprop": 2}


@dataclass(frozen=True)
class Audit:
    """Term values, shares (0..1) of the summed gradient norms, and bytes a step needs."""

    values: dict[str, float]
    shares: dict[str, float]
    weights: int
    activations: int

    def as_json(self) -> dict[str, Any]:
        return {
            "values": self.values,
            "gradient_share": self.shares,
            "bytes": {"weights_and_optimiser": self.weights, "activations": self.activations},
        }

    def speak(self, voice: Voice, phase: str) -> None:
        """Say it in a line, and warn of a term that does nothing or swamps the others."""
        terms = ", ".join(
            f"{name} {value:.4g} ({self.shares[name]:.0%} of the gradient)"
            for name, value in self.values.items()
        )
        voice.say(
            f"{phase}: first batch {terms}; memory {self.weights / 2**20:,.0f} MiB for weights, "
            f"gradients and optimiser, {self.activations / 2**20:,.0f} MiB for activations"
        )
        if len(self.shares) < 2:
            return
        for name, share in self.shares.items():
            if share < 0.01:
                voice.warn(
                    f"the term {name!r} makes {share:.2%} of the gradient: it does next to nothing"
                )
            elif share > 0.99:
                voice.warn(
                    f"the term {name!r} makes {share:.2%} of the gradient: it swamps the others"
                )


def audit(update: Update, batch: Batch) -> Audit:
    """Measure one forward and one backward per term; the modules are left as they were.

    Shares are of the gradient at the module named ``student`` if the update trains one, else at
    all that it trains.
    """
    watched = update.train.get("student") or nn.ModuleList(update.train.values())
    parameters = [p for p in watched.parameters() if p.requires_grad]
    with _undone(update), _counted() as seen:
        terms = update.terms(batch)
        norms = {}
        *_, last = terms
        for name, term in terms.items():
            if not term.requires_grad:
                norms[name] = 0.0
                continue
            gradients = torch.autograd.grad(
                term, parameters, retain_graph=name != last, allow_unused=True
            )
            norms[name] = _norm([g for g in gradients if g is not None])
    total = sum(norms.values())
    trained = sum(
        p.numel() * p.element_size() * (2 + _OPTIMISER_COPIES[update.settings.optimiser])
        for module in update.train.values()
        for p in module.parameters()
    )
    return Audit(
        values={name: float(term.detach()) for name, term in terms.items()},
        shares={name: norm / total if total else 0.0 for name, norm in norms.items()},
        weights=trained,
        activations=sum(seen.values()),
    )


def some_unused(update: Update, batch: Batch) -> bool:
    """Whether a trained parameter has no part in the loss of a batch."""
    parameters = [p for m in update.train.values() for p in m.parameters() if p.requires_grad]
    with _undone(update):
        total = torch.stack(list(update.terms(batch).values())).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return any(gradient is None for gradient in gradients)


def _norm(gradients: list[Tensor]) -> float:
    if not gradients:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack([g.float().norm() for g in gradients])))


@contextmanager
def _counted() -> Iterator[dict[int, int]]:
    """Bytes of what autograd keeps, by storage."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield seen


@contextmanager
def _undone(update: Update) -> Iterator[None]:
    """Put buffers back (running statistics, memory banks) that a forward pass changes."""
    buffers = [b for module in update.train.values() for b in module.buffers()]
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
