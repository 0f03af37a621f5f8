"""Distilling the Knowledge in a Neural Network. Hinton, Vinyals, Dean, 2015 (arXiv 1503.02531).

A teacher's probabilities for the wrong classes say how it generalises. Softened by a temperature,
they become visible, and a student that matches them on any transfer set, labelled or not, learns
more from each sample than from its label. Several teachers are averaged into one target.

Needs: any classifiers with the same classes as teacher and student.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.head import last_linear
from limbeck.tasks.classification import Classification
from limbeck.training.bench import Bench
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network
from limbeck.training.phases import Journal, Solve
from limbeck.training.task import Answer, Batch, Terms

ENTRIES = 2**22
"""The most probabilities that are in memory at once; larger batches are worked off in rows."""


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities at a temperature (section 2, eq. 1), in float32 or better.

    Args:
        logits: (..., C).
        temperature: above 0; higher is softer.

    >>> soften(torch.tensor([0.0, 0.0]), 4.0)
    tensor([0.5000, 0.5000])
    """
    return (_precise(logits) / _positive(temperature)).softmax(-1)


def kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    rows: int | None = None,
) -> Tensor:
    r"""Soft-target loss :math:`T^2\,\mathrm{KL}(p\,\|\,q)` (section 2), mean over the batch.

    Its gradient is that of the cross-entropy with soft targets; the factor T^2 keeps the
    gradient's size when the temperature changes (section 2).

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C); no gradient flows into them.
        temperature: T, above 0.
        rows: work the batch off so many rows at a time, and again in the backward pass, so that
            no softmax of the whole batch is ever in memory: for vocabularies. The value and the
            gradient are the same; there is no second derivative.

    Returns:
        A scalar at least 0, in nats times T^2.

    Raises:
        UserError: shapes that differ; a temperature that is not positive.

    >>> z, v = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[2.0, 0.0, 0.0]])
    >>> round(float(kd(z, v, temperature=2.0)), 6)
    0.091417
    """
    _same_classes(student_logits, teacher_logits)
    if rows is not None:
        return _KDInRows.apply(student_logits, teacher_logits, _positive(temperature), rows)  # type: ignore[no-any-return]
    return soft_targets(student_logits, soften(teacher_logits, temperature), temperature)


class _KDInRows(torch.autograd.Function):
    """:func:`kd` without a softmax of the whole batch in memory: the backward pass makes it again.

    The gradient is T / B (q - p), row by row (section 2, eq. 2, times T^2).
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, temperature: float, rows: int
    ) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.temperature, ctx.rows = temperature, rows
        total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
        for z, v in zip(student.split(rows), teacher.split(rows), strict=True):
            log_q = (_precise(z) / temperature).log_softmax(-1)
            total += F.kl_div(log_q, soften(v, temperature).to(log_q), reduction="sum")
        return total * (temperature**2 / len(student))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher = ctx.saved_tensors
        scale = gradients[0] * (ctx.temperature / len(student))
        found = torch.empty_like(student)
        pieces = (t.split(ctx.rows) for t in (student, teacher, found))
        for z, v, gradient in zip(*pieces, strict=True):
            q = soften(z, ctx.temperature)
            gradient.copy_(q.sub_(soften(v, ctx.temperature)).mul_(scale))
        return found, None, None, None


def soft_targets(student_logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    r"""The soft-target loss against given probabilities, (B, C), already at this temperature."""
    log_q = (_precise(student_logits) / _positive(temperature)).log_softmax(-1)
    return temperature**2 * F.kl_div(log_q, targets.detach().to(log_q), reduction="batchmean")


def ensemble_targets(
    teacher_logits: Sequence[Tensor],
    temperature: float,
    mean: Literal["arithmetic", "geometric"] = "arithmetic",
    weights: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """One target distribution for several teachers (section 2), at a temperature.

    Args:
        teacher_logits: K tensors (B, C).
        temperature: above 0.
        mean: ``arithmetic`` averages the probabilities; ``geometric`` averages the logits, which
            is the renormalised geometric mean.
        weights: K numbers, normalised to sum to one; equal if not given.

    Returns:
        Probabilities (B, C).

    >>> one, two = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> ensemble_targets([one, two], 1.0, "geometric")
    tensor([[0.7311, 0.2689]])
    """
    stacked = torch.stack([_precise(v) for v in teacher_logits])
    shares = torch.ones(len(stacked)) if weights is None else torch.as_tensor(weights)
    shares = (shares / shares.sum()).to(stacked).view(-1, *[1] * (stacked.ndim - 1))
    if mean == "geometric":
        return soften((shares * stacked).sum(0), temperature)
    return (shares * soften(stacked, temperature)).sum(0)


def match_logits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""The limit of :func:`kd` for high temperatures (section 2.1): logits are matched.

    :math:`\frac{1}{2C}\|z-v\|^2` with both rows centred, mean over the batch.

    >>> z, v = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[2.0, 0.0, 0.0]])
    >>> round(float(match_logits(z, v)), 6)
    0.111111
    """
    _same_classes(student_logits, teacher_logits)
    difference = _precise(student_logits) - _precise(teacher_logits).detach()
    difference = difference - difference.mean(-1, keepdim=True)
    return difference.square().mean(-1).mean() / 2


