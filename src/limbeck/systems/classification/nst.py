"""Like What You Like: Knowledge Distill via Neuron Selectivity Transfer. Huang, Wang, 2017
(arXiv 1707.01219).

A channel of a convolutional layer fires on the regions that it is selective for. All channels of a
layer, each one sample over the positions, form a set that says where a network looks, and a
student whose set has the same distribution as its teacher's looks at the same regions. A squared
maximum mean discrepancy compares the sets: it asks for neither equal numbers of channels nor an
order among them, so there is no adapter to train.

Needs: layers of student and teacher that put out feature maps, (B, C, H, W), of any channels and
sizes.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck.errors import UserError, did_you_mean
from limbeck.training.features import check_maps, meeting, reduced
from limbeck.training.method import Method
from limbeck.training.task import Answer, Batch, Terms

KERNELS = ("poly", "linear", "gaussian")
STAGES = ("stage1", "stage2", "stage3")
"""Where Limbeck's own residual networks for small images end a resolution."""
PURPOSE = "neuron selectivity is that of"
DEAD = 1e-12
"""The length up to which a channel counts as dead and is divided by this number instead."""

Layers = Annotated[tuple[str, ...], Field(min_length=1)]


def nst(
    student_features: Tensor,
    teacher_features: Tensor,
    kernel: Literal["poly", "linear", "gaussian"] = "poly",
    degree: int = 2,
    offset: float = 0.0,
) -> Tensor:
    r"""Squared maximum mean discrepancy of two sets of channels, mean over the batch.

    With t_i the C_T channels of the teacher and s_j the C_S channels of the student, each a unit
    vector over the positions (a dead channel stays zero), of one image:

    .. math::
        \frac{1}{C_T^2} \sum_{i,i'} k(t_i, t_{i'}) + \frac{1}{C_S^2} \sum_{j,j'} k(s_j, s_{j'})
        - \frac{2}{C_S C_T} \sum_{i,j} k(t_i, s_j)

    Maps of different heights or widths meet at the smaller one by adaptive average pooling.

    Args:
        student_features: (B, C_S, H, W).
        teacher_features: (B, C_T, H', W'); no gradient flows into them.
        kernel: ``poly`` is :math:`(x^\top y + c)^d`, ``linear`` is :math:`x^\top y` and
            ``gaussian`` is :math:`\exp(-\|x - y\|^2 / 2\sigma^2)`, where :math:`\sigma^2` is the
            mean of :math:`\|t_i - s_j\|^2` in the image, taken as a constant.
        degree: d of ``poly``, at least 1.
        offset: c of ``poly``, at least 0.

    Returns:
        A scalar at least 0 up to rounding, in float32 or better: at most 2 for ``gaussian`` and
        for ``poly`` by default, at most 4 for ``linear``.

    Raises:
        UserError: features that are no maps or not of the same batch; an unknown kernel; a degree
            or an offset out of range.

    >>> teacher = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    >>> student = torch.tensor([1.0, 1.0]).view(1, 1, 1, 2)
    >>> nst(student, teacher), nst(student, teacher, kernel="linear")
    (tensor(1.0000), tensor(0.5858))
    """
    check_maps(student_features, "student", PURPOSE)
    check_maps(teacher_features, "teacher", PURPOSE)
    if len(student_features) != len(teacher_features):
        raise UserError(
            f"the student's features are of {len(student_features)} samples, the teacher's of "
            f"{len(teacher_features)}; both must come from the same batch"
        )
    if kernel not in KERNELS:
        raise UserError(f"there is no kernel {kernel!r}; {did_you_mean(kernel, KERNELS)}")
    if not isinstance(degree, int) or degree < 1 or not 0 <= offset < math.inf:
        raise UserError(
            "a polynomial kernel has a whole degree of at least 1 and an offset of at least 0, "
            f"not {degree} and {offset}"
        )
    size = meeting(student_features, teacher_features)
    # The discrepancy is a small difference of large means, which bfloat16 products would drown.
    with torch.autocast(student_features.device.type, enabled=False):
        s = selectivity(student_features, size)
        t = selectivity(teacher_features.detach(), size).to(s.dtype)
        if kernel == "linear":
            return (s.mean(1) - t.mean(1)).square().sum(1).mean()
        if kernel == "gaussian":
            return _gaussian(s, t)
        # (x'y)^2 = <xx', yy'>, so the discrepancy is also the squared distance of two Gram
        # matrices over positions. Value and gradient are the same; what is smaller is built.
        (c_s, positions), c_t = s.shape[1:], t.shape[1]
        if degree == 2 and offset == 0 and 2 * positions**2 < c_s**2 + c_t**2 + c_s * c_t:
            gram_s, gram_t = (x.mT @ x / x.shape[1] for x in (s, t))
            return (gram_s - gram_t).square().sum((1, 2)).mean()
        tt, ss, ts = ((x @ y.mT + offset) ** degree for x, y in ((t, t), (s, s), (t, s)))
        return tt.mean() + ss.mean() - 2 * ts.mean()


