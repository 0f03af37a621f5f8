"""The verdict, against numbers worked out by hand from tables of Student's t."""

import math

import pytest

from limbeck.report.verdict import mean_interval, verdict

T2 = 4.302652730  # 97.5 % quantile of Student's t with two degrees of freedom


def test_an_interval_is_the_quantile_times_the_standard_error():
    # 1, 2, 3: mean 2, variance 1, standard error 1/sqrt(3).
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(T2 / math.sqrt(3), rel=1e-8)


def test_one_value_has_no_interval():
    assert mean_interval([0.7]) == (0.7, None)


def test_differences_clear_of_zero_decide_for_the_student():
    # Differences 0.10, 0.11, 0.12: mean 0.11, standard deviation 0.01.
    found = verdict([0.50, 0.50, 0.50], [0.60, 0.61, 0.62])
    half = T2 * 0.01 / math.sqrt(3)
    assert (found.word, found.seeds) == ("better", 3)
    assert found.difference == pytest.approx(0.11)
    assert (found.low, found.high) == (pytest.approx(0.11 - half), pytest.approx(0.11 + half))
    # With two degrees of freedom the two-sided p is 1 - t / sqrt(2 + t**2).
    t = 0.11 / (0.01 / math.sqrt(3))
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)


def test_the_same_differences_the_other_way_decide_against_it():
    found = verdict([0.60, 0.61, 0.62], [0.50, 0.50, 0.50])
    assert found.word == "worse"
    assert found.difference == pytest.approx(-0.11)


def test_where_lower_is_better_a_lower_student_is_better():
    found = verdict([0.60, 0.61, 0.62], [0.50, 0.50, 0.50], higher_is_better=False)
    assert found.word == "better"
    assert found.difference == pytest.approx(0.11)


def test_an_interval_that_holds_zero_decides_nothing():
    # Differences -0.01, 0.00, 0.04: mean 0.01, standard error 0.0153, so +-0.066.
    found = verdict([0.5, 0.5, 0.5], [0.49, 0.50, 0.54])
    assert found.word == "not decided"
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0 < found.high


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_decide_nothing_however_large_the_difference(seeds):
    found = verdict([0.1] * seeds, [0.9] * seeds)
    assert (found.word, found.low, found.p) == ("not decided", None, None)
    assert "--seeds 3" in found.sentence


@pytest.mark.parametrize(
    ("gain", "word", "p"), [(0.125, "better", 0.0), (-0.1, "worse", 0.0), (0.0, "not decided", 1.0)]
)
def test_equal_differences_have_an_interval_without_width(gain, word, p):
    # In floating point the three differences are not equal: rounding must not look like spread.
    plain = [0.5, 0.6, 0.7]
    found = verdict(plain, [value + gain for value in plain])
    assert (found.word, found.p) == (word, p)
    assert found.low == found.difference == found.high == pytest.approx(gain)


def test_only_pairs_can_be_compared():
    for baseline, student in (([0.5], []), ([], [])):
        with pytest.raises(ValueError, match="make no pairs"):
            verdict(baseline, student)


def test_the_sentence_begins_with_the_word_and_says_the_numbers():
    sentence = verdict([0.50, 0.50, 0.50], [0.60, 0.61, 0.62]).sentence
    assert sentence.startswith("better: ")
    for said in ("+0.1100", "95 %", "paired t test", "3 seeds"):
        assert said in sentence