def missing_class_bias(logits: Tensor, labels: Tensor, absent: Sequence[int]) -> float:
    """How far to raise the biases of classes the transfer set lacked (section 3).

    One number for all of them: the middle of the interval of offsets with the fewest errors on
    these samples, which should be validation data. Exact: errors change only where the best
    absent class overtakes the best present one.

    Args:
        logits: (N, C) of the student.
        labels: (N,), all classes among them.
        absent: the classes that the transfer set lacked.

    >>> logits = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    >>> missing_class_bias(logits, torch.tensor([0, 1]), absent=[1])
    2.0
    """
    chosen = torch.zeros(logits.shape[1], dtype=torch.bool)
    chosen[list(absent)] = True
    there, lacking = logits[:, ~chosen].max(1), logits[:, chosen].max(1)
    names = torch.arange(logits.shape[1])
    right_below = names[~chosen][there.indices] == labels
    right_above = names[chosen][lacking.indices] == labels
    overtaking, order = (there.values - lacking.values).sort()
    # right[i]: samples right once the offset lies above i of the sorted thresholds
    gain = (right_above.long() - right_below.long())[order].cumsum(0)
    right = torch.cat([gain.new_zeros(1), gain])
    edges = torch.cat([overtaking[:1] - 1, overtaking, overtaking[-1:] + 1])
    lengths = edges.diff()
    right[lengths <= 0] = right.min() - 1
    best = int(right.argmax())
    return float((edges[best] + edges[best + 1]) / 2)


class KD(Method):
    """Soft targets, mixed with labels.

    Args:
        temperature: T for teacher and student (section 2); the labels' term is at T = 1.
        weight: of the soft targets, which carry the factor T^2.
        label_weight: of the labels' cross-entropy; 0 for a transfer set without labels.
        absent: classes that the transfer set lacks, whose biases are raised afterwards to what
            is best on validation data (section 3).
    """

    tasks = ("classification", "tabular", "text")

    def __init__(
        self,
        temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0,
        weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.9,
        label_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1,
        absent: tuple[Annotated[int, Field(ge=0)], ...] = (),
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = weight
        self.label_weight = label_weight
        self.absent = absent

    def build(self, student: Answer, teacher: Answer, batch: Batch) -> None:
        _same_classes(student["logits"], teacher["logits"])

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        if not self.weight:
            return {}
        if teacher.members:
            targets = ensemble_targets(
                [member["logits"] for member in teacher.members],
                self.temperature,
                weights=teacher.weights,
            )
            return {"kd": self.weight * soft_targets(student["logits"], targets, self.temperature)}
        z, v = student["logits"], teacher["logits"]
        rows = max(1, ENTRIES // v.shape[-1]) if v.numel() > ENTRIES else None
        return {"kd": self.weight * kd(z, v, self.temperature, rows)}

    def rehearse(self, bench: Bench) -> None:
        super().rehearse(bench)
        if not self.absent:
            return
        task = bench.task
        if not isinstance(task, Classification) or not len(bench.validation):
            raise UserError("the bias of absent classes is chosen on validation data; give some")
        if max(self.absent) >= len(task.classes):
            raise UserError(
                f"KD(absent={list(self.absent)}): classes run from 0 to {len(task.classes) - 1}"
            )
        _head(bench.make_student(bench.seeds[0]).model, len(task.classes))

    def finish(self, bench: Bench, seed: int, student: Network) -> Phases:
        if not self.absent:
            return
        task = bench.task
        assert isinstance(task, Classification), "the rehearsal has seen to it"

        def correct(_: Journal) -> float:
            logits, labels = task.predict(student, bench.validation)
            head = _head(student.model, logits.shape[1])
            offset = missing_class_bias(logits, labels, self.absent)
            with torch.no_grad():
                head.bias[list(self.absent)] += offset
            return offset

        name = bench.label("bias", seed)
        offset = yield Solve(name=name, seed=seed, run=correct, writes={"student": student})
        classes = ", ".join(str(c) for c in self.absent)
        bench.voice.say(f"bias of class {classes} raised by {offset:.3g} on validation data")


def _head(model: nn.Module, classes: int) -> nn.Linear:
    """The last linear layer, whose outputs are the logits."""
    found = last_linear(model, classes)
    if found is None or found[1].bias is None:
        raise UserError(
            f"{type(model).__name__} has no last linear layer with a bias for each of the "
            f"{classes} classes, which the correction for absent classes changes"
        )
    return found[1]


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _positive(temperature: float) -> float:
    if not temperature > 0:
        raise UserError(f"a temperature is a number above 0, not {temperature}")
    return temperature


def _same_classes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"the student's logits have the shape {tuple(student_logits.shape)}, the teacher's "
            f"{tuple(teacher_logits.shape)}; both must speak of the same classes"
        )
