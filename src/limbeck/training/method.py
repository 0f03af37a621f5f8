"""What a paper adds beside student and teacher, and how a batch becomes loss terms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from limbeck.errors import UserError
from limbeck.training.finding import Finding
from limbeck.training.network import Network
from limbeck.training.parameters import checked
from limbeck.training.phases import Fit, Phase, Update
from limbeck.training.task import Answer, Batch, Task, Terms

if TYPE_CHECKING:
    from limbeck.training.bench import Bench

Phases = Generator[Phase, Any, None]
"""Phases in order; a ``yield`` gives back what a ``Solve`` found.

Between two yields a method only builds: whatever it changes there is done again on resume.
"""


class Method(nn.Module):
    """What a paper adds beside student and teacher, and how a batch becomes named loss terms.

    A plain method overrides :meth:`terms`, and where it needs them ``student_taps`` and
    ``teacher_taps`` (paths) and :meth:`build` (adapters, shaped by one batch). A method with
    phases of its own overrides :meth:`prepare`, :meth:`finish` or :meth:`distil`, one that is not
    offline :meth:`phases`.

    Constructor arguments are the paper's hyper-parameters with its defaults; their annotations
    are checked, from a recipe and from Python alike. ``label_weight`` is the weight of the
    supervised loss beside the method's own terms. ``tasks`` names the tasks it can eat; empty
    means any. Where :meth:`terms` reads nothing of the teacher but its features,
    ``teacher_outputs = False`` lets the teacher stop at its last tap. ``takes_teacher = False``
    says that there is none. ``roles`` says what
    ``teacher``, ``baseline``, ``student`` and further networks that the method delivers
    (:meth:`Bench.deliver`) are called where a recipe does not.
    """

    tasks: tuple[str, ...] = ()
    label_weight: float = 1.0
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    teacher_outputs: bool = True
    takes_teacher: bool = True
    roles: Mapping[str, str] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = checked(cls.__name__, cls.__init__)  # type: ignore[method-assign]

    def check_task(self, task: Task) -> None:
        """Raise a :class:`UserError` where the method cannot eat a task."""
        if self.tasks and task.name not in self.tasks:
            raise UserError(
                f"{type(self).__name__} works on {', '.join(self.tasks)}, not on {task.name}"
            )

    def build(self, student: Answer, teacher: Answer, batch: Batch) -> None:
        """Make the modules whose shapes depend on the two models, from a probe of one batch."""

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        """The method's named loss terms, weights included; the supervised one is not among them."""
        raise NotImplementedError

    def rehearse(self, bench: Bench) -> None:
        """Find out, before anything is trained or written, whether everything fits together."""
        bench.rehearse(self)

    def phases(self, bench: Bench) -> Phases:
        """The whole run: teacher, then for each seed the plain student and the distilled one."""
        yield from bench.teach()
        own = copy.deepcopy(self)
        yield from own.prepare(bench)
        for seed in bench.seeds:
            yield from bench.plain(seed)
            yield from own.distil(bench, seed)

    def prepare(self, bench: Bench) -> Phases:
        """Phases between the teacher's and the students', of parts that all students share.

        They may change this method, of which every run has a copy; none unless overridden.
        """
        yield from ()

    def distil(self, bench: Bench, seed: int) -> Phases:
        """The distillation of one student."""
        student = bench.student(seed)
        distiller = bench.distiller(student, self, seed)
        yield self.fit(bench, seed, distiller, student=student, method=distiller.method)
        yield from self.finish(bench, seed, student)

    def finish(self, bench: Bench, seed: int, student: Network) -> Phases:
        """Phases that follow a student's distillation; none unless overridden."""
        yield from ()

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """What the report shows of this method alone, when everything is trained and measured.

        Args:
            bench: with the finished networks (:meth:`Bench.delivered`) and the test split.
            metrics: the run's metrics, one mapping a line.
        """
        return []

    def fit(
        self, bench: Bench, seed: int, terms: Callable[[Batch], Terms], **train: nn.Module
    ) -> Fit:
        """One ``Fit`` of the student (and what else is named) on the bench's budget."""
        settings = bench.training
        return Fit(
            name=bench.label("student", seed),
            seed=seed,
            updates=[Update(train=train, terms=terms, settings=settings)],
            batches=bench.batches(settings.batch_size, seed),
            epochs=settings.epochs,
            evaluate=bench.watch(train["student"]),
            select=bench.select,
            higher_is_better=bench.task.higher_is_better,
        )

    def __add__(self, other: Method) -> Method:
        return Sum(self, other)


class Supervised(Method):
    """No distillation: the student learns from labels alone, as does its rival if it has one."""

    takes_teacher = False

    def rehearse(self, bench: Bench) -> None:
        if bench.candidates:
            raise UserError(
                f"{type(self).__name__} trains networks on labels alone and takes no teacher; to "
                "distil into its student, name a method: limbeck distill --method kd"
            )
        super().rehearse(bench)

    def phases(self, bench: Bench) -> Phases:
        for seed in bench.seeds:
            if bench.rival is not None:
                yield from bench.plain(seed)
            yield bench.on_labels("student", bench.student(seed), bench.training, seed)


class Sum(Method):
    """Several methods at once: their terms side by side, each under its method's name.

    The supervised loss keeps the label weight of the first method. Only methods with a plain
    :meth:`Method.distil` add up; the others say so.
    """

    def __init__(self, first: Method, second: Method) -> None:
        super().__init__()
        flat = [*_parts(first), *_parts(second)]
        for method in flat:
            kind = type(method)
            if kind.distil is not Method.distil or kind.phases is not Method.phases:
                raise UserError(
                    f"{kind.__name__} has phases of its own and cannot be added to another "
                    "method; run it alone"
                )
        self.members = nn.ModuleList(flat)
        self.label_weight = flat[0].label_weight
        self.student_taps = tuple(dict.fromkeys(p for m in flat for p in m.student_taps))
        self.teacher_taps = tuple(dict.fromkeys(p for m in flat for p in m.teacher_taps))
        self.teacher_outputs = any(m.teacher_outputs for m in flat)
        named = [set(m.tasks) for m in flat if m.tasks]
        if named:
            self.tasks = tuple(sorted(set.intersection(*named)))
            if not self.tasks:
                names = " + ".join(type(m).__name__ for m in flat)
                raise UserError(f"{names}: these methods have no task in common")

    def rehearse(self, bench: Bench) -> None:
        super().rehearse(bench)
        for method in self.parts:
            method.rehearse(bench)

    @property
    def parts(self) -> list[Method]:
        """The methods, in the order in which they were added."""
        return [m for m in self.members if isinstance(m, Method)]

    def prepare(self, bench: Bench) -> Phases:
        for method in self.parts:
            yield from method.prepare(bench)

    def finish(self, bench: Bench, seed: int, student: Network) -> Phases:
        for method in self.parts:
            yield from method.finish(bench, seed, student)

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        return [found for method in self.parts for found in method.findings(bench, metrics)]

    def build(self, student: Answer, teacher: Answer, batch: Batch) -> None:
        for method in self.parts:
            method.build(student, teacher, batch)

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        terms: Terms = {}
        for method in self.parts:
            for name, value in method.terms(student, teacher, batch).items():
                unique = name if name not in terms else f"{type(method).__name__.lower()}.{name}"
                terms[unique] = value
        return terms


def _parts(method: Method) -> list[Method]:
    return method.parts if isinstance(method, Sum) else [method]
