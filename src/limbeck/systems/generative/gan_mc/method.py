"""The generator's training, the students on real and made samples, and the compression score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from limbeck.data.data import Split
from limbeck.data.tables import Rows
from limbeck.errors import UserError
from limbeck.report.verdict import said
from limbeck.systems.classification.kd import kd
from limbeck.systems.generative.gan_mc.losses import (
    balanced,
    compression,
    compression_score,
    generator_terms,
    judge_terms,
    munge,
)
from limbeck.systems.generative.gan_mc.networks import (
    Generator,
    ImageGenerator,
    Judge,
    RowGenerator,
    judge_of_images,
    judge_of_rows,
)
from limbeck.tasks.classification import Classification
from limbeck.tasks.tabular import Tabular
from limbeck.training.bench import Bench
from limbeck.training.finding import Chart, Finding
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network, Solved
from limbeck.training.phases import Fit, Phase, Solve, Training, Update
from limbeck.training.seeding import derive
from limbeck.training.task import Answer, Batch, Batches, Terms

AFFINITY = "class affinity"
PROBES, CHUNK, SHOWN = 500, 256, 8

Rival = Literal["real", "fake", "munge"]
RIVALS = {"real": "real-only student", "fake": "GAN-only student", "munge": "MUNGE student"}


class Mixed:
    """Batches of a training set, some of them replaced by batches of a generator.

    Before each step u is drawn from U(0, 1); the batch is real where u >= p. So p = 0 is the
    training set itself, and p = 1 never reads it. An epoch has floor(p N / C) made samples of each
    class, fresh in every epoch, in an order drawn for it. They have no label: what the generator
    was asked for is not what a sample is.

    Args:
        real: the training set's batches.
        generator: makes the others.
        name: what a batch calls its samples.
        share: p.
        samples: N, how many the training set has.
        batch_size: samples a step, over all processes.
        seed: decides which steps are made, and what.
    """

    def __init__(
        self,
        real: Batches,
        generator: Generator,
        name: str,
        share: float,
        samples: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.real, self.generator, self.name, self.share = real, generator, name, share
        self.samples, self.batch_size, self.seed = samples, batch_size, seed

    def __len__(self) -> int:
        return len(self.real)

    def made(self, epoch: int) -> Tensor:
        """Which steps of an epoch show made samples, bool (steps,)."""
        drawing = torch.Generator().manual_seed(derive(self.seed, epoch, 57) >> 1)
        return torch.rand(len(self), generator=drawing) < self.share

    def classes(self, epoch: int) -> Tensor:
        """The classes of an epoch's made samples in order."""
        drawing = torch.Generator().manual_seed(derive(self.seed, epoch, 58) >> 1)
        wanted = balanced(int(self.share * self.samples), self.generator.classes)
        return wanted[torch.randperm(len(wanted), generator=drawing)]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from step ``start`` on."""
        made, classes = self.made(epoch), self.classes(epoch)
        real: Iterator[Batch] | None = None
        behind = 0
        for step in range(start, len(self)):
            if made[step]:
                first = int(made[:step].sum()) * self.batch_size
                places = torch.arange(first, first + self.batch_size) % len(classes)
                yield self._draw(classes[places], derive(self.seed, epoch, step) >> 1)
                continue
            if real is None:
                real, behind = self.real.epoch(epoch, start), start
            yield next(islice(real, step - behind, None))
            behind = step + 1

    def _draw(self, classes: Tensor, seed: int) -> Batch:
        samples, share = self.generator.draw(classes, seed), 1.0
        if dist.is_available() and dist.is_initialized():
            rank, world = dist.get_rank(), dist.get_world_size()
            mine = samples[rank::world] if len(samples) > rank else samples[:1]
            share = len(mine) * world / len(samples) if len(samples) > rank else 0.0
            samples = mine
        return {self.name: samples, "share": share}


class GANMC(Method):
    """A student of a teacher's answers to real samples and to those of a conditional generator.

    Rows of tables: ``times`` as many made rows are laid beside the real ones and the teacher is
    asked once; a student by gradients makes as many steps as on real rows alone. Images: some
    batches are made ones, new in each epoch. Labels teach the generator, and no student.

    Args:
        match: what the student takes over, the teacher's logits or (at temperature 1) its
            probabilities; by default probabilities of rows and logits of images. A forest takes
            probabilities.
        p_fake: the share of batches of images that are made.
        times: made rows of a table for each real one.
        gan: how generator and judge are trained, on the students' samples.
        width: of an image's generator and judge, in channels where they are narrowest.
        rivals: further students: of the teacher's answers to ``real`` samples alone, to ``fake``
            ones alone, to real ones and rows by MUNGE.
        score: students trained on each set for the compression score; 0 leaves it out.
        scoring: how; one pass, as more would hide how diverse a set is.
    """

    tasks = ("classification", "tabular")
    label_weight = 0.0
    roles: Mapping[str, str] = {
        "baseline": "label student",
        "student": "GAN student",
        **{f"on-{rival}": name for rival, name in RIVALS.items()},
    }

    def __init__(
        self,
        match: Literal["logits", "probabilities"] | None = None,
        p_fake: Annotated[float, Field(ge=0, le=1)] = 0.8,
        times: Annotated[int, Field(ge=1, le=1000)] = 9,
        gan: Training = Training(  # noqa: B008  (frozen)
            epochs=50,
            batch_size=128,
            optimiser="adam",
            lr=2e-4,
            betas=(0.5, 0.999),
            weight_decay=0.0,
            schedule="constant",
        ),
        width: Annotated[int, Field(ge=1, le=1024)] = 48,
        rivals: tuple[Rival, ...] = ("real",),
        score: Annotated[int, Field(ge=0, le=100)] = 3,
        scoring: Training = Training(  # noqa: B008  (frozen)
            epochs=1,
            batch_size=256,
            optimiser="adam",
            lr=1e-4,
            weight_decay=0.0,
            schedule="constant",
        ),
    ) -> None:
        super().__init__()
        self.match = match
        self.p_fake = p_fake
        self.times = times
        self.gan = gan
        self.width = width
        self.rivals = tuple(dict.fromkeys(rivals))
        self.score = score
        self.scoring = scoring
        self.generator: Generator | None = None
        self.scores: dict[str, list[float]] = {}

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        """The student's one term, of whatever samples."""
        return self._loss(student["logits"], teacher["logits"], rows=Tabular.seen in batch)

    def _loss(self, ours: Tensor, theirs: Tensor, rows: bool) -> Terms:
        match = self.match or ("probabilities" if rows else "logits")
        loss = compression(ours, theirs) if match == "logits" else kd(ours, theirs, 1.0)
        return {"compression": loss}

    def rehearse(self, bench: Bench) -> None:
        task, split = _task(bench), bench.transfer
        self.check_task(task)
        if not bench.candidates:
            raise UserError("this method needs a teacher; name one with --teacher")
        if not isinstance(split, Split | Rows) or split.labels is None:
            raise UserError(
                "a generator learns classes by their labels: give labelled data by name or as "
                "limbeck.data.Data"
            )
        if task.augment.mixes:
            raise UserError(
                "mixup and cutmix make samples of no one class, which a generator of classes "
                "cannot learn from; leave them out of data.augment"
            )
        rows = isinstance(task, Tabular)
        if "munge" in self.rivals and not rows:
            raise UserError("MUNGE makes rows of tables, not images; leave it out of rivals")
        student = bench.make_student(bench.seeds[0])
        if not isinstance(student.model, Solved):
            bench.rehearse(self)
        elif not rows or self.match == "logits":
            raise UserError(
                f"{student.name} is fitted to probabilities of rows of a table, and to nothing else"
            )
        generator, judge = self._made(bench)
        sample = bench.sample()
        labels = sample["label"]
        real = generator.shown(sample[task.seen])
        fake = generator(generator.noise(len(labels)).to(bench.device), labels)
        judge_terms(judge(real), judge(fake), labels, labels)

    def phases(self, bench: Bench) -> Phases:
        yield from bench.teach()
        self.generator, judge = self._made(bench)
        yield self._adversarial(bench, self.generator, judge)
        told = None
        if isinstance(bench.task, Tabular):
            told = _Told(**(yield Solve(name="rows", run=lambda _: self._tell(bench))))
        for seed in bench.seeds:
            yield from bench.plain(seed)
            for rival in self.rivals:
                network = bench.laid_out(bench.make_student(seed))
                yield self._compress(bench, seed, network, rival, told)
                bench.deliver(f"on-{rival}", seed, network)
            yield self._compress(bench, seed, bench.student(seed), "student", told)
        if self.score:
            self.scores = yield Solve(name="score", run=lambda j: self._score(bench, j.remember))

    def _made(self, bench: Bench) -> tuple[Generator, Judge]:
        """A fresh generator and its judge for the samples of the bench."""
        task = _task(bench)
        classes = len(task.classes)
        with torch.random.fork_rng():
            torch.manual_seed(bench.seeds[0])
            if isinstance(task, Tabular):
                generator: Generator = RowGenerator(task.input, classes)
                judge = judge_of_rows(task.input.width, classes)
            else:
                _, channels, height, width = bench.sample()["image"].shape
                size = (height, width)
                generator = ImageGenerator(size, channels, classes, self.width)
                judge = judge_of_images(size, channels, classes, self.width)
        return generator.to(bench.device), judge.to(bench.device)

    def _adversarial(self, bench: Bench, generator: Generator, judge: Judge) -> Fit:
        """The judge's update, then the generator's, on the students' real samples."""
        task, settings = _task(bench), self.gan

        def made(number: int, device: torch.device) -> tuple[Tensor, Tensor]:
            classes = torch.randint(generator.classes, (number,))
            noise = generator.noise(number)
            classes = classes.to(device)
            return generator(noise.to(device), classes), classes

        def judged(batch: Batch) -> Terms:
            labels = batch["label"]
            fake, drawn = made(len(labels), labels.device)
            real = generator.shown(batch[task.seen])
            return judge_terms(judge(real), judge(fake.detach()), labels, drawn)

        def learned(batch: Batch) -> Terms:
            fake, drawn = made(len(batch["label"]), batch["label"].device)
            return generator_terms(judge(fake), drawn)

        return Fit(
            name="gan",
            seed=bench.seeds[0],
            updates=[
                Update(name="judge", train={"judge": judge}, terms=judged, settings=settings),
                Update(
                    name="generator",
                    train={"generator": generator},
                    terms=learned,
                    settings=settings,
                ),
            ],
            batches=bench.batches(settings.batch_size, bench.seeds[0]),
            epochs=settings.epochs,
            evaluate=lambda: {AFFINITY: self._affinity(bench, generator)},
        )

    def _affinity(self, bench: Bench, generator: Generator) -> float:
        """The share of made samples that the teacher puts into the class they were drawn for."""
        classes = balanced(max(PROBES, generator.classes), generator.classes)
        logits = _answers(bench, generator.draw(classes, 0))
        generator.train()
        return float((logits.argmax(1).cpu() == classes).float().mean())

    def _tell(self, bench: Bench) -> dict[str, Any]:
        """Real rows, made ones and, if wanted, those of MUNGE, each with the teacher's logits."""
        task, split, generator = bench.task, bench.transfer, self.generator
        assert isinstance(task, Tabular)
        assert generator is not None
        real = split.cells[split.rows].to(bench.device)
        parts = {"real": real}
        number = self.times * len(real)
        classes = balanced(max(number, generator.classes), generator.classes)
        parts["fake"] = generator.draw(classes, derive(bench.seeds[0], 59) >> 1)
        if "munge" in self.rivals:
            rows = munge(task.input(real), self.times, seed=bench.seeds[0])
            parts["munge"] = task.input.restored(rows)
        answers = [_answers(bench, part).cpu() for part in parts.values()]
        return {
            "cells": torch.cat([part.cpu() for part in parts.values()]),
            "logits": torch.cat(answers),
            "counts": {name: len(part) for name, part in parts.items()},
        }

    def _compress(
        self, bench: Bench, seed: int, network: Network, way: str, told: _Told | None
    ) -> Phase:
        """The training of one student on one of the mixtures."""
        label = bench.label("student" if way == "student" else f"on-{way}", seed)
        if told is None:
            return self._on_batches(bench, seed, network, way, label)
        task = _task(bench)
        chosen = told.of(WAYS[way])
        if isinstance(network.model, Solved):

            def fit(_: Any) -> None:
                model, cells = network.model, told.cells[chosen].to(bench.device)
                assert isinstance(model, Solved)
                fed = cells if network.input is None else network.input(cells)
                model.solve(fed, told.logits[chosen].softmax(1), seed)

            return Solve(name=label, seed=seed, run=fit, writes={"student": network})
        logits = told.logits.to(bench.device)

        def terms(batch: Batch) -> Terms:
            answer = task.run(network, batch)
            wanted = logits[batch["row"].to(logits.device)]
            return self._loss(answer["logits"], wanted, rows=True)

        settings = bench.training.stretched(len(bench.transfer) / len(chosen))
        split = Rows(way, told.cells, None, chosen)
        return self._fit(bench, seed, network, label, terms, settings, split=split)

    def _on_batches(self, bench: Bench, seed: int, network: Network, way: str, label: str) -> Phase:
        task, generator, size = _task(bench), self.generator, bench.training.batch_size
        assert generator is not None
        share = {"real": 0.0, "fake": 1.0}.get(way, self.p_fake)
        real = bench.batches(size, seed)
        mixed = Mixed(real, generator, task.seen, share, len(bench.transfer), size, seed)

        def terms(batch: Batch) -> Terms:
            assert bench.teacher is not None
            answer, wanted = task.run(network, batch), bench.teacher(task, batch)
            return self._loss(answer["logits"], wanted["logits"], rows=False)

        return self._fit(bench, seed, network, label, terms, bench.training, batches=mixed)

    def _fit(
        self,
        bench: Bench,
        seed: int,
        network: Network,
        label: str,
        terms: Callable[[Batch], Terms],
        settings: Training,
        split: Rows | None = None,
        batches: Batches | None = None,
    ) -> Fit:
        if batches is None:
            size = settings.batch_size
            batches = bench.task.batches(split, batch_size=size, seed=seed, train=True)
        return Fit(
            name=label,
            seed=seed,
            updates=[Update(train={"student": network}, terms=terms, settings=settings)],
            batches=batches,
            epochs=settings.epochs,
            evaluate=bench.watch(network),
            select=bench.select,
            higher_is_better=bench.task.higher_is_better,
        )

    # The compression score.

    def _sets(self, bench: Bench, seed: int) -> dict[str, Callable[[], Iterator[Tensor]]]:
        """The sets that are scored, as many samples each, and what gives their batches in order."""
        task, split, generator = _task(bench), bench.transfer, self.generator
        assert generator is not None
        made: Generator = generator
        drawing = torch.Generator().manual_seed(derive(seed, 60) >> 1)
        shuffled = split.subset(torch.randperm(len(split), generator=drawing))
        wanted = balanced(max(len(split), made.classes), made.classes)
        wanted = wanted[torch.randperm(len(wanted), generator=drawing)]

        def real() -> Iterator[Tensor]:
            for batch in task.batches(shuffled, batch_size=self.scoring.batch_size).epoch(0):
                yield batch[task.seen].to(bench.device)

        def drawn(classes: Tensor) -> Iterator[Tensor]:
            for number, part in enumerate(classes.split(self.scoring.batch_size)):
                yield made.draw(part, derive(seed, 61, number) >> 1)

        def poorer() -> Iterator[Tensor]:
            for samples in real():
                if samples.ndim == 4:
                    yield F.avg_pool2d(samples, 3, 1, padding=1, count_include_pad=False)
                else:
                    yield made.view(torch.zeros_like(made.shown(samples)))

        other = "real, blurred" if isinstance(split, Split) else "one row, the means"
        return {
            "real": real,
            "GAN": lambda: drawn(wanted),
            f"GAN, {task.classes[0]} only": lambda: drawn(torch.zeros_like(wanted)),
            other: poorer,
        }

    def _score(
        self, bench: Bench, remember: Callable[[str, Callable[[], Any]], Any]
    ) -> dict[str, list[float]]:
        """The test accuracies of students that see a set once, by set; the very last to be run."""
        found: dict[str, list[float]] = {}
        for seed in range(self.score):
            for number, (name, batches) in enumerate(self._sets(bench, seed).items()):

                def work(seed: int = seed, batches: Any = batches) -> float:
                    return self._seen_once(bench, seed, batches())

                found.setdefault(name, []).append(remember(f"{number}-{seed}", work))
        return found

    def _seen_once(self, bench: Bench, seed: int, batches: Iterator[Tensor]) -> float:
        task, student = _task(bench), bench.laid_out(bench.make_student(seed)).train()
        rows = isinstance(task, Tabular)
        if isinstance(student.model, Solved):
            samples = torch.cat(list(batches))
            fed = samples if student.input is None else student.input(samples)
            student.model.solve(fed, _answers(bench, samples).softmax(1), seed)
            return task.measure(student, bench.test)["accuracy"]
        optimiser = self.scoring.build(student.parameters())
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for samples in batches:
                ours = task.run(student, {task.seen: samples})["logits"]
                loss = self._loss(ours, _answers(bench, samples), rows)["compression"]
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return task.measure(student, bench.test)["accuracy"]

    # The report.

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """How the generator came to know the classes, what it makes, and its score."""
        found = [self._sheet(bench), *self._table()]
        course = [
            (float(line["epoch"]), float(line["validation"][AFFINITY]))
            for line in metrics
            if AFFINITY in line.get("validation", {})
        ]
        if course:
            caption = (
                "Share of the generator's samples that the teacher puts into the class that they "
                "were drawn for."
            )
            chart = Chart("Class affinity", "epoch", "share", {"generator": course})
            found.append(Finding("The generator's classes", caption, charts=[chart]))
        return found

    def _sheet(self, bench: Bench) -> Finding:
        """Real samples beside made ones."""
        task, generator = _task(bench), self.generator
        assert generator is not None
        split, classes = bench.transfer, min(len(task.classes), 10)
        if isinstance(task, Tabular):
            return self._distributions(bench, task, generator)
        kinds = torch.arange(classes).repeat_interleave(SHOWN)
        own = [(split.labels == kind).nonzero().flatten()[:SHOWN] for kind in range(classes)]
        real = torch.zeros(classes * SHOWN, *bench.sample()["image"].shape[1:])
        for kind, places in enumerate(own):
            for n, row in enumerate(split.rows[places].tolist()):
                real[kind * SHOWN + n] = split.images.read(row).float() / 255
        pictures = {"real": _sheet(real), "made": _sheet(generator.draw(kinds, 62).cpu())}
        names = ", ".join(task.classes[:classes])
        caption = f"A row a class, {SHOWN} samples of each, from above: {names}."
        return Finding("Real and made images", caption, pictures=pictures)

    def _distributions(self, bench: Bench, task: Tabular, generator: Generator) -> Finding:
        split = bench.transfer
        real = split.cells[split.rows]
        classes = balanced(max(2000, generator.classes), generator.classes)
        made = generator.draw(classes, 62).cpu()
        numbers = [n for n, c in enumerate(task.input.columns) if not c.categories][:6]
        shares = [(n + 0.5) / 20 for n in range(20)]
        charts = []
        for column in numbers:
            lines = {}
            for name, cells in (("real", real), ("made", made)):
                known = cells[:, column][~cells[:, column].isnan()]
                places = known.quantile(torch.tensor(shares)).tolist()
                lines[name] = list(zip(places, shares, strict=True))
            title = task.input.columns[column].name
            charts.append(Chart(title, "value", "share below", lines))
        caption = "The share of real and of made rows that lie below a value, column by column."
        return Finding("Real and made rows", caption, charts=charts)

    def _table(self) -> list[Finding]:
        if not self.scores:
            return []
        table = [["set", "accuracy", "compression score", "standard error"]]
        for name, accuracies in self.scores.items():
            score, error = compression_score(accuracies, self.scores["real"])
            table.append([name, said(accuracies, percent=True), f"{score:.3f}", f"{error:.3f}"])
        caption = (
            "Test accuracy of students that saw what the teacher says of a set once, over that of "
            f"students of real samples; {self.score} students a set."
        )
        return [Finding("Compression score", caption, table)]


