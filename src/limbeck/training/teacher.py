"""A frozen model, or several, whose answers the student learns from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.training.cache import Cache, identify
from limbeck.training.folding import fold_batch_norm
from limbeck.training.network import Network
from limbeck.training.profiling import stretch
from limbeck.training.taps import Taps
from limbeck.training.task import Answer, Batch, Task

FEWEST = 16
"""A matrix product may round otherwise for fewer rows than this."""


class Teacher(nn.Module):
    """Frozen networks that answer without gradient and never leave eval mode.

    The networks are no submodules: they appear neither in ``parameters()`` nor in
    ``state_dict()`` of a module that holds the teacher, and a parent's ``.train()`` does not wake
    them; ``.to(device)`` does move them. They answer through copies that share their weights and
    are made when the first answer is wanted, and again when :meth:`tap` wants others.

    Args:
        networks: one network or several; plain modules are wrapped.
        mean: how several answers become one: the mean of ``"probabilities"`` (arithmetic) or of
            ``"logits"`` (geometric, after the softmax).
        weights: one positive weight a teacher, normalised to sum to one; equal if not given.
        route: the key of a batch, int64 of shape (B,), that says which teacher answers for which
            sample; then nothing is averaged.
        fold: answer with batch norms folded into the layers before them, equal to rounding.
        precision: answer in this type instead of the student's.
        compile: ``torch.compile`` the answering copies; ``graphs`` as CUDA graphs.
        cache: remembers answers to batches that say which view of which samples they show
            (``view`` and ``row``); others are answered afresh.

    Raises:
        UserError: no teacher; weights that do not fit.

    Example:
        >>> teacher = Teacher(nn.Linear(4, 3)).train()
        >>> teacher.networks[0].training, len(list(teacher.parameters()))
        (False, 0)
    """

    def __init__(
        self,
        networks: nn.Module | Sequence[nn.Module],
        *,
        mean: Literal["probabilities", "logits"] = "probabilities",
        weights: Sequence[float] | None = None,
        route: str | None = None,
        fold: bool = True,
        precision: torch.dtype | None = None,
        compile: bool | Literal["graphs"] = False,
        cache: Cache | None = None,
    ) -> None:
        super().__init__()
        given = [networks] if isinstance(networks, nn.Module) else list(networks)
        if not given:
            raise UserError("a teacher needs at least one network")
        if mean not in ("probabilities", "logits"):
            raise UserError(f"teachers are averaged by 'probabilities' or 'logits', not {mean!r}")
        if weights is not None and (len(weights) != len(given) or min(weights) <= 0):
            raise UserError(
                f"{len(given)} teachers need {len(given)} positive weights, not {list(weights)}"
            )
        self._hidden = tuple(n if isinstance(n, Network) else Network(n) for n in given)
        for network in self._hidden:
            network.requires_grad_(False).eval()
        self.mean: Literal["probabilities", "logits"] = mean
        self.route = route
        shares = torch.tensor(weights or [1.0] * len(given), dtype=torch.float64)
        self.weights: Tensor = shares / shares.sum()
        self.fold = fold
        self.precision = precision
        self.compile_mode = compile
        self.cache = cache
        self.paths: tuple[str, ...] = ()
        self.outputs = True
        self._answering: tuple[tuple[Network, Taps], ...] = ()
        self._identities: list[dict[str, Any]] = []

    @property
    def networks(self) -> tuple[Network, ...]:
        """The frozen networks, in order."""
        return self._hidden

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._answering, self._identities = (), []
        for network in self._hidden:
            network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def tap(self, paths: Iterable[str], outputs: bool = True) -> None:
        """Capture these places from now on, in every network.

        Without ``outputs`` the networks stop at the last of them, and answers hold features only.
        """
        before = self.paths, self.outputs
        self.paths, self.outputs = tuple(paths), outputs
        if self.paths and len(self._hidden) > 1 and self.route is None:
            raise UserError(
                f"features of {len(self._hidden)} teachers cannot be averaged; give one teacher, "
                "or route each sample to one"
            )
        for network in self._hidden:
            Taps(network.model, self.paths).remove()
        if (self.paths, self.outputs) != before:
            self._answering = ()

    def _awake(self) -> tuple[tuple[Network, Taps], ...]:
        """The copies that answer, each with its taps."""
        if not self._answering:
            self._answering = tuple(self._copy(network) for network in self._hidden)
        return self._answering

    def _copy(self, network: Network) -> tuple[Network, Taps]:
        shared = {id(t): t for t in (*network.parameters(), *network.buffers())}
        own = copy.deepcopy(network, {} if self.precision else shared).eval()
        if self.fold:
            own.model = fold_batch_norm(own.model, self.paths, share=True)
        if self.precision:
            own.lay_out(own.memory_format, self.precision)
        own.requires_grad_(False)
        # A compiled pass ends where its outputs end, and cannot be left by an exception.
        stop = not self.outputs and not self.compile_mode
        taps = Taps(own.model, self.paths, stop=stop)
        own.compile_model(self.compile_mode)
        return own, taps

    @torch.no_grad()
    def forward(self, task: Task, batch: Batch) -> Answer:
        """The teacher's answer to a batch, detached."""
        with stretch("teacher"):
            answers = self.members(task, batch)
        if len(answers) == 1:
            return answers[0]
        if self.route is not None:
            return self._routed(answers, batch)
        return task.combine(answers, self.weights, self.mean)

    @torch.no_grad()
    def members(self, task: Task, batch: Batch) -> list[Answer]:
        """What each network answers, by itself."""
        return [self._one(n, task, batch) for n in range(len(self._hidden))]

    def _one(self, number: int, task: Task, batch: Batch) -> Answer:
        """The answer of one network, remembered or asked."""
        if "view" not in batch:
            return self._ask(number, task, batch)

        def ask(positions: Tensor) -> Answer:
            if len(positions) == len(batch["row"]) >= FEWEST:
                return self._ask(number, task, batch)
            # An answer must not depend on how many others are asked for with it.
            padded = positions[torch.arange(max(len(positions), FEWEST)) % len(positions)]
            return _first(self._ask(number, task, _picked(batch, padded)), len(positions))

        if self.cache is None:
            return ask(torch.arange(len(batch["row"])))
        return self.cache.answer(
            self._identity(number, task),
            batch["view"],
            batch["row"],
            ask,
            task.distributions,
            self._device(number),
        )

    def _ask(self, number: int, task: Task, batch: Batch) -> Answer:
        network, taps = self._awake()[number]
        with self._precisely(number):
            answer = task.run(network, batch, taps)
        return answer if self.outputs else Answer({}, answer.features)

    def _precisely(self, number: int) -> AbstractContextManager[Any]:
        """In the teacher's own precision if it has one, else in whatever surrounds it."""
        if self.precision is None:
            return nullcontext()
        return torch.autocast(self._device(number).type, enabled=False)

    def _device(self, number: int) -> torch.device:
        network = self._hidden[number]
        found = next(chain(network.parameters(), network.buffers()), None)
        return torch.device("cpu") if found is None else found.device

    def _identity(self, number: int, task: Task) -> dict[str, Any]:
        """What the answers of a network depend on, beside the view."""
        if not self._identities:
            self._identities = [identify(network) for network in self._hidden]
        kind = self._device(number).type
        autocast = self.precision is None and torch.is_autocast_enabled(kind)
        return {
            **self._identities[number],
            "task": task.name,
            "taps": list(self.paths),
            "outputs": self.outputs,
            "precision": str(self.precision),
            "autocast": str(torch.get_autocast_dtype(kind)) if autocast else None,
            "folded": self.fold,
            "memory_format": str(self._hidden[number].memory_format),
        }

    def _routed(self, answers: Sequence[Answer], batch: Batch) -> Answer:
        if self.route not in batch:
            raise UserError(
                f"the batch has no {self.route!r} to say which teacher answers; it has "
                + ", ".join(sorted(batch))
            )
        which: Tensor = batch[self.route]

        def pick(tensors: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(tensors))[which, torch.arange(len(which), device=which.device)]

        return Answer(
            {name: pick([a.outputs[name] for a in answers]) for name in answers[0].outputs},
            {path: pick([a.features[path] for a in answers]) for path in answers[0].features},
        )


def _picked(batch: Batch, positions: Tensor) -> Batch:
    """The samples of a batch at these positions."""
    size = len(batch["row"])
    return {
        name: value[positions.to(value.device)]
        if isinstance(value, Tensor) and value.ndim and len(value) == size
        else value
        for name, value in batch.items()
    }


def _first(answer: Answer, number: int) -> Answer:
    return Answer(
        {name: tensor[:number] for name, tensor in answer.outputs.items()},
        {path: tensor[:number] for path, tensor in answer.features.items()},
    )
