"""Better, worse, or not decided: what paired seeds say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LEAST_SEEDS = 3


@dataclass(frozen=True)
class Verdict:
    """What was found: the mean difference in favour of the student and its 95 % interval.

    ``difference``, ``low`` and ``high`` are positive where the student is better, whichever
    direction the metric has; the interval and ``p`` are ``None`` with fewer than two seeds.
    """

    word: Literal["better", "worse", "not decided"]
    sentence: str
    seeds: int
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def verdict(
    baseline: Sequence[float],
    student: Sequence[float],
    higher_is_better: bool = True,
    names: tuple[str, str] = ("plain student", "distilled student"),
) -> Verdict:
    """Compare distilled with plain students, one pair a seed, by a two-sided paired t test.

    It assumes that the differences of the pairs are independent and roughly normal; the data
    split and the teacher are the same in all pairs, so it speaks of this teacher on this data.
    Below three pairs, and where the 95 % interval of the mean difference holds zero, nothing is
    decided. Differences that are equal but for rounding leave an interval without width; ``p`` is
    then 0, or 1 where they are all zero.

    Raises:
        ValueError: nothing to compare, or not as many of one as of the other.

    >>> verdict([0.50, 0.52, 0.51], [0.60, 0.63, 0.61]).word
    'better'
    >>> verdict([0.5], [0.9]).word
    'not decided'
    """
    if len(baseline) != len(student) or not baseline:
        raise ValueError(
            f"{len(baseline)} of the {names[0]} and {len(student)} of the {names[1]} make no pairs"
        )
    sign = 1.0 if higher_is_better else -1.0
    differences = [sign * (s - b) for b, s in zip(baseline, student, strict=True)]
    # Subtraction leaves the rounding of its operands; a spread or a mean of that size is none.
    rounding = 1e-12 * max(map(abs, [*baseline, *student]))
    if max(differences) - min(differences) <= rounding:
        same = differences[0] if abs(differences[0]) > rounding else 0.0
        differences = [same] * len(differences)
    number, mean = len(differences), sum(differences) / len(differences)
    if number < LEAST_SEEDS:
        return Verdict(
            "not decided",
            f"not decided: the {names[1]} differs by {mean:+.4f} from the {names[0]} in "
            f"{number} seed{'s' if number > 1 else ''}; --seeds {LEAST_SEEDS} or more can decide",
            number,
            mean,
        )
    _, half = mean_interval(differences)
    assert half is not None
    low, high = mean - half, mean + half
    if len(set(differences)) == 1:
        low = high = mean = differences[0]
        p = float(mean == 0)
    else:
        from scipy import stats

        p = float(stats.ttest_rel(student, baseline).pvalue)
    word: Literal["better", "worse", "not decided"] = "not decided"
    if low > 0:
        word = "better"
    elif high < 0:
        word = "worse"
    return Verdict(
        word,
        f"{word}: the {names[1]} differs by {mean:+.4f} from the {names[0]} "
        f"(95 % interval {low:+.4f} to {high:+.4f}, p = {p:.2g}, paired t test, {number} seeds)",
        number,
        mean,
        low,
        high,
        p,
    )


def said(values: Sequence[float], percent: bool = False) -> str:
    """The mean as people read it, with half its 95 % interval where there are several values.

    >>> said([0.5]), said([0.5, 0.52], percent=True)
    ('0.5000', '51.00 % ± 12.71')
    """
    mean, half = mean_interval(values)
    if percent:
        return f"{100 * mean:.2f} %" + (f" ± {100 * half:.2f}" if half is not None else "")
    return f"{mean:.4f}" + (f" ± {half:.4f}" if half is not None else "")


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval by Student's t; ``None`` for one value.

    >>> mean_interval([1.0, 3.0])
    (2.0, 12.706...)
    """
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    from scipy import stats

    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return mean, quantile * math.sqrt(variance / len(values))
