"""The report: one HTML file that holds everything it shows."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.files import regular
from limbeck.report import (
    attributes,
    classification,
    control,
    detection,
    findings,
    generation,
    segmentation,
    tabular,
    text,
    translation,
)
from limbeck.report.figures import (
    COLOURS,
    INK,
    MARKERS,
    OTHER,
    Figure,
    Panel,
    Point,
    Section,
    capital,
    grid,
    logarithmic,
    panel,
    plain,
    scatter,
)
from limbeck.report.table import names, roles, rows
from limbeck.report.verdict import mean_interval
from limbeck.training.checkpoint import write_atomically
from limbeck.training.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SECTIONS: dict[str, Callable[[Run], list[Section]]] = {
    "attributes": attributes.sections,
    "classification": classification.sections,
    "detection": detection.sections,
    "generation": generation.sections,
    "lanes": segmentation.sections,
    "segmentation": segmentation.sections,
    "control": control.sections,
    "sequence": classification.sections,
    "text": text.sections,
    "translation": translation.sections,
    "tabular": tabular.sections,
}

REPORT = "report.html"
_MOST_PANELS, _MOST_POINTS = 24, 300
# Phases that share a colour differ by these.
_DASHES = ("-", "--", ":", "-.")

Line = list[tuple[float, float]]


def write(run: Run) -> Path:
    """Write ``report.html`` into the folder of a finished run.

    Raises:
        UserError: the run is not finished, or its folder cannot be read or written.
    """
    path = run.path / REPORT
    write_atomically(path, render(_content(run)).encode("utf-8", "replace"))
    return path


def render(content: Mapping[str, Any]) -> str:
    """A page from what it says, by the names that its template has."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return templates.get_template("page.html").render(content)


def _content(run: Run) -> dict[str, Any]:
    import yaml

    result, metrics = run.result(), run.metrics()
    headings, lines = rows(result)
    own = SECTIONS.get(result.get("task", ""))
    sections = [
        *_curves(metrics, result),
        *_cost(result),
        *_agreement(result),
        *findings.sections(run),
        *(own(run) if own is not None else []),
    ]
    return {
        "title": f"{result['system']} on {result['data']} · Limbeck",
        "result": {"limbeck": "", **result},
        "facts": _facts(result),
        "verdict": _verdict(result),
        "table": {"headings": headings, "lines": lines, "note": _table_note(result, headings)},
        "sections": sections,
        "audit": _audit(metrics, names(result)),
        "recipe": yaml.safe_dump(run.recipe(), sort_keys=False, allow_unicode=True),
        "environment": _environment(run),
        "folder": run.path.name,
    }


def _facts(result: Mapping[str, Any]) -> list[str]:
    seeds = [str(s["seed"]) for s in result.get("seeds") or ()] or [str(result.get("seed", 0))]
    facts = [f"preset {result['preset']}"] if result.get("preset") else []
    facts.append(f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}")
    seconds = result.get("seconds") or {}
    if seconds.get("total") is not None:
        facts.append(f"{_duration(seconds['total'])} in all")
    for role, name in names(result).items():
        if seconds.get(role) and result.get(role) is not None and result.get("baseline"):
            facts.append(f"{name} {_duration(seconds[role])}")
    return facts


