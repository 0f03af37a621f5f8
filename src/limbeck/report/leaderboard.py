"""What several systems did on the same ground: a leaderboard as HTML, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.report.figures import (
    BASELINE,
    INK,
    STUDENT,
    TEACHER,
    Figure,
    Panel,
    Point,
    Section,
    capital,
    frontier,
    grid,
    panel,
    plain,
    scatter,
)
from limbeck.report.table import measured, table
from limbeck.report.verdict import LEAST_SEEDS, Verdict, mean_interval, verdict
from limbeck.training.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

PLAIN = "plain student"
NAME = "leaderboard"
TEST = (
    "Two-sided paired t test over the seeds: it takes the differences of the pairs to be "
    "independent and roughly normal. Pairs share initial weights, batches and teacher, so it "
    "speaks of this teacher on this data. Where several systems are compared with the plain "
    f"student, p is Holm's; below {LEAST_SEEDS} seeds, and where p is 0.05 or more, nothing is "
    "decided."
)


@dataclass(frozen=True)
class Entry:
    """One system's students.

    Args:
        name: the system's, or the plain student.
        values: the deciding metric on the test split, one a seed.
        mean, half: their mean and half its 95 % interval; ``None`` for one seed.
        seconds: of training a student, without the teacher's.
        memory: the process's peak, in bytes; ``None`` if unknown.
        against_plain: the comparison with the plain student.
        tuned: hyper-parameters that were found on validation data, and how.
    """

    name: str
    values: Sequence[float]
    mean: float
    half: float | None
    seconds: float
    memory: int | None
    against_plain: Verdict | None = None
    tuned: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Leaderboard:
    """Entries, best first, and how each pair of systems compares.

    ``pairs[one][other]`` is the verdict on ``one`` measured against ``other``.
    """

    data: str
    metric: str
    higher_is_better: bool
    teacher: float | None
    seeds: Sequence[int]
    entries: Sequence[Entry]
    pairs: Mapping[str, Mapping[str, Verdict]]

    def as_json(self) -> dict[str, Any]:
        """The leaderboard as plain values."""
        return {**asdict(self), "test": TEST}


def rank(
    alone: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
) -> Leaderboard:
    """Rank systems by what their runs found.

    Args:
        alone: ``result.json`` of the plain student's run.
        results: those of the systems' runs, by name, with the same seeds.
        tuned: what a search for their hyper-parameters found, by name.
    """
    metric = alone["metric"]
    higher = bool(metric["higher_is_better"])
    values = {PLAIN: _values(alone), **{name: _values(r) for name, r in results.items()}}
    pairs = {
        one: {
            other: verdict(values[other], values[one], higher, (_student(other), _student(one)))
            for other in values
            if other != one
        }
        for one in values
    }
    against = _corrected({name: pairs[name][PLAIN] for name in results})
    entries = []
    for name, found in ((PLAIN, alone), *results.items()):
        mean, half = mean_interval(values[name])
        entries.append(
            Entry(
                name,
                values[name],
                mean,
                half,
                _seconds(found) / len(values[name]),
                found.get("memory"),
                against.get(name),
                (tuned or {}).get(name),
            )
        )
    entries.sort(key=lambda e: -e.mean if higher else e.mean)
    teachers = [r["teacher"] for r in results.values() if r.get("teacher") is not None]
    return Leaderboard(
        str(alone["data"]),
        metric["name"],
        higher,
        teachers[0] if teachers else None,
        [row["seed"] for row in alone["seeds"]],
        entries,
        pairs,
    )


def _student(name: str) -> str:
    return name if name == PLAIN else f"student of {name}"


def _values(result: Mapping[str, Any]) -> list[float]:
    return [row["student"] for row in result["seeds"]]


def _seconds(result: Mapping[str, Any]) -> float:
    """Of all phases but the teacher's."""
    seconds = result["seconds"]
    return float(sum(s for name, s in seconds.items() if not name.startswith(("teacher", "total"))))


def _corrected(found: Mapping[str, Verdict]) -> dict[str, Verdict]:
    """Verdicts on several systems, their p corrected by Holm's step-down method."""
    known = {name: v.p for name, v in found.items() if v.p is not None}
    corrected = dict(zip(known, holm(list(known.values())), strict=True))
    if len(known) < 2:
        return dict(found)
    result = dict(found)
    for name, p in corrected.items():
        before = found[name]
        word = before.word if p < 0.05 else "not decided"
        said = before.sentence.removeprefix(before.word)
        sentence = f"{word}{said}; p = {p:.2g} corrected for {len(known)} systems"
        result[name] = replace(before, word=word, sentence=sentence, p=p)
    return result


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction (Holm 1979): the k-th smallest of n is multiplied by n - k + 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(ps)), key=ps.__getitem__)
    corrected, least = [0.0] * len(ps), 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (len(ps) - place) * ps[index]))
        corrected[index] = least
    return corrected


