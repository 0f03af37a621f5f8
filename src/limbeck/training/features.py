"""What losses on feature maps share: maps they must be, and the size at which two of them meet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import UserError


def check_maps(features: Tensor, whose: str, purpose: str) -> None:
    """See to it that features are maps, (B, C, H, W), none of these being 0.

    Raises:
        UserError: they are not; ``purpose`` ends the sentence.
    """
    if features.ndim != 4 or 0 in features.shape:
        raise UserError(
            f"the {whose} features have the shape {tuple(features.shape)}; {purpose} feature maps, "
            "(B, C, H, W)"
        )


def meeting(one: Tensor, other: Tensor) -> tuple[int, int]:
    """The smaller height and the smaller width of two sets of maps, (B, C, H, W)."""
    (a, b), (c, d) = one.shape[2:], other.shape[2:]
    return min(a, c), min(b, d)


def reduced(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, C, H, W) at a smaller size, by adaptive average pooling.

    >>> import torch
    >>> reduced(torch.ones(1, 2, 8, 8), (4, 2)).shape
    torch.Size([1, 2, 4, 2])
    """
    return maps if tuple(maps.shape[2:]) == size else F.adaptive_avg_pool2d(maps, size)
