"""The parts of the report that only the classification of texts has."""

from __future__ import annotations

import json
from typing import Any

from limbeck.files import regular
from limbeck.report import classification
from limbeck.report.figures import Section, plain
from limbeck.report.table import names, roles
from limbeck.training.run import Run

MOST, WIDEST = 16, 220


def sections(run: Run) -> list[Section]:
    """Calibration and confusions, and what each network said of some texts."""
    return [*classification.sections(run), *_words(run)]


def _words(run: Run) -> list[Section]:
    """Texts that plain student and student part over, then others that are hard."""
    result = run.result()
    found = classification.read_predictions(run, [*roles(result)])
    try:
        shown: list[dict[str, Any]] = json.loads(regular(run.path / "examples.json").read_text())
    except (OSError, ValueError, RecursionError):
        return []
    if found is None or not shown:
        return []
    called = names(result)
    said = {role: p.argmax(1) for role, p in found.probabilities.items()}

    def parted(example: dict[str, Any]) -> bool:
        votes = [said[r][example["position"]] for r in ("baseline", "student") if r in said]
        return len(set(votes)) > 1

    chosen = sorted(shown, key=lambda e: not parted(e))[:MOST]
    rows = [["text", "true", *(called[role] for role in said)]]
    for example in chosen:
        place = example["position"]
        true = int(found.labels[place])
        cells = [
            f"{plain(found.classes[answers[place]], 24)} "
            f"{100 * float(found.probabilities[role][place].max()):.0f} %"
            + ("" if answers[place] == true else " ✗")
            for role, answers in said.items()
        ]
        text = " ∥ ".join(example["texts"])
        rows.append([plain(text, WIDEST), plain(found.classes[true], 24), *cells])
    note = (
        "Test texts over which the networks part, or which all get wrong, with what each said and "
        "how sure it was; ✗ marks what is wrong. Two texts of a pair are parted by ∥."
    )
    return [Section("texts", "What was said of which text", table=rows, note=note)]
