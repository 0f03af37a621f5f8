"""Learning Efficient Object Detection Models with Knowledge Distillation. Chen, Choi, Yu, Han,
Chandraker, NeurIPS 2017.

A detector's teacher says of each box what is in it and how far its corners are off. Most boxes hold
nothing, so in the soft targets the background weighs more than the rest. Offsets have no bound, and
a teacher's may point away from the truth: it is no target but a bound, and the student is drawn to
the truth as long as it is not nearer to it than the teacher. And the last layer of the student's
trunk is drawn to the teacher's through an adaptation layer, which is left behind. The first two
work on both heads of Faster R-CNN, that of the region proposals and that of the regions.

Needs: the task ``detection``. Both detectors judge the same boxes: the teacher the anchors and the
proposals that were sampled for the student, so their anchors must be the same.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.tasks.detection import BEND, Detection, Head, box_loss
from limbeck.training.features import meeting, reduced
from limbeck.training.method import Method
from limbeck.training.task import Answer, Batch, Task, Terms

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def weighted_soft_targets(student: Tensor, teacher: Tensor, background: float = 1.5) -> Tensor:
    r"""Cross-entropy with the teacher's probabilities, the background weighing more (Eq. 3).

    .. math::
        -\frac{1}{N} \sum_n \sum_c w_c P_t(c) \log P_s(c), \quad w_0 = w, \; w_{c \ge 1} = 1

    Args:
        student: logits (N, C + 1), the background's first.
        teacher: of the same shape; no gradient flows into it.
        background: its weight w, at least 0.

    Returns:
        A scalar at least 0, in nats, in float32 or better; 0 where there are no boxes. Unless w
        is 1 it is not least where the two distributions are equal.

    Raises:
        UserError: logits of different shapes.

    >>> weighted_soft_targets(torch.zeros(1, 2), torch.zeros(1, 2))
    tensor(0.8664)
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise UserError(
            f"the student's logits have the shape {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}; both must be (N, C + 1) and equal"
        )
    kind = torch.promote_types(student.dtype, torch.float32)
    log_p, q = student.to(kind).log_softmax(1), teacher.detach().to(kind).softmax(1)
    weights = torch.ones_like(q[:1])
    weights[:, 0] = background
    return -(weights * q * log_p).sum() / max(len(student), 1)


def bounded_regression(
    student: Tensor, teacher: Tensor, target: Tensor, margin: float = 0.0
) -> Tensor:
    r"""The squared error of each box, where it is not below the teacher's by a margin (Eq. 4).

    .. math::
        L_b = \|R_s - y\|_2^2 \;\text{ if }\; \|R_s - y\|_2^2 + m > \|R_t - y\|_2^2,
        \text{ else } 0

    Args:
        student: R_s, offsets (N, 4) of the class that each box has.
        teacher: R_t, of the same shape; it only decides, so no gradient flows into it.
        target: y, of the same shape.
        margin: m, at least 0.

    Returns:
        One number a box, (N,).

    >>> truth = torch.zeros(2, 4)
    >>> student = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0]])
    >>> teacher = torch.tensor([[2.0, 0, 0, 0], [0.5, 0, 0, 0]])
    >>> bounded_regression(student, teacher, truth)
    tensor([0., 1.])
    """
    if not student.shape == teacher.shape == target.shape or student.ndim != 2:
        raise UserError(
            f"the student's offsets have the shape {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)} and the targets {tuple(target.shape)}; all must be (N, 4)"
        )
    error = (student - target.detach()).square().sum(1)
    bound = (teacher.detach() - target).square().sum(1)
    return torch.where(error.detach() + margin > bound, error, torch.zeros_like(error))


def hint(adapted: Tensor, teacher: Tensor) -> Tensor:
    """The squared distance of adapted features and the teacher's (Eq. 6), the mean of elements.

    >>> hint(torch.ones(1, 2), torch.zeros(1, 2))
    tensor(1.)
    """
    return F.mse_loss(adapted, teacher.detach())


