"""The parts of the report that only translations have."""

from __future__ import annotations

import json
from typing import Any

from limbeck.files import regular
from limbeck.report.figures import Section, plain
from limbeck.report.table import names, roles
from limbeck.training.run import Run

_SHOWN = 8


def sections(run: Run) -> list[Section]:
    """How well each network translates, and some sentences as each translates them."""
    result = run.result()
    called = names(result)
    there = list(roles(result))
    found = result.get("measures") or {}
    measured = [role for role in there if role in found]
    parts = []
    if measured:
        headings = list(found[measured[0]])
        lines = [
            [called[role], *(_number(name, found[role].get(name)) for name in headings)]
            for role in measured
        ]
        note = (
            "On the test data, of the first seed. BLEU by greedy search unless it names a beam; "
            "perplexity of the gold translations, by token; mode mass: the probability that a "
            "network gives to the best translation that beam search finds, mean over sentences."
        )
        table = [["", *headings], *lines]
        parts.append(Section("measures", "Greedy and beam search", table=table, note=note))
    said = _predictions(run)
    if said:
        parts.append(_sentences(said, there, called))
    return parts


def _predictions(run: Run) -> dict[str, Any]:
    try:
        found = json.loads(regular(run.path / "predictions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and found.get("source") else {}


def _sentences(said: dict[str, Any], there: list[str], called: dict[str, str]) -> Section:
    """A column a sentence, evenly spread over those that the networks do not all say alike."""
    shown = [role for role in there if role in said["said"]]
    total = range(len(said["source"]))
    differing = [n for n in total if len({said["said"][role][n] for role in shown}) > 1]
    pool = differing or list(total)
    step = max(1, len(pool) // _SHOWN)
    chosen = pool[::step][:_SHOWN]
    lines = [
        ["source", *(_text(said["source"][n]) for n in chosen)],
        ["reference", *(_text(said["reference"][n]) for n in chosen)],
        *([called[role], *(_text(said["said"][role][n]) for n in chosen)] for role in shown),
    ]
    note = (
        f"By greedy search; {len(chosen)} test sentences, evenly spread over the "
        f"{len(differing):,} of {len(said['source']):,} that the networks do not all say alike."
    )
    headings = ["", *(f"sentence {n + 1}" for n in chosen)]
    return Section(
        "sentences", "What the networks say", table=[headings, *lines], note=note, prose=True
    )


def _text(sentence: str) -> str:
    return plain(sentence, 300)


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if name == "mode mass" else f"{value:.2f}"
