"""Knowledge Distillation via Route Constrained Optimization. Jin, Peng, Wu, Liu, Liu, Liang, Yan,
Hu, ICCV 2019 (arXiv 1904.09149).

What a heavy teacher says when it has converged is too hard a target for a small student. What it
said on its way there is easier. The teacher's route, its states after each epoch, is kept; some of
them, the anchors, teach one after the other, from an early one to the last, and each stage goes on
with the student of the one before.

Needs: a teacher that is trained in the run, or its states as several teachers in the order of
time; for soft targets classifiers of the same classes, for features layers of student and teacher.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.systems.classification.kd import kd
from limbeck.training.bench import Bench
from limbeck.training.checkpoint import read_state
from limbeck.training.distiller import Distiller
from limbeck.training.features import meeting, reduced
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Journal, Phase, Solve, Update
from limbeck.training.task import Answer, Batch, Terms, moved

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def equal_intervals(epochs: int, anchors: int) -> list[int]:
    """Anchors at equal intervals (section 3.3), the last one the converged teacher.

    Args:
        epochs: how long the teacher is trained.
        anchors: how many there are, at most as many as epochs.

    >>> equal_intervals(240, 4), equal_intervals(10, 3)
    ([60, 120, 180, 240], [4, 7, 10])
    """
    return [math.ceil(j * epochs / anchors) for j in range(1, anchors + 1)]


def next_anchor(hardness: Mapping[int, float], threshold: float) -> int:
    """The greedy choice (section 3.3): the last state before one that is too hard.

    Args:
        hardness: of each later state, by its place on the route: the student's mimic loss over
            that of a student who learned nothing.
        threshold: delta; harder is too hard.

    Returns:
        The place of the next anchor, at least the first one.

    >>> next_anchor({2: 0.2, 3: 0.5, 4: 0.79, 5: 0.9, 6: 0.95}, threshold=0.8)
    4
    """
    places = sorted(hardness)
    chosen = places[0]
    for place in places:
        if hardness[place] > threshold:
            break
        chosen = place
    return chosen


class RCO(Method):
    """A student learns from states on its teacher's route, one after the other.

    Args:
        anchors: how many, or the teacher's epochs themselves, 1 being after the first.
        select: ``equal`` intervals; ``greedy``, the hardest state each time that the student can
            follow, by its loss on validation data, ``anchors`` being the most of them.
        threshold: delta of the greedy choice, the share of an untrained student's loss.
        form: of the loss: ``kd``, soft targets; ``features``, the mean squared difference of two
            layers, a linear map between them where their widths differ.
        temperature, weight, label_weight: of the loss and of the labels.
        student_layer, teacher_layer: tap paths of ``features``: by default the embedding that the
            classifier reads.
        schedule: each stage begins the learning rate's schedule anew (``restart``), or all of them
            follow one (``continuous``).
    """

    tasks = ("classification",)

    def __init__(
        self,
        anchors: Annotated[int, Field(ge=1)] | Annotated[tuple[int, ...], Field(min_length=1)] = 4,
        select: Literal["equal", "greedy"] = "equal",
        threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.8,
        form: Literal["kd", "features"] = "kd",
        temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0,
        weight: Weight = 0.9,
        label_weight: Weight = 0.1,
        student_layer: str = "fc:input",
        teacher_layer: str = "",
        schedule: Literal["restart", "continuous"] = "restart",
    ) -> None:
        super().__init__()
        if isinstance(anchors, tuple) and (list(anchors) != sorted(set(anchors)) or anchors[0] < 1):
            raise UserError(f"anchors are epochs in rising order from 1 on, not {list(anchors)}")
        if isinstance(anchors, tuple) and select == "greedy":
            raise UserError("a greedy choice finds its anchors; give the most of them as a number")
        self.anchors = anchors
        self.select = select
        self.threshold = threshold
        self.form = form
        self.temperature = temperature
        self.weight = weight
        self.label_weight = label_weight
        self.schedule = schedule
        self.map: nn.Module = nn.Identity()
        if form == "features":
            self.student_taps = (student_layer,)
            self.teacher_taps = (teacher_layer or student_layer,)
            self.teacher_outputs = False

    # The loss of one stage (section 3.2), which knows nothing but the present anchor.

    def build(self, student: Answer, teacher: Answer, batch: Batch) -> None:
        if self.form == "kd":
            kd(student["logits"], teacher["logits"], self.temperature)
            return
        s, t = self._features(student, teacher)
        if s.ndim != t.ndim or s.ndim not in (2, 4):
            raise UserError(
                f"the student's features have the shape {tuple(s.shape)}, the teacher's "
                f"{tuple(t.shape)}; both must be (B, C) or (B, C, H, W)"
            )
        if s.shape[1] != t.shape[1]:
            widths = s.shape[1], t.shape[1]
            self.map = nn.Linear(*widths) if s.ndim == 2 else nn.Conv2d(*widths, 1)

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        if self.form == "kd":
            loss = kd(student["logits"], teacher["logits"], self.temperature)
            return {"anchor": self.weight * loss}
        s, t = self._features(student, teacher)
        s = self.map(s)
        if s.ndim == 4:
            size = meeting(s, t)
            s, t = reduced(s, size), reduced(t, size)
        return {"anchor": self.weight * F.mse_loss(s, t)}

    def _features(self, student: Answer, teacher: Answer) -> tuple[Tensor, Tensor]:
        return student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]]

    # The route.

    def rehearse(self, bench: Bench) -> None:
        super().rehearse(bench)
        length = self._length(bench)
        most = self.anchors if isinstance(self.anchors, int) else max(self.anchors)
        if length == 1 and most > 1:
            raise UserError(
                "RCO: a finished teacher has no route; let it be trained in the run itself "
                "(limbeck run rco), or name its states in the order of time, each as a --teacher "
                "of its own"
            )
        if most > length:
            raise UserError(f"there is no anchor {most}: the teacher's route has {length} states")
        stages = most if isinstance(self.anchors, int) else len(self.anchors)
        if stages > bench.training.epochs > 0:
            raise UserError(
                f"{stages} anchors need {stages} epochs of the student or more, not "
                f"{bench.training.epochs}"
            )
        if self.select == "greedy" and not len(bench.validation):
            raise UserError("the greedy choice is made on validation data; give some")

    def _length(self, bench: Bench) -> int:
        """How many states the route has: the teachers given, or the epochs of the one trained."""
        trained = [c.training for c in bench.candidates if c.training is not None]
        if len(bench.candidates) > 1:
            if trained:
                raise UserError(
                    "several teachers are states of one route, but some are not trained yet; give "
                    "their weights, as in --teacher file:PATH"
                )
            return len(bench.candidates)
        return trained[0].epochs if trained else 1

    def _places(self, length: int) -> list[int]:
        """The anchors that are known beforehand."""
        if isinstance(self.anchors, int):
            return equal_intervals(length, self.anchors)
        return list(self.anchors)

    def phases(self, bench: Bench) -> Phases:
        length = self._length(bench)
        wanted = range(1, length + 1) if self.select == "greedy" else self._places(length)
        route = yield from bench.teach(keep=tuple(wanted))
        for seed in bench.seeds:
            yield from bench.plain(seed)
            yield from self._follow(bench, seed, route, length)

    def _anchor(self, bench: Bench, route: Mapping[int, Path], place: int) -> Network:
        """The teacher as it was at a place on its route."""
        if not route:
            return bench.candidates[place - 1].network
        network = copy.deepcopy(bench.candidates[0].network)
        network.load_state_dict(read_state(route[place])["modules"]["student"])
        return network

    def _follow(self, bench: Bench, seed: int, route: Mapping[int, Path], length: int) -> Phases:
        """One stage after the other; the student goes on where the stage before left it."""
        student = bench.student(seed)
        own = bench.distiller(student, self, seed).method
        untrained = copy.deepcopy(student), copy.deepcopy(own)

        def taught(place: int, pupil: nn.Module = student, method: Method = own) -> Distiller:
            anchor = bench.frozen([self._anchor(bench, route, place)], bench.cache)
            return Distiller(pupil, anchor, method, bench.task).to(bench.device)

        places = self._places(length)
        stages, place, begun = len(places), 0, 0
        for number in range(1, stages + 1):
            if self.select == "equal":
                place = places[number - 1]
            elif number == stages:
                place = length
            else:
                later = range(place + 1, length + 1)

                def choose(_: Journal, later: range = later) -> int:
                    hardness = {
                        p: _loss(bench, taught(p)) / max(_loss(bench, taught(p, *untrained)), 1e-12)
                        for p in later
                    }
                    return next_anchor(hardness, self.threshold)

                name = bench.label(f"anchor-{number}", seed)
                place = yield Solve(name=name, seed=seed, run=choose)
            last = number == stages or place == length
            end = bench.training.epochs if last else number * bench.training.epochs // stages
            yield from self._stage(bench, seed, number, taught(place), student, begun, end)
            begun = end
            if last:
                break

    def _stage(
        self,
        bench: Bench,
        seed: int,
        number: int,
        distiller: Distiller,
        student: Network,
        begun: int,
        end: int,
    ) -> Generator[Phase, Any, None]:
        """Eq. 3: from the weights of the stage before."""
        settings, continuous = bench.training, self.schedule == "continuous"
        if not continuous and settings.epochs:
            settings = settings.stretched((end - begun) / settings.epochs)
        name = "student" if begun == 0 and end == bench.training.epochs else f"student-{number}"
        yield Fit(
            name=bench.label(name, seed),
            seed=seed,
            updates=[
                Update(
                    train={"student": student, "method": distiller.method},
                    terms=distiller,
                    settings=settings,
                )
            ],
            batches=bench.batches(settings.batch_size, seed),
            epochs=end - begun,
            evaluate=bench.watch(student),
            select=bench.select,
            higher_is_better=bench.task.higher_is_better,
            begun=begun if continuous else 0.0,
        )


@torch.no_grad()
def _loss(bench: Bench, distiller: Distiller) -> float:
    """The mean mimic loss on the validation split."""
    was_training = distiller.student.training
    distiller.student.eval()
    total, number = 0.0, 0
    for batch in bench.task.batches(bench.validation, batch_size=256).epoch(0):
        batch = moved(batch, bench.device)
        size = len(batch["label"])
        total += float(distiller(batch)["anchor"]) * size
        number += size
    distiller.student.train(was_training)
    return total / number
