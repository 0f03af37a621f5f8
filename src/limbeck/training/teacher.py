"""A frozen model, or several, whose answers the student learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.training.network import Network
from limbeck.training.taps import Taps
from limbeck.training.task import Answer, Batch, Task


class Teacher(nn.Module):
    """Frozen networks that answer without gradient and never leave eval mode.

    The networks are no submodules: they appear neither in ``parameters()`` nor in
    ``state_dict()`` of a module that holds the teacher, and a parent's ``.train()`` does not wake
    them; ``.to(device)`` does move them.

    Args:
        networks: one network or several; plain modules are wrapped.
        mean: how several answers become one: the mean of ``"probabilities"`` (arithmetic) or of
            ``"logits"`` (geometric, after the softmax).
        weights: one positive weight a teacher, normalised to sum to one; equal if not given.
        route: the key of a batch, int64 of shape (B,), that says which teacher answers for which
            sample; then nothing is averaged.

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
        self._taps = tuple(Taps(n.model, ()) for n in self._hidden)

    @property
    def networks(self) -> tuple[Network, ...]:
        """The frozen networks, in order."""
        return self._hidden

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        for network in self._hidden:
            network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def tap(self, paths: Iterable[str]) -> None:
        """Capture these places from now on, in every network."""
        wanted = tuple(paths)
        if wanted and len(self._hidden) > 1 and self.route is None:
            raise UserError(
                f"features of {len(self._hidden)} teachers cannot be averaged; give one teacher, "
                "or route each sample to one"
            )
        fresh = tuple(Taps(n.model, wanted) for n in self._hidden)
        for taps in self._taps:
            taps.remove()
        self._taps = fresh

    @torch.no_grad()
    def forward(self, task: Task, batch: Batch) -> Answer:
        """The teacher's answer to a batch, detached."""
        answers = []
        for network, taps in zip(self._hidden, self._taps, strict=True):
            network.eval()
            answers.append(task.run(network, batch, taps))
        if len(answers) == 1:
            return answers[0]
        if self.route is not None:
            return self._routed(answers, batch)
        return task.combine(answers, self.weights, self.mean)

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
