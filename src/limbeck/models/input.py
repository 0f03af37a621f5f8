"""What models want to be fed, and where those come from that are fed alike."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from torch import Tensor

from limbeck.errors import UserError
from limbeck.training.parameters import reason_of

if TYPE_CHECKING:
    from limbeck.models.libraries import Offer, Order

KINDS = {
    "images": "limbeck.models.input:Input",
    "boxed": "limbeck.models.detectors:BoxedInput",
    "scenes": "limbeck.models.dense:SceneInput",
    "lanes": "limbeck.models.dense:LaneInput",
    "conditions": "limbeck.models.generators:ConditionInput",
    "observations": "limbeck.models.policy:Observations",
    "sentences": "limbeck.models.sentences:Sentences",
    "text": "limbeck.models.text:TextInput",
    "tables": "limbeck.models.table:TableInput",
}
"""Kinds of intake, as a stored network names them, and the class of each."""


Count = Annotated[int, Field(ge=1, le=2**13)]
Deviation = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Intake(ABC):
    """What models of one kind are fed; it knows where such models come from.

    Subclasses are frozen dataclasses of plain values, which lie beside a network's weights.
    """

    kind: ClassVar[str]

    @abstractmethod
    def __call__(self, view: Any) -> Any:
        """Turn a view of a batch of samples into the model's input."""

    @abstractmethod
    def sample(self) -> Any:
        """A view of one sample that says nothing, as networks are called with it."""

    @abstractmethod
    def describe(self) -> str:
        """What it is, in a sentence on what cannot be fed so."""

    @abstractmethod
    def offers(self) -> Mapping[str, Callable[[Order], Offer]]:
        """What makes models that are fed so, by library; "" stands for Limbeck's own."""

    def check(self, output: Any, classes: int) -> None:
        """Raise where this is not what such a model puts out for :meth:`sample`."""

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Self:
        """The inverse of ``dataclasses.asdict``, also after a round through JSON.

        Raises:
            ValueError: a field is missing, of another type, or out of range.
        """
        try:
            return TypeAdapter(cls).validate_json(json.dumps(facts), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "all of it"
            raise ValueError(f"{where}: {reason_of(first['msg'])}") from None


def intake(facts: dict[str, Any]) -> Intake:
    """What a stored network is fed, from the ``input`` among its facts.

    >>> intake({"channels": 1, "size": [8, 8], "mean": [0.5], "std": [0.5]})
    Input(channels=1, size=(8, 8), mean=(0.5,), std=(0.5,))

    Raises:
        KeyError, TypeError, ValueError: the facts are not of this kind.
    """
    module, _, name = KINDS[facts.get("kind", "images")].partition(":")
    kind: type[Intake] = getattr(import_module(module), name)
    return kind.from_json({key: value for key, value in facts.items() if key != "kind"})


@dataclass(frozen=True)
class Input(Intake):
    """What a vision model wants to be fed: channels, size in pixels, normalisation.

    ``size`` is (height, width); ``mean`` and ``std`` hold one number a channel, on the scale where
    white is 1.
    """

    channels: Count
    size: tuple[Count, Count]
    mean: tuple[FiniteFloat, ...]
    std: tuple[Deviation, ...]

    kind = "images"

    def __call__(self, view: Tensor) -> Tensor:
        """Turn a view, (B, C, H, W) in [0, 1], into this model's input.

        Resizes with antialiasing, repeats or averages channels and normalises: the last steps,
        in which two models that look at the same geometric view may differ.

        >>> grey = Input(1, (2, 2), (0.5,), (0.5,))
        >>> grey(torch.ones(1, 3, 4, 4)).unique()
        tensor([1.])
        """
        if tuple(view.shape[-2:]) != self.size:
            view = F.interpolate(view, self.size, mode="bilinear", antialias=True)
        if view.shape[1] != self.channels:
            if self.channels == 1:
                view = view.mean(1, keepdim=True)
            elif view.shape[1] == 1:
                view = view.expand(-1, self.channels, -1, -1)
            else:
                raise UserError(
                    f"a model for {self.channels} channels cannot read images of "
                    f"{view.shape[1]} channels"
                )
        return (view - _per_channel(self.mean, view)) / _per_channel(self.std, view)

    def sample(self) -> Tensor:
        return torch.zeros(1, self.channels, *self.size)

    def describe(self) -> str:
        return f"{self.channels} x {self.size[0]} x {self.size[1]} images"

    def offers(self) -> Mapping[str, Callable[[Order], Offer]]:
        from limbeck.models.libraries import OFFERS

        return OFFERS

    def check(self, output: Any, classes: int) -> None:
        check_logits(output, classes)


def check_logits(output: Any, *shape: int) -> None:
    """Raise where this is no output a class for one sample, or of this shape for it."""
    if not isinstance(output, Tensor) or output.shape != (1, *shape):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"it puts out {got} instead of {(1, *shape)}")


def _per_channel(numbers: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
