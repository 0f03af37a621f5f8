"""KTAN: Knowledge Transfer Adversarial Network. Liu, Liu, Ma, Mei, Seok, IJCNN 2020
(arXiv 1810.08126, 2018).

A high-level map of the teacher, brought to the student's shape by a small layer, is what the
student's own map should be. It is compared point by point, and a discriminator that sees whole maps
tells the teacher's from the student's, which the student learns to prevent. The teacher's soft
targets and the labels are learned beside them.

Needs: layers of student and teacher that put out feature maps, (B, C, H, W), both behind a ReLU;
of classifiers, or of detectors (:class:`KTANDetection`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.systems.classification.kd import kd
from limbeck.tasks.detection import Detection
from limbeck.training.bench import Bench
from limbeck.training.distiller import Distiller
from limbeck.training.features import check_maps
from limbeck.training.finding import Chart, Finding
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Training, Update
from limbeck.training.taps import Taps
from limbeck.training.task import Answer, Batch, Task, Terms, moved
from limbeck.training.teacher import Teacher

ACCURACY = "discriminator accuracy"
PURPOSE = "a discriminator judges"
SLOPE = 0.2

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Form = Literal["non-saturating", "min-max"]


def feature_distance(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """The mean of squared differences of two maps of one shape, a scalar at least 0.

    Args:
        student_map: (B, C, H, W).
        teacher_map: of the same shape; no gradient flows into it.

    Raises:
        UserError: maps of different shapes.

    >>> feature_distance(torch.zeros(1, 2, 3, 3), torch.full((1, 2, 3, 3), 0.5))
    tensor(0.2500)
    """
    if student_map.shape != teacher_map.shape:
        raise UserError(
            f"the student's map has the shape {tuple(student_map.shape)}, the teacher's "
            f"{tuple(teacher_map.shape)}; both must be equal"
        )
    precise = _precise(student_map)
    return F.mse_loss(precise, teacher_map.detach().to(precise))


def discrimination(real: Tensor, fake: Tensor) -> Tensor:
    r"""What a discriminator minimises, from its logits (B,) for real and for fake maps, in nats.

    .. math:: -\frac1B \sum \log \sigma(r) - \frac1B \sum \log (1 - \sigma(f))

    >>> round(float(discrimination(torch.zeros(3), torch.zeros(3))), 6)
    1.386294
    """
    return F.softplus(-_precise(real)).mean() + F.softplus(_precise(fake)).mean()


def fooling(fake: Tensor, form: Form = "non-saturating") -> Tensor:
    r"""What the student minimises, from the discriminator's logits (B,) for its maps, in nats.

    :math:`-\log \sigma(f)`, or in the min-max form :math:`\log (1 - \sigma(f))`, the batch's mean.

    >>> round(float(fooling(torch.zeros(3))), 6)
    0.693147
    """
    precise = _precise(fake)
    return F.softplus(-precise).mean() if form == "non-saturating" else -F.softplus(precise).mean()


def _precise(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


class TeacherToStudent(nn.Module):
    """The layer that brings the teacher's map to the student's shape (TSL).

    Args:
        channels: of the teacher's map.
        size: its height and width.
        shape: (C, H, W) of the student's map.

    >>> TeacherToStudent(64, (16, 16), (32, 8, 8))(torch.zeros(2, 64, 16, 16)).shape
    torch.Size([2, 32, 8, 8])
    """

    def __init__(self, channels: int, size: tuple[int, int], shape: tuple[int, int, int]) -> None:
        super().__init__()
        wanted = shape[1:]
        whole = all(a % b == 0 for a, b in zip(size, wanted, strict=True))
        self.size = None if whole else wanted
        stride = (size[0] // wanted[0], size[1] // wanted[1]) if whole else (1, 1)
        self.convolution = nn.Conv2d(channels, shape[0], 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(shape[0])

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C_t, H_t, W_t) -> (B, C_s, H_s, W_s)."""
        if self.size is not None:
            maps = F.interpolate(maps, self.size, mode="bilinear", align_corners=False)
        return F.relu(self.norm(self.convolution(maps)))


