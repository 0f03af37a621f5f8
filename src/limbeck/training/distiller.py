"""Student, teacher and method in one module: the step that every offline system shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.training.method import Method
from limbeck.training.network import Network
from limbeck.training.profiling import stretch
from limbeck.training.taps import Taps
from limbeck.training.task import Batch, Task, Terms
from limbeck.training.teacher import Teacher


class Distiller(nn.Module):
    """Turns a batch into named loss terms; their sum is what the student learns from.

    Works in any training loop: sum the terms, call ``backward``, step an optimiser over
    ``distiller.parameters()``, which are the student's and the method's. The teacher is in
    neither its parameters nor its state dict.

    Args:
        student: a network, or any module.
        teacher: a :class:`Teacher`, or a module or several, which are then frozen.
        method: what a paper adds; methods add up with ``+``.
        task: what a batch means.
        sample: one batch to learn shapes from; needed where the method builds adapters, and good
            for finding out early what does not fit.

    Raises:
        UserError: a tap that does not exist or never fires, or that is overwritten in place; a
            method that cannot eat the task; a teacher that answers NaN.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module],
        method: Method,
        task: Task,
        sample: Batch | None = None,
    ) -> None:
        super().__init__()
        self.student = student if isinstance(student, Network) else Network(student)
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        self.method = method
        self.task = task
        method.check_task(task)
        self._taps = Taps(self.student.model, method.student_taps)
        self.teacher.tap(method.teacher_taps, outputs=method.teacher_outputs)
        if sample is not None:
            self._probe(sample)

    def _probe(self, sample: Batch) -> None:
        was_training = self.student.training
        self.student.eval()
        with torch.no_grad():
            for path in self._taps.overwritten(
                lambda: self.task.run(self.student, sample, self._taps)
            ):
                raise UserError(
                    f"what the student's tap {path!r} captures is overwritten in place by the "
                    "layer behind it; build that layer with inplace=False, or tap behind it"
                )
            student = self.task.run(self.student, sample, self._taps)
            teacher = self.teacher(self.task, self.task.question(sample, student))
        self.student.train(was_training)
        for name, value in {**teacher.outputs, **teacher.features}.items():
            if not torch.isfinite(value).all():
                raise UserError(
                    f"the teacher's {name} hold NaN or infinity on the first batch; check its "
                    "weights and its input normalisation"
                )
        self.method.build(student, teacher, sample)

    def release(self) -> None:
        """Take the taps off the student, which then learns in another way or not at all."""
        self._taps.remove()

    def forward(self, batch: Batch) -> Terms:
        """The named loss terms of a batch: ``labels`` first, then the method's."""
        with stretch("student"):
            student = self.task.run(self.student, batch, self._taps)
        teacher = self.teacher(self.task, self.task.question(batch, student))
        with stretch("loss"):
            terms: Terms = {}
            if self.method.label_weight:
                terms["labels"] = self.method.label_weight * self.task.loss(student, batch)
            return {**terms, **self.method.terms(student, teacher, batch)}
