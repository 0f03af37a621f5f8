"""What a page is made of: sections, and figures drawn as SVG that follows the reader's colours."""

from __future__ import annotations

import base64
import io
import re
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from numpy.typing import NDArray
    from PIL.Image import Image as Pixels

# Matplotlib knows no CSS variables: it draws in these colours, and each becomes a variable that
# the page sets once for light and once for dark.
INK, TEACHER, BASELINE, STUDENT, OTHER = "#000001", "#000002", "#000003", "#000004", "#000005"
MORE, LESS = STUDENT, BASELINE
_VARIABLES = {
    INK: "currentColor",
    TEACHER: "var(--teacher)",
    BASELINE: "var(--baseline)",
    STUDENT: "var(--student)",
    OTHER: "var(--other)",
}
COLOURS = {"teacher": TEACHER, "baseline": BASELINE, "student": STUDENT}
MARKERS = {"teacher": "s", "baseline": "o", "student": "D"}

# Any: the names of settings are literals in the types of some releases of Matplotlib only.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "limbeck",
    "text.parse_math": False,  # a class may be called $x$
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}


@dataclass(frozen=True)
class Panel:
    """One drawing; ``label`` says to someone who cannot see it what it shows.

    It is at most ``widest`` and at least ``narrowest`` CSS pixels wide: between these its text can
    be read and is no larger than the page's.
    """

    svg: Markup
    label: str
    widest: int
    narrowest: int


@dataclass(frozen=True)
class Figure:
    """Panels side by side under one caption that says how to read them."""

    panels: list[Panel]
    caption: str


@dataclass(frozen=True)
class Picture:
    """An image with what is said about it, in pairs such as ``("true", "cat")``."""

    source: str
    alt: str
    lines: list[tuple[str, str]]
    small: bool


@dataclass(frozen=True)
class Gallery:
    """Images under a heading, as large as they are or as thumbnails."""

    title: str
    pictures: list[Picture]
    caption: str
    large: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page, under a heading; ``table`` has rows of cells, the headings first.

    ``prose`` says that the cells are sentences.
    """

    anchor: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)
    table: Sequence[Sequence[str]] = ()
    note: str = ""
    prose: bool = False


def panel(
    name: str, label: str, draw: Callable[[Axes], None], size: tuple[float, float] = (3.7, 2.55)
) -> Panel:
    """Draw one panel.

    Args:
        name: unique on its page; the SVG's identifiers begin with it.
        label: what the panel shows, for those who cannot see it.
        draw: puts everything onto the axes.
        size: width and height in inches, at which the text has the size that Matplotlib sets.
    """
    import matplotlib
    from matplotlib.figure import Figure as Drawing

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The reader's own font draws the text, so glyphs that Matplotlib's lacks do not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        drawing = Drawing(figsize=size, layout="constrained")
        draw(drawing.subplots())
        file = io.StringIO()
        drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Panel(_inline(file.getvalue(), name), label, round(106 * size[0]), round(74 * size[0]))


_NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
"""What XML cannot hold."""


def _inline(svg: str, name: str) -> Markup:
    """An SVG file as an element for HTML; going through the parser escapes all its text."""
    root = ET.fromstring(_NO_TEXT.sub("\ufffd", svg))
    for parent in root.iter():
        for child in list(parent):
            # Its style sheet would reach the whole page; its metadata names outside addresses.
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(k): _value(_local(k), v, name) for k, v in element.items()}
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("aria-hidden", "true")
    root.set("focusable", "false")
    # A string as Markup is trusted: all of it was written by the serialiser just now.
    return Markup(ET.tostring(root, encoding="unicode", short_empty_elements=False))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _value(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    if key == "style":
        value = re.sub(
            r"font: (?:(bold|[1-9]00) )?([\d.]+px)[^;]*",
            lambda m: f"font-size: {m[2]}" + ("; font-weight: 600" if m[1] else ""),
            value,
        )
    for colour, variable in _VARIABLES.items():
        value = value.replace(colour, variable)
    return value


def embedded(image: Pixels | NDArray[np.uint8], format: Literal["PNG", "JPEG"] = "PNG") -> str:
    """An image, or its pixels (H, W) or (H, W, 3), as the page holds it: a data address."""
    from PIL import Image

    file = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(file, format=format, optimize=True, quality=85)
    content = base64.b64encode(file.getvalue()).decode("ascii")
    return f"data:image/{format.lower()};base64,{content}"


def plain(text: object, longest: int = 24) -> str:
    """Text that an SVG can hold, cut to a length that fits beside an axis.

    >>> plain("a" * 30, 5), plain("tab\\there")
    ('aaaa…', 'tab here')
    """
    # Control characters and lone surrogates are not allowed in XML, even escaped.
    kept = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Cn") else c for c in str(text))
    return kept if len(kept) <= longest else kept[: longest - 1] + "…"


def capital(text: str) -> str:
    """Text as it begins a sentence; a first word with capitals of its own keeps them.

    >>> capital("mean IoU"), capital("mAP@0.5")
    ('Mean IoU', 'mAP@0.5')
    """
    first = text.partition(" ")[0]
    return text[:1].upper() + text[1:] if first == first.lower() else text


def short(number: float) -> str:
    """A number for an axis.

    >>> short(1_500_000), short(20_000), short(0.25)
    ('1.5M', '20k', '0.25')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.4g}"


