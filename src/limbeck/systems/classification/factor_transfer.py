"""Paraphrasing Complex Network: Network Compression via Factor Transfer. Kim, Park, Kwak, NeurIPS
2018 (arXiv 1802.04977).

A teacher's features are in a language that a smaller network does not speak. A paraphraser, a
convolutional auto-encoder that is trained on them without labels, puts them into fewer words: its
bottleneck is the teacher's factor. While the student learns its task, a translator turns its
features into a factor of the same shape, and the two are drawn together in direction. So the
student may keep the knowledge in its own way, and the translator bears the difference.

Needs: layers of student and teacher that put out feature maps, (B, C, H, W); the smaller height and
width of a pair is where they meet.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.training.bench import Bench
from limbeck.training.features import check_maps, meeting, reduced
from limbeck.training.method import Method, Phases
from limbeck.training.phases import Fit, Training, Update
from limbeck.training.task import Answer, Batch, Terms

LEAST = 1e-12
"""The length below which a factor is divided by this number instead."""
PURPOSE = "factors are made of"
SLOPE = 0.1
"""Of the leaky ReLU behind every convolution, the last one included."""

Layers = Annotated[tuple[str, ...], Field(min_length=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def factor_transfer(
    student_factor: Tensor, teacher_factor: Tensor, norm: Literal[1, 2] = 1
) -> Tensor:
    r"""Distance of two factors in direction (Eq. 3), the mean over samples and elements.

    .. math::
        \frac{1}{B d} \sum_b \left\| \frac{F_S}{\|F_S\|_2} - \frac{F_T}{\|F_T\|_2} \right\|_p^p

    where a factor is all of a sample's d = C H W elements. The paper writes the norm without a
    mean; its published weights belong to the mean, which its code takes.

    Args:
        student_factor: (B, C, H, W), or any shape (B, ...).
        teacher_factor: of the same shape; no gradient flows into it.
        norm: p.

    Returns:
        A scalar at least 0, in float32 or better; at most 2 / sqrt(d) for p = 1.

    Raises:
        UserError: factors of different shapes.

    >>> student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    >>> factor_transfer(student, teacher)
    tensor(0.6000)
    """
    if student_factor.shape != teacher_factor.shape or student_factor.ndim < 2:
        raise UserError(
            f"the student's factor has the shape {tuple(student_factor.shape)}, the teacher's "
            f"{tuple(teacher_factor.shape)}; both must be (B, ...) and equal"
        )
    difference = _direction(student_factor) - _direction(teacher_factor.detach())
    return (difference.abs() if norm == 1 else difference.square()).mean()


def _direction(factor: Tensor) -> Tensor:
    flat = factor.flatten(1).to(torch.promote_types(factor.dtype, torch.float32))
    return F.normalize(flat, dim=1, eps=LEAST)


def _convolutions(*widths: int, transposed: bool = False) -> nn.Sequential:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [kind(inputs, outputs, 3, padding=1), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers)


class Paraphraser(nn.Module):
    """The auto-encoder of a teacher's features (section 3.1); its bottleneck is the factor.

    Args:
        channels: of the features, m.
        rate: the factor's channels over those of the features, k.

    >>> paraphraser = Paraphraser(64, 0.5)
    >>> paraphraser.encode(torch.zeros(2, 64, 8, 8)).shape
    torch.Size([2, 32, 8, 8])
    """

    def __init__(self, channels: int, rate: float) -> None:
        super().__init__()
        self.factors = max(1, round(rate * channels))
        self.encoder = _convolutions(channels, channels, self.factors, self.factors)
        self.decoder = _convolutions(
            self.factors, self.factors, channels, channels, transposed=True
        )

    def encode(self, features: Tensor) -> Tensor:
        """(B, m, H, W) -> (B, k m, H, W)."""
        return self.encoder(features)  # type: ignore[no-any-return]

    def forward(self, features: Tensor) -> Tensor:
        """The features put together again from their factor, (B, m, H, W)."""
        return self.decoder(self.encoder(features))  # type: ignore[no-any-return]


class Translator(nn.Sequential):
    """Turns a student's features into a factor (section 3.2): (B, c, H, W) -> (B, p, H, W).

    >>> sum(p.numel() for p in Translator(64, 32).parameters())
    64640
    """

    def __init__(self, channels: int, factors: int) -> None:
        super().__init__(*_convolutions(channels, channels, factors, factors))


class FactorTransfer(Method):
    """Factors of some pairs of layers, drawn together beside the labels.

    A run trains the paraphrasers first; in a loop of your own they stay as they were made, unless
    :meth:`prepare`'s phase is carried out.

    Args:
        weight: beta, of the distances, which are summed over the pairs; 500 on CIFAR, 1000 on
            ImageNet.
        rate: k, the factor's channels over those of the teacher's features.
        norm: p of the distance.
        reconstruction: what the paraphraser is trained by, the mean of absolute errors (the
            published code) or of squared ones (Eq. 1, but for its mean).
        paraphraser: how the paraphraser is trained, on the teacher's training images.
        student_layers: tap paths; by default the last stage of Limbeck's own residual networks.
        teacher_layers: as many tap paths, in the order of the student's; by default the same.
        label_weight: of the labels' cross-entropy; 0 for a transfer set without labels.
    """

    teacher_outputs = False

    def __init__(
        self,
        weight: Weight = 500.0,
        rate: Annotated[float, Field(gt=0, le=4)] = 0.5,
        norm: Literal[1, 2] = 1,
        reconstruction: Literal["absolute", "squared"] = "absolute",
        paraphraser: Training = Training(  # noqa: B008  (frozen)
            epochs=6, batch_size=128, lr=0.1, schedule="constant"
        ),
        student_layers: Layers = ("stage3",),
        teacher_layers: Layers | None = None,
        label_weight: Weight = 1.0,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.rate = rate
        self.norm: Literal[1, 2] = norm
        self.reconstruction = reconstruction
        self.training_of_paraphraser = paraphraser
        self.label_weight = label_weight
        self.student_taps = student_layers
        self.teacher_taps = student_layers if teacher_layers is None else teacher_layers
        if len(self.student_taps) != len(self.teacher_taps):
            raise UserError(
                f"factors are paired in order, but student_layers has {len(self.student_taps)} and "
                f"teacher_layers has {len(self.teacher_taps)}; name as many of each"
            )
        self.paraphrasers = nn.ModuleList()
        self.translators = nn.ModuleList()

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The layers whose factors are drawn together: student's path, teacher's path."""
        return list(zip(self.student_taps, self.teacher_taps, strict=True))

    def build(self, student: Answer, teacher: Answer, batch: Batch) -> None:
        """Make the translators, and the paraphrasers where there are none yet."""
        for one, other in self.pairs:
            check_maps(student.features[one], f"student's {one!r}", PURPOSE)
            check_maps(teacher.features[other], f"teacher's {other!r}", PURPOSE)
        if not self.paraphrasers:
            self._paraphrase(teacher)
        self.paraphrasers.requires_grad_(False)
        for (one, _), paraphraser in zip(self.pairs, self.paraphrasers, strict=True):
            assert isinstance(paraphraser, Paraphraser)
            channels = student.features[one].shape[1]
            self.translators.append(Translator(channels, paraphraser.factors))

    def _paraphrase(self, teacher: Answer) -> None:
        for path in self.teacher_taps:
            self.paraphrasers.append(Paraphraser(teacher.features[path].shape[1], self.rate))

    def prepare(self, bench: Bench) -> Phases:
        """Train the paraphrasers on what the frozen teacher sees in its own training images."""
        teacher, task = bench.teacher, bench.task
        assert teacher is not None, "it was taught before"
        teacher.tap(self.teacher_taps, outputs=False)
        with torch.random.fork_rng():
            torch.manual_seed(bench.seeds[0])
            self._paraphrase(teacher(task, bench.sample(bench.train)))
        self.paraphrasers.to(bench.device)

        def terms(batch: Batch) -> Terms:
            """Eq. 1."""
            features = teacher(task, batch).features
            return {
                f"reconstruction of {path}": self._error(
                    paraphraser(features[path]), features[path]
                )
                for path, paraphraser in zip(self.teacher_taps, self.paraphrasers, strict=True)
            }

        settings = self.training_of_paraphraser
        train = {"paraphrasers": self.paraphrasers}
        yield Fit(
            name="paraphraser",
            seed=bench.seeds[0],
            updates=[Update(name="paraphraser", train=train, terms=terms, settings=settings)],
            batches=task.batches(
                bench.train, batch_size=settings.batch_size, seed=bench.seeds[0], train=True
            ),
            epochs=settings.epochs,
        )

    def _error(self, found: Tensor, wanted: Tensor) -> Tensor:
        loss = F.l1_loss if self.reconstruction == "absolute" else F.mse_loss
        return loss(found, wanted)

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        """Eq. 2: beta times the distance, beside the labels' term."""
        if not self.weight:
            return {}
        distances = []
        for (one, other), paraphraser, translator in zip(
            self.pairs, self.paraphrasers, self.translators, strict=True
        ):
            assert isinstance(paraphraser, Paraphraser)
            with torch.no_grad():
                wanted = paraphraser.encode(teacher.features[other])
            found = translator(student.features[one])
            size = meeting(found, wanted)
            found, wanted = reduced(found, size), reduced(wanted, size)
            distances.append(factor_transfer(found, wanted, self.norm))
        return {"factor": self.weight * torch.stack(distances).sum()}
