"""Scenes that need no download: digits on photographs, and roads with lanes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from limbeck.data.scenes import Lanes, Pools
from limbeck.data.sources import load
from limbeck.data.tusimple import drawn, lane_classes

Array = NDArray[Any]
FRAME = (720, 1280)
"""Height and width in which the lanes of generated roads are told, as TuSimple's are."""
ROWS = torch.arange(240, 720, 10)


def digit_scenes(size: tuple[int, int], train: int = 600, test: int = 150) -> Pools:
    """One to three light handwritten digits of various sizes on pieces of photographs.

    Classes are ``background`` and the digits; the test scenes show digits that no training scene
    does. Digits, photographs and their pieces are scikit-learn's.
    """
    digits = load("digits", validation=0)
    chance = np.random.default_rng(0)
    parts = {}
    for name, split, number in (("train", digits.train, train), ("test", digits.test, test)):
        assert split.labels is not None
        pixels = np.stack([split.images.read(int(r))[0].numpy() for r in split.rows]) / 255
        labels = split.labels.numpy()
        scenes = [_digits(pixels, labels, size, chance) for _ in range(number)]
        parts[name] = (
            torch.from_numpy(np.stack([image for image, _ in scenes])),
            torch.from_numpy(np.stack([mask for _, mask in scenes])),
        )
    return Pools.of(parts, ("background", *digits.classes))