def write(found: Leaderboard, folder: Path, content: Mapping[str, Any]) -> Path:
    """Write ``leaderboard.html``, ``.md`` and ``.json``; the page is returned."""
    import yaml

    from limbeck import __version__
    from limbeck.report.page import render

    headings, lines = rows(found)
    tuned = [e for e in found.entries if e.tuned]
    page = render(
        {
            "title": f"{_systems(found)} on {found.data} · Limbeck",
            "result": {"system": _systems(found), "data": found.data, "limbeck": __version__},
            "facts": _facts(found),
            "verdict": None,
            "table": {"headings": headings, "lines": lines, "note": _note(found)},
            "sections": [
                _spread_of_seeds(found),
                _pareto(found),
                *([_pairwise(found)] if len(found.entries) > 2 else []),
                *([_search(tuned)] if tuned else []),
            ],
            "audit": [],
            "recipe": yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True),
            "environment": [],
            "folder": folder.name,
        }
    )
    write_atomically(folder / f"{NAME}.md", as_markdown(found).encode("utf-8", "replace"))
    write_atomically(folder / f"{NAME}.json", json.dumps(found.as_json(), indent=2).encode())
    write_atomically(folder / f"{NAME}.html", page.encode("utf-8", "replace"))
    return folder / f"{NAME}.html"


def _systems(found: Leaderboard) -> str:
    return ", ".join(e.name for e in found.entries if e.name != PLAIN)


def _facts(found: Leaderboard) -> list[str]:
    seeds = ", ".join(map(str, found.seeds))
    facts = [f"seed{'s' if len(found.seeds) > 1 else ''} {seeds}"]
    if found.teacher is not None:
        facts.append(f"teacher {measured(found.metric, found.teacher)}")
    return facts


