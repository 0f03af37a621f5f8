"""The parts of the report that only tables have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from limbeck.files import regular
from limbeck.report import classification
from limbeck.report.figures import COLOURS, OTHER, Figure, Section, grid, panel, plain
from limbeck.report.table import names, roles
from limbeck.training.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = dict[str, NDArray[np.float32]]


def sections(run: Run) -> list[Section]:
    """How the networks' answers go with single columns, then calibration and confusions."""
    return [*_curves(run), *classification.sections(run)]


def _curves(run: Run) -> list[Section]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(regular(run.path / "curves.safetensors"), framework="numpy") as file:
            keys = file.keys()  # the file itself cannot be iterated over
            tensors = {key: file.get_tensor(key) for key in keys}
            columns = [
                c.split("\t") for c in (file.metadata() or {}).get("columns", "").split("\n")
            ]
    except (OSError, SafetensorError):
        return []
    result = run.result()
    called = names(result)
    there = [role for role in roles(result) if f"curve.{role}" in tensors]
    if not there or "places" not in tensors:
        return []
    panels = []
    for number, (column, kind) in enumerate(columns):
        lines = {role: tensors[f"curve.{role}"][number] for role in there}
        title = f"{plain(column, 24)}: {plain(kind, 12)}"
        said = ", ".join(f"{called[r]} {y[0]:.2f} to {y[-1]:.2f}" for r, y in lines.items())
        draw = _draw(tensors["places"][number], lines, called, title, legend=number == 0)
        panels.append(panel(f"curve{number}", f"Probability of {kind} over {column}: {said}", draw))
    caption = (
        "Mean probability of a class where one column takes the value below and all other cells "
        "stay as they are in test rows; the columns that move the first network most."
    )
    return [Section("curves-of-columns", "What the answers go by", [Figure(panels, caption)])]


def _draw(
    places: NDArray[np.float32], lines: Lines, called: dict[str, Any], title: str, legend: bool
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for role, line in lines.items():
            axes.plot(places, line, color=COLOURS.get(role, OTHER), label=plain(called[role], 24))
        axes.set_ylim(-0.02, 1.02)
        axes.set_title(title)
        axes.set_ylabel("probability")
        axes.margins(x=0.02)
        grid(axes)
        if legend:
            axes.legend(fontsize=6.5, frameon=False)

    return draw
