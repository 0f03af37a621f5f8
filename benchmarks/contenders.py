"""The same distillation by hand and by Limbeck, from the same weights on the same batches."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from arena import Pace
from ground import BATCH, DECAY, LABELS, LR, MOMENTUM, SOFT, STUDENT, TEMPERATURE
from torch import Tensor, nn

from limbeck.data import load
from limbeck.data.batches import ImageBatches
from limbeck.distillation import start
from limbeck.models import Input, build
from limbeck.recipes import Recipe
from limbeck.training.bench import Bench
from limbeck.training.method import Method, Phases
from limbeck.training.phases import Fit
from limbeck.training.task import Answer, Batch, Batches, Terms

MAPS = 1000.0
STAGES = ("stage1", "stage2", "stage3")


def attention(features: Tensor) -> Tensor:
    """Where a layer is active: the mean square over channels, (B, C, H, W) -> (B, HW), norm 1."""
    return F.normalize(features.square().mean(1).flatten(1))


def maps_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean squared difference of attention maps, summed over layers."""
    return torch.stack(
        [F.mse_loss(attention(s), attention(t)) for s, t in zip(student, teacher, strict=True)]
    ).sum()


class AttentionMaps(Method):
    """Three stages' attention maps instead of the teacher's answers."""

    tasks = ("classification",)
    label_weight = LABELS
    student_taps = teacher_taps = STAGES

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        theirs, ours = ([a.features[s] for s in STAGES] for a in (teacher, student))
        return {"maps": MAPS * maps_loss(ours, theirs)}


def hand(pace: Pace, folder: str, method: str = "kd") -> None:
    """The shortest loop that distils: what an owner of two models writes, and the measure of all.

    Images are normalised and in memory as floats before the clock runs.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    data = load(f"cifar100:{folder}", validation=0.0)
    split = data.train
    own = Input(3, data.size, data.mean, data.std)
    pixels = torch.stack([split.images.read(int(row)) for row in split.rows])
    images, labels = own(pixels / 255).to(device), split.labels.to(device)
    order = ImageBatches(split, BATCH, train=True).order
    student = build(STUDENT, data.classes, own, seed=0).model.to(device).train()
    teacher = build(f"file:{folder}/teacher", data.classes, own).model.to(device).eval()
    optimiser = torch.optim.SGD(student.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    examine = _examination(student, images[:BATCH], labels[:BATCH])
    loss_of = (_by_answers if method == "kd" else _by_maps)(student, teacher)
    for epoch in count():
        pace.mark(examine)
        for rows in order(epoch).to(device).split(BATCH):
            loss = loss_of(images[rows], labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


def _by_answers(student: nn.Module, teacher: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            v = teacher(images)
        z = student(images)
        log_q, p = F.log_softmax(z / TEMPERATURE, 1), F.softmax(v / TEMPERATURE, 1)
        soft = TEMPERATURE**2 * F.kl_div(log_q, p, reduction="batchmean")
        return LABELS * F.cross_entropy(z, labels) + SOFT * soft

    return loss


def _by_maps(student: nn.Module, teacher: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    ours, theirs = _caught(student), _caught(teacher)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            teacher(images)
        z = student(images)
        maps = maps_loss([ours[s] for s in STAGES], [theirs[s] for s in STAGES])
        return LABELS * F.cross_entropy(z, labels) + MAPS * maps

    return loss


def _caught(model: nn.Module) -> Mapping[str, Tensor]:
    """What the stages put out in the latest pass."""
    found: dict[str, Tensor] = {}
    for name in STAGES:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: found.__setitem__(name, output)
        )
    return found


def _examination(
    student: nn.Module, images: Tensor, labels: Tensor
) -> Callable[[], dict[str, float]]:
    """The student's loss on some images: after equal work it is equal."""

    def examine() -> dict[str, float]:
        with torch.no_grad():
            loss = F.cross_entropy(student.eval()(images), labels)
        student.train()
        return {"loss": float(loss)}

    return examine


def limbeck(
    pace: Pace,
    folder: str,
    method: str = "kd",
    engine: Mapping[str, Any] | None = None,
    augment: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    student: str = STUDENT,
    lr: float = LR,
    every: int = 1,
) -> None:
    """A run of Limbeck from its recipe to its folder, as the command line starts it.

    Everything is on that is on by default: the audit of the first batch, the progress bar, metrics,
    checkpoints. Only the batches are handed out a stretch at a time, and training never ends.

    Args:
        folder: what :func:`ground.lay_out` filled.
        method: ``kd``, ``maps``, or ``plain`` for the student alone.
        engine: the recipe's ``engine``.
        augment: the recipe's ``data.augment``.
        data: more of the recipe's ``data``.
        student: the student's model.
        lr: the learning rate.
        every: epochs that make a stretch.
    """
    pace.every = every

    class Recorded(Recipe):
        def method(self) -> Method:
            return _in_turn(AttentionMaps() if method == "maps" else super().method(), pace)

    training = {
        "epochs": 10**6,
        "batch_size": BATCH,
        "lr": lr,
        "momentum": MOMENTUM,
        "weight_decay": DECAY,
        "schedule": "constant",
    }
    soft = {"temperature": TEMPERATURE, "weight": SOFT, "label_weight": LABELS}
    teacher = {"model": f"file:{folder}/teacher"}
    recipe = Recorded.model_validate(
        {
            "system": method,
            "data": {
                "source": f"cifar100:{folder}",
                "validation": 0.0,
                "augment": augment or {},
                **(data or {}),
            },
            "teachers": [] if method == "plain" else [teacher],
            "student": {"model": student, "training": training},
            "methods": {"kd": soft} if method == "kd" else {},
            "baseline": False,
            "engine": engine or {},
        }
    )
    start(recipe, Path(tempfile.mkdtemp(prefix="run-", dir=folder)))


def _in_turn(method: Method, pace: Pace) -> Method:
    """A method whose batches come when the pace says so."""
    phases = method.phases

    def in_turn(bench: Bench) -> Phases:
        given, result = phases(bench), None
        while True:
            try:
                phase = given.send(result)
            except StopIteration:
                return
            if isinstance(phase, Fit):
                _hold(phase.batches, pace, lambda: _loss(bench))
            result = yield phase

    method.phases = in_turn  # type: ignore[method-assign]
    return method


def _hold(batches: Batches, pace: Pace, tell: Callable[[], dict[str, float]]) -> None:
    """Let each epoch begin with a mark: the one before, its last step included, is over then."""
    given = batches.epoch

    def epoch(number: int, start: int = 0) -> Iterator[Batch]:
        pace.mark(tell)
        yield from given(number, start)

    batches.epoch = epoch  # type: ignore[method-assign]


def _loss(bench: Bench) -> dict[str, float]:
    """The loss that is told by hand too, of a copy, whatever the engine has made of the student."""
    copy = bench.make_student(0).to(bench.device).eval()
    copy.load_state_dict(bench.students[0].state_dict())
    first = bench.transfer.subset(range(min(BATCH, len(bench.transfer))))
    batch = next(iter(bench.task.batches(first, batch_size=BATCH).epoch(0)))
    with torch.no_grad():
        return {"loss": float(bench.task.loss(bench.task.run(copy, batch), batch))}
