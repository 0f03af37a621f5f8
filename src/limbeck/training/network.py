"""A model together with what it is fed and what is needed to build it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn


class Network(nn.Module):
    """A model, the input it expects, and what is needed to build it again.

    Args:
        model: any module; its own state-dict keys are what is written to disk.
        input: turns a view of a sample into this model's input (a frozen dataclass such as
            :class:`limbeck.models.Input`); ``None`` hands batches over untouched.
        name: the name ``limbeck.models.build`` knows it by, or "" for a module built elsewhere.
        classes: the class names its outputs stand for, in order; empty if unknown.

    Example:
        >>> import torch
        >>> Network(nn.Linear(3, 2))(torch.zeros(1, 3)).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        input: Callable[[Any], Any] | None = None,
        name: str = "",
        classes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.input = input
        self.name = name
        self.classes = tuple(classes)

    def forward(self, view: Any) -> Any:
        """Run the model on a geometric view of a batch of samples."""
        return self.model(view if self.input is None else self.input(view))

    def facts(self) -> dict[str, Any]:
        """What lies beside the weights as JSON so that the model can be built again."""
        return {
            "model": self.name,
            "classes": list(self.classes),
            "input": None if self.input is None else asdict(self.input),  # type: ignore[call-overload]
        }
