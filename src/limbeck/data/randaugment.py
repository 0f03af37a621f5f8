"""RandAugment in batches (Cubuk et al. 2020, arXiv 1909.13719).

Every image gets operations drawn from a list, all at one strength. The 14 operations and the 31
strengths are those of the paper as ``torchvision.transforms.RandAugment`` has them: nearest
neighbours and black where an image is moved. Images that drew the same go through torchvision
together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Operation = Callable[[Tensor], Tensor]


def rand_augment(pixels: Tensor, draws: Tensor, magnitude: int) -> Tensor:
    """Apply to each image the operations that it drew, one after the other.

    Args:
        pixels: uint8 of shape (B, C, H, W), C is 1 or 3.
        draws: float64 of shape (B, operations an image) in [0, 1): which operation, and which of
            its two directions if it has them.
        magnitude: the strength, 0 to 30.

    Returns:
        uint8 of shape (B, C, H, W); what becomes of an image depends on its own draws only.
    """
    operations = _operations(magnitude, *pixels.shape[2:])
    every = [directed for directions in operations for directed in directions]
    counts = torch.tensor([len(directions) for directions in operations])
    first = counts.cumsum(0) - counts
    for draw in (draws.cpu() * len(operations)).T:
        drawn = draw.long()
        chosen = first[drawn] + ((draw - drawn) * counts[drawn]).long()
        changed = torch.empty_like(pixels)
        for number in chosen.unique().tolist():
            members = (chosen == number).nonzero().flatten().to(pixels.device)
            changed[members] = every[number](pixels[members])
        pixels = changed
    return pixels


def _operations(magnitude: int, height: int, width: int) -> list[tuple[Operation, ...]]:
    """The operations at a strength; those with a sign in both directions."""
    # Only when there is something to do, as torchvision takes long to import.
    import torchvision.transforms.v2.functional as tv

    def level(least: float, most: float) -> float:
        return float(torch.linspace(least, most, 31)[magnitude])

    def signed(
        operation: Callable[[Tensor, float], Tensor], most: float
    ) -> tuple[Operation, Operation]:
        by = level(0.0, most)
        return (lambda images: operation(images, by)), (lambda images: operation(images, -by))

    move = partial(tv.affine, angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, 0.0])
    shear = partial(move, center=[0.0, 0.0])
    bits = 8 - round(4 * magnitude / 30)
    threshold = 255 * level(1.0, 0.0)
    return [
        (lambda images: images,),
        signed(lambda images, by: shear(images, shear=[math.degrees(math.atan(by)), 0.0]), 0.3),
        signed(lambda images, by: shear(images, shear=[0.0, math.degrees(math.atan(by))]), 0.3),
        signed(lambda images, by: move(images, translate=[int(by), 0]), 150 / 331 * width),
        signed(lambda images, by: move(images, translate=[0, int(by)]), 150 / 331 * height),
        signed(tv.rotate, 30.0),
        signed(lambda images, by: tv.adjust_brightness(images, 1 + by), 0.9),
        signed(lambda images, by: tv.adjust_saturation(images, 1 + by), 0.9),
        signed(lambda images, by: tv.adjust_contrast(images, 1 + by), 0.9),
        signed(lambda images, by: tv.adjust_sharpness(images, 1 + by), 0.9),
        (lambda images: tv.posterize(images, bits),),
        (lambda images: tv.solarize(images, threshold),),
        (tv.autocontrast,),
        (tv.equalize,),
    ]
