"""Which split a sample belongs to is a property of the sample; what a student may see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.data.data import ResidentImages, Split
from limbeck.data.splits import hold_out, split_off_test, split_off_validation, transfer
from limbeck.errors import UserError


def pool(labels: Tensor | list[int] | None, number: int = 100) -> Split:
    labels = None if labels is None else torch.as_tensor(labels)
    number = number if labels is None else len(labels)
    pixels = torch.zeros(number, 1, 1, 1, dtype=torch.uint8)
    return Split("train", ResidentImages(pixels), labels)


def mixed(counts: list[int]) -> Tensor:
    """Labels with these counts, in an order that is fixed but mixed."""
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(8))]


def counts_of(split: Split, classes: int) -> list[int]:
    assert split.labels is not None
    return torch.bincount(split.labels, minlength=classes).tolist()


def test_training_validation_and_test_never_overlap_and_lose_nothing() -> None:
    for labels in (mixed([70, 41, 9, 3]), None):
        whole = pool(labels, 123)
        rest, test = split_off_test(whole)
        train, validation = split_off_validation(rest, 0.1)
        parts = [set(s.rows.tolist()) for s in (train, validation, test)]
        assert sum(map(len, parts)) == len(whole)
        assert set.union(*parts) == set(range(len(whole)))
        assert [s.name for s in (train, validation, test)] == ["train", "validation", "test"]


def test_a_sample_keeps_its_label_on_either_side() -> None:
    labels = mixed([20, 30, 40])
    for part in split_off_validation(pool(labels), 0.3):
        assert part.labels is not None
        assert torch.equal(part.labels, labels[part.rows])


@pytest.mark.parametrize(
    ("counts", "fraction", "held"),
    [
        ([100, 50, 10], 0.1, [10, 5, 1]),
        ([100, 50, 10], 0.25, [25, 12, 2]),
        ([100, 3, 2], 0.1, [10, 1, 1]),
        ([10, 1, 2], 0.9, [9, 0, 1]),
    ],
)
def test_each_class_gives_its_share_at_least_one_and_never_its_last(
    counts: list[int], fraction: float, held: list[int]
) -> None:
    keep, out = hold_out(pool(mixed(counts)), fraction, "validation", 1)
    assert counts_of(out, 3) == held
    assert counts_of(keep, 3) == [c - h for c, h in zip(counts, held, strict=True)]


def test_an_unlabelled_split_gives_its_share_of_the_whole() -> None:
    keep, out = split_off_validation(pool(None, 200), 0.15)
    assert (len(keep), len(out)) == (170, 30)
    assert keep.labels is None
    assert out.labels is None


def test_the_choice_is_the_same_at_every_call_whatever_torch_was_seeded_with() -> None:
    whole = pool(mixed([50, 50]))
    torch.manual_seed(0)
    first = split_off_validation(whole, 0.2)[1].rows
    torch.manual_seed(1)
    assert torch.equal(split_off_validation(whole, 0.2)[1].rows, first)


def test_the_choice_does_not_depend_on_the_order_or_on_other_classes() -> None:
    labels = mixed([60, 60, 60])
    whole = pool(labels)
    held = set(split_off_validation(whole, 0.2)[1].rows.tolist())
    backwards = whole.subset(range(len(whole) - 1, -1, -1))
    assert set(split_off_validation(backwards, 0.2)[1].rows.tolist()) == held
    two = whole.subset((labels != 1).nonzero().flatten())
    expected = {row for row in held if labels[row] != 1}
    assert set(split_off_validation(two, 0.2)[1].rows.tolist()) == expected


def test_a_larger_share_holds_out_the_smaller_one_too() -> None:
    whole = pool(mixed([80, 80]))
    few, many = (set(split_off_validation(whole, f)[1].rows.tolist()) for f in (0.1, 0.3))
    assert few < many


def test_test_validation_and_transfer_are_chosen_independently() -> None:
    whole = pool(torch.zeros(10_000, dtype=torch.int64))
    chosen = [
        split_off_test(whole, 0.5)[1],
        split_off_validation(whole, 0.5)[1],
        transfer(whole, fraction=0.5),
    ]
    for i in range(3):
        for j in range(i):
            both = len(set(chosen[i].rows.tolist()) & set(chosen[j].rows.tolist()))
            assert abs(both - 2500) < 200  # 8 standard deviations of independent halves


@pytest.mark.parametrize("fraction", [0.0, -0.5])
def test_no_share_holds_out_nothing(fraction: float) -> None:
    keep, out = split_off_validation(pool(mixed([5, 5])), fraction)
    assert (len(keep), len(out)) == (10, 0)


def test_nothing_parts_into_nothing() -> None:
    keep, out = split_off_validation(pool(mixed([5, 5])).subset([]), 0.5)
    assert (len(keep), len(out)) == (0, 0)


def test_left_out_classes_are_gone_and_the_rest_is_whole() -> None:
    labels = mixed([7, 8, 9])
    part = transfer(pool(labels), exclude=[0, 2])
    assert part.rows.tolist() == [i for i, c in enumerate(labels.tolist()) if c == 1]
    assert counts_of(part, 3) == [0, 8, 0]


def test_only_some_classes_are_kept_less_those_left_out() -> None:
    split = pool(mixed([7, 8, 9]))
    assert counts_of(transfer(split, only=[0, 2]), 3) == [7, 0, 9]
    assert counts_of(transfer(split, only=[0, 2], exclude=[2]), 3) == [7, 0, 0]


@pytest.mark.parametrize(
    ("fraction", "kept"), [(1.0, [40, 20, 3]), (0.5, [20, 10, 2]), (0.01, [1, 1, 1])]
)
def test_a_share_is_a_share_of_every_class(fraction: float, kept: list[int]) -> None:
    assert counts_of(transfer(pool(mixed([40, 20, 3])), fraction=fraction), 3) == kept


def test_labels_can_be_hidden_after_they_have_chosen() -> None:
    split = pool(mixed([6, 6]))
    hidden = transfer(split, only=[1], fraction=0.5, labels=False)
    shown = transfer(split, only=[1], fraction=0.5)
    assert hidden.labels is None
    assert torch.equal(hidden.rows, shown.rows)


def test_the_whole_split_is_the_default() -> None:
    split = pool(mixed([3, 4]))
    part = transfer(split)
    assert torch.equal(part.rows, split.rows)
    assert part.labels is not None
    assert torch.equal(part.labels, mixed([3, 4]))
    assert len(transfer(pool(None, 9), fraction=0.34)) == 3


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.01, float("nan")])
def test_a_share_out_of_range_is_named(fraction: float) -> None:
    with pytest.raises(UserError, match=rf"fraction lies in \(0, 1\], not at {fraction}"):
        transfer(pool([0, 1]), fraction=fraction)


def test_a_class_that_does_not_occur_is_named_with_those_that_do() -> None:
    for choice in ({"exclude": [7]}, {"only": [1, 7]}):
        with pytest.raises(UserError, match=r"class 7, which does not occur.* 1 to 3"):
            transfer(pool([1, 2, 3]), **choice)  # type: ignore[arg-type]


def test_classes_cannot_be_chosen_without_labels() -> None:
    for choice in ({"exclude": [1]}, {"only": [1]}):
        with pytest.raises(UserError, match="no labels"):
            transfer(pool(None, 5), **choice)  # type: ignore[arg-type]


def test_an_empty_transfer_set_is_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        transfer(pool([0, 1, 1]), exclude=[0, 1])
    with pytest.raises(UserError, match="empty"):
        transfer(pool([0, 1, 1]), only=[0], exclude=[0])
