"""Stretches of training: ``Fit``, a gradient loop, and ``Solve``, a step without one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import nn

from limbeck.training.task import Batch, Batches, Terms


class Training(BaseModel):
    """How a model is trained: budget, optimiser and learning rate.

    ``milestones`` are epochs after which a ``step`` schedule multiplies the rate by ``gamma``;
    ``cosine``, ``linear`` and ``poly``, (1 - done)^0.9, fall to zero at the last step; ``warmup``
    epochs rise linearly from zero.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    epochs: int = Field(default=10, ge=0, le=10**6, description="passes over the training set")
    batch_size: int = Field(
        default=64, ge=1, le=10**6, description="samples a step, over all processes"
    )
    optimiser: Literal["sgd", "adam", "adamw", "rmsprop"] = Field(
        default="sgd", description="rmsprop as Inception-v3 used it: alpha 0.9, epsilon 1"
    )
    lr: float = Field(default=0.05, gt=0, allow_inf_nan=False, description="peak learning rate")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd and rmsprop")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="of adam and adamw"
    )
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0, allow_inf_nan=False)
    decay: Literal["all", "kernels"] = Field(
        default="all", description="kernels: not biases, norms and depthwise filters"
    )
    schedule: Literal["constant", "step", "cosine", "linear", "poly"] = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = Field(default=0.1, gt=0, le=1)
    warmup: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="epochs")
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    accumulate: int = Field(
        default=1, ge=1, le=10**6, description="slices that a batch is worked off in"
    )

    @field_validator("nesterov")
    @classmethod
    def _moved(cls, nesterov: bool, found: ValidationInfo) -> bool:
        if nesterov and not found.data.get("momentum", True):
            raise ValueError("Nesterov's step needs a momentum above 0")
        return nesterov

    def factor(self, epoch: float) -> float:
        """What the learning rate is multiplied by at a fractional epoch.

        >>> Training(schedule="step", milestones=(2, 4)).factor(2.0)
        0.1
        >>> Training(schedule="cosine", epochs=2).factor(1.0)
        0.5
        >>> round(Training(schedule="poly", epochs=2).factor(1.0), 4)
        0.5359
        >>> Training(schedule="linear", epochs=5, warmup=1).factor(2.0)
        0.75
        """
        if epoch < self.warmup:
            return epoch / self.warmup
        if self.schedule == "step":
            return math.prod(self.gamma for m in self.milestones if epoch >= m)
        if self.schedule == "constant":
            return 1.0
        done = min((epoch - self.warmup) / max(self.epochs - self.warmup, 1e-12), 1.0)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return float((1 - done) ** (0.9 if self.schedule == "poly" else 1))

    def stretched(self, factor: float) -> Training:
        """The same training over so many times the epochs, at least one of them.

        >>> Training(epochs=10, schedule="step", milestones=(5,)).stretched(2.0).milestones
        (10,)
        """
        return self.model_copy(
            update={
                "epochs": max(1, round(self.epochs * factor)) if self.epochs else 0,
                "milestones": tuple(round(m * factor) for m in self.milestones),
                "warmup": self.warmup * factor,
            }
        )

    def build(
        self, parameters: Iterable[nn.Parameter], fused: bool = False
    ) -> torch.optim.Optimizer:
        """The optimiser over these parameters; ``fused`` makes its step one kernel."""
        wanted: list[Any] = [p for p in parameters if p.requires_grad]
        if self.decay == "kernels":
            spared = [p for p in wanted if _spared(p)]
            decayed = [p for p in wanted if not _spared(p)]
            groups = ({"params": decayed}, {"params": spared, "weight_decay": 0.0})
            wanted = [group for group in groups if group["params"]]
        if self.optimiser == "sgd":
            return torch.optim.SGD(
                wanted,
                lr=self.lr,
                momentum=self.momentum,
                nesterov=self.nesterov,
                weight_decay=self.weight_decay,
                fused=fused or None,
            )
        if self.optimiser == "rmsprop":
            return torch.optim.RMSprop(
                wanted,
                lr=self.lr,
                alpha=0.9,
                eps=1.0,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
            )
        kind = torch.optim.Adam if self.optimiser == "adam" else torch.optim.AdamW
        return kind(
            wanted,
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=fused or None,
        )


def _spared(parameter: nn.Parameter) -> bool:
    """Whether it is a bias, a norm's scale or shift, or filters of one input channel each."""
    return parameter.ndim < 2 or (parameter.ndim == 4 and parameter.shape[1] == 1)


@dataclass(kw_only=True)
class Update:
    """One optimiser step within a step of a ``Fit``: what it trains, and on which loss terms.

    ``train`` names the modules that this update's optimiser owns; a module that needs another
    learning rate than the rest has an entry in ``settings_for``.
    """

    train: Mapping[str, nn.Module]
    terms: Callable[[Batch], Terms]
    settings: Training
    settings_for: Mapping[str, Training] = field(default_factory=dict)
    name: str = "student"


@dataclass(kw_only=True)
class Phase:
    """A stretch of training that changes some modules and can be skipped once it is done.

    ``name`` is unique in a run. ``seed`` decides data order, augmentation and dropout.
    """

    name: str
    seed: int = 0

    def modules(self) -> dict[str, nn.Module]:
        """Everything whose state the phase changes."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Fit(Phase):
    """Gradient steps over batches for some epochs, one or several updates a step, in order.

    ``evaluate`` measures on validation data after every epoch; with ``select="best"`` the state
    with the best measure (the task's metric, first key) is kept instead of the last. With
    ``patience`` besides, the phase ends when the best measure is so many epochs old.
    ``keep`` lists epochs (1 = after the first) after which the state is kept in the run folder; the
    ``yield`` then gives back where, by epoch, for :func:`limbeck.training.checkpoint.read_state`.
    ``begun`` is how many epochs of the learning rate's schedule lie behind.
    """

    updates: Sequence[Update]
    batches: Batches
    epochs: int
    evaluate: Callable[[], dict[str, float]] | None = None
    select: Literal["last", "best"] = "last"
    higher_is_better: bool = True
    keep: Sequence[int] = ()
    begun: float = 0.0
    patience: int | None = None

    def modules(self) -> dict[str, nn.Module]:
        return {name: module for update in self.updates for name, module in update.train.items()}


class Journal(Protocol):
    """What a ``Solve`` has done so far; it survives a kill, until the phase is finished."""

    def remember(self, name: str, work: Callable[[], Any]) -> Any:
        """Do a piece of work once; a resumed run gets its result back instead.

        The result is made of tensors, numbers, strings, lists and dicts.
        """
        ...


@dataclass(kw_only=True)
class Solve(Phase):
    """A step with no gradient loop: a closed form, a search, another engine's run.

    ``run`` changes the modules in ``writes`` and returns a result of plain values, which is what
    the ``yield`` of the phase gives back, also in a resumed run.
    """

    run: Callable[[Journal], Any]
    writes: Mapping[str, nn.Module] = field(default_factory=dict)

    def modules(self) -> dict[str, nn.Module]:
        return dict(self.writes)
