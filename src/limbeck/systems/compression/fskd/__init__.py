"""Few Sample Knowledge Distillation for Efficient Network Compression. Li, Li, Liu, Zhang, CVPR
2020 (arXiv 1812.01839).

A pruned network has forgotten, and usually learns again from all the labelled data. Here a 1x1
convolution is put behind each of its convolutions, and is found by linear least squares: what
comes out is to be what the whole network puts out there, in the channels that were kept, on a few
images without labels. Block follows block, so that each one makes up for what the ones before
could not, and at last each 1x1 convolution is multiplied into the convolution before it: the
repaired network has the size of the pruned one.

Needs: a convolutional classifier whose forward pass can be traced, and an image set in memory or
by name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.data.batches import ImageBatches
from limbeck.data.data import Split
from limbeck.errors import UserError
from limbeck.models import profile
from limbeck.report.verdict import said
from limbeck.systems.compression.fskd.networks import PLAIN, Plain, folded, name_of, network
from limbeck.systems.compression.fskd.pointwise import (
    Block,
    Moments,
    Recombined,
    Sight,
    add_pointwise,
    alike,
    blocks,
    fit_block,
    least_squares,
    merge_pointwise,
)
from limbeck.systems.compression.fskd.pruning import (
    Layer,
    layers,
    prune,
    surviving,
    surviving_together,
    width,
)
from limbeck.training.bench import Bench
from limbeck.training.finding import Chart, Finding
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Journal, Solve, Training, Update
from limbeck.training.seeding import derive
from limbeck.training.task import Batch, Terms

__all__ = [
    "FSKD",
    "PLAIN",
    "Block",
    "Moments",
    "Plain",
    "Recombined",
    "Sight",
    "add_pointwise",
    "blocks",
    "fit_block",
    "layers",
    "least_squares",
    "merge_pointwise",
    "name_of",
    "network",
    "prune",
    "surviving",
    "surviving_together",
]

Rival = Literal["pruned", "brief", "closed", "sgd"]
CALLED: dict[str, str] = {
    "pruned": "pruned alone",
    "brief": "brief fine-tuning",
    "closed": "least squares",
    "sgd": "by gradient",
}
_FEW = 47


class FSKD(Method):
    """A pruned network is repaired by least squares, from a few images without labels.

    The student of a recipe is the teacher's own network, whose filters are pruned by ``ratio``, or
    that network with fewer filters (``fskd-BASE-keep-...``), which says how many stay. What it is
    compared with is the same pruned network, fine-tuned with the labels of the same few images on
    the student's budget; a seed chooses the images.

    Args:
        samples: how many images, of the transfer set.
        criterion: which filters stay: those with the largest sums of absolute weights (``l1``), a
            share of each layer; or with the largest scales of their batch norms (``scale``), a
            share of all together, as in network slimming, but from a teacher that was trained
            without a penalty on them.
        ratio: the share of filters that go.
        layers: the convolutions that lose filters, 1 being the first; all that can if not given.
        solver: ``closed``, least squares for one block after the other; ``sgd``, all of them at
            once by gradient, in as many steps as fine-tuning has.
        sums: fit the branches of a residual network so that the sums come out right, which the
            paper does not speak of.
        sgd: the optimiser of ``sgd``; epochs and batch size are those of fine-tuning.
        others: further numbers of images, for the table.
        rivals: what else is in the table: ``pruned`` and left alone; ``brief``, fine-tuning with
            as many multiply-adds as least squares take; the other solver.
    """

    tasks = ("classification",)
    label_weight = 0.0
    roles: Mapping[str, str] = {
        "baseline": "fine-tuning with labels",
        "student": "few-sample distillation",
    }

    def __init__(
        self,
        samples: Annotated[int, Field(ge=1)] = 100,
        criterion: Literal["l1", "scale"] = "l1",
        ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        layers: tuple[Annotated[int, Field(ge=1)], ...] = (),
        solver: Literal["closed", "sgd"] = "closed",
        sums: bool = False,
        sgd: Training = Training(  # noqa: B008  (frozen)
            optimiser="adam", lr=0.003, weight_decay=0.0
        ),
        others: tuple[Annotated[int, Field(ge=1)], ...] = (),
        rivals: tuple[Rival, ...] = ("pruned", "brief", "sgd"),
    ) -> None:
        super().__init__()
        self.samples = samples
        self.criterion = criterion
        self.ratio = ratio
        self.layers = layers
        self.solver = solver
        self.sums = sums
        self.training_by_gradient = sgd
        self.others = tuple(n for n in dict.fromkeys(others) if n != samples)
        self.rivals = tuple(way for way in dict.fromkeys(rivals) if way != solver)
        self.ways: dict[tuple[str, int, int], Network] = {}
        self.fitted: dict[int, dict[str, dict[str, float]]] = {}
        self.moved: dict[int, float] = {}
        self.plan: list[tuple[str, int, int, str]] = []

    # What is found out before anything is trained.

    def rehearse(self, bench: Bench) -> None:
        if bench.rival is not None:
            raise UserError(
                "what few-sample distillation is compared with is the same pruned network, "
                "fine-tuned; leave baseline out, or give false"
            )
        if len(bench.candidates) != 1:
            raise UserError(
                f"the student is one teacher, pruned, but {len(bench.candidates)} teachers were "
                "given; name one with --teacher"
            )
        self.check_task(bench.task)
        if not isinstance(bench.transfer, Split):
            raise UserError(
                "a few images are chosen from a set in memory or by name; give the data by name "
                "or as limbeck.data.Data instead of your own loaders"
            )
        most = max(self.samples, *self.others, 0)
        if most > len(bench.transfer):
            raise UserError(
                f"{most:,} images are wanted, but the transfer set has {len(bench.transfer):,}"
            )
        with torch.random.fork_rng():
            teacher = bench.laid_out(copy.deepcopy(bench.candidates[0].network)).eval()
            if teacher.name.startswith("hf:"):
                raise UserError(
                    f"{teacher.name} would have no name when pruned; take a network of Limbeck's "
                    "own, torchvision's or timm's, or pass the module in Python"
                )
            kept = self._kept(bench, teacher)
            pruned = _pruned(teacher, kept)
            sight = self._sight(pruned, teacher, kept)
            fit_block(sight, sight.blocks[0], bench.task, _few(bench.transfer, 1, 0))
            sample = bench.sample()
            if bench.task.labelled(sample):
                bench.task.loss(bench.task.run(pruned, sample), sample)

    def _kept(self, bench: Bench, teacher: Network) -> dict[str, list[int]]:
        """By a convolution's path the filters that stay."""
        every = layers(copy.deepcopy(teacher.model))
        able = {layer.path: layer for layer in every if not layer.obstacle}
        if not able:
            reasons = "; ".join(f"{layer.path}: {layer.obstacle}" for layer in every[:2])
            raise UserError(
                f"{_called(teacher)} has no convolution that can lose filters"
                + (f" ({reasons})" if reasons else "")
            )
        by_hand = _by_hand(teacher, bench.make_student(bench.seeds[0]), every)
        paths = list(by_hand) or self._paths(teacher, every)
        scores = {path: self._scores(teacher, able[path]) for path in paths}
        if by_hand:
            kept = {
                path: scores[path].argsort(descending=True, stable=True)[:most].sort().values
                for path, most in by_hand.items()
            }
        elif self.criterion == "scale":
            kept = surviving_together(scores, self.ratio)
        else:
            kept = {path: surviving(score, self.ratio) for path, score in scores.items()}
        return {path: numbers.tolist() for path, numbers in kept.items()}

    def _paths(self, teacher: Network, every: Sequence[Layer]) -> list[str]:
        """The convolutions that lose filters by ratio."""
        if not self.layers:
            return [layer.path for layer in every if not layer.obstacle]
        for number in self.layers:
            if number > len(every):
                raise UserError(
                    f"there is no convolution {number}: {_called(teacher)} has {len(every)}"
                )
            layer = every[number - 1]
            if layer.obstacle:
                raise UserError(
                    f"convolution {number} of {_called(teacher)}, {layer.path}, cannot lose "
                    f"filters: {layer.obstacle}"
                )
        return [every[number - 1].path for number in sorted(set(self.layers))]

    def _scores(self, teacher: Network, layer: Layer) -> Tensor:
        """What a layer's filters are chosen by, the larger the better."""
        if self.criterion == "l1":
            conv = teacher.model.get_submodule(layer.path)
            assert isinstance(conv, nn.Conv2d)
            return conv.weight.detach().abs().flatten(1).sum(1).cpu()
        norms = [teacher.model.get_submodule(name) for name in layer.norms]
        scales = [norm.weight for norm in norms if isinstance(norm.weight, Tensor)]
        if not scales:
            raise UserError(
                f"{layer.path} of {_called(teacher)} has no batch norm whose scales say which "
                "filters matter; choose criterion: l1"
            )
        return scales[0].detach().abs().cpu()

    # The run.

    def phases(self, bench: Bench) -> Phases:
        yield from bench.teach()
        assert bench.teacher is not None, "it was taught"
        teacher = bench.teacher.networks[0]
        kept = yield Solve(name="prune", run=lambda _: self._kept(bench, teacher))
        self.plan = _plan(teacher, kept)
        numbers = (self.samples, *self.others) if bench.baseline else (self.samples,)
        for seed in bench.seeds:
            for number in numbers:
                yield from self._from_few(bench, teacher, kept, seed, number)
            bench.students[seed] = self.ways["student", self.samples, seed]
            if ("baseline", self.samples, seed) in self.ways:
                bench.baselines[seed] = self.ways["baseline", self.samples, seed]

    def _from_few(
        self,
        bench: Bench,
        teacher: Network,
        kept: Mapping[str, list[int]],
        seed: int,
        number: int,
    ) -> Phases:
        """The pruned network by all ways from the same few images."""
        images = _few(bench.transfer, number, seed)
        pruned = _pruned(teacher, kept)
        budget = self._budget(bench, number)
        tuned = {"baseline": budget, "brief": self._brief(bench, teacher, pruned, budget)}
        for way in self._ways(bench):
            name = bench.label(way if number == self.samples else f"{way}-{number}", seed)
            if way in tuned:
                learner = alike(copy.deepcopy(pruned.model), pruned, pruned.name)
                fit = bench.fit(name, learner, tuned[way], seed=seed, split=images)
                yield fit if bench.select == "best" else replace(fit, evaluate=None)
                self.ways[way, number, seed] = learner
            elif way == "pruned":
                self.ways[way, number, seed] = pruned
            else:
                sight = self._sight(pruned, teacher, kept)
                solver = self.solver if way == "student" else way
                shown = replace(images, labels=None)
                if solver == "closed":
                    found = yield self._solve(bench, name, seed, sight, shown)
                    if number == self.samples:
                        self.fitted[seed] = found
                else:
                    yield self._descend(bench, name, seed, sight, shown, budget)
                yield from self._merge(bench, way, number, seed, sight, pruned)

    def _ways(self, bench: Bench) -> list[str]:
        if not bench.baseline:
            return ["student"]
        if bench.transfer.labels is None:
            bench.voice.say("nothing is fine-tuned: there are no labels to learn from")
            return [*(way for way in self.rivals if way != "brief"), "student"]
        return ["baseline", *self.rivals, "student"]

    def _budget(self, bench: Bench, number: int) -> Training:
        """The student's budget in steps, on another number of images."""
        training = bench.training
        if not training.epochs:
            return training
        size = training.batch_size
        steps = training.epochs * math.ceil(self.samples / size)
        return training.stretched(max(1, round(steps / math.ceil(number / size))) / training.epochs)

    def _brief(self, bench: Bench, teacher: Network, pruned: Network, budget: Training) -> Training:
        """Fine-tuning that takes about as many multiply-adds as least squares.

        These run both networks up to each block, on average to the middle; a step runs the pruned
        one forward, and backward at twice the cost.
        """
        if not budget.epochs:
            return budget
        view = bench.sample()["image"].shape[1:]
        whole, part = (profile(n, view, latency=False).multiply_adds for n in (teacher, pruned))
        passes = (len(blocks(folded(pruned).model)) + 1) / 2
        return budget.stretched(max(1, round(passes * (whole + part) / (3 * part))) / budget.epochs)

    def _sight(self, pruned: Network, teacher: Network, kept: Mapping[str, list[int]]) -> Sight:
        """Batch norms folded in both networks, 1x1 convolutions added to the pruned one."""
        small, whole = folded(pruned), folded(teacher)
        over = blocks(small.model)
        grown = add_pointwise(small.model, [block.path for block in over]).eval()
        sight = Sight(
            alike(grown.requires_grad_(False), small),
            whole.requires_grad_(False).eval(),
            {path: torch.tensor(numbers) for path, numbers in kept.items()},
            over,
            self.sums,
        )
        sight.added.requires_grad_(True)
        return sight

    def _solve(self, bench: Bench, name: str, seed: int, sight: Sight, images: Split) -> Solve:
        """Least squares for one block after the other, in the student as it then is."""
        added = sight.added

        @torch.no_grad()
        def run(journal: Journal) -> dict[str, dict[str, float]]:
            facts = {}
            for (place, pointwise), block in zip(added.items(), sight.blocks, strict=True):
                work = partial(fit_block, sight, block, bench.task, images)
                found = dict(journal.remember(place, work))
                assert isinstance(pointwise, nn.Conv2d)
                pointwise.weight.copy_(found.pop("q").view_as(pointwise.weight))
                facts[block.path] = found
            return facts

        return Solve(name=name, seed=seed, run=run, writes={"pointwise": added})

    def _descend(
        self,
        bench: Bench,
        name: str,
        seed: int,
        sight: Sight,
        images: Split,
        budget: Training,
    ) -> Fit:
        """All 1x1 convolutions at once, on the sum of the blocks' mean squared errors."""
        look = sight.pairs(sight.blocks)

        def terms(batch: Batch) -> Terms:
            errors = [F.mse_loss(own, wanted) for own, wanted in look(batch["image"])]
            return {"blocks": torch.stack(errors).sum()}

        settings = self.training_by_gradient.model_copy(
            update={"epochs": budget.epochs, "batch_size": budget.batch_size}
        )
        # Images as they are, in an order of their own each epoch.
        batches = ImageBatches(
            images, settings.batch_size, seed=seed, train=True, device=bench.device
        )
        return Fit(
            name=name,
            seed=seed,
            updates=[Update(train={"pointwise": sight.added}, terms=terms, settings=settings)],
            batches=batches,
            epochs=settings.epochs,
        )

    def _merge(
        self, bench: Bench, way: str, number: int, seed: int, sight: Sight, pruned: Network
    ) -> Phases:
        """Multiply the 1x1 convolutions into those before them."""
        merged = folded(pruned)
        merged.requires_grad_(True)
        sample = bench.sample()["image"]

        @torch.no_grad()
        def run(_: Journal) -> float:
            merged.model.load_state_dict(merge_pointwise(sight.student.model).state_dict())
            before, after = sight.student(sample), merged.eval()(sample)
            return float((before - after).norm() / before.norm())

        name = "merge" if way == "student" else f"merge-{way}"
        name = bench.label(name if number == self.samples else f"{name}-{number}", seed)
        moved = yield Solve(name=name, seed=seed, run=run, writes={"student": merged})
        self.ways[way, number, seed] = merged
        if way == "student" and number == self.samples:
            self.moved[seed] = moved

    # The report.

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """Accuracy and time of each way by the number of images, and the error of each block."""
        return [self._table(bench), *([self._errors(bench)] if self.fitted else [])]

    def _table(self, bench: Bench) -> Finding:
        assert bench.teacher is not None
        metric, called = bench.task.metric, {**CALLED, **self.roles}
        numbers = sorted({number for _, number, _ in self.ways})
        heard = bench.task.measure(bench.teacher, bench.test)[metric]
        rows = [["way", "labels", *(f"{number:,} images" for number in numbers)]]
        rows.append(["teacher, whole", "", *([said([heard], percent=True)] * len(numbers))])
        lines: dict[str, list[tuple[float, float]]] = {}
        order = ("pruned", "student", "closed", "sgd", "baseline", "brief")
        there = {way for way, _, _ in self.ways}
        for way in (way for way in order if way in there):
            cells = []
            for number in numbers:
                found = [
                    bench.task.measure(self.ways[way, number, seed], bench.test)[metric]
                    for seed in (bench.seeds[:1] if way == "pruned" else bench.seeds)
                ]
                cells.append(said(found, percent=True) + self._took(bench, way, number))
                line = lines.setdefault(way if way in self.roles else called[way], [])
                line.append((number, sum(found) / len(found)))
            labels = "yes" if way in ("baseline", "brief") else "no"
            rows.append([called[way], labels, *cells])
        chart = Chart("From a few images", "images", metric, lines)
        caption = (
            "Test accuracy of the same pruned network, repaired from the same few images, and the "
            "seconds that took. Brief fine-tuning is as many multiply-adds as least squares are."
        )
        if len(bench.seeds) > 1:
            caption += " Each seed chooses other images; ± is half the 95 % interval."
        if self.moved:
            caption += (
                f" Merging the 1x1 convolutions moved the logits by {max(self.moved.values()):.0e} "
                "of their length at most."
            )
        return Finding("A few images", caption, rows, charts=[chart] if len(numbers) > 1 else [])

    def _took(self, bench: Bench, way: str, number: int) -> str:
        """The seconds of a way's phases, as far as they are known."""
        ending = "" if number == self.samples else f"-{number}"
        merge = "merge" if way == "student" else f"merge-{way}"
        known = [
            bench.seconds.get(bench.label(f"{way}{ending}", seed), 0.0)
            + bench.seconds.get(bench.label(f"{merge}{ending}", seed), 0.0)
            for seed in bench.seeds
        ]
        return f", {sum(known) / len(known):.1f} s" if any(known) else ""

    def _errors(self, bench: Bench) -> Finding:
        """What each block's fit left of its error, and what was pruned."""
        fits = list(self.fitted.values())
        rows = [["convolution", "filters", "error when pruned", "error when fitted", ""]]
        lines: dict[str, list[tuple[float, float]]] = {"pruned": [], "student": []}
        for place, (path, left, whole, obstacle) in enumerate(self.plan, start=1):
            errors = {"before": "", "after": ""}
            for key, line in (("before", "pruned"), ("after", "student")):
                shares = [facts[path][key] for facts in fits if path in facts]
                if shares:
                    mean = sum(shares) / len(shares)
                    errors[key] = f"{100 * mean:.2f} %"
                    lines[line].append((place, mean))
            filters = f"{left} of {whole}" if left < whole else f"{whole}"
            rows.append([path, filters, *errors.values(), obstacle and f"whole: {obstacle}"])
        caption = (
            "Squared error of what a convolution puts out, as a share of the squares of what it "
            "was to put out, on the few images: with the blocks before it repaired, before and "
            "after its own fit."
        )
        chart = Chart("Block after block", "convolution", "share of squares", lines)
        return Finding("What is left of each block's error", caption, rows, charts=[chart])