def _duration(seconds: float) -> str:
    """A length of time to be read at a glance.

    >>> _duration(8.24), _duration(95), _duration(3 * 3600 + 120)
    ('8.2 s', '1 min 35 s', '3 h 2 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _verdict(result: Mapping[str, Any]) -> dict[str, str] | None:
    found = result.get("verdict") or {}
    word = found.get("word", "")
    # That a model trained alone was compared with nothing is no news.
    if not found.get("sentence") or (word == "none" and names(result)["student"] == "model"):
        return None
    head, colon, rest = found["sentence"].partition(":")
    if not colon:
        head, rest = found["sentence"], ""
    tone = word if word in ("better", "worse") else "open"
    return {"head": capital(head) + colon, "rest": rest, "tone": tone}


def _table_note(result: Mapping[str, Any], headings: Sequence[str]) -> str:
    better = "higher" if result["metric"].get("higher_is_better", True) else "lower"
    notes = [f"{capital(result['metric']['name'])}: {better} is better"]
    if len(result.get("seeds") or ()) > 1:
        notes[0] += "; ± is half the 95 % interval of the mean over the seeds"
    if "agreement" in headings:
        notes.append("agreement: share of predictions equal to the teacher's")
    if "latency" in headings:
        notes.append("latency: median of one forward pass")
    return "; ".join(notes) + "."


# Training curves.


def _role(phase: str) -> str:
    """The phase without its seed: ``student@3`` is a ``student``."""
    return phase.partition("@")[0]


def _lines(metrics: Iterable[Mapping[str, Any]], kind: str) -> dict[tuple[str, str], list[Line]]:
    """Points (epoch, value) by role and name, one line a phase."""
    by_phase: dict[tuple[str, str, str], Line] = {}
    for entry in metrics:
        for name, value in (entry.get(kind) or {}).items():
            if isinstance(value, int | float) and math.isfinite(value):
                key = (_role(entry["phase"]), name, entry["phase"])
                by_phase.setdefault(key, []).append((entry["epoch"], value))
    found: dict[tuple[str, str], list[Line]] = {}
    for (role, name, _), line in by_phase.items():
        found.setdefault((role, name), []).append(_thinned(line))
    return found


def _thinned(line: Line) -> Line:
    """Means over neighbours, so that a long training does not make a heavy page."""
    stride = math.ceil(len(line) / _MOST_POINTS)
    groups = [line[i : i + stride] for i in range(0, len(line), stride)]
    return [(g[-1][0], sum(value for _, value in g) / len(g)) for g in groups]


def _curves(metrics: list[dict[str, Any]], result: Mapping[str, Any]) -> list[Section]:
    figures, metric, called = [], result["metric"]["name"], names(result)
    seeds = max(1, len(result.get("seeds") or ()))
    validated = {
        called.get(role, role): (role, lines)
        for (role, name), lines in _lines(metrics, "validation").items()
        if name == metric  # a phase may measure something else
    }
    if validated:
        figures.append(_validation(validated, metric, seeds))
    terms = _lines(metrics, "terms")
    panels = [
        _term(number, role, f"{called.get(role, role)}: {name}", lines)
        for number, ((role, name), lines) in enumerate(terms.items())
    ]
    if panels:
        caption = "Loss terms over epochs" + _lines_note(terms.values(), seeds)
        if len(panels) > 1:
            caption += "; one panel a phase and term, each with its own scale"
        if len(panels) > _MOST_PANELS:
            caption += f"; the first {_MOST_PANELS} of {len(panels)}"
        figures.append(Figure(panels[:_MOST_PANELS], caption + "."))
    return [Section("curves", "Training", figures)] if figures else []


def _lines_note(families: Iterable[list[Line]], seeds: int) -> str:
    """What several lines of one colour are: its seeds, or more, as in rounds."""
    most = max((len(lines) for lines in families), default=0)
    if most > seeds:
        return "; one thin line each time a network is trained"
    return "; one thin line a seed" if most > 1 else ""


def _validation(families: Mapping[str, tuple[str, list[Line]]], metric: str, seeds: int) -> Figure:
    def draw(axes: Axes) -> None:
        drawn: Counter[str] = Counter()
        for name, (role, lines) in families.items():
            _draw_lines(axes, role, lines, plain(name), _DASHES[drawn[_colour(role)] % 4])
            drawn[_colour(role)] += 1
        axes.set_xlabel("epoch")
        axes.set_ylabel(plain(metric))
        axes.margins(x=0.02)
        if len(families) > 1:
            legend = axes.figure.legend(
                loc="outside upper left",
                ncols=3 if max(map(len, families)) < 18 else 2,
                handlelength=2.6 if len(set(drawn)) < len(families) else 1.2,
                columnspacing=1.2,
            )
            for handle in legend.get_lines():
                handle.set(linewidth=1.8, alpha=1)

    ends = ", ".join(
        f"{name} ends at {sum(line[-1][1] for line in lines) / len(lines):.4g}"
        for name, (_, lines) in families.items()
    )
    label = f"{metric} on the validation data over epochs: {ends}"
    note = _lines_note((lines for _, lines in families.values()), seeds)
    caption = f"{capital(metric)} on the validation data after each epoch{note}."
    return Figure([panel("validation", label, draw, (4.2, 2.9))], caption)


def _colour(role: str) -> str:
    """The colour of a role; ``teacher-2`` is one of several teachers."""
    return COLOURS.get(role.partition("-")[0], OTHER)


def _marker(role: str) -> str:
    return MARKERS.get(role, "^")


def _draw_lines(
    axes: Axes, role: str, lines: list[Line], name: str | None = None, dashes: str = "-"
) -> None:
    from matplotlib.ticker import MaxNLocator

    many = len(lines) > 1
    for number, line in enumerate(lines):
        axes.plot(
            [epoch for epoch, _ in line],
            [value for _, value in line],
            label=None if number else name,
            color=_colour(role),
            linestyle=dashes,
            linewidth=0.8 if many else 1.6,
            alpha=0.75 if many else 1.0,
            # One point makes no line.
            marker="o" if len(line) == 1 else None,
            markersize=4,
        )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    grid(axes)


def _term(number: int, role: str, title: str, lines: list[Line]) -> Panel:
    values = [value for line in lines for _, value in line]

    def draw(axes: Axes) -> None:
        _draw_lines(axes, role, lines)
        if min(values) > 0 and max(values) > 30 * min(values):
            logarithmic(axes, "y")
        elif min(values) >= 0:
            axes.set_ylim(bottom=0)
        axes.set_title(plain(title, 40))
        axes.set_xlabel("epoch")
        axes.margins(x=0.02)

    begin, end = lines[0][0][1], lines[0][-1][1]
    label = f"Loss term over epochs, {title}: from {begin:.4g} to {end:.4g}"
    return panel(f"term{number}", label, draw)


# What the networks cost, and how near they come to their teacher.


def _means(result: Mapping[str, Any]) -> dict[str, float]:
    """The metric of each role, over all seeds it was trained with."""
    found = {}
    for role, value in roles(result).items():
        values = [s[role] for s in result.get("seeds") or () if s.get(role) is not None]
        found[role], _ = mean_interval(values or [value])
    return found


def _cost(result: Mapping[str, Any]) -> list[Section]:
    means, metric, called = _means(result), result["metric"]["name"], names(result)
    costs = {
        "parameters": result.get("parameters") or {},
        "median latency (ms)": {
            role: (p or {}).get("p50") for role, p in (result.get("latency_ms") or {}).items()
        },
    }
    panels = []
    for number, (heading, cost) in enumerate(costs.items()):
        known = {role: value for role, value in cost.items() if value is not None}
        points = {role: (known[role], mean) for role, mean in means.items() if role in known}
        if len(points) < 2:
            continue
        said = ", ".join(f"{called[r]} {y:.4g} at {x:,.4g}" for r, (x, y) in points.items())
        label = f"{metric} against {heading}: {said}"
        drawn = {called[r]: Point(*xy, _colour(r), _marker(r)) for r, xy in points.items()}
        panels.append(panel(f"cost{number}", label, scatter(drawn, heading, metric)))
    if not panels:
        return []
    ideal = "upper" if result["metric"].get("higher_is_better", True) else "lower"
    caption = f"Each point is a network; the {ideal} left corner, good at little cost, is best."
    title = f"{capital(metric)} against size and latency"
    return [Section("cost", title, [Figure(panels, caption)])]


def _agreement(result: Mapping[str, Any]) -> list[Section]:
    agreement, called = result.get("agreement") or {}, names(result)
    shares = {r: agreement[r] for r in roles(result) if agreement.get(r) is not None}
    if not shares:
        return []

    def draw(axes: Axes) -> None:
        for place, (role, share) in enumerate(shares.items()):
            axes.barh(place, share, height=0.5, color=_colour(role))
            axes.annotate(
                f"{100 * share:.1f} %",
                (1.02, place),
                xycoords=("axes fraction", "data"),
                va="center",
            )
        axes.set_yticks(range(len(shares)), [plain(called[role]) for role in shares])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        grid(axes, "x")
        axes.axvline(0, color=INK, linewidth=0.6)

    said = ", ".join(f"{called[role]} {100 * share:.1f} %" for role, share in shares.items())
    drawn = panel(
        "agreement", f"Agreement with the teacher: {said}", draw, (4.2, 0.55 + 0.36 * len(shares))
    )
    caption = "Share of test samples to which a network gives the same answer as the teacher."
    return [Section("agreement", "Agreement with the teacher", [Figure([drawn], caption)])]


# What the run wrote down about itself.


def _audit(metrics: list[dict[str, Any]], called: Mapping[str, str]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    heard: dict[str, str] = {}
    for entry in metrics:
        phase = entry["phase"]
        # Further seeds of a role say the same again.
        if "audit" not in entry or heard.setdefault(_role(phase), phase) != phase:
            continue
        shares = entry["audit"].get("gradient_share", {})
        for term, value in entry["audit"].get("values", {}).items():
            share = shares.get(term, 0.0)
            share = share if math.isfinite(share) else 0.0
            found.append(
                {
                    "phase": called.get(_role(phase), _role(phase)),
                    "term": term,
                    "value": f"{value:.4g}",
                    "share": f"{100 * share:.1f} %",
                    "width": f"{100 * min(max(share, 0.0), 1.0):.1f}",
                }
            )
    return found


def _environment(run: Run) -> list[tuple[str, str]]:
    try:
        facts = json.loads(regular(run.path / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    found = []
    for name, value in facts.items() if isinstance(facts, dict) else ():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {v}" for key, v in value.items())
        elif isinstance(value, list):
            value = " ".join(str(v) for v in value)
        if value is not None:
            found.append((str(name), str(value)))
    return found
