"""Folders of images with a mask each: PNG files whose pixels are numbers of classes (CamVid)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from limbeck.data.faults import tolerated
from limbeck.data.images import SUFFIXES, decode, decode_all, opened
from limbeck.data.scenes import IGNORE, Pools
from limbeck.errors import UserError

_SPLITS = {"train": "train", "val": "validation", "valid": "validation", "test": "test"}
_WANTED = (
    "wanted are folders train and trainannot with files of the same names (val, test likewise), or "
    "a train.txt with an image and its mask in each line"
)

Pair = tuple[Path, Path]


def read_masks(root: Path, size: tuple[int, int] | None, void: int | None) -> Pools:
    """Read images and masks: ``train.txt`` with a pair a line, or ``train`` beside ``trainannot``.

    ``classes.txt`` names the classes, one a line; without it they are numbered as far as they
    occur.

    Args:
        root: the folder.
        size: height and width that all are brought to; the first image's if not given.
        void: the value of pixels without a class, beside 255; one more than the last class in
            ``classes.txt`` if not given.

    Raises:
        UserError: no such folder or files, masks that are no numbers of classes or of another size
            than their image; the sentence names the file.
    """
    if not root.is_dir():
        raise UserError(f"the data path {root} is no folder; {_WANTED}")
    pairs = {split: found for name, split in _SPLITS.items() if (found := _pairs(root, name))}
    if "train" not in pairs:
        raise UserError(f"{root} holds no training images with masks; {_WANTED}")
    names = root / "classes.txt"
    lines = _lines(names) if names.is_file() else []
    classes = tuple(line.strip() for line in lines if line.strip())
    if void is None and classes:
        void = len(classes)
    if size is None:
        first = pairs["train"][0][0]
        _, *own = decode(first, 3, None, str(first)).shape
        size = own[0], own[1]
    parts = {split: _read(found, size, classes, void) for split, found in pairs.items()}
    if not classes:
        highest = max(int(m[m != IGNORE].max(initial=0)) for _, m in parts.values())
        classes = tuple(str(number) for number in range(highest + 1))
    if len(classes) < 2:
        raise UserError(f"{root} has masks of one class only; two or more are wanted")
    return Pools.of(
        {split: (pixels, torch.from_numpy(masks)) for split, (pixels, masks) in parts.items()},
        classes,
    )


def _pairs(root: Path, name: str) -> list[Pair]:
    """The images and masks of one split; none where it is not there."""
    listed = root / f"{name}.txt"
    if listed.is_file():
        return [
            _pair(root, listed, number, line)
            for number, line in enumerate(_lines(listed), 1)
            if line.strip()
        ]
    images, masks = root / name, root / f"{name}annot"
    if not images.is_dir() or not masks.is_dir():
        return []
    found = sorted(p for p in images.iterdir() if p.suffix.lower() in SUFFIXES)
    pairs = [(path, masks / f"{path.stem}.png") for path in found]
    for path, mask in pairs:
        with tolerated():
            if not mask.is_file():
                raise UserError(f"{path} has no mask {mask}")
    return [(path, mask) for path, mask in pairs if mask.is_file()]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="backslashreplace").splitlines()


def _pair(root: Path, listed: Path, number: int, line: str) -> Pair:
    words = line.split()
    if len(words) != 2:
        raise UserError(
            f"line {number} of {listed} has {len(words)} words; wanted are an image and its mask"
        )
    # The published lists begin with a folder on their authors' machine.
    paths = [p if p.is_file() else root.joinpath(*p.parts[-2:]) for p in (root / w for w in words)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}, which line {number} of {listed} names, does not exist")
    return paths[0], paths[1]


def _read(
    pairs: list[Pair], size: tuple[int, int], classes: tuple[str, ...], void: int | None
) -> tuple[Tensor, NDArray[np.uint8]]:
    masks = np.empty((len(pairs), *size), dtype=np.uint8)

    def read(index: int) -> Tensor:
        with tolerated():
            return together(index)
        masks[index] = IGNORE
        return torch.zeros(3, *size, dtype=torch.uint8)

    def together(index: int) -> Tensor:
        image, mask = pairs[index]
        pixels = decode(image, 3, None, str(image))
        values = _mask(mask)
        if values.shape != pixels.shape[1:]:
            raise UserError(
                f"the mask {mask} has {values.shape[0]} x {values.shape[1]} pixels, its image "
                f"{pixels.shape[1]} x {pixels.shape[2]}"
            )
        values = np.where(values == void, IGNORE, values) if void is not None else values
        wrong = values[(values >= (len(classes) or IGNORE)) & (values != IGNORE)]
        if len(wrong):
            raise UserError(
                f"the mask {mask} has the value {wrong[0]}, but classes run from 0 to "
                f"{(len(classes) or IGNORE) - 1}; pixels without a class have {IGNORE}, or what "
                "data.void says"
            )
        nearest = Image.fromarray(values.astype(np.uint8)).resize(
            (size[1], size[0]), Image.Resampling.NEAREST
        )
        masks[index] = np.array(nearest)
        return resized(pixels, size)

    return decode_all(len(pairs), read), masks


def _mask(path: Path) -> NDArray[np.int64]:
    try:
        with opened(path, f"the mask {path}") as image:
            mode, values = image.mode, np.array(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"the mask {path} cannot be read as an image: {error}") from None
    if mode not in ("L", "P", "I", "I;16"):
        raise UserError(
            f"the mask {path} is an image in colours ({mode}); wanted is one number a pixel, that "
            "of its class"
        )
    return values.astype(np.int64)


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """An image, uint8 (C, H, W), stretched to a size.

    >>> resized(torch.zeros(3, 4, 4, dtype=torch.uint8), (2, 6)).shape
    torch.Size([3, 2, 6])
    """
    if tuple(pixels.shape[1:]) == size:
        return pixels
    found = F.interpolate(pixels[None].float(), size, mode="bilinear", antialias=True)[0]
    return found.round().clamp(0, 255).to(torch.uint8)