def rows(found: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of strings, one row an entry."""
    unit = "points against plain" if found.metric == "accuracy" else "against plain"
    headings = ["system", found.metric, unit, "p", "verdict", "training", "memory"]
    lines = []
    for entry in found.entries:
        against = entry.against_plain
        lines.append(
            [
                entry.name,
                measured(found.metric, entry.mean, entry.half),
                "" if against is None else _difference(found.metric, against),
                "" if against is None or against.p is None else f"{against.p:.2g}",
                "" if against is None else against.word,
                f"{entry.seconds:.1f} s",
                "" if entry.memory is None else f"{entry.memory / 1e9:.2f} GB",
            ]
        )
    return headings, lines


def _difference(metric: str, found: Verdict) -> str:
    """A mean paired difference with its interval; of accuracies in points.

    >>> _difference("accuracy", verdict([0.5, 0.5, 0.5], [0.4, 0.4, 0.4]))
    '−10.00 (−10.00 to −10.00)'
    """
    mean = _signed(metric, found.difference)
    if found.low is None or found.high is None:
        return mean
    return f"{mean} ({_signed(metric, found.low)} to {_signed(metric, found.high)})"


def _signed(metric: str, value: float) -> str:
    scaled, digits = (100 * value, 2) if metric == "accuracy" else (value, 4)
    # Rounding first, as there is no such thing as minus zero.
    return f"{round(scaled, digits) + 0.0:+.{digits}f}".replace("-", "−")


def _note(found: Leaderboard) -> str:
    better = "higher" if found.higher_is_better else "lower"
    return (
        f"{capital(found.metric)} on the test split, {better} is better; ± is half the 95 % "
        "interval of the mean over the seeds. Differences are positive where a system is better, "
        f"with their 95 % interval. {TEST} Training: seconds a student, the teacher's own left "
        "out; memory: the peak of the process."
    )


def _spread_of_seeds(found: Leaderboard) -> Section:
    def draw(axes: Axes) -> None:
        for place, entry in enumerate(found.entries):
            colour = BASELINE if entry.name == PLAIN else STUDENT
            axes.plot(entry.values, [place] * len(entry.values), "o", color=colour, alpha=0.35)
            axes.plot([entry.mean], [place], "D", color=colour, markersize=7)
            if entry.half is not None:
                ends = entry.mean - entry.half, entry.mean + entry.half
                axes.plot(ends, [place, place], color=colour, linewidth=1.6)
        if found.teacher is not None:
            axes.axvline(found.teacher, color=TEACHER, linewidth=1, dashes=(4, 3))
        axes.set_yticks(range(len(found.entries)), [plain(e.name) for e in found.entries])
        axes.set_ylim(len(found.entries) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(plain(found.metric))
        axes.spines["left"].set_visible(False)
        grid(axes, "x")

    said = ", ".join(f"{e.name} {e.mean:.4g}" for e in found.entries)
    drawn = panel(
        "seeds",
        f"{found.metric} of each entry: {said}",
        draw,
        (5.2, 0.9 + 0.36 * len(found.entries)),
    )
    caption = "Each seed (circle), the mean (diamond) and its 95 % interval (line)"
    caption += "; the dashed line is the teacher." if found.teacher is not None else "."
    return Section("seeds", f"{capital(found.metric)} over the seeds", [Figure([drawn], caption)])


def _pareto(found: Leaderboard) -> Section:
    costs = {
        "seconds of training a student": {e.name: e.seconds for e in found.entries},
        "peak memory (MB)": {e.name: e.memory / 1e6 for e in found.entries if e.memory is not None},
    }
    panels = [
        _costs(number, heading, cost, found)
        for number, (heading, cost) in enumerate(costs.items())
        if len(cost) > 1
    ]
    upper = "upper" if found.higher_is_better else "lower"
    caption = (
        f"The {upper} left corner is best; the line joins the entries that no other beats in both."
    )
    return Section("pareto", f"{capital(found.metric)} against cost", [Figure(panels, caption)])


def _costs(number: int, heading: str, cost: Mapping[str, float], found: Leaderboard) -> Panel:
    points = {
        e.name: Point(
            cost[e.name],
            e.mean,
            BASELINE if e.name == PLAIN else STUDENT,
            "o" if e.name == PLAIN else "D",
        )
        for e in found.entries
        if e.name in cost
    }
    best = frontier([(p.x, p.y) for p in points.values()], found.higher_is_better)
    place = scatter(points, heading, found.metric)

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*best, strict=True), color=INK, linewidth=0.8, alpha=0.45)
        place(axes)

    said = ", ".join(f"{name} {p.y:.4g} at {p.x:,.4g}" for name, p in points.items())
    return panel(f"pareto{number}", f"{found.metric} against {heading}: {said}", draw)


def _pairwise(found: Leaderboard) -> Section:
    order = [e.name for e in found.entries]
    cells = {
        (one, other): f"{_signed(found.metric, pair.difference)} {pair.word}"
        for one, other in permutations(order, 2)
        for pair in [found.pairs[one][other]]
    }
    lines = [[one, *(cells.get((one, other), "") for other in order)] for one in order]
    note = (
        "Mean paired difference of the row against the column, positive where the row is better, "
        "and the verdict; p is not corrected here."
    )
    return Section("pairs", "Each against each", table=[["system", *order], *lines], note=note)


def _search(tuned: Sequence[Entry]) -> Section:
    headings = ["system", "trials", "pruned", "on validation data before", "after", "found"]
    lines = []
    for entry in tuned:
        facts = entry.tuned or {}
        lines.append(
            [
                entry.name,
                str(facts.get("trials", "")),
                str(facts.get("pruned", "")),
                f"{facts['before']:.4f}" if facts.get("before") is not None else "",
                f"{facts['after']:.4f}" if facts.get("after") is not None else "",
                settings(facts.get("found") or {}),
            ]
        )
    note = (
        "Hyper-parameters searched for on the validation split with a seed of its own; the test "
        "split had no part in it. Before: the preset's values."
    )
    return Section("search", "Search for hyper-parameters", table=[headings, *lines], note=note)


def settings(found: Mapping[str, Any]) -> str:
    """Hyper-parameters in a line.

    >>> settings({"kd.weight": 0.123456, "nst.kernel": "poly"})
    'kd.weight = 0.1235, nst.kernel = poly'
    """
    said = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.items()}
    return ", ".join(f"{name} = {value}" for name, value in said.items())


def as_rich(found: Leaderboard) -> Table:
    """The leaderboard for a terminal."""
    return table(*rows(found))


def as_markdown(found: Leaderboard) -> str:
    """The leaderboard in Markdown."""
    headings, lines = rows(found)
    ruler = ["---", *["---:"] * (len(headings) - 1)]
    drawn = ["| " + " | ".join(row) + " |" for row in [headings, ruler, *lines]]
    sentences = [
        f"- {e.name}: {e.against_plain.sentence}" for e in found.entries if e.against_plain
    ]
    facts = "; ".join(_facts(found))
    return "\n".join(
        [
            f"# {_systems(found)} on {found.data}",
            "",
            f"{facts}.",
            "",
            *drawn,
            "",
            *sentences,
            "",
            _note(found),
            "",
        ]
    )
