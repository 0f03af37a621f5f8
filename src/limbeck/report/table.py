"""The one table: teacher, plain student and distilled student side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from limbeck.report.verdict import mean_interval

ROLES = {"teacher": "teacher", "baseline": "plain student", "student": "distilled student"}


def roles(result: Mapping[str, Any]) -> dict[str, float]:
    """The metric of each network that there is, by its role; further networks come last.

    >>> roles({"teacher": None, "student": 0.5, "further": {"fused": 0.6}})
    {'student': 0.5, 'fused': 0.6}
    """
    usual = {role: result[role] for role in ROLES if result.get(role) is not None}
    return usual | dict(result.get("further") or {})


def names(result: Mapping[str, Any]) -> dict[str, str]:
    """What the roles are called: a student that was compared with nothing is just the model.

    >>> names({"student": 0.5})["student"], names({"names": {"student": "with dropout"}})["student"]
    ('model', 'with dropout')
    """
    alone = "student" in result and all(result.get(r) is None for r in ("teacher", "baseline"))
    usual = {**ROLES, "student": "model"} if alone else ROLES
    further = {role: role for role in result.get("further") or {}}
    return {**usual, **further, **(result.get("names") or {})}


def rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of strings, one row a network that the run has."""
    there = list(roles(result))
    headings = ["", result["metric"]["name"]]
    called = names(result)
    columns = [[called[role] for role in there], [_metric(result, role) for role in there]]
    latency = {role: (p or {}).get("p50") for role, p in (result.get("latency_ms") or {}).items()}
    for facts, heading, form in (
        (result.get("agreement"), "agreement", _percent),
        (result.get("parameters"), "parameters", _count),
        (result.get("multiply_adds"), "multiply-adds", _count),
        (result.get("bytes"), "size", _megabytes),
        (latency, "latency", _milliseconds),
    ):
        known = {role: fact for role, fact in (facts or {}).items() if fact is not None}
        if any(role in known for role in there):
            headings.append(heading)
            columns.append([form(known[role]) if role in known else "" for role in there])
    return headings, [list(row) for row in zip(*columns, strict=True)]


def _metric(result: Mapping[str, Any], role: str) -> str:
    values = [s[role] for s in result.get("seeds") or () if s.get(role) is not None]
    return measured(result["metric"]["name"], *mean_interval(values or [roles(result)[role]]))


def measured(metric: str, mean: float, half: float | None = None) -> str:
    """A metric as people read it, with half its interval if there is one.

    >>> measured("accuracy", 0.5, 0.01), measured("cross_entropy", 0.5), measured("return", -150)
    ('50.00 % ± 1.00 %', '0.5000', '-150.00')
    """
    places = 4 if abs(mean) < 10 else 2
    form = _percent if metric == "accuracy" else f"{{:.{places}f}}".format
    return form(mean) + (f" ± {form(half)}" if half is not None else "")


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _count(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def _megabytes(number: float) -> str:
    return f"{_rounded(number / 1e6)} MB"


def _milliseconds(number: float) -> str:
    return f"{_rounded(number)} ms"


def _rounded(number: float) -> str:
    # Students may be so small that two digits would make them all alike.
    return f"{number:.2f}" if number >= 1 else f"{number:.3f}"


def as_rich(result: Mapping[str, Any]) -> Table:
    """The table for a terminal."""
    return table(*rows(result))


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Rows of strings for a terminal."""
    drawn = Table(box=None, pad_edge=False)
    for number, heading in enumerate(headings):
        drawn.add_column(heading, justify="right" if number else "left")
    for line in lines:
        drawn.add_row(*line)
    return drawn


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    headings, lines = rows(result)
    ruler = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [headings, ruler, *lines])