def selectivity(features: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Each channel as a unit vector over the positions; a dead channel as zeros, with no gradient.

    Args:
        features: (B, C, H, W).
        size: height and width that the maps are first reduced to by adaptive average pooling.

    Returns:
        (B, C, H * W), in float32 or better.

    >>> selectivity(torch.tensor([3.0, 4.0, 0.0, 0.0]).view(1, 2, 1, 2))
    tensor([[[0.6000, 0.8000],
             [0.0000, 0.0000]]])
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if size is not None:
        features = reduced(features, size)
    channels = features.flatten(2)
    length = torch.linalg.vector_norm(channels, dim=2, keepdim=True)
    units = channels / length.clamp(min=DEAD)
    # A dead channel has no direction; the derivative of dividing it by 1e-12 would be 1e12.
    return torch.where(length > DEAD, units, units.detach())


def _gaussian(s: Tensor, t: Tensor) -> Tensor:
    ts = _squared_distances(t, s)
    # The floor is the rounding of float32, below which all vectors are the same one.
    variance = ts.detach().mean((1, 2), keepdim=True).clamp(min=1e-6)
    tt, ss, ts = (
        (d / (-2 * variance)).exp()
        for d in (_squared_distances(t, t), _squared_distances(s, s), ts)
    )
    return tt.mean() + ss.mean() - 2 * ts.mean()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Between vectors of (B, M, N) and (B, M', N): (B, M, M')."""
    norms = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :]
    return (norms - 2 * x @ y.mT).clamp(min=0)


class NST(Method):
    """The sets of channels of some pairs of layers, matched beside the labels.

    Args:
        kernel: of the discrepancy.
        weight: of the discrepancies, which are summed over the pairs; 50 is that of ``poly``.
        half: halve the weight, as the paper's formula does and its published code does not.
        degree, offset: d and c of the polynomial kernel.
        student_layers: tap paths, by default the stages of Limbeck's own residual networks.
        teacher_layers: as many tap paths, in the order of the student's; by default the same.
        label_weight: of the labels' cross-entropy; 0 for a transfer set without labels.
    """

    teacher_outputs = False

    def __init__(
        self,
        kernel: Literal["poly", "linear", "gaussian"] = "poly",
        weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 50.0,
        half: bool = False,
        degree: Annotated[int, Field(ge=1)] = 2,
        offset: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
        student_layers: Layers = STAGES,
        teacher_layers: Layers | None = None,
        label_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = weight / 2 if half else weight
        self.degree = degree
        self.offset = offset
        self.label_weight = label_weight
        self.student_taps = student_layers
        self.teacher_taps = student_layers if teacher_layers is None else teacher_layers
        if len(self.student_taps) != len(self.teacher_taps):
            raise UserError(
                f"NST pairs layers in order, but student_layers has {len(self.student_taps)} and "
                f"teacher_layers has {len(self.teacher_taps)}; name as many of each"
            )

    def build(self, student: Answer, teacher: Answer, batch: Batch) -> None:
        for one, other in self.pairs:
            s, t = student.features[one], teacher.features[other]
            check_maps(s, f"student's {one!r}", PURPOSE)
            check_maps(t, f"teacher's {other!r}", PURPOSE)
            if meeting(s, t) == (1, 1):
                raise UserError(
                    f"the student's {one!r} and the teacher's {other!r} meet at a single "
                    "position, where channels cannot differ in what they select; tap earlier "
                    "layers, or give larger images"
                )

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The layers that are matched: student's path, teacher's path."""
        return list(zip(self.student_taps, self.teacher_taps, strict=True))

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        if not self.weight:
            return {}
        discrepancies = [
            nst(
                student.features[one],
                teacher.features[other],
                self.kernel,
                self.degree,
                self.offset,
            )
            for one, other in self.pairs
        ]
        return {"nst": self.weight * torch.stack(discrepancies).sum()}
