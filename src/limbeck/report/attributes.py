"""The parts of the report that only attributes have."""

from __future__ import annotations

from limbeck.report.figures import Section, plain
from limbeck.report.table import names, roles
from limbeck.training.run import Run


def sections(run: Run) -> list[Section]:
    """How well each network ranks the samples by each attribute."""
    result = run.result()
    found, called = result.get("attributes") or {}, names(result)
    there = [role for role in roles(result) if role in found]
    if not there:
        return []
    frequencies = result.get("frequencies") or {}
    lines = [
        [
            plain(name, 32),
            f"{100 * frequencies[name]:.1f} %" if name in frequencies else "",
            *(_value(found[role].get(name)) for role in there),
        ]
        for name in found[there[0]]
    ]
    note = (
        "Average precision of each attribute on the test data, and how many samples have it, which "
        "is what ranking at random reaches."
    )
    headings = ["", "samples", *(called[role] for role in there)]
    return [Section("attributes", "Attribute by attribute", table=[headings, *lines], note=note)]


def _value(precision: float | None) -> str:
    return "" if precision is None else f"{precision:.4f}"
