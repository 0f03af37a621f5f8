"""A model together with what it is fed and what is needed to build it again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn


class Solved(nn.Module, ABC):
    """A model that is fitted at one go, without gradients: a forest, say.

    Its tensors have the same shapes before and after, so that it is stored and loaded like any
    other.
    """

    @abstractmethod
    def solve(self, inputs: Tensor, targets: Tensor, seed: int) -> None:
        """Fit the model to inputs as the network's ``input`` makes them.

        Args:
            inputs: the first dimension is the samples.
            targets: int64 labels, or what the model is to put out, as floating point numbers.
            seed: of whatever is drawn.
        """


class Network(nn.Module):
    """A model, the input it expects, and what is needed to build it again.

    Args:
        model: any module; its own state-dict keys are what is written to disk.
        input: turns a view of a sample into this model's input (a frozen dataclass such as
            :class:`limbeck.models.Input`), or into several by name; ``None`` hands batches over
            untouched.
        name: the name ``limbeck.models.build`` knows it by, or "" for a module built elsewhere.
        classes: the class names its outputs stand for, in order; empty if unknown.

    ``memory_format`` and ``dtype`` are what images are turned into last; :meth:`lay_out` sets them
    together with the weights'.

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
        self.memory_format = torch.contiguous_format
        self.dtype: torch.dtype | None = None

    def forward(self, view: Any) -> Any:
        """Run the model on a geometric view of a batch of samples."""
        fed = view if self.input is None else self.input(view)
        if isinstance(fed, Mapping):
            return self.model(**self.placed(fed))
        if isinstance(fed, Tensor) and fed.is_floating_point():
            format = self.memory_format if fed.ndim == 4 else torch.preserve_format
            fed = fed.to(self.dtype or fed.dtype, memory_format=format)
        return self.model(fed)

    def placed(self, fed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a model is fed by name, where its weights lie: not every view lies on a device."""
        found = next(self.model.parameters(), None)
        device = torch.device("cpu") if found is None else found.device
        return {name: tensor.to(device, non_blocking=True) for name, tensor in fed.items()}

    def lay_out(
        self, memory_format: torch.memory_format, dtype: torch.dtype | None = None
    ) -> Network:
        """Put weights and images into a memory format, and into a type if one is given."""
        self.memory_format, self.dtype = memory_format, dtype
        self.model.to(memory_format=memory_format)
        if dtype is not None:
            self.model.to(dtype)
        return self

    def compile_model(self, mode: bool | Literal["graphs"]) -> None:
        """Compile the model in place as one graph; its names and weights stay as they are."""
        if mode:
            from torch._functorch import config

            # The audit of the first batch goes backward once for each loss term.
            config.donated_buffer = False
            self.model.compile(mode="reduce-overhead" if mode == "graphs" else None)

    def facts(self) -> dict[str, Any]:
        """What lies beside the weights as JSON so that the model can be built again."""
        fed: Any = self.input
        kind = {"kind": fed.kind} if hasattr(fed, "kind") else {}
        return {
            "model": self.name,
            "classes": list(self.classes),
            "input": None if fed is None else {**kind, **asdict(fed)},
        }
