"""What a vision model wants to be fed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import UserError


@dataclass(frozen=True)
class Input:
    """What a vision model wants to be fed: channels, size in pixels, normalisation.

    ``size`` is (height, width); ``mean`` and ``std`` hold one number a channel, on the scale where
    white is 1.
    """

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

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

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Input:
        """The inverse of ``dataclasses.asdict`` after a round through JSON."""
        return cls(
            channels=int(facts["channels"]),
            size=(int(facts["size"][0]), int(facts["size"][1])),
            mean=tuple(float(x) for x in facts["mean"]),
            std=tuple(float(x) for x in facts["std"]),
        )


def _per_channel(numbers: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