WAYS: Mapping[str, tuple[str, ...]] = {
    "student": ("real", "fake"),
    "real": ("real",),
    "fake": ("fake",),
    "munge": ("real", "munge"),
}
"""The parts of a table's rows that each student learns from."""


class _Told:
    """Rows of all parts one below the other, (N, columns), with the teacher's logits, (N, C)."""

    def __init__(self, cells: Tensor, logits: Tensor, counts: Mapping[str, int]) -> None:
        self.cells, self.logits, self.counts = cells, logits, counts

    def of(self, parts: Sequence[str]) -> Tensor:
        """The places of some parts' rows, int64."""
        found, first = [], 0
        for name, number in self.counts.items():
            if name in parts:
                found.append(torch.arange(first, first + number))
            first += number
        return torch.cat(found)


def _task(bench: Bench) -> Classification:
    assert isinstance(bench.task, Classification)
    return bench.task


@torch.no_grad()
def _answers(bench: Bench, samples: Tensor) -> Tensor:
    """The teacher's logits for samples (N, ...) as a batch holds them, (N, C)."""
    teacher, task = bench.teacher, _task(bench)
    assert teacher is not None
    return torch.cat(
        [teacher(task, {task.seen: part})["logits"].float() for part in samples.split(CHUNK)]
    )


def _sheet(images: Tensor) -> Tensor:
    """Images (N, C, H, W) in [0, 1] side by side, rows of a few: uint8 (H, W) or (H, W, 3)."""
    from torchvision.utils import make_grid

    grid: Tensor = make_grid(images, nrow=SHOWN, padding=1)
    return (255 * grid).round().to(torch.uint8).permute(1, 2, 0)