def logarithmic(axes: Axes, name: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with plain numbers: powers need the formulas that are off."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis: Axis
    if name == "x":
        axes.set_xscale("log")
        axis = axes.xaxis
    else:
        axes.set_yscale("log")
        axis = axes.yaxis
    axes.autoscale_view()
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,), numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda number, _: short(number)))


def grid(axes: Axes, axis: str = "y") -> None:
    """Faint lines to read values by."""
    axes.grid(axis="x" if axis == "x" else "y", color=INK, alpha=0.12, linewidth=0.6)


def spread(values: list[float], gap: float) -> list[float]:
    """Positions as near to ``values`` as may be, in the same order, at least ``gap`` apart.

    >>> spread([0.0, 1.0], 0.5)
    [0.0, 1.0]
    >>> spread([0.5, 0.5], 0.25)
    [0.375, 0.625]
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    # Neighbours that collide merge into a block, centred on the mean of what its members want.
    blocks: list[list[int]] = []

    def low(block: list[int]) -> float:
        centre = sum(values[i] for i in block) / len(block)
        return centre - gap * (len(block) - 1) / 2

    for index in order:
        blocks.append([index])
        while len(blocks) > 1 and low(blocks[-1]) < low(blocks[-2]) + gap * len(blocks[-2]) - 1e-12:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    found = list(values)
    for block in blocks:
        for number, index in enumerate(block):
            found[index] = low(block) + gap * number
    return found


@dataclass(frozen=True)
class Point:
    """A point of a :func:`scatter`, with its colour and marker."""

    x: float
    y: float
    colour: str
    marker: str


def scatter(points: Mapping[str, Point], heading: str, metric: str) -> Callable[[Axes], None]:
    """What draws named points, ``metric`` over ``heading``; see :func:`panel`."""

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        for p in points.values():
            axes.plot(p.x, p.y, p.marker, color=p.colour, markersize=8, alpha=0.9)
        axes.margins(0.22)
        widths = [p.x for p in points.values()]
        if min(widths) > 0 and max(widths) > 10 * min(widths):
            logarithmic(axes, "x")
        else:
            if min(widths) >= 0:
                axes.set_xlim(0, 1.15 * max(widths) or 1)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(heading)
        axes.set_ylabel(plain(metric))
        grid(axes)
        _label_points(axes, points)

    return draw


def _label_points(axes: Axes, points: Mapping[str, Point]) -> None:
    """Names beside the points, towards the middle, moved apart where they would overlap."""
    axes.autoscale_view()  # what is not drawn yet has no places yet
    inside = axes.transData + axes.transAxes.inverted()
    places = {name: inside.transform((p.x, p.y)) for name, p in points.items()}
    for left in (True, False):
        side = [name for name in places if (places[name][0] < 0.5) == left]
        heights = spread([float(places[name][1]) for name in side], 0.1)
        for name, height in zip(side, heights, strict=True):
            axes.annotate(
                plain(name),
                (float(places[name][0]) + (0.04 if left else -0.04), height),
                xycoords="axes fraction",
                ha="left" if left else "right",
                va="center",
                color=points[name].colour,
                fontweight="bold",
            )


def frontier(
    points: Sequence[tuple[float, float]], higher_is_better: bool = True
) -> list[tuple[float, float]]:
    """The points that no other beats in both, by rising cost x.

    >>> frontier([(1, 0.5), (2, 0.4), (3, 0.7)])
    [(1, 0.5), (3, 0.7)]
    """
    sign = 1 if higher_is_better else -1
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -sign * p[1])):
        if not best or sign * y > sign * best[-1][1]:
            best.append((x, y))
    return best
