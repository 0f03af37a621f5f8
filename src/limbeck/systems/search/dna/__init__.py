"""Blockwisely Supervised Neural Architecture Search with Knowledge Distillation. Li, Peng, Yuan,
Wang, Liang, Lin, Chang, CVPR 2020 (arXiv 1911.13053).

A network that holds all candidates at once rates them badly, as it has to serve too many. Cut into
blocks, each with few candidates, it is trained fairly and rated completely. What a block in the
middle is trained by is the matching block of a trained teacher: it is given what the teacher's
block takes in, and has to put out what that puts out. Candidates are rated by how far they are
from it, and the best network within a budget has the least sum of ratings.

Needs: a convolutional teacher with as many layers to tap as the student has stages, which halve
the resolution where the student does; validation data; and a student named ``dna-...``, which says
how many blocks there are, how wide and how deep.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models import Input
from limbeck.report.verdict import said, verdict
from limbeck.systems.search.dna.choice import Candidate, Choice, frontier, search
from limbeck.systems.search.dna.networks import (
    PUBLISHED,
    DNANet,
    InvertedResidual,
    Operation,
    Plan,
    Stage,
    network,
    stem_of,
)
from limbeck.systems.search.dna.space import Cost, Places, Space
from limbeck.systems.search.dna.supernet import (
    Supernet,
    rate,
    relative_l1,
    similarity_divergence,
)
from limbeck.training.bench import Bench
from limbeck.training.features import check_maps
from limbeck.training.finding import Chart, Finding
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Journal, Phase, Solve, Training, Update
from limbeck.training.seeding import derive
from limbeck.training.task import Batch, Terms, moved
from limbeck.training.teacher import Teacher

__all__ = [
    "DNA",
    "PUBLISHED",
    "Candidate",
    "Choice",
    "DNANet",
    "InvertedResidual",
    "Operation",
    "Plan",
    "Space",
    "Stage",
    "Supernet",
    "frontier",
    "network",
    "rate",
    "relative_l1",
    "search",
    "similarity_divergence",
]

PURPOSE = "a block is trained to put out"
DRAWS = 1000
"""The networks drawn at random that those are chosen from whose rank is looked at."""
SHOWN = 200
"""The networks drawn at random that the chart of the search shows."""
CALLED = {"multiply_adds": "multiply-adds", "parameters": "parameters"}
_RANDOM, _RANKED, _SHOWN = 1, 2, 3

Look = Callable[[Batch], tuple[Tensor, Tensor]]
"""What the teacher's block takes in and puts out."""
Ratings = list[list[float]]
"""Of each block's candidates, in their order in the space."""