class DetectionKD(Method):
    """Soft targets, bounded offsets and a hint, for both heads of Faster R-CNN.

    Args:
        hard: mu, the labels' share of the loss of the classes; the rest is the soft targets'.
        background: the weight of the background in the soft targets; 1 is the paper's CLS, 1.5
            its CLS-W.
        bound: nu, of the squared errors that the teacher bounds.
        margin: m, by which the student's squared error must be less than the teacher's.
        bounded: whether the teacher bounds them; else they count for every box that holds
            something, the paper's L2 in place of L2-B.
        hint: gamma, of the hint.
        adaptation: whether the hint passes through an adaptation layer.
        student_layer: tap path of the guided layer; by default the last of the trunk. Of
            torchvision's detectors over a pyramid it is within, such as ``backbone.body.layer4``.
        teacher_layer: of the hint layer; by default the same path.
    """

    tasks = ("detection",)
    label_weight = 0.0

    def __init__(
        self,
        hard: Annotated[float, Field(ge=0, le=1)] = 0.5,
        background: Weight = 1.5,
        bound: Weight = 0.5,
        margin: Weight = 0.0,
        bounded: bool = True,
        hint: Weight = 0.5,
        adaptation: bool = True,
        student_layer: str = "backbone",
        teacher_layer: str | None = None,
    ) -> None:
        super().__init__()
        self.hard = hard
        self.background = background
        self.bound = bound
        self.margin = margin
        self.bounded = bounded
        self.hint = hint
        self.adaptation = adaptation
        self.student_taps = (student_layer,) if hint else ()
        self.teacher_taps = (teacher_layer or student_layer,) if hint else ()
        self.adapter: nn.Module = nn.Identity()
        self.task: Detection | None = None

    def check_task(self, task: Task) -> None:
        super().check_task(task)
        assert isinstance(task, Detection), "the only task of this name"
        self.task = task

    def build(self, student: Answer, teacher: Answer, batch: Batch) -> None:
        """Make the adaptation layer: a convolution of one pixel for maps, else a linear layer.

        Raises:
            UserError: detectors that judge different boxes, layers that cannot be compared.
        """
        ours, theirs = student["objectness"].shape[1], teacher["objectness"].shape[1]
        if ours != theirs:
            raise UserError(
                f"the student judges {ours:,} anchors an image and the teacher {theirs:,}; choose "
                "two detectors with the same anchors and trunks of the same stride"
            )
        if not self.hint:
            return
        guided, wanted = self._features(student, teacher)
        kinds = {4: "maps", 2: "rows"}
        if guided.ndim != wanted.ndim or guided.ndim not in kinds:
            raise UserError(
                f"the guided layer {self.student_taps[0]!r} puts out the shape "
                f"{tuple(guided.shape)}, the hint layer {self.teacher_taps[0]!r} "
                f"{tuple(wanted.shape)}; both must be maps (B, C, H, W) or rows (P, C)"
            )
        channels = guided.shape[1], wanted.shape[1]
        if self.adaptation:
            maps = guided.ndim == 4
            self.adapter = nn.Conv2d(*channels, 1) if maps else nn.Linear(*channels)
        elif channels[0] != channels[1]:
            raise UserError(
                f"the guided layer has {channels[0]} channels and the hint layer {channels[1]}, "
                "which wants an adaptation layer: adaptation: true"
            )

    def _features(self, student: Answer, teacher: Answer) -> tuple[Tensor, Tensor]:
        guided = student.features[self.student_taps[0]]
        return guided, teacher.features[self.teacher_taps[0]]

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        """Eq. 1: the losses of classes (Eq. 2) and offsets (Eq. 5) of both heads, and the hint."""
        assert self.task is not None, "the task was checked"
        ours = self.task.heads(student, student)
        theirs = self.task.heads(teacher, student)
        terms: Terms = {}
        for name, head in ours.items():
            terms[f"{name} classes"] = self._classes(head, theirs[name])
            terms[f"{name} boxes"] = self._boxes(head, theirs[name], BEND[name])
        if self.hint:
            guided, wanted = self._features(student, teacher)
            guided = self.adapter(guided)
            if guided.ndim == 4:
                size = meeting(guided, wanted)
                guided, wanted = reduced(guided, size), reduced(wanted, size)
            terms["hint"] = self.hint * hint(guided, wanted)
        return terms

    def _classes(self, ours: Head, theirs: Head) -> Tensor:
        """Eq. 2: mu times the labels' cross-entropy, and the rest times the teacher's."""
        loss = self.hard * F.cross_entropy(ours.logits, ours.label)
        if self.hard == 1:
            return loss
        soft = weighted_soft_targets(ours.logits, theirs.logits, self.background)
        return loss + (1 - self.hard) * soft

    def _boxes(self, ours: Head, theirs: Head, bend: float) -> Tensor:
        """Eq. 5: smooth L1, and nu times the bounded errors, over the number of all boxes."""
        loss = box_loss(ours, bend)
        if not self.bound:
            return loss
        there = ours.label > 0
        bounded = bounded_regression(
            ours.offsets[there],
            theirs.offsets[there],
            ours.target[there],
            self.margin if self.bounded else float("inf"),
        )
        return loss + self.bound * bounded.sum() / max(len(ours.label), 1)