def _few(split: Split, number: int, seed: int) -> Split:
    """So many samples of a split; fewer ones of a seed are among its more."""
    generator = torch.Generator().manual_seed(derive(seed, _FEW) >> 1)
    return split.subset(torch.randperm(len(split), generator=generator)[:number])


def _pruned(teacher: Network, kept: Mapping[str, list[int]]) -> Network:
    """The teacher without the filters that go, named by the widths that are left."""
    chosen = {path: torch.tensor(numbers) for path, numbers in kept.items()}
    model = prune(teacher.model, chosen).requires_grad_(True)
    able = [la.path for la in layers(copy.deepcopy(model)) if not la.obstacle]
    return alike(model, teacher, name_of(teacher.name, [width(model, p) for p in able]))


def _by_hand(teacher: Network, student: Network, every: Sequence[Layer]) -> dict[str, int]:
    """The widths that a student has where they are not the teacher's; empty where all are.

    Raises:
        UserError: it is another network.
    """
    modules, widths = dict(student.model.named_modules()), {}
    convolutions = [path for path, m in modules.items() if isinstance(m, nn.Conv2d)]
    if sorted(convolutions) != sorted(layer.path for layer in every):
        base = name_of(teacher.name, ["WIDTHS"]) or "the same module with fewer filters"
        raise UserError(
            f"the student {_called(student)} is not the teacher {_called(teacher)} with fewer "
            f"filters; as a student give {_called(teacher)}, which is then pruned, or {base}"
        )
    for layer in every:
        own, whole = width(student.model, layer.path), width(teacher.model, layer.path)
        if own > whole or (own < whole and layer.obstacle):
            raise UserError(
                f"the student's {layer.path} has {own} filters and the teacher's {whole}"
                + (f", but it cannot lose any: {layer.obstacle}" if own < whole else "")
                + f"; as a student give {_called(teacher)}, which is then pruned"
            )
        if own < whole:
            widths[layer.path] = own
    return widths


def _plan(teacher: Network, kept: Mapping[str, list[int]]) -> list[tuple[str, int, int, str]]:
    """Of each convolution its path, the filters left, those there were, and what is in the way."""
    plan = []
    for layer in layers(copy.deepcopy(teacher.model)):
        whole = width(teacher.model, layer.path)
        left = len(kept.get(layer.path, range(whole)))
        plan.append((layer.path, left, whole, layer.obstacle))
    return plan


def _called(network: Network) -> str:
    return network.name or type(network.model).__name__
