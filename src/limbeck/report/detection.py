"""The parts of the report that only detection has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.files import regular
from limbeck.report.figures import Gallery, Picture, Section, embedded, plain
from limbeck.report.table import ROLES, names, roles
from limbeck.training.run import Run

SURE = 0.3
"""Boxes of at least this score are drawn."""
NAMED = 8
"""Where there are more boxes than this, their classes are told by colour alone."""
COLOURS = {
    "blue": "#4aa3ff",
    "orange": "#ff9d2e",
    "green": "#4fd67a",
    "pink": "#ff6fb1",
    "yellow": "#ffe04a",
    "violet": "#b990ff",
}
_NARROWEST = 240

Tensors = Mapping[str, NDArray[Any]]


def sections(run: Run) -> list[Section]:
    """How well each network finds each class, and what it finds in some images."""
    result = run.result()
    return [*_by_class(result), *_pictures(run, [*ROLES, *roles(result)], names(result))]


def _by_class(result: Mapping[str, Any]) -> list[Section]:
    found, called = result.get("by_class") or {}, names(result)
    there = [role for role in roles(result) if found.get(role)]
    if not there:
        return []
    lines = [
        [plain(name, 32), *(_value(found[role].get(name)) for role in there)]
        for name in found[there[0]]
    ]
    note = "Average precision of each class on the test data, at an overlap of 0.5."
    if len(result.get("seeds") or ()) > 1:
        note += " Of the first seed."
    headings = ["class", *(called[role] for role in there)]
    return [Section("classes", "Class by class", table=[headings, *lines], note=note)]


def _value(precision: float | None) -> str:
    return "" if precision is None else f"{precision:.4f}"


def _pictures(run: Run, known: list[str], called: Mapping[str, str]) -> list[Section]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(regular(run.path / "detections.safetensors"), framework="numpy") as file:
            keys = file.keys()  # the file itself cannot be iterated over
            tensors = {key: file.get_tensor(key) for key in keys}
            classes = (file.metadata() or {}).get("classes", "").split("\n")
    except (OSError, SafetensorError):
        return []
    shown = [role for role in dict.fromkeys(known) if f"{role}.of" in tensors]
    galleries = []
    for number in range(len(tensors["images"])):
        there = tensors["labels"][number] != 0
        truth = tensors["boxes"][number][there], np.abs(tensors["labels"][number][there])
        pictures = [_picture(tensors, number, "truth", *truth, classes)]
        for role in shown:
            sure = tensors[f"{role}.of"] == number
            sure &= tensors[f"{role}.scores"] >= SURE
            own = tensors[f"{role}.boxes"][sure], tensors[f"{role}.labels"][sure]
            pictures.append(_picture(tensors, number, called[role], *own, classes))
        galleries.append(Gallery("", pictures, "", large=True))
    if not galleries:
        return []
    note = f"Test images with their true boxes, and with what is found at a score of {SURE} or more"
    colours = zip(classes, COLOURS, strict=False)
    note += "; " + ", ".join(f"{plain(name, 32)} {colour}" for name, colour in colours)
    note += " and so on again." if len(classes) > len(COLOURS) else "."
    return [Section("found", "What is found", galleries=galleries, note=note)]


def _picture(
    tensors: Tensors,
    number: int,
    whose: str,
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: list[str],
) -> Picture:
    from PIL import Image, ImageDraw

    image = Image.fromarray(np.ascontiguousarray(tensors["images"][number].transpose(1, 2, 0)))
    scale = max(1, -(-_NARROWEST // image.width))
    image = image.resize((scale * image.width, scale * image.height))
    draw, colours = ImageDraw.Draw(image), list(COLOURS.values())
    for box, label in zip(boxes, labels, strict=True):
        colour = colours[(int(label) - 1) % len(colours)]
        left, top, right, bottom = (scale * float(corner) for corner in box)
        draw.rectangle(
            (left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=2
        )
        if len(boxes) <= NAMED:
            draw.text((left + 3, top + 1), plain(classes[int(label) - 1], 12), fill=colour)
    said = f"{len(boxes)} box{'' if len(boxes) == 1 else 'es'}"
    return Picture(
        source=embedded(image, "JPEG"),
        alt=f"Test image {number + 1}, {whose}: {said}",
        lines=[(whose, said)],
        small=False,
    )
