"""The parts of the report that only one method has, drawn from what it left in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from limbeck.report.figures import (
    COLOURS,
    OTHER,
    Figure,
    Gallery,
    Panel,
    Picture,
    Section,
    grid,
    panel,
    plain,
)
from limbeck.report.table import names
from limbeck.training.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Lines of one colour differ by these.
_DASHES = ("-", "--", ":", "-.")


def sections(run: Run) -> list[Section]:
    """A section for each finding: its table, its charts, its pictures."""
    called = names(run.result())
    return [_section(number, found, called) for number, found in enumerate(run.findings())]


def _section(number: int, found: Mapping[str, Any], called: Mapping[str, str]) -> Section:
    panels = [
        _chart(f"finding{number}-{place}", chart, called)
        for place, chart in enumerate(found["charts"])
    ]
    pictures = [
        Picture(source=source, alt=said, lines=[("", said)], small=True)
        for said, source in found["pictures"].items()
    ]
    # Said once, below whatever comes last.
    caption = found["caption"]
    below_pictures, below_charts = bool(pictures), bool(panels) and not pictures
    return Section(
        anchor=f"finding{number}",
        title=found["title"],
        table=found["table"],
        note="" if below_pictures or below_charts else caption,
        figures=[Figure(panels, caption if below_charts else "")] if panels else [],
        galleries=[Gallery("", pictures, caption, large=True)] if pictures else [],
    )


def _chart(anchor: str, chart: Mapping[str, Any], called: Mapping[str, str]) -> Panel:
    from matplotlib.ticker import MaxNLocator

    said = _legend(chart["lines"], called)

    def draw(axes: Axes) -> None:
        drawn: dict[str, int] = {}
        for name, points in chart["lines"].items():
            colour = COLOURS.get(name.partition(" ")[0], OTHER)
            dashes = _DASHES[drawn.get(colour, 0) % len(_DASHES)]
            drawn[colour] = drawn.get(colour, 0) + 1
            xs, ys = [x for x, _ in points], [y for _, y in points]
            apart = name in chart.get("dots", ())
            mark = "o" if apart or len(points) == 1 else None
            axes.plot(
                xs,
                ys,
                color=colour,
                linestyle="none" if apart else dashes,
                marker=mark,
                markersize=4 if apart else None,
                label=said[name],
            )
            if band := chart.get("bands", {}).get(name):
                at, low, high = zip(*band, strict=True)
                axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(plain(chart["title"], 40))
        axes.set_xlabel(plain(chart["x"]))
        axes.set_ylabel(plain(chart["y"]))
        axes.margins(x=0.02)
        # Rounds and epochs come whole.
        if all(float(x).is_integer() for points in chart["lines"].values() for x, _ in points):
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        grid(axes)
        if len(chart["lines"]) > 1:
            columns = 3 if max(map(len, said.values())) < 12 else 1
            axes.figure.legend(loc="outside upper left", ncols=columns, handlelength=2.6)

    ends = ", ".join(
        f"{said[name]} from {points[0][1]:.4g} to {points[-1][1]:.4g}"
        for name, points in chart["lines"].items()
        if points
    )
    return panel(
        anchor, f"{chart['title']}, {chart['y']} over {chart['x']}: {ends}", draw, (4, 2.9)
    )


def _legend(lines: Mapping[str, Any], called: Mapping[str, str]) -> dict[str, str]:
    """What the lines are called: roles by their names, and left out where all are of the same.

    >>> _legend({"student 15 %": [], "student 50 %": []}, {"student": "with batch norm"})
    {'student 15 %': '15 %', 'student 50 %': '50 %'}
    >>> _legend({"baseline": [], "student 1": []}, {"student": "A", "baseline": "B"})
    {'baseline': 'B', 'student 1': 'A 1'}
    """
    parted = {name: name.partition(" ") for name in lines}
    alone = len({role for role, _, _ in parted.values()}) == 1 < len(parted)
    return {
        name: plain(rest if alone and rest else f"{called.get(role, role)}{space}{rest}", 40)
        for name, (role, space, rest) in parted.items()
    }
