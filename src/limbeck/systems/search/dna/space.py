"""The space of networks that a search chooses from, and what each of them costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Literal

import torch
from torch import nn

from limbeck.models import profile
from limbeck.systems.search.dna.choice import Candidate, frontier
from limbeck.systems.search.dna.networks import DNANet, InvertedResidual, Operation, Plan, Stage
from limbeck.systems.search.dna.supernet import Path
from limbeck.training.network import Network

Cost = Literal["multiply_adds", "parameters"]
Cell = tuple[int, int]
Places = tuple[int, ...]
"""A network of the space: the place of its candidate among those of each block."""


class Space:
    """All networks that a plan becomes when each layer may have any operation.

    Args:
        plan: the network that says how many blocks there are, their strides, stem and head.
        cells: for each block the cells, width and number of layers, that it may have beside the
            plan's; nothing for none.
        operations: the candidates of each layer.
        view: channels, height and width of the images, which multiply-adds depend on.
        classes: number of outputs.
        cost: what is counted; widths are those of the network, not the teacher's.

    Attributes:
        cells: each block's cells, the plan's first.
        candidates: each block's candidates: the place of its cell, and its path.

    >>> plan = Plan.parse("dna-8-8.32.32-16s2.32")
    >>> space = Space(plan, (), (Operation(3, 2), Operation(5, 2)), (1, 8, 8), 10)
    >>> space.number, space.plan_of((1, 0)).name
    (8, 'dna-8-8.32.52-16s2.32')
    """

    def __init__(
        self,
        plan: Plan,
        cells: Sequence[Sequence[Cell]],
        operations: Sequence[Operation],
        view: tuple[int, int, int],
        classes: int,
        cost: Cost = "multiply_adds",
    ) -> None:
        self.plan, self.operations, self.cost = plan, tuple(operations), cost
        self.view, self.classes = view, classes
        further = cells or [()] * len(plan.stages)
        self.cells = [
            list(dict.fromkeys([(stage.width, len(stage.operations)), *others]))
            for stage, others in zip(plan.stages, further, strict=True)
        ]
        self.candidates: list[list[tuple[int, Path]]] = [
            [
                (number, path)
                for number, (_, depth) in enumerate(block)
                for path in product(range(len(self.operations)), repeat=depth)
            ]
            for block in self.cells
        ]
        self.costs = self._costs()

    @property
    def number(self) -> int:
        """How many networks there are."""
        return math.prod(map(len, self.candidates))

    @property
    def cheapest(self) -> float:
        """What the cheapest network costs."""
        nothing = [[0.0] * len(candidates) for candidates in self.candidates]
        return frontier(self.blocks(nothing))[0].cost

    def plan_of(self, places: Sequence[int]) -> Plan:
        """A network's plan."""
        stages = []
        for stage, cells, candidates, place in zip(
            self.plan.stages, self.cells, self.candidates, places, strict=True
        ):
            cell, path = candidates[place]
            operations = tuple(self.operations[n] for n in path)
            stages.append(Stage(cells[cell][0], stage.stride, operations))
        plan = self.plan
        return Plan(plan.stem, plan.stem_stride, plan.first, tuple(stages), plan.head)

    def places_of(self, plan: Plan) -> Places | None:
        """Where a plan with these blocks lies in the space; ``None`` where it does not."""
        found = []
        for stage, cells, candidates in zip(plan.stages, self.cells, self.candidates, strict=True):
            cell = (stage.width, len(stage.operations))
            if cell not in cells or not set(stage.operations) <= set(self.operations):
                return None
            path = tuple(map(self.operations.index, stage.operations))
            found.append(candidates.index((cells.index(cell), path)))
        return tuple(found)

    def blocks(self, ratings: Sequence[Sequence[float]]) -> list[list[Candidate]]:
        """What is searched: each block's candidates with their ratings, and last all the rest."""
        blocks = [
            [
                Candidate(rating, costs, cell)
                for rating, costs, (cell, _) in zip(*columns, strict=True)
            ]
            for columns in zip(ratings, self.costs, self.candidates, strict=False)
        ]
        return [*blocks, [Candidate(0.0, self.costs[-1][0])]]

    def cost_of(self, places: Sequence[int]) -> float:
        """What a network costs."""
        total, cell = 0.0, 0
        for candidates, costs, place in zip(self.candidates, self.costs, places, strict=False):
            total += costs[place][cell]
            cell = candidates[place][0]
        return total + self.costs[-1][0][cell]

    def cost_of_plan(self, plan: Plan) -> float:
        """What any network costs, of the space or not."""
        with torch.device("meta"):
            whole = DNANet(plan, self.classes, self.view[0])
        return _count(whole, self.view, self.cost)

    def draw(self, generator: torch.Generator) -> Places:
        """A network drawn uniformly."""
        return tuple(
            int(torch.randint(len(candidates), (), generator=generator))
            for candidates in self.candidates
        )

    def draw_near(
        self, cost: float, generator: torch.Generator, within: float = 0.05, tries: int = 2000
    ) -> Places:
        """The first network drawn that costs about so much, or the nearest of those tried."""
        nearest, best = math.inf, self.draw(generator)
        for _ in range(tries):
            if nearest <= within * cost:
                break
            places = self.draw(generator)
            if (distance := abs(self.cost_of(places) - cost)) < nearest:
                nearest, best = distance, places
        return best

    def _costs(self) -> list[list[tuple[float, ...]]]:
        """Of each candidate, behind each cell of the block before it; last those of the rest."""
        sizes = self.plan.sizes((self.view[1], self.view[2]))
        before = [self.plan.stem_width]
        found: list[list[tuple[float, ...]]] = []
        for stage, size, cells, candidates in zip(
            self.plan.stages, sizes, self.cells, self.candidates, strict=True
        ):
            inner = math.ceil(size[0] / stage.stride), math.ceil(size[1] / stage.stride)
            costs = []
            for cell, path in candidates:
                width = cells[cell][0]
                first, *later = (self.operations[n] for n in path)
                rest = sum(self._layer(width, width, one, 1, inner) for one in later)
                costs.append(
                    tuple(
                        self._layer(inputs, width, first, stage.stride, size) + rest
                        for inputs in before
                    )
                )
            found.append(costs)
            before = [width for width, _ in cells]
        return [*found, [self._rest(found)]]

    def _rest(self, costs: Sequence[Sequence[tuple[float, ...]]]) -> tuple[float, ...]:
        """Stem, head and classifier, behind each cell of the last block."""
        found = []
        for cell, _ in enumerate(self.cells[-1]):
            last = next(place for place, (n, _) in enumerate(self.candidates[-1]) if n == cell)
            places = [0] * (len(self.cells) - 1) + [last]
            parts = sum(of[place][0] for of, place in zip(costs, places, strict=True))
            found.append(self.cost_of_plan(self.plan_of(places)) - parts)
        return tuple(found)

    def _layer(
        self, inputs: int, outputs: int, operation: Operation, stride: int, size: tuple[int, int]
    ) -> float:
        return _layer(inputs, outputs, operation, stride, size, self.cost)


@cache
def _layer(
    inputs: int,
    outputs: int,
    operation: Operation,
    stride: int,
    size: tuple[int, int],
    cost: Cost,
) -> float:
    with torch.device("meta"):
        layer = InvertedResidual(inputs, outputs, operation, stride)
    return _count(layer, (inputs, *size), cost)


def _count(model: nn.Module, view: tuple[int, int, int], cost: Cost) -> float:
    return float(getattr(profile(Network(model), view, latency=False), cost))