def _digits(
    pixels: Array, labels: Array, size: tuple[int, int], chance: np.random.Generator
) -> tuple[Array, Array]:
    """One scene, uint8 (3, H, W), with its mask, uint8 (H, W)."""
    image = 0.5 * _piece(size, chance)
    mask = np.zeros(size, np.uint8)
    small = min(size)
    for _ in range(int(chance.integers(1, 4))):
        which = int(chance.integers(len(labels)))
        side = int(chance.integers(small // 2, 3 * small // 4))
        ink = _enlarged(pixels[which], side)
        top, left = (int(chance.integers(0, extent - side + 1)) for extent in size)
        inside = (slice(top, top + side), slice(left, left + side))
        colour = chance.uniform(150, 255, 3)
        part = image[:, inside[0], inside[1]]
        part += ink * (colour[:, None, None] - part)
        mask[inside][ink > 0.4] = labels[which] + 1
    image += chance.normal(0, 6, image.shape)
    return image.round().clip(0, 255).astype(np.uint8), mask


def _enlarged(digit: Array, side: int) -> Array:
    tensor = torch.from_numpy(digit)[None, None].float()
    large = torch.nn.functional.interpolate(tensor, (side, side), mode="bilinear")
    return large[0, 0].double().numpy()


@cache
def _photographs() -> list[Array]:
    from sklearn.datasets import load_sample_images

    return [image.transpose(2, 0, 1) for image in load_sample_images().images]


def _piece(size: tuple[int, int], chance: np.random.Generator) -> Array:
    """A piece of a photograph, float (3, H, W) in 0..255."""
    photographs = _photographs()
    photograph = photographs[int(chance.integers(len(photographs)))]
    _, height, width = photograph.shape
    step = max(1, min(height // size[0], width // size[1], int(chance.integers(1, 4))))
    rows, columns = min(size[0] * step, height), min(size[1] * step, width)
    top = int(chance.integers(0, height - rows + 1))
    left = int(chance.integers(0, width - columns + 1))
    ys = top + np.arange(size[0]) * step % rows
    xs = left + np.arange(size[1]) * step % columns
    return photograph[:, ys][:, :, xs].astype(np.float64)


def roads(size: tuple[int, int], number: int, train: int = 600, test: int = 150) -> Pools:
    """Roads in perspective with up to four lanes' lines, straight or bent, some hidden by cars.

    Args:
        size: height and width of the images; lanes are told in pixels of :data:`FRAME`.
        number: how many lanes a mask may show, an even number.
    """
    chance = np.random.default_rng(0)
    parts, every = {}, []
    for name, count in (("train", train), ("test", test)):
        scenes = [_road(size, chance) for _ in range(count)]
        lanes = [found for _, found in scenes]
        masks = torch.stack([drawn(found, number, size) for found in lanes])
        parts[name] = (torch.from_numpy(np.stack([image for image, _ in scenes])), masks)
        every += lanes
    return Pools.of(parts, lane_classes(number), every)


def _road(size: tuple[int, int], chance: np.random.Generator) -> tuple[Array, Lanes]:
    """One road, uint8 (3, H, W), with its lanes."""
    height, width = FRAME
    horizon, vanishing = chance.uniform(200, 300), width / 2 + chance.uniform(-120, 120)
    bend, shift = chance.uniform(-260, 260), chance.uniform(-0.25, 0.25)
    wide = chance.uniform(560, 760)

    def nearness(y: Array) -> Array:
        """0 at the horizon, 1 at the lower edge."""
        return ((y - horizon) / (height - horizon)).clip(0, 1)

    def column(y: Array, offset: float) -> Array:
        near = nearness(y)
        return vanishing + bend * (1 - near) ** 2 + wide * (offset + shift) * near

    y = (np.arange(size[0])[:, None] + 0.5) * height / size[0]
    x = (np.arange(size[1])[None, :] + 0.5) * width / size[1]
    near = nearness(y)
    image = _piece(size, chance) * chance.uniform(0.6, 1.1)
    ground, asphalt = chance.uniform(60, 140, 3), np.full(3, chance.uniform(70, 130))
    below = y >= horizon
    surface = below & (np.abs(x - column(y, 0)) < 1.9 * wide * near)
    image = np.where(below, 0.3 * image + 0.7 * ground[:, None, None], image)
    image = np.where(surface, asphalt[:, None, None], image)
    offsets = [
        o
        for o, often in ((-1.5, 0.7), (-0.5, 0.95), (0.5, 0.95), (1.5, 0.7))
        if chance.random() < often
    ]
    for offset in offsets:
        paint = np.array([1, 1, chance.choice([1.0, 0.5])]) * chance.uniform(150, 245)
        line = below & (np.abs(x - column(y, offset)) < 1 + 11 * near)
        if chance.random() < 0.6:  # dashes are as long on the road, so they shorten with distance
            phase = 2.2 / np.maximum(near, 0.05) + chance.uniform(0, 1)
            line = line & (phase % 1 < 0.55)
        image = np.where(line, paint[:, None, None], image)
    for _ in range(int(chance.integers(0, 3))):
        _car(image, x, y, column, horizon, wide, chance)
    image = image * chance.uniform(0.7, 1.15) + chance.normal(0, 9, image.shape)
    rows = ROWS.numpy().astype(np.float64)
    xs = np.stack([column(rows, offset) for offset in offsets] or [np.zeros((0, len(rows)))])
    seen = (nearness(rows) > 0.06) & (xs >= 0) & (xs < width)
    lanes = torch.from_numpy(np.where(seen, xs.round(), -2)).view(-1, len(ROWS))
    return image.round().clip(0, 255).astype(np.uint8), Lanes(lanes, ROWS, FRAME)


def _car(
    image: Array, x: Array, y: Array, column: Any, horizon: float, wide: float, chance: Any
) -> None:
    """Put a box with dark windows onto the road."""
    near = chance.uniform(0.12, 0.7)
    foot = horizon + near * (FRAME[0] - horizon)
    middle = float(column(np.array(foot), float(chance.choice([-1, 0, 1]))))
    half, tall = 0.3 * wide * near, 0.45 * wide * near
    box = (np.abs(x - middle) < half) & (y < foot) & (y > foot - tall)
    window = box & (y < foot - 0.55 * tall) & (np.abs(x - middle) < 0.8 * half)
    image[:, box] = chance.uniform(20, 220, 3)[:, None]
    image[:, window] = 30