class Discriminator(nn.Module):
    """Tells the teacher's maps from the student's: (B, C, H, W) -> logits (B,).

    Its batch norms keep no running statistics: real and fake maps are normalised each among
    themselves, and a student's step leaves nothing behind.

    >>> Discriminator(8, (4, 4))(torch.zeros(2, 8, 4, 4)).shape
    torch.Size([2])
    """

    steps: Tensor

    def __init__(self, channels: int, size: tuple[int, int], norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(SLOPE)]
        side, width = min(size), channels
        for _ in range(2):
            stride = 2 if side > 2 else 1
            layers.append(nn.Conv2d(width, 2 * width, 3, stride, padding=1))
            if norm:
                layers.append(nn.BatchNorm2d(2 * width, track_running_stats=False))
            layers.append(nn.LeakyReLU(SLOPE))
            side, width = -(-side // stride), 2 * width
        self.layers = nn.Sequential(*layers)
        self.logit = nn.Linear(width, 1)
        # A buffer, so that a resumed run knows how much of the warm-up is over.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, maps: Tensor) -> Tensor:
        return self.logit(self.layers(maps).mean((2, 3))).squeeze(1)  # type: ignore[no-any-return]


class KTAN(Method):
    """A teacher's map matched, and a discriminator of maps fooled, beside soft targets and labels.

    A run trains the teacher's layer first; then each step trains the discriminator and after it
    the student. In a loop of your own the discriminator stays as it was made.

    Args:
        kd: lambda_KD, of the soft targets, which carry the factor T^2.
        feature: lambda_feat, of the maps' distance.
        adversarial: lambda_adv; 0 leaves the discriminator out.
        temperature: T of the soft targets.
        form: of the student's adversarial term.
        warmup: epochs in which the discriminator learns and the student does not heed it.
        identity: take the teacher's map as it is; it must have the student's shape.
        norm: whether the discriminator has batch norms.
        discriminator_lr: of its Adam, with betas 0.5 and 0.999.
        layer: how the teacher's layer is trained, on labels, on the teacher's training samples.
        student_layer: a tap path; the last stage of Limbeck's own residual networks.
        teacher_layer: a tap path; by default the same.
        label_weight: of the labels' loss.
    """

    tasks = ("classification",)

    def __init__(
        self,
        kd: Weight = 1.0,
        feature: Weight = 1.0,
        adversarial: Weight = 1e-3,
        temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0,
        form: Form = "non-saturating",
        warmup: Annotated[int, Field(ge=0)] = 0,
        identity: bool = False,
        norm: bool = True,
        discriminator_lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4,
        layer: Training = Training(  # noqa: B008  (frozen)
            epochs=3, batch_size=128, optimiser="adam", lr=1e-3, weight_decay=0, schedule="constant"
        ),
        student_layer: str = "stage3",
        teacher_layer: str | None = None,
        label_weight: Weight = 1.0,
    ) -> None:
        super().__init__()
        self.kd, self.feature, self.adversarial = kd, feature, adversarial
        self.temperature = temperature
        self.form: Form = form
        self.warmup = warmup
        self.identity = identity
        self.norm = norm
        self.discriminator_lr = discriminator_lr
        self.training_of_layer = layer
        self.label_weight = label_weight
        self.student_taps = (student_layer,)
        self.teacher_taps = (student_layer if teacher_layer is None else teacher_layer,)
        self.layer: nn.Module | None = None
        self.discriminator: Discriminator | None = None
        self.quiet_steps = 0

    def build(self, student: Answer, teacher: Answer, batch: Batch) -> None:
        """Make the teacher's layer where there is none yet, and the discriminator."""
        own, other = student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]]
        check_maps(own, f"student's {self.student_taps[0]!r}", PURPOSE)
        check_maps(other, f"teacher's {self.teacher_taps[0]!r}", PURPOSE)
        if self.identity and own.shape != other.shape:
            raise UserError(
                f"the student's map has the shape {tuple(own.shape[1:])}, the teacher's "
                f"{tuple(other.shape[1:])}; identity needs equal ones, so leave it out"
            )
        if self.kd:
            kd(student["logits"], teacher["logits"], self.temperature)
        if self.layer is None:
            _, channels, *_ = other.shape
            size = (other.shape[2], other.shape[3])
            shape = (own.shape[1], own.shape[2], own.shape[3])
            self.layer = nn.Identity() if self.identity else TeacherToStudent(channels, size, shape)
        self.layer.requires_grad_(False).eval()
        if self.adversarial:
            size = (own.shape[2], own.shape[3])
            self.discriminator = Discriminator(own.shape[1], size, self.norm).requires_grad_(False)

    def prepare(self, bench: Bench) -> Phases:
        """Train the teacher's layer under a classifier of its own, which is then dropped."""
        teacher, task = bench.teacher, bench.task
        assert teacher is not None, "it was taught before"
        with torch.random.fork_rng():
            torch.manual_seed(bench.seeds[0])
            built = copy.deepcopy(self)
            student = bench.laid_out(bench.make_student(bench.seeds[0]))
            sample = bench.sample()
            Distiller(student, teacher, built, task, sample)
            layer = self.layer = built.layer
            if layer is None or self.identity:
                return
            answer = teacher(task, sample)
            made = layer.to(bench.device)(answer.features[self.teacher_taps[0]])
            # Drawn afresh, lest it depend on whether there is a discriminator.
            torch.manual_seed(bench.seeds[0])
            head = nn.Linear(made.shape[1], self._kinds(task, answer)).to(bench.device)
        layer.requires_grad_(True)
        path = self.teacher_taps[0]

        def terms(batch: Batch) -> Terms:
            maps = layer(teacher(task, batch).features[path])
            return {"labels": self._classified(task, head(maps.mean((2, 3))), batch)}

        settings = self.training_of_layer
        train = {"layer": layer, "head": head}
        yield Fit(
            name="layer",
            seed=bench.seeds[0],
            updates=[Update(name="layer", train=train, terms=terms, settings=settings)],
            batches=task.batches(
                bench.train, batch_size=settings.batch_size, seed=bench.seeds[0], train=True
            ),
            epochs=settings.epochs,
        )
        layer.requires_grad_(False)

    def _kinds(self, task: Task, teacher: Answer) -> int:
        """How many outputs the classifier behind the teacher's layer has."""
        return teacher["logits"].shape[-1]

    def _classified(self, task: Task, logits: Tensor, batch: Batch) -> Tensor:
        """That classifier's loss."""
        return task.loss(Answer({"logits": logits}), batch)

    def _wanted(self, teacher: Answer) -> Tensor:
        assert self.layer is not None
        with torch.no_grad():
            wanted: Tensor = self.layer.eval()(teacher.features[self.teacher_taps[0]])
        return wanted

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        """The student's terms beside the labels'."""
        found: Terms = {}
        own = student.features[self.student_taps[0]]
        if self.kd:
            found["kd"] = self.kd * kd(student["logits"], teacher["logits"], self.temperature)
        if self.feature:
            found["feature"] = self.feature * feature_distance(own, self._wanted(teacher))
        if self.discriminator is not None:
            loss = self.adversarial * fooling(self.discriminator(own), self.form)
            if self.quiet_steps:
                # As a factor, since to ask the device would make it wait.
                loss = loss * (self.discriminator.steps > self.quiet_steps)
            found["adversarial"] = loss
        return found

    def distil(self, bench: Bench, seed: int) -> Phases:
        student, task = bench.student(seed), bench.task
        distiller = bench.distiller(student, self, seed)
        own, teacher = distiller.method, distiller.teacher
        assert isinstance(own, KTAN)
        fit = self.fit(bench, seed, distiller, student=student)
        judge = own.discriminator
        if judge is None:
            yield fit
            return
        judge.requires_grad_(True)
        path, taps = own.student_taps[0], Taps(student.model, own.student_taps)
        training = bench.training
        own.quiet_steps = own.warmup * len(fit.batches) * training.accumulate
        held: list[tuple[Batch, Answer]] = []

        def judged(batch: Batch) -> Terms:
            # The student's own pass comes next and must find everything as it was.
            kept = [(b, b.clone()) for b in student.buffers()]
            with torch.no_grad(), torch.random.fork_rng():
                fake = task.run(student, batch, taps).features[path]
                for buffer, value in kept:
                    buffer.copy_(value)
            answer = teacher(task, batch)
            held[:] = [(batch, answer)]
            judge.steps += 1
            loss = discrimination(judge(own._wanted(answer)), judge(fake.detach()))
            return {"discrimination": loss}

        def learned(batch: Batch) -> Terms:
            known = held and held[0][0] is batch
            answer = held[0][1] if known else teacher(task, batch)
            said = task.run(student, batch, taps)
            terms: Terms = {}
            if own.label_weight:
                terms["labels"] = own.label_weight * task.loss(said, batch)
            return {**terms, **own.terms(said, answer, batch)}

        plainly = fit.evaluate

        def evaluate() -> dict[str, float]:
            assert plainly is not None
            return {**plainly(), ACCURACY: own._discerned(bench, student, teacher, taps)}

        settings = Training(
            optimiser="adam",
            lr=own.discriminator_lr,
            betas=(0.5, 0.999),
            weight_decay=0.0,
            schedule="constant",
            epochs=training.epochs,
            accumulate=training.accumulate,
        )
        fit.updates = [
            Update(
                name="discriminator",
                train={"discriminator": judge},
                terms=judged,
                settings=settings,
            ),
            Update(train={"student": student}, terms=learned, settings=training),
        ]
        fit.evaluate = None if plainly is None else evaluate
        yield fit
        taps.remove()

    @torch.no_grad()
    def _discerned(self, bench: Bench, student: Network, teacher: Teacher, taps: Taps) -> float:
        """The share of validation maps whose origin the discriminator tells."""
        judge, path, task = self.discriminator, self.student_taps[0], bench.task
        assert judge is not None
        was_training, right, seen = student.training, 0, 0
        student.eval()
        for batch in task.batches(bench.validation, batch_size=128).epoch(0):
            batch = moved(batch, bench.device)
            fake = judge(task.run(student, batch, taps).features[path])
            real = judge(self._wanted(teacher(task, batch)))
            right += int((fake < 0).sum() + (real > 0).sum())
            seen += 2 * len(fake)
        student.train(was_training)
        return right / seen

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """How well the discriminator told the maps of validation data apart."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for line in metrics:
            value = line.get("validation", {}).get(ACCURACY)
            if value is not None:
                lines.setdefault(line["phase"], []).append((line["epoch"], value))
        if not lines:
            return []
        means = [
            (epochs[0][0], sum(value for _, value in epochs) / len(epochs))
            for epochs in zip(*lines.values(), strict=True)
        ]
        chart = Chart("Held-out accuracy", "epoch", "accuracy", {"student": means})
        caption = (
            "Share of validation maps whose origin the discriminator told rightly; 0.5 is a guess, "
            "1 means that student and teacher are easily told apart."
        )
        if len(lines) > 1:
            caption += " Drawn is the mean over the seeds."
        table = [
            ["phase", "first epoch", "last epoch"],
            *([name, f"{p[0][1]:.3f}", f"{p[-1][1]:.3f}"] for name, p in lines.items()),
        ]
        return [Finding("Discriminator", caption, table, [chart])]


class KTANDetection(KTAN):
    """The same for detectors, by the last map that their heads share.

    The teacher's layer is trained to say which kinds of things an image shows. The teacher looks at
    images alone and judges no boxes, so there are no soft targets.

    Args:
        student_layer: a tap path; the trunk of Limbeck's own detectors.

    The others are those of :class:`KTAN`.
    """

    tasks = ("detection",)
    teacher_outputs = False

    def __init__(
        self,
        feature: Weight = 1.0,
        adversarial: Weight = 1e-3,
        form: Form = "non-saturating",
        warmup: Annotated[int, Field(ge=0)] = 0,
        identity: bool = False,
        norm: bool = True,
        discriminator_lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4,
        layer: Training = Training(  # noqa: B008  (frozen)
            epochs=3, batch_size=16, optimiser="adam", lr=1e-3, weight_decay=0, schedule="constant"
        ),
        student_layer: str = "backbone",
        teacher_layer: str | None = None,
        label_weight: Weight = 1.0,
    ) -> None:
        super().__init__(
            kd=0.0,
            feature=feature,
            adversarial=adversarial,
            form=form,
            warmup=warmup,
            identity=identity,
            norm=norm,
            discriminator_lr=discriminator_lr,
            layer=layer,
            student_layer=student_layer,
            teacher_layer=teacher_layer,
            label_weight=label_weight,
        )

    def _kinds(self, task: Task, teacher: Answer) -> int:
        assert isinstance(task, Detection)
        return len(task.classes)

    def _classified(self, task: Task, logits: Tensor, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, shown(batch["label"], logits.shape[1]))


def shown(labels: Tensor, classes: int) -> Tensor:
    """Which classes the boxes of images have, 0 or 1 in (B, classes).

    Args:
        labels: (B, G), class numbers from 1 on; 0 and less are no boxes.

    >>> shown(torch.tensor([[2, 2, 0], [0, -1, 0]]), 2)
    tensor([[0., 1.],
            [0., 0.]])
    """
    numbers = torch.arange(1, classes + 1, device=labels.device)
    return (labels[:, :, None] == numbers).any(1).float()
