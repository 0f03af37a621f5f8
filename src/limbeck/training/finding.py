"""What a method found out beside the metric: numbers, curves and pictures for the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis.

    ``lines`` holds points (x, y) by the lines' names; a name ``teacher``, ``baseline`` or
    ``student`` has that role's colour. The points of those named in ``dots`` are not joined.
    ``bands`` holds points (x, low, high) by the name of a line around which they lie, such as the
    interval of a mean.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    dots: Sequence[str] = ()
    bands: Mapping[str, Sequence[tuple[float, float, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One part of the report that only one method has.

    Args:
        title: its heading.
        caption: how to read it.
        table: rows of cells, the headings first.
        charts: drawn side by side.
        pictures: uint8 of shape (H, W) or (H, W, 3), by what is said below them.

    >>> import torch
    >>> found = Finding("Filters", "One unit each.", pictures={"unit 1": torch.zeros(2, 2).byte()})
    >>> found.as_json()["pictures"]["unit 1"][:22]
    'data:image/png;base64,'
    """

    title: str
    caption: str
    table: Sequence[Sequence[str]] = ()
    charts: Sequence[Chart] = ()
    pictures: Mapping[str, Tensor] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The finding as plain values; pictures as PNG in data addresses."""
        pictures = {name: _png(pixels) for name, pixels in self.pictures.items()}
        return {
            "title": self.title,
            "caption": self.caption,
            "table": [list(row) for row in self.table],
            "charts": [asdict(chart) for chart in self.charts],
            "pictures": pictures,
        }


def _png(pixels: Tensor) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.cpu().contiguous().numpy()).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
