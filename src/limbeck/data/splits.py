"""Which samples belong to which split: a property of the sample, never of a run or its seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from limbeck.data.augment import uniforms
from limbeck.data.data import Samples
from limbeck.errors import UserError

_TEST, _VALIDATION, _SUBSET, _SAMPLE = 11, 12, 13, 14


S = TypeVar("S", bound=Samples)


def hold_out(split: S, fraction: float, name: str, purpose: int) -> tuple[S, S]:
    """Part a split in two, stratified by class: what stays, and what is held out.

    Each class gives the samples whose identity hashes lowest, at least one and never its last, so
    the choice is the same in every run and depends neither on the order of the samples nor on the
    other classes.
    """
    chosen = torch.zeros(len(split), dtype=torch.bool)
    chosen[_lowest(split, fraction, purpose, spared=1)] = True
    keep, held = (~chosen).nonzero().flatten(), chosen.nonzero().flatten()
    return split.subset(keep), split.subset(held, name)


def split_off_validation(train: S, fraction: float) -> tuple[S, S]:
    """Training and validation split out of a training split."""
    return hold_out(train, fraction, "validation", _VALIDATION)


def split_off_test(pool: S, fraction: float = 0.2) -> tuple[S, S]:
    """Training and test split out of a pool of samples."""
    return hold_out(pool, fraction, "test", _TEST)


def completed(splits: Mapping[str, S], validation: float) -> tuple[dict[str, S], list[str]]:
    """``train``, ``validation`` and ``test``, and notes on what was held out of ``train`` for it.

    Args:
        splits: what there is, ``train`` among it.
        validation: the share that is held out where there is no validation split.
    """
    train, notes = splits["train"], []
    if "test" in splits:
        test = splits["test"]
    else:
        train, test = split_off_test(train)
        notes.append("20 % held out for testing")
    held = splits.get("validation", train.subset([], "validation"))
    if "validation" not in splits and validation:
        train, held = split_off_validation(train, validation)
    return {"train": train, "validation": held, "test": test}, notes


def sample(split: S, most: int) -> S:
    """At most so many samples of a split, chosen by their identities, in its order."""
    order = uniforms(split.rows, 1, seed=_SAMPLE, view=0).flatten().argsort(stable=True)
    return split.subset(order[:most].sort().values)


def _lowest(split: Samples, fraction: float, purpose: int, spared: int = 0) -> Tensor:
    """Positions of the share ``fraction`` of each class with the lowest hashes.

    At least one of each class is taken, and so many are ``spared`` whatever the share.
    """
    order = uniforms(split.rows, 1, seed=purpose, view=0).flatten().argsort(stable=True)
    if fraction <= 0 or not len(split):
        return order[:0]
    labels = split.labels if split.labels is not None else torch.zeros(len(split)).long()
    parts = []
    for label in labels.unique():
        own = order[labels[order] == label]
        number = min(max(1, round(fraction * len(own))), len(own) - spared)
        parts.append(own[:number])
    return torch.cat(parts).sort().values


def transfer(
    split: S,
    *,
    exclude: Sequence[int] = (),
    only: Sequence[int] = (),
    fraction: float = 1.0,
    labels: bool = True,
) -> S:
    """The part of a training split that a student may see.

    Args:
        exclude: class numbers left out.
        only: the only class numbers kept; empty keeps all.
        fraction: share of each class, in (0, 1].
        labels: whether the labels are kept.

    Raises:
        UserError: a class that does not occur, a fraction out of range, or nothing left.

    >>> from limbeck.data import ResidentImages, Split
    >>> pixels = ResidentImages(torch.zeros(4, 1, 2, 2, dtype=torch.uint8))
    >>> len(transfer(Split("train", pixels, torch.tensor([0, 0, 1, 2])), exclude=[0]))
    2
    """
    if not 0 < fraction <= 1:
        raise UserError(f"the transfer set's fraction lies in (0, 1], not at {fraction}")
    if split.labels is None and (exclude or only):
        raise UserError("classes cannot be chosen for a transfer set that has no labels")
    chosen = torch.ones(len(split), dtype=torch.bool)
    if split.labels is not None:
        there = set(split.labels.unique().tolist())
        unknown = sorted({*exclude, *only} - there)
        if unknown:
            raise UserError(
                f"the transfer set is to be made of or without class {unknown[0]}, which does not "
                f"occur; classes are {min(there, default=0)} to {max(there, default=0)}"
            )
        if only:
            chosen &= torch.isin(split.labels, torch.tensor(list(only)))
        if exclude:
            chosen &= ~torch.isin(split.labels, torch.tensor(list(exclude)))
    part = split.subset(chosen.nonzero().flatten())
    if fraction < 1:
        part = part.subset(_lowest(part, fraction, _SUBSET))
    if not len(part):
        raise UserError("the transfer set is empty: every class was left out")
    return part if labels else part.unlabelled()
