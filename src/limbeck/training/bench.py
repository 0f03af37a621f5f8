"""What a method finds laid out for it: task, data, teacher, students and budget."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.training.cache import Cache
from limbeck.training.distiller import Distiller
from limbeck.training.engine import PRECISIONS, Engine
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network, Solved
from limbeck.training.phases import Fit, Phase, Solve, Training, Update
from limbeck.training.profiling import stretch
from limbeck.training.progress import Voice
from limbeck.training.task import Batch, Batches, Task, Terms, moved
from limbeck.training.teacher import Teacher

_NO_TEACHER = "{} needs a teacher; name one with --teacher"

TAKEN = ("teacher", "baseline", "student", "result", "findings", "environment", "predictions")
"""What further networks cannot be called, as files of a run have these names."""


@dataclass(frozen=True)
class Candidate:
    """A network that is to teach, and how it is trained first (``None``: it is ready).

    ``task`` makes its training batches where they differ from the students' (augmentation).
    """

    network: Network
    training: Training | None = None
    task: Task | None = None


@dataclass(frozen=True)
class Rival:
    """What students are compared with where that is not themselves, plainly trained.

    Another network, or the same one trained or augmented in another way.
    """

    make: Callable[[int], Network]
    training: Training
    task: Task | None = None


@dataclass(kw_only=True)
class Bench:
    """What a method finds laid out for it.

    Args:
        task: what a batch means.
        train: the split that teachers are trained on.
        transfer: the split that students learn from, plainly and by distillation.
        validation: the split that decides whatever is decided; may be empty.
        test: the split that the finished networks are measured on, and nothing else.
        candidates: the teachers-to-be; empty for methods without a teacher.
        make_student: builds the student that starts from a seed, the same for plain training and
            distillation.
        training: the students' budget.
        seeds: one paired comparison each.
        baseline: whether the plain student is trained too.
        rival: the baseline, where it is not the plain student.
        select: whether the last epoch counts or the best on validation data.
        mean, weights: how several teachers are averaged (see :class:`Teacher`).
        engine: how networks are laid out and answer.
        cache: remembers the teachers' answers.
    """

    task: Task
    train: Any
    transfer: Any
    validation: Any
    test: Any
    candidates: Sequence[Candidate]
    make_student: Callable[[int], Network]
    training: Training
    seeds: tuple[int, ...] = (0,)
    baseline: bool = True
    rival: Rival | None = None
    select: Literal["last", "best"] = "last"
    mean: Literal["probabilities", "logits"] = "probabilities"
    weights: Sequence[float] | None = None
    engine: Engine = field(default_factory=Engine)
    cache: Cache | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    voice: Voice = field(default_factory=lambda: Voice(quiet=True))

    def __post_init__(self) -> None:
        self.students: dict[int, Network] = {}
        self.baselines: dict[int, Network] = {}
        self.further: dict[str, dict[int, Network]] = {}
        self.teacher: Teacher | None = None
        self.seconds: Mapping[str, float] = {}  # of the finished phases by name, if they are run
        self._formats: dict[str, torch.memory_format] = {}

    def label(self, name: str, seed: int) -> str:
        """A phase's name, with its seed where there are several."""
        return name if len(self.seeds) == 1 else f"{name}@{seed}"

    def batches(self, batch_size: int, seed: int) -> Batches:
        """Training batches of the transfer set."""
        return self.task.batches(self.transfer, batch_size=batch_size, seed=seed, train=True)

    def watch(self, network: nn.Module) -> Callable[[], dict[str, float]] | None:
        """A measurement on validation data, the task's metric first; ``None`` without any."""
        if not len(self.validation) or not isinstance(network, Network):
            return None

        def measure() -> dict[str, float]:
            found = self.task.measure(network, self.validation)
            return {self.task.metric: found[self.task.metric], **found}

        return measure

    def student(self, seed: int) -> Network:
        """A fresh student for this seed, delivered at the end of the run."""
        self.students[seed] = self._fresh(self.make_student, seed)
        return self.students[seed]

    def deliver(self, role: str, seed: int, network: Network) -> None:
        """Have one more network of this seed measured at the end, and stored under its role.

        Args:
            role: letters, digits and hyphens; its file's name in the run folder. What people call
                it, :attr:`Method.roles` says.
            seed: the seed it was trained with.
            network: it may share weights with the student.

        Raises:
            ValueError: a role that is taken, or is no file's name.
        """
        if role.partition("-")[0] in TAKEN or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", role):
            raise ValueError(f"{role!r} cannot be the role of a further network")
        self.further.setdefault(role, {})[seed] = network

    def _fresh(self, make: Callable[[int], Network], seed: int) -> Network:
        network = self.laid_out(make(seed))
        network.compile_model(self.engine.compile)
        return network

    def laid_out(self, network: Network) -> Network:
        """The network on the device, its convolutions in the memory format that is fastest."""
        network.to(self.device)
        if not self.engine.channels_last:
            return network
        kind = repr(network.model)
        if kind not in self._formats:
            self._formats[kind] = self._format(network)
        return network.lay_out(self._formats[kind])

    def _format(self, network: Network) -> torch.memory_format:
        """Channels last, unless the model has no convolution or looks at its input as it lies."""
        if not any(isinstance(m, nn.Conv2d) for m in network.modules()):
            return torch.contiguous_format
        if self.device.type == "cpu" and any(map(_writes_beyond, network.modules())):
            return torch.contiguous_format
        sample, found = self.sample(), []
        try:
            for format in (torch.contiguous_format, torch.channels_last):
                trial = copy.deepcopy(network).lay_out(format).eval()
                outputs = torch.cat(
                    [o.float().flatten() for o in self.task.run(trial, sample).outputs.values()]
                )
                if outputs.requires_grad:
                    outputs.sum().backward()
                found.append(outputs.detach())
        except RuntimeError:
            return torch.contiguous_format
        alike = found[0].shape == found[1].shape  # how much is answered may depend on the input
        same = alike and torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-3)
        return torch.channels_last if same else torch.contiguous_format

    def sample(self, split: Any = None) -> Batch:
        """A few samples for probing shapes, on the device; of the transfer set unless told."""
        split = self.transfer if split is None else split
        loader = self.task.batches(split, batch_size=min(8, len(split)))
        return moved(next(iter(loader.epoch(0))), self.device)

    def distiller(self, student: Network, method: Method, seed: int = 0) -> Distiller:
        """Student, teacher and a copy of the method, its adapters shaped by a first batch."""
        if self.teacher is None:
            raise UserError(_NO_TEACHER.format(type(method).__name__))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            own = copy.deepcopy(method)
            distiller = Distiller(student, self.teacher, own, self.task, self.sample())
        distiller.to(self.device)
        return distiller

    def rehearse(self, method: Method) -> None:
        """One step with throw-away copies, so that what does not fit is found before training.

        Raises:
            UserError: student, teacher, data and method do not fit together.
        """
        with torch.random.fork_rng():
            student = self.laid_out(self.make_student(self.seeds[0]))
            sample, labelled = self.sample(), self.sample(self._labelled)
            if self.rival is not None:
                rival = self.laid_out(self.rival.make(self.seeds[0]))
                self.task.loss(self.task.run(rival, labelled), labelled)
            if not self.candidates and method.takes_teacher:
                raise UserError(_NO_TEACHER.format(type(method).__name__))
            if not self.candidates:
                self.task.loss(self.task.run(student, labelled), labelled)
                return
            networks = [
                copy.deepcopy(c.network) if c.training is not None else c.network
                for c in self.candidates
            ]
            teacher = self.frozen([self.laid_out(n) for n in networks], None)
            rehearsed = Distiller(student, teacher, copy.deepcopy(method), self.task, sample)
            if isinstance(student.model, Solved):
                raise UserError(
                    f"{student.name} learns by no gradient, which {type(method).__name__} needs; "
                    "name a network as the student"
                )
            for name, value in rehearsed.to(self.device)(sample).items():
                if not value.isfinite().all():
                    raise UserError(
                        f"the loss term {name!r} is NaN or infinite on the first batch; a "
                        f"hyper-parameter of {type(method).__name__} is too large or too small"
                    )
            if self.cache is not None:
                self._rehearse_cache(self.cache, teacher, sample)

    def _rehearse_cache(self, cache: Cache, teacher: Teacher, sample: Batch) -> None:
        """Find out whether answers can be remembered, and whether there is room for them."""
        batch = next(self.batches(self.training.batch_size, self.seeds[0]).epoch(0))
        if "view" not in batch:
            raise UserError(
                "the teacher's answers can be remembered where a sample has a name and a finite "
                f"number of views, which a batch of the task {self.task.name} does not say here: "
                "of images set data.augment.views, and give the data by name or as "
                "limbeck.data.Data instead of your own loaders; or leave engine.cache out"
            )
        cache.check(teacher.members(self.task, sample), batch["view"], self.task.distributions)

    def frozen(self, networks: Sequence[Network], cache: Cache | None) -> Teacher:
        """These networks as the teacher, answering as the engine says."""
        precision = self.engine.teacher_precision
        return Teacher(
            networks,
            mean=self.mean,
            weights=self.weights,
            fold=self.engine.fold,
            precision=None if precision == "same" else PRECISIONS[precision],
            compile=self.engine.compile,
            cache=cache,
        ).to(self.device)

    def teach(self, keep: Sequence[int] = ()) -> Generator[Phase, Any, dict[int, Path]]:
        """Train the teachers that are not ready, freeze all, and say how good they are.

        Args:
            keep: epochs after which the state of the last one trained is kept.

        Returns:
            Where these states lie, by epoch.
        """
        route: dict[int, Path] = {}
        if not self.candidates:
            raise UserError("this method needs a teacher; name one with --teacher")
        for number, candidate in enumerate(self.candidates):
            network = self.laid_out(candidate.network)
            if candidate.training is not None:
                name = "teacher" if len(self.candidates) == 1 else f"teacher-{number + 1}"
                phase = self.supervised(
                    name,
                    network,
                    candidate.training,
                    seed=number,
                    split=self.train,
                    task=candidate.task,
                )
                if isinstance(phase, Fit):
                    route = (yield replace(phase, keep=keep)) or {}
                elif keep:
                    raise UserError(f"{network.name} is fitted at one go and leaves no route")
                else:
                    yield phase
        networks = [c.network for c in self.candidates]
        self.teacher = self.frozen(networks, self.cache)
        if len(self.validation):
            for network in networks:
                found = self.task.measure(network, self.validation)[self.task.metric]
                self.voice.say(
                    f"teacher {network.name or type(network.model).__name__}: "
                    f"{self.task.metric} {found:.4f} on the validation split"
                )
        return route

    def plain(self, seed: int) -> Phases:
        """Train the plain student of this seed, or its rival, on labels for the comparison."""
        if not self.baseline:
            return
        if not self.task.labelled(self.sample(self._labelled)):
            self.voice.say("no plain student: there are no labels to learn from")
            return
        rival = self.rival or Rival(self.make_student, self.training)
        network = self.baselines[seed] = self._fresh(rival.make, seed)
        yield self.on_labels("baseline", network, rival.training, seed, rival.task)

    def on_labels(
        self,
        role: str,
        network: Network,
        training: Training,
        seed: int,
        task: Task | None = None,
    ) -> Phase:
        """Supervised training of one network on the students' samples.

        Where these have no labels it learns from the teacher's, in as many steps.
        """
        split = self._labelled
        if split is not self.transfer:
            size = training.batch_size
            steps = [len(self.batches(size, seed)), len(self.task.batches(split, batch_size=size))]
            training = training.stretched(steps[0] / steps[1])
            self.voice.say(
                f"{role}: learns from the {len(split):,} samples that have labels, in "
                f"{training.epochs:,} epochs"
            )
        name = self.label(role, seed)
        return self.supervised(name, network, training, seed=seed, split=split, task=task)

    @property
    def _labelled(self) -> Any:
        """The transfer set, or the teacher's training split where that alone has labels."""
        return self.transfer if self.task.labelled(self.sample()) else self.train

    def supervised(
        self,
        name: str,
        network: Network,
        settings: Training,
        *,
        seed: int,
        split: Any,
        task: Task | None = None,
    ) -> Phase:
        """Training on labels, by gradients or, of a :class:`Solved` model, at one go."""
        if not isinstance(network.model, Solved):
            return self.fit(name, network, settings, seed=seed, split=split, task=task)
        fitted = task or self.task
        return Solve(
            name=name,
            seed=seed,
            run=lambda _: fitted.solve(network, split, seed),
            writes={"student": network},
        )

    def fit(
        self,
        name: str,
        network: Network,
        settings: Training,
        *,
        seed: int,
        split: Any = None,
        task: Task | None = None,
    ) -> Fit:
        """Supervised training of one network, on the transfer set unless told otherwise."""
        task = task or self.task
        split = self.transfer if split is None else split

        def terms(batch: Batch) -> Terms:
            with stretch("student"):
                answer = task.run(network, batch)
            with stretch("loss"):
                return {"labels": task.loss(answer, batch)}

        return Fit(
            name=name,
            seed=seed,
            updates=[
                Update(train={"student": network}, terms=terms, settings=settings),
            ],
            batches=task.batches(split, batch_size=settings.batch_size, seed=seed, train=True),
            epochs=settings.epochs,
            evaluate=self.watch(network),
            select=self.select,
            higher_is_better=task.higher_is_better,
        )

    def delivered(self, seed: int) -> dict[str, Network | Teacher]:
        """The finished networks of a seed by role: teacher, baseline, student, further ones."""
        found: dict[str, Network | Teacher] = {}
        if self.teacher is not None:
            # A method may have had it stop early.
            self.teacher.tap(())
            found["teacher"] = self.teacher
        if seed in self.baselines:
            found["baseline"] = self.baselines[seed]
        if seed in self.students:
            found["student"] = self.students[seed]
        further = {role: trained[seed] for role, trained in self.further.items() if seed in trained}
        return found | further


def _writes_beyond(module: nn.Module) -> bool:
    """Whether the backward pass of a convolution with its channels last spoils foreign memory.

    On CPUs that of torch 2.15 does where images are large, kernels are 1 x 1, strides are larger
    and fewer than 16 channels come in.
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels < 16
    )
