"""The parts of the report that only tasks with a class for every pixel have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from limbeck.files import regular
from limbeck.report.figures import Figure, Gallery, Picture, Section, embedded, panel, plain
from limbeck.report.table import names, roles
from limbeck.training.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLANK = (96, 96, 96)
"""The colour of pixels without a class."""
_WIDE = 300
"""Small scenes are enlarged by whole numbers up to so many pixels a sheet."""


def sections(run: Run) -> list[Section]:
    """Intersection over union by class, and predicted masks beside the true ones."""
    return [*_classes(run.result()), *_masks(run)]


def palette(classes: list[str]) -> NDArray[np.uint8]:
    """A colour for each class, (C, 3): black for a background, apart in hue and light otherwise.

    >>> palette(["background", "left 1"])[0].tolist()
    [0, 0, 0]
    """
    from matplotlib import colormaps

    found = np.array([colormaps["tab20"](i % 20)[:3] for i in _spread(len(classes))]) * 255
    if classes[0] == "background":
        found[0] = 0
    return found.round().astype(np.uint8)


def _spread(number: int) -> list[int]:
    """Numbers of colours: the ten strong ones first, then the ten pale ones."""
    return [2 * (i % 10) + (i // 10) % 2 for i in range(number)]


def _classes(result: Mapping[str, Any]) -> list[Section]:
    found, called = result.get("class_iou") or {}, names(result)
    there = [role for role in roles(result) if role in found]
    if not there:
        return []
    lines = [
        [plain(name, 32), *(_value(found[role].get(name)) for role in there)]
        for name in found[there[0]]
    ]
    note = "Intersection over union of each class on the test data, of the first seed."
    headings = ["class", *(called[role] for role in there)]
    return [Section("class-iou", "Class by class", table=[headings, *lines], note=note)]


def _value(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _masks(run: Run) -> list[Section]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(regular(run.path / "predictions.safetensors"), framework="numpy") as file:
            keys = file.keys()  # the file itself cannot be iterated over
            tensors = {key: file.get_tensor(key) for key in keys}
            classes = (file.metadata() or {}).get("classes", "").split("\n")
    except (OSError, SafetensorError):
        return []
    result = run.result()
    called = names(result)
    there = [role for role in roles(result) if f"masks.{role}" in tensors]
    if not there or "images" not in tensors or "labels" not in tensors:
        return []
    colours = palette(classes)
    said = ["image", "true", *(called[role] for role in there)]
    reading = "From left to right, row by row: " + ", ".join(said)
    pictures = []
    for number, image in enumerate(tensors["images"].transpose(0, 2, 3, 1)):
        masks = [tensors["labels"][number], *(tensors[f"masks.{role}"][number] for role in there)]
        tiles = [image, *(_coloured(mask, colours) for mask in masks)]
        pictures.append(
            Picture(
                source=embedded(_tiled(tiles)),
                alt=f"Test scene {number + 1}. {reading}",
                lines=[("", f"test scene {number + 1}")],
                small=True,
            )
        )
    gallery = Gallery("", pictures, f"{reading}.", large=True)
    return [Section("masks", "Masks", [_legend(classes, colours)], [gallery])]


def _coloured(mask: NDArray[np.uint8], colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    table = np.full((256, 3), BLANK, np.uint8)
    table[: len(colours)] = colours[:256]
    found: NDArray[np.uint8] = table[mask]
    return found


def _tiled(tiles: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Images (H, W, 3) of one size, two in a row, with a white line between them."""
    height, width, _ = tiles[0].shape
    lines = -(-len(tiles) // 2)
    sheet = np.full((lines * (height + 2) - 2, 2 * width + 2, 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // 2 * (height + 2), number % 2 * (width + 2)
        sheet[top : top + height, left : left + width] = tile
    times = max(1, _WIDE // sheet.shape[1])
    return sheet.repeat(times, 0).repeat(times, 1)


def _legend(classes: list[str], colours: NDArray[np.uint8]) -> Figure:
    columns = min(6, len(classes))
    lines = -(-len(classes) // columns)

    def draw(axes: Axes) -> None:
        for number, (name, colour) in enumerate(zip(classes, colours, strict=True)):
            row, column = divmod(number, columns)
            axes.scatter([column], [-row], s=110, marker="s", color=[colour / 255])
            axes.annotate(plain(name, 14), (column + 0.13, -row), va="center")
        axes.set_xlim(-0.2, columns)
        axes.set_ylim(0.6 - lines, 0.6)
        axes.set_axis_off()

    label = "The colours of the classes: " + ", ".join(classes)
    return Figure([panel("classes", label, draw, (7.2, 0.15 + 0.28 * lines))], "")
