"""Lanes as the TuSimple challenge of 2017 writes them, and masks that are drawn from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from limbeck import plain
from limbeck.data.faults import tolerated
from limbeck.data.images import decode, decode_all
from limbeck.data.masks import resized
from limbeck.data.scenes import Lanes, Pools
from limbeck.errors import UserError
from limbeck.files import regular

WIDTH = 16 / 1280
"""How wide a lane is drawn, as a share of the image's width."""
_LOWEST = 8
"""So many of a lane's lowest points say where it leaves the image."""


def lane_classes(number: int) -> tuple[str, ...]:
    """What the masks' values stand for, the background first.

    >>> lane_classes(4)
    ('background', 'left 2', 'left 1', 'right 1', 'right 2')
    """
    left = [f"left {n}" for n in range(number // 2, 0, -1)]
    return ("background", *left, *(f"right {n}" for n in range(1, number // 2 + 1)))


def places(lanes: Lanes, number: int) -> list[int]:
    """Which of ``number`` lanes, 1 to ``number`` from the left, each is; 0 for none of them.

    Counted from the middle of the image's lower edge, half of them to either side, so that a
    place means the same in every image. A lane has two points or more.

    >>> rows = torch.tensor([300, 700])
    >>> found = torch.tensor([[500, 100], [600, 560], [660, 900], [-2, -2]])
    >>> places(Lanes(found, rows, (720, 1280)), 4)
    [1, 2, 3, 0]
    """
    height, width = lanes.size
    ends = {}
    for index, x in enumerate(lanes.x):
        there = x >= 0
        if int(there.sum()) >= 2:
            xs, ys = x[there][-_LOWEST:].double(), lanes.rows[there][-_LOWEST:].double()
            slope = ((ys - ys.mean()) * (xs - xs.mean())).sum() / (ys - ys.mean()).square().sum()
            ends[index] = float(xs.mean() + slope * (height - 1 - ys.mean())) - width / 2
    found, half = [0] * len(lanes.x), number // 2
    left = sorted((i for i in ends if ends[i] < 0), key=lambda i: -ends[i])
    right = sorted((i for i in ends if ends[i] >= 0), key=lambda i: ends[i])
    for order, step, first in ((left, -1, half), (right, 1, half + 1)):
        for place, index in enumerate(order[:half]):
            found[index] = first + step * place
    return found


def drawn(lanes: Lanes, number: int, size: tuple[int, int]) -> Tensor:
    """The mask of one image's lanes, uint8 (H, W): 0 is background, then :func:`places`."""
    (height, width), (rows, columns) = lanes.size, size
    image = Image.new("L", (columns, rows))
    pen = ImageDraw.Draw(image)
    for x, place in zip(lanes.x, places(lanes, number), strict=True):
        if place:
            there = x >= 0
            xs = (x[there].double() + 0.5) * columns / width - 0.5
            ys = (lanes.rows[there].double() + 0.5) * rows / height - 0.5
            line = list(zip(xs.tolist(), ys.tolist(), strict=True))
            pen.line(line, fill=place, width=max(1, round(WIDTH * columns)), joint="curve")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(rows, columns)


def read_tusimple(root: Path, size: tuple[int, int], number: int) -> Pools:
    """Read frames and lanes: ``label_data*.json`` for training, ``test_label*.json`` for testing.

    Args:
        root: the folder with the label files and the frames that they name.
        size: height and width that frames are brought to.
        number: how many lanes there may be, an even number; see :func:`places`.

    Raises:
        UserError: no label files, a line that is no label, or frames that are missing; the
            sentence names file and line.
    """
    if not root.is_dir():
        raise UserError(f"the data path {root} is no folder; wanted is one with label_data*.json")
    labels = {
        split: [entry for path in sorted(root.glob(pattern)) for entry in _labels(root, path)]
        for split, pattern in (("train", "label_data*.json"), ("test", "test_label*.json"))
    }
    if not labels["train"]:
        raise UserError(f"{root} holds no lanes in a label_data*.json, as TuSimple has them")
    parts, every = {}, []
    for split, entries in labels.items():
        if entries:
            parts[split], lanes = _frames(entries, size, number)
            every += lanes
    return Pools.of(parts, lane_classes(number), every)


def _labels(root: Path, path: Path) -> list[tuple[Path, Tensor, Tensor]]:
    """Frame, columns and rows of each line of a label file."""
    found = []
    try:
        lines = regular(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            with tolerated():
                found.append(_label(root, line, f"line {number} of {path}"))
    return found


def _label(root: Path, line: str, where: str) -> tuple[Path, Tensor, Tensor]:
    """Frame, columns and rows of a line."""
    try:
        entry: Any = plain.parse_json(line)
        rows = torch.tensor(entry["h_samples"], dtype=torch.int64)
        x = torch.tensor(entry["lanes"], dtype=torch.float64).view(-1, len(rows))
        frame = root / str(entry["raw_file"])
        if not x.isfinite().all():
            raise ValueError
    except (ValueError, KeyError, TypeError, RuntimeError):
        raise UserError(
            f"{where} is no label: wanted is a JSON object with h_samples, lanes (a column for "
            "each of these rows) and raw_file"
        ) from None
    if not frame.is_file():
        raise UserError(f"the frame {frame}, which {where} names, does not exist")
    if not frame.resolve().is_relative_to(root.resolve()):
        raise UserError(f"the frame {frame}, which {where} names, lies outside {root}")
    return frame, x, rows


def _frames(
    entries: list[tuple[Path, Tensor, Tensor]], size: tuple[int, int], number: int
) -> tuple[tuple[Tensor, Tensor], list[Lanes]]:
    shapes: list[tuple[int, int]] = [(0, 0)] * len(entries)

    def read(index: int) -> Tensor:
        path = entries[index][0]
        pixels = decode(path, 3, None, str(path))
        shapes[index] = (pixels.shape[1], pixels.shape[2])
        return resized(pixels, size)

    pixels = decode_all(len(entries), read)
    lanes = [Lanes(x, rows, shape) for (_, x, rows), shape in zip(entries, shapes, strict=True)]
    return (pixels, torch.stack([drawn(one, number, size) for one in lanes])), lanes
