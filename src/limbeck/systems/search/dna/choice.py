"""Which candidate of each block: the least sum of ratings that a budget allows, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One way to make a block.

    Attributes:
        rating: the lower the better.
        costs: what it costs behind each cell that the block before it may have, whose width it
            takes in.
        cell: which of its block's cells it is made of.
    """

    rating: float
    costs: tuple[float, ...]
    cell: int = 0


@dataclass(frozen=True)
class Choice:
    """One candidate of each block, by its place, with the sums of costs and ratings."""

    cost: float
    rating: float
    places: tuple[int, ...]


def frontier(blocks: Sequence[Sequence[Candidate]]) -> list[Choice]:
    """All choices of one candidate a block that no other beats in both cost and rating.

    Of a beginning only the choices matter that no other with the same last cell beats, as whatever
    follows costs the same behind both; so the blocks are gone through once, however many choices
    there are.

    Args:
        blocks: the candidates of each block, in order.

    Returns:
        Choices by rising cost and falling rating.

    >>> first = [Candidate(0.1, (5,)), Candidate(0.3, (2,))]
    >>> second = [Candidate(0.2, (4,)), Candidate(0.05, (6,))]
    >>> [(c.cost, round(c.rating, 2), c.places) for c in frontier([first, second])]
    [(6, 0.5, (1, 0)), (8, 0.35, (1, 1)), (9, 0.3, (0, 0)), (11, 0.15, (0, 1))]
    """
    reached: dict[int, list[Choice]] = {0: [Choice(0, 0.0, ())]}
    for candidates in blocks:
        after: dict[int, list[Choice]] = {}
        for place in _kept(candidates):
            candidate = candidates[place]
            after.setdefault(candidate.cell, []).extend(
                Choice(
                    choice.cost + candidate.costs[cell],
                    choice.rating + candidate.rating,
                    (*choice.places, place),
                )
                for cell, choices in reached.items()
                for choice in choices
            )
        reached = {cell: _unbeaten(choices) for cell, choices in after.items()}
    return _unbeaten(choice for choices in reached.values() for choice in choices)


def _kept(candidates: Sequence[Candidate]) -> list[int]:
    """The places of those that no other of the same cell beats behind every cell."""
    order = sorted(
        range(len(candidates)), key=lambda n: (candidates[n].rating, sum(candidates[n].costs), n)
    )
    kept: list[int] = []
    for place in order:
        one = candidates[place]
        rivals = (candidates[n] for n in kept if candidates[n].cell == one.cell)
        if not any(
            all(a <= b for a, b in zip(other.costs, one.costs, strict=True)) for other in rivals
        ):
            kept.append(place)
    return kept


def _unbeaten(choices: Iterable[Choice]) -> list[Choice]:
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.cost, c.rating, c.places)):
        if not found or choice.rating < found[-1].rating:
            found.append(choice)
    return found


def search(blocks: Sequence[Sequence[Candidate]], budget: float) -> Choice | None:
    """The choice with the least sum of ratings that costs at most so much; ``None`` if none does.

    >>> search([[Candidate(0.1, (5,)), Candidate(0.3, (2,))]], 4).places
    (1,)
    """
    allowed = [choice for choice in frontier(blocks) if choice.cost <= budget]
    return allowed[-1] if allowed else None