class DNA(Method):
    """A network is searched block by block under a teacher's features, then trained on labels.

    The student of a recipe is a network of the space, ``dna-STEM-STAGE-...``: its blocks, widths,
    depths, stem and head are those of the space, its own operations and their training are what
    the found network is compared with, and what it costs is the budget unless another is given.
    For each seed a search is made, and a network is drawn at random that costs about as much as
    the found one; all of them are trained from scratch on the same budget.

    Args:
        teacher_layers: tap paths, one for each block: what the teacher's block puts out.
        kernels, expansions: every layer may have each kernel with each expansion.
        cells: for each block further cells that compete, (width, layers) of each.
        cost: what the budget limits.
        budget: the most that the network may cost; what the student costs if not given.
        blocks: how each block is trained, with a path drawn uniformly for each step.
        rates: the learning rate of each block, instead of one for all.
        loss: the mean squared error, or the divergence of ``similarities`` between samples.
        teacher_bn: the teacher's batch norms use their ``running`` statistics, or those of each
            ``batch``, as in the published code.
        rating_batches: how many validation batches candidates are rated on.
        ranked: so many networks, spread over the range of ratings, are trained as well, to see
            whether the ratings rank them rightly.
        ranked_share: their epochs over the student's.
    """

    tasks = ("classification",)
    roles: Mapping[str, str] = {
        "baseline": "network as given",
        "student": "network found",
        "random": "network at random",
    }

    def __init__(
        self,
        teacher_layers: Annotated[tuple[str, ...], Field(min_length=1)] = (
            "stage1",
            "stage2",
            "stage3",
        ),
        kernels: Annotated[tuple[Literal[3, 5, 7, 9], ...], Field(min_length=1)] = (3, 5, 7),
        expansions: Annotated[
            tuple[Annotated[int, Field(ge=1, le=9)], ...], Field(min_length=1)
        ] = (6, 3),
        cells: tuple[
            tuple[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1, le=6)]], ...], ...
        ] = (),
        cost: Cost = "multiply_adds",
        budget: Annotated[int, Field(ge=1)] | None = None,
        blocks: Training = Training(  # noqa: B008  (frozen)
            epochs=20,
            batch_size=512,
            optimiser="adam",
            lr=0.005,
            weight_decay=1e-4,
            decay="kernels",
            schedule="step",
            milestones=tuple(range(1, 20)),
            gamma=0.9,
        ),
        rates: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = (),
        loss: Literal["mse", "similarities"] = "mse",
        teacher_bn: Literal["running", "batch"] = "running",
        rating_batches: Annotated[int, Field(ge=1)] = 20,
        ranked: Literal[0] | Annotated[int, Field(ge=3)] = 0,
        ranked_share: Annotated[float, Field(gt=0, le=1)] = 1.0,
    ) -> None:
        super().__init__()
        self.layers = teacher_layers
        self.operations = tuple(dict.fromkeys(Operation(k, e) for e in expansions for k in kernels))
        self.cells = cells
        self.cost: Cost = cost
        self.budget = budget
        self.training_of_blocks = blocks
        self.rates = rates
        self.loss = F.mse_loss if loss == "mse" else similarity_divergence
        self.teacher_bn = teacher_bn
        self.rating_batches = rating_batches
        self.ranked = ranked
        self.ranked_share = ranked_share
        self.ratings: dict[int, Ratings] = {}
        self.untrained: Ratings = []
        self.found: dict[int, dict[str, Any]] = {}
        self.rivals: list[tuple[Places, Network]] = []

    # What is found out before anything is trained.

    def rehearse(self, bench: Bench) -> None:
        self.check_task(bench.task)
        if len(bench.candidates) != 1:
            raise UserError(
                f"blocks are supervised by one teacher, not {len(bench.candidates)}; name one "
                "with --teacher"
            )
        if not len(bench.validation):
            raise UserError("candidates are rated on validation data; give some")
        with torch.random.fork_rng():
            given = bench.laid_out(bench.make_student(bench.seeds[0]))
            self._check_numbers(_model(given).plan)
            space = self._space(bench, given)
            if space.cheapest > self._budget(space):
                raise UserError(
                    f"no network of the space costs {self._budget(space):,.0f} {CALLED[self.cost]} "
                    f"or less; the cheapest costs {space.cheapest:,.0f}"
                )
            sample = bench.sample(bench.transfer)
            taught = bench.laid_out(copy.deepcopy(bench.candidates[0].network))
            teacher = self._teacher(bench, given, taught)
            for number, _ in enumerate(space.cells):
                self._check_block(bench, given, teacher, space, number, sample)
            labelled = sample if bench.task.labelled(sample) else bench.sample(bench.train)
            rival = (
                given if bench.rival is None else bench.laid_out(bench.rival.make(bench.seeds[0]))
            )
            for one in (given, rival):
                bench.task.loss(bench.task.run(one, labelled), labelled)

    def _check_numbers(self, plan: Plan) -> None:
        """See to it that everything that is said of each block is said of all."""
        blocks = len(plan.stages)
        for told, number in (
            ("teacher_layers", len(self.layers)),
            ("cells", len(self.cells) or blocks),
            ("rates", len(self.rates) or blocks),
        ):
            if number != blocks:
                raise UserError(
                    f"{told} has {number} entries, but the student {plan.name} has {blocks} "
                    "stages, each of which is a block; give one for each"
                )

    def _check_block(
        self,
        bench: Bench,
        given: Network,
        teacher: Teacher,
        space: Space,
        number: int,
        sample: Batch,
    ) -> None:
        """See to it that a block can put out what the teacher's does."""
        x, wanted = self._look(bench, given, teacher, number)(sample)
        check_maps(wanted, f"teacher's {self.layers[number]!r}", PURPOSE)
        block = self._supernet(bench, given, teacher, space, number, 0, seed=0)
        found = block(x, block.paths[0])
        if found.shape != wanted.shape:
            sides = [f"{f.shape[2]} x {f.shape[3]}" for f in (found, wanted)]
            raise UserError(
                f"stage {number + 1} of the student {space.plan.name} would put out maps of "
                f"{sides[0]}, but the teacher's {self.layers[number]!r} are {sides[1]}; s2 behind "
                "its channels halves what it takes in, or name another layer of the teacher"
            )

    def _space(self, bench: Bench, given: Network) -> Space:
        model = _model(given)
        channels, height, width = bench.sample()["image"].shape[1:]
        if isinstance(given.input, Input):
            channels, (height, width) = given.input.channels, given.input.size
        view = (channels, height, width)
        return Space(model.plan, self.cells, self.operations, view, model.classes, self.cost)

    def _budget(self, space: Space) -> float:
        if self.budget is not None:
            return self.budget
        return space.cost_of_plan(space.plan)

    # The blocks.

    def _teacher(self, bench: Bench, given: Network, network: Network) -> Teacher:
        """The teacher of the blocks, which sees images as large as the student's.

        Its maps are too many to be remembered on disk.
        """
        fed, wanted = network.input, given.input
        if isinstance(fed, Input) and isinstance(wanted, Input) and fed.size != wanted.size:
            resized = Network(network.model, replace(fed, size=wanted.size), network.name)
            network = resized.lay_out(network.memory_format)
        if self.teacher_bn == "running":
            return bench.frozen([network], None)
        network = copy.deepcopy(network)
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.track_running_stats = False
                norm.running_mean = norm.running_var = None
        return Teacher(network, fold=False).to(bench.device)

    def _look(self, bench: Bench, given: Network, teacher: Teacher, number: int) -> Look:
        """What the teacher's block takes in and puts out; the first takes in images."""
        paths = self.layers[max(0, number - 1) : number + 1]
        teacher.tap(paths, outputs=False)

        def look(batch: Batch) -> tuple[Tensor, Tensor]:
            features = teacher(bench.task, batch).features
            if number:
                x = features[paths[0]]
                return x.to(torch.promote_types(x.dtype, torch.float32)), features[paths[1]]
            image = batch["image"] if given.input is None else given.input(batch["image"])
            return image.to(memory_format=given.memory_format), features[paths[0]]

        return look

    def _supernet(
        self,
        bench: Bench,
        given: Network,
        teacher: Teacher,
        space: Space,
        number: int,
        cell: int,
        seed: int,
    ) -> Supernet:
        """A block with fresh weights, one of its cells; the first has the stem before it."""
        x, wanted = self._look(bench, given, teacher, number)(bench.sample())
        width, depth = space.cells[number][cell]
        plan, stem, inputs = space.plan, None, x.shape[1]
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, number, cell) >> 1)
            if number == 0:
                stem, inputs = stem_of(plan, inputs), plan.stem_width
            stride = plan.stages[number].stride
            block = Supernet(inputs, width, wanted.shape[1], stride, depth, self.operations, stem)
        return block.to(bench.device).to(memory_format=given.memory_format)

    def _train(
        self, bench: Bench, look: Look, block: Supernet, number: int, name: str, seed: int
    ) -> Fit:
        """One path for each step: L = mean (S - T)^2."""
        settings = self.training_of_blocks
        if self.rates:
            settings = settings.model_copy(update={"lr": self.rates[number]})

        def terms(batch: Batch) -> Terms:
            x, wanted = look(batch)
            return {"features": self.loss(block(x, block.draw()), wanted)}

        return Fit(
            name=name,
            seed=seed,
            updates=[Update(name=name, train={"block": block}, terms=terms, settings=settings)],
            batches=bench.batches(settings.batch_size, seed),
            epochs=settings.epochs,
        )

    def _rate(self, bench: Bench, look: Look, block: Supernet, name: str, seed: int) -> Solve:
        """All candidates on the same validation batches, by statistics of the same training batch.

        The block itself keeps its statistics.
        """
        size = self.training_of_blocks.batch_size

        def run(journal: Journal) -> list[float]:
            training = moved(next(bench.batches(size, seed).epoch(0)), bench.device)
            held = bench.task.batches(bench.validation, batch_size=size).epoch(0)
            seen = [look(moved(batch, bench.device)) for batch in islice(held, self.rating_batches)]
            own, given = copy.deepcopy(block), look(training)[0]
            ratings: list[float] = []
            for first, _ in enumerate(block.operations):
                ratings += journal.remember(f"{first}", partial(rate, own, given, seen, first))
            return ratings

        return Solve(name=name, seed=seed, run=run)

    # The run.

    def phases(self, bench: Bench) -> Phases:
        yield from bench.teach()
        assert bench.teacher is not None, "it was taught"
        self.untrained, self.rivals = [], []
        for seed in bench.seeds:
            yield from bench.plain(seed)
            given = bench.laid_out(bench.make_student(seed))
            space = self._space(bench, given)
            teacher = self._teacher(bench, given, bench.teacher.networks[0])
            self.ratings[seed] = yield from self._rated(bench, given, teacher, space, seed)
            choose = partial(self._choose, space, seed, self._ranks(bench, seed))
            found = yield Solve(name=bench.label("search", seed), seed=seed, run=choose)
            self.found[seed] = found
            if bench.baseline:
                drawn = self._made(bench, given, space.plan_of(found["random"]), seed)
                yield bench.on_labels("random", drawn, bench.training, seed)
                bench.deliver("random", seed, drawn)
            for number, places in enumerate(found["ranked"], start=1):
                rival = self._made(bench, given, space.plan_of(places), seed)
                share = bench.training.stretched(self.ranked_share)
                yield bench.on_labels(f"ranked-{number}", rival, share, seed)
                self.rivals.append((tuple(places), rival))
            student = self._made(bench, given, space.plan_of(found["found"]), seed)
            yield bench.on_labels("student", student, bench.training, seed)
            bench.students[seed] = student

    def _rated(
        self, bench: Bench, given: Network, teacher: Teacher, space: Space, seed: int
    ) -> Generator[Phase, Any, Ratings]:
        """Train and rate block after block, which share nothing but the teacher."""
        ratings: Ratings = []
        for number, cells in enumerate(space.cells):
            found: list[float] = []
            before: list[float] = []
            for cell, _ in enumerate(cells):
                ending = f"{number + 1}" if len(cells) == 1 else f"{number + 1}-{cell + 1}"
                block = self._supernet(bench, given, teacher, space, number, cell, seed)
                look = self._look(bench, given, teacher, number)
                if self._ranks(bench, seed):
                    name = bench.label(f"untrained-{ending}", seed)
                    before += yield self._rate(bench, look, block, name, seed)
                name = bench.label(f"block-{ending}", seed)
                yield self._train(bench, look, block, number, name, seed)
                name = bench.label(f"rate-{ending}", seed)
                found += yield self._rate(bench, look, block, name, seed)
            ratings.append(found)
            if self._ranks(bench, seed):
                self.untrained.append(before)
        return ratings

    def _ranks(self, bench: Bench, seed: int) -> bool:
        """Whether it is looked at if networks are ranked rightly: in the first search."""
        return self.ranked > 0 and seed == bench.seeds[0]

    def _choose(self, space: Space, seed: int, ranks: bool, _: Journal) -> dict[str, Any]:
        """The places of the network with the least sum of ratings, and of those it is beside."""
        ratings = self.ratings[seed]
        choice = search(space.blocks(ratings), self._budget(space))
        assert choice is not None, "the rehearsal has seen to it"
        found = choice.places[:-1]
        near = space.draw_near(choice.cost, _generator(seed, _RANDOM))
        ranked: list[Places] = []
        if ranks:
            ranked = _spread(space, ratings, self.ranked, _generator(seed, _RANKED))
        return {"found": list(found), "random": list(near), "ranked": [list(p) for p in ranked]}

    def _made(self, bench: Bench, given: Network, plan: Plan, seed: int) -> Network:
        """A network by its plan, with fresh weights."""
        alike = _model(given)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = DNANet(plan, alike.classes, alike.channels)
        made = bench.laid_out(Network(model, given.input, plan.name, given.classes))
        made.compile_model(bench.engine.compile)
        return made

    # The report.

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """What was found and beside what, the search, the blocks, and whether ratings rank."""
        seed = bench.seeds[0]
        space = self._space(bench, bench.make_student(seed))
        shown = [self._networks(bench, space), self._search(space, seed)]
        shown.append(self._blocks(space, seed))
        return [*shown, self._ranking(bench, space, seed)] if self.rivals else shown

    def _networks(self, bench: Bench, space: Space) -> Finding:
        """Each network with its cost, its rating and what it does on the test split."""
        metric, percent = bench.task.metric, bench.task.metric == "accuracy"
        rows = [["seed", "network", CALLED[self.cost], "sum of ratings", metric]]
        values: dict[str, list[float]] = {"random": [], "student": []}
        for seed in bench.seeds:
            delivered = bench.delivered(seed)
            for role in ("baseline", "random", "student"):
                one = delivered.get(role)
                if not isinstance(one, Network) or not isinstance(one.model, DNANet):
                    continue
                value = bench.task.measure(one, bench.test)[metric]
                values.setdefault(role, []).append(value)
                plan, rating = one.model.plan, "outside the space"
                if (places := space.places_of(plan)) is not None:
                    rating = f"{_sum(self.ratings[seed], places):.4f}"
                cost = f"{space.cost_of_plan(plan):,.0f}"
                name = f"{self.roles[role]}: {plan.name}"
                rows.append([f"{seed}", name, cost, rating, said([value], percent)])
        caption = (
            f"{space.number:,} networks were to choose from, of at most {self._budget(space):,.0f} "
            f"{CALLED[self.cost]}. Behind a stage's channels each layer has two digits, its kernel "
            "and its expansion; s2 halves the resolution. All were trained from scratch on the "
            "same budget and measured on the test split."
        )
        if values["random"]:
            names = self.roles["random"], self.roles["student"]
            higher = bench.task.higher_is_better
            found = verdict(values["random"], values["student"], higher, names).sentence
            caption += f" {found[:1].upper()}{found[1:]}."
        return Finding("Networks", caption, rows)

    def _search(self, space: Space, seed: int) -> Finding:
        """The best sum of ratings for each budget, and where the networks lie."""
        ratings, generator = self.ratings[seed], _generator(seed, _SHOWN)

        def at(places: Sequence[int]) -> tuple[float, float]:
            return space.cost_of(places), _sum(ratings, places)

        lines = {
            "any network": [at(space.draw(generator)) for _ in range(SHOWN)],
            "best within a budget": [(c.cost, c.rating) for c in frontier(space.blocks(ratings))],
        }
        if (given := space.places_of(space.plan)) is not None:
            lines["baseline"] = [at(given)]
        lines["student"] = [at(self.found[seed]["found"])]
        chart = Chart(
            "Rating and cost",
            CALLED[self.cost],
            "sum of ratings",
            lines,
            dots=("any network", "baseline", "student"),
        )
        caption = (
            "The sum of the ratings of a network's blocks, the lower the better, over what the "
            f"network costs; the line is exact. Seed {seed}."
        )
        return Finding("Search", caption, charts=[chart])

    def _blocks(self, space: Space, seed: int) -> Finding:
        """How candidates were rated, block by block, and which was chosen."""
        rows = [["block", "teacher's", "candidates", "best", "median", "worst", "chosen", "rank"]]
        lines: dict[str, list[tuple[float, float]]] = {}
        plan = space.plan_of(self.found[seed]["found"])
        for number, ratings in enumerate(self.ratings[seed]):
            order, place = sorted(ratings), self.found[seed]["found"][number]
            rank = order.index(ratings[place]) + 1
            spots = order[0], order[len(order) // 2], order[-1]
            rows.append(
                [f"{number + 1}", self.layers[number], f"{len(ratings):,}"]
                + [f"{rating:.4f}" for rating in spots]
                + [str(plan.stages[number]), f"{rank}"]
            )
            most = max(len(order) - 1, 1)
            line = [(100 * n / most, rating) for n, rating in enumerate(order)]
            lines[f"block {number + 1}"] = line[:: max(1, len(line) // SHOWN)]
        chart = Chart("Candidates of each block", "worse than, %", "rating", lines)
        caption = (
            "Mean |S - T| over the deviation of T, on validation data, each candidate by batch "
            f"statistics of its own. The lowest sum is chosen within the budget. Seed {seed}."
        )
        return Finding("Blocks", caption, rows, charts=[chart])

    def _ranking(self, bench: Bench, space: Space, seed: int) -> Finding:
        """Whether the ratings rank networks as training them does."""
        from scipy.stats import kendalltau

        metric, sign = bench.task.metric, 1 if bench.task.higher_is_better else -1
        reached = [bench.task.measure(n, bench.test)[metric] for _, n in self.rivals]
        every = [places for places, _ in self.rivals]
        predictors = {
            "sum of ratings, the lower the better": [-_sum(self.ratings[seed], p) for p in every],
            "the same by untrained blocks": [-_sum(self.untrained, p) for p in every],
            f"{CALLED[self.cost]}, the more the better": [space.cost_of(p) for p in every],
        }
        rows = [["ranked by", "Kendall's tau", "p"]]
        for name, predicted in predictors.items():
            found = kendalltau(predicted, [sign * value for value in reached])
            rows.append([name, f"{found.statistic:+.3f}", f"{found.pvalue:.2g}"])
        points = [(_sum(self.ratings[seed], p), v) for p, v in zip(every, reached, strict=True)]
        chart = Chart(
            "Rated and trained", "sum of ratings", metric, {"networks": points}, ["networks"]
        )
        caption = (
            f"{len(every)} networks spread over the range of ratings, trained from scratch for "
            f"{bench.training.stretched(self.ranked_share).epochs:,} epochs and measured on the "
            "test split. Tau is 1 where two orders agree, 0 where one tells nothing of the other."
        )
        return Finding("Ranking", caption, rows, charts=[chart])


def _model(given: Network) -> DNANet:
    """The model of a student, which is to be a network of the space."""
    if not isinstance(given.model, DNANet):
        raise UserError(
            f"the student {given.name or type(given.model).__name__} is no network of the space; "
            "give one whose name begins with dna-, such as dna-16-24.33.33-48s2.33.33, which says "
            "how many blocks there are, how wide and how deep"
        )
    return given.model


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive(*numbers) >> 1)


def _sum(ratings: Ratings, places: Sequence[int]) -> float:
    return sum(of[place] for of, place in zip(ratings, places, strict=True))


def _spread(
    space: Space, ratings: Ratings, number: int, generator: torch.Generator
) -> list[Places]:
    """Networks drawn at random whose sums of ratings are spread evenly by rank."""
    drawn = {space.draw(generator) for _ in range(DRAWS)}
    order = sorted(drawn, key=lambda places: (_sum(ratings, places), places))
    last = max(number - 1, 1)
    return [order[n * (len(order) - 1) // last] for n in range(min(number, len(order)))]
