"""The leaderboard: its statistics, its order, and that the page holds it."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from typing import Any

import pytest
from scipy import stats

from limbeck.report import leaderboard
from limbeck.report.figures import frontier
from limbeck.report.leaderboard import PLAIN, holm, rank


def result(
    values: list[float], seconds: float = 30.0, memory: int | None = 10**9, **facts: Any
) -> dict[str, Any]:
    return {
        "data": "digits",
        "metric": {"name": "accuracy", "higher_is_better": True},
        "teacher": 0.95,
        "seeds": [{"seed": seed, "student": value} for seed, value in enumerate(values)],
        "seconds": {"teacher": 500.0, "student@0": seconds, "total": 500.0 + seconds},
        "memory": memory,
        **facts,
    }


ALONE = result([0.50, 0.51, 0.49, 0.50], teacher=None)
GOOD = result([0.60, 0.62, 0.59, 0.61], seconds=60.0)
SAME = result([0.50, 0.50, 0.50, 0.51])
BAD = result([0.40, 0.42, 0.39, 0.41])


def test_the_best_mean_comes_first_and_a_lower_one_does_where_lower_is_better():
    found = rank(ALONE, {"bad": BAD, "good": GOOD})
    assert [e.name for e in found.entries] == ["good", PLAIN, "bad"]
    error = {"name": "error", "higher_is_better": False}
    found = rank({**ALONE, "metric": error}, {"bad": BAD, "good": GOOD})
    assert [e.name for e in found.entries] == ["bad", PLAIN, "good"]
    assert found.pairs["bad"][PLAIN].word == "better"


def test_each_system_is_compared_with_the_plain_student_by_a_corrected_paired_t_test():
    found = rank(ALONE, {"good": GOOD, "same": SAME, "bad": BAD})
    raw = {
        name: stats.ttest_rel(
            [s["student"] for s in r["seeds"]], [s["student"] for s in ALONE["seeds"]]
        ).pvalue
        for name, r in (("good", GOOD), ("same", SAME), ("bad", BAD))
    }
    order = sorted(raw, key=raw.__getitem__)
    expected, least = {}, 0.0
    for place, name in enumerate(order):
        least = max(least, min(1.0, raw[name] * (3 - place)))
        expected[name] = least
    by_name = {e.name: e for e in found.entries}
    for name, p in expected.items():
        assert by_name[name].against_plain.p == pytest.approx(p)
    words = {name: e.against_plain.word for name, e in by_name.items() if e.against_plain}
    assert words == {"good": "better", "same": "not decided", "bad": "worse"}


def test_many_systems_make_a_single_small_p_prove_nothing():
    lucky = result([0.52, 0.53, 0.525, 0.513])
    alone = rank(ALONE, {"lucky": lucky})
    among = rank(ALONE, {"lucky": lucky, **{f"same{n}": SAME for n in range(9)}})
    assert alone.entries[0].against_plain.word == "better"
    (found,) = (e for e in among.entries if e.name == "lucky")
    assert found.against_plain.word == "not decided"
    assert found.against_plain.sentence.startswith("not decided: the student of lucky")
    assert "corrected for 10 systems" in found.against_plain.sentence


def test_holms_correction_never_lets_a_larger_p_overtake_a_smaller_one():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_two_seeds_decide_nothing_and_one_has_no_interval():
    few = rank(result([0.5, 0.5]), {"good": result([0.9, 0.91])})
    assert few.entries[0].against_plain.word == "not decided"
    single = rank(result([0.5]), {"good": result([0.9])})
    assert single.entries[0].half is None
    assert leaderboard.rows(single)[1][0][1:4] == ["90.00 %", "+40.00", ""]


def test_the_cost_of_a_student_leaves_the_teachers_out():
    found = rank(ALONE, {"good": GOOD})
    assert {e.name: e.seconds for e in found.entries} == {"good": 15.0, PLAIN: 7.5}


@pytest.mark.parametrize(
    ("higher", "expected"),
    [(True, [(1, 0.5), (2, 0.6), (4, 0.7)]), (False, [(1, 0.5), (3, 0.4)])],
)
def test_the_frontier_joins_what_no_other_beats_in_both(higher, expected):
    points = [(4, 0.7), (1, 0.5), (3, 0.4), (2, 0.6), (5, 0.7), (1, 0.5)]
    assert frontier(points, higher) == expected


def test_page_table_and_json_say_the_same(tmp_path):
    tuned = {"found": {"kd.weight": 0.5}, "before": 0.6, "after": 0.7, "trials": 8, "pruned": 3}
    found = rank(ALONE, {"good": GOOD, "<b>": BAD}, {"good": tuned})
    page = leaderboard.write(found, tmp_path, {"trials": 8}).read_text(encoding="utf-8")
    text = (tmp_path / "leaderboard.md").read_text(encoding="utf-8")
    facts = json.loads((tmp_path / "leaderboard.json").read_text(encoding="utf-8"))
    mean = sum(s["student"] for s in GOOD["seeds"]) / 4
    assert facts["entries"][0]["mean"] == pytest.approx(mean)
    assert facts["teacher"] == 0.95
    for shown in (page, text):
        assert f"{100 * mean:.2f} %" in shown
        assert "+10.50" in shown
        assert "paired t test" in shown
        assert "1.00 GB" in shown
    assert "kd.weight = 0.5" in page
    assert "<b>" not in page
    assert facts["pairs"]["good"]["<b>"]["word"] == "better"
    assert "trials: 8" in page


def test_hostile_names_are_text_in_the_leaderboard(tmp_path):
    names = [
        "<script>document.title='x'</script>",
        '"><img src=x onerror=alert(1)>',
        r"$\frac$ {{7*7}}",
    ]
    tuned = {name: {"found": {name: name}, "before": 0.6, "after": 0.7} for name in names}
    alone = {**ALONE, "data": names[0], "metric": {"name": names[0], "higher_is_better": True}}
    found = rank(alone, dict.fromkeys(names, GOOD), tuned)
    page = leaderboard.write(found, tmp_path, {names[0]: names[1]}).read_text(encoding="utf-8")
    tags: list[tuple[str, Any]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, attrs))  # type: ignore[method-assign]
    parser.feed(page)
    assert not [tag for tag, _ in tags if tag in ("script", "img")]
    assert not [name for _, attrs in tags for name, _ in attrs if name.startswith("on")]
    assert "{{7*7}}" in page


def test_a_cost_that_is_not_known_is_left_out(tmp_path):
    found = rank(result([0.5, 0.6], memory=None), {"good": result([0.7, 0.8], memory=None)})
    page = leaderboard.write(found, tmp_path, {}).read_text(encoding="utf-8")
    assert "peak memory" not in page
    assert math.isclose(found.entries[0].mean, 0.75)
