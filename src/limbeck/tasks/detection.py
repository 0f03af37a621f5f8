"""Detection: boxes around the things in an image, and what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from limbeck.data import boxed as sources
from limbeck.data.augment import Augment
from limbeck.data.boxed import Boxed, BoxedBatches
from limbeck.errors import UserError
from limbeck.extras import need
from limbeck.models.build import build
from limbeck.models.detectors import Asked, BoxedInput
from limbeck.tasks.images import Side
from limbeck.training.domain import Domain, Words
from limbeck.training.network import Network
from limbeck.training.progress import Voice
from limbeck.training.taps import Taps
from limbeck.training.task import Answer, Batch, Batches, Task
from limbeck.training.teacher import Teacher

HEADS: tuple[Literal["rpn", "rcn"], ...] = ("rpn", "rcn")
"""The proposal network, which tells objects from background, and the region head."""
BEND = {"rpn": 1 / 9, "rcn": 1.0}
"""The error at which a head's smooth L1 loss turns from a square into a line, as published."""
PICTURES = 6
"""So many test images are shown in the report."""

Found = dict[str, Tensor]
"""What is found in an image: ``boxes`` (n, 4), ``labels`` (n,), ``scores`` (n,)."""


@dataclass(frozen=True)
class Head:
    """What a head says of N boxes, and what it should say.

    Attributes:
        logits: (N, C + 1), the background's first; a proposal network tells two classes.
        offsets: (N, 4), of the corners for the class that a box has.
        label: (N,), 0 for the background.
        target: (N, 4), the offsets that lead to the true box; of no meaning for the background.
    """

    logits: Tensor
    offsets: Tensor
    label: Tensor
    target: Tensor


class Detection(Task):
    """Detection by Faster R-CNN; a batch is one of :class:`limbeck.data.boxed.BoxedBatches`.

    An answer has what :class:`limbeck.models.detectors.Detector` says to a question, and
    :meth:`heads` reads it. The teacher judges the student's sampled anchors and proposals.

    Args:
        classes: the class names in the order of the labels.
        flip: mirror half of the training images.
        workers: processes that read images which do not fit into memory.
        device: where networks and batches live.
    """

    name: ClassVar[str] = "detection"
    metric: ClassVar[str] = "mAP@0.5"
    higher_is_better: ClassVar[bool] = True

    def __init__(
        self,
        classes: Sequence[str],
        flip: bool = True,
        workers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.classes = tuple(classes)
        self.flip = flip
        self.workers = workers
        self.device = device or torch.device("cpu")

    def batches(
        self, split: Boxed, *, batch_size: int, seed: int = 0, train: bool = False
    ) -> Batches:
        return BoxedBatches(
            split,
            batch_size,
            seed=seed,
            train=train,
            flip=self.flip,
            workers=self.workers,
            device=self.device,
        )

    def run(self, network: Network, batch: Batch, taps: Taps | None = None) -> Answer:
        if network.dtype not in (None, torch.float32):
            raise UserError(
                "detectors answer in float32; leave engine.teacher_precision out, or set "
                "engine.precision for both"
            )
        asked = Asked(batch["image"], batch.get("boxes"), batch.get("label"), batch.get("proposed"))
        if taps is None or not taps.paths:
            return Answer(network(asked))
        output, features = taps.watch(network, asked)
        return Answer({} if output is None else output, features)

    def question(self, batch: Batch, student: Answer) -> Batch:
        """The batch with the student's proposals, which the teacher is to judge."""
        return {**batch, "proposed": student["proposals"].detach()}

    def heads(self, answer: Answer, student: Answer) -> dict[Literal["rpn", "rcn"], Head]:
        """What an answer says of the boxes that were sampled for the student, head by head.

        Args:
            answer: the student's own, or the teacher's to the student's proposals.
            student: given in training mode to a batch with true boxes.
        """
        chosen = student["anchor_label"] >= 0
        objectness = answer["objectness"][chosen].float()
        label = student["label"]
        own = answer["corrections"].gather(1, label.view(-1, 1, 1).expand(-1, 1, 4))[:, 0]
        return {
            # One logit under a sigmoid is two under a softmax, the background's being 0.
            "rpn": Head(
                torch.stack([torch.zeros_like(objectness), objectness], 1),
                answer["offsets"][chosen].float(),
                student["anchor_label"][chosen],
                student["anchor_target"][chosen],
            ),
            "rcn": Head(answer["logits"].float(), own.float(), label, student["target"]),
        }

    def loss(self, answer: Answer, batch: Batch) -> Tensor:
        """Cross-entropy of the sampled boxes and smooth L1 of their offsets, of both heads."""
        if not self.labelled(batch):
            raise UserError("the data has no boxes, which the supervised loss needs")
        parts = [
            F.cross_entropy(head.logits, head.label) + box_loss(head, BEND[name])
            for name, head in self.heads(answer, answer).items()
        ]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def predict(self, network: Network | Teacher, split: Boxed) -> list[Found]:
        """What a network finds in each image, on the CPU, in the view's pixels."""
        one = _single(network)
        was_training = one.training
        one.eval()
        found: list[Found] = []
        for batch in self.batches(split, batch_size=16).epoch(0):
            images = batch["image"].to(self.device)
            scale = 1.0 if one.input is None else one.input.scale(images)
            for boxes in one(images):
                found.append(
                    {
                        "boxes": (boxes["boxes"] / scale).float().cpu(),
                        "labels": boxes["labels"].cpu(),
                        "scores": boxes["scores"].float().cpu(),
                    }
                )
        one.train(was_training)
        if not found:
            raise UserError("there are no images to measure on")
        return found

    def measure(self, network: Network | Teacher, split: Boxed) -> dict[str, float]:
        """Mean average precision at an overlap of 0.5, at 0.75, and over 0.5 to 0.95 (0..1)."""
        return measures(self.predict(network, split), list(truths(split)))

    def compare(self, networks: Mapping[str, Network | Teacher], split: Boxed) -> dict[str, Any]:
        """All measures, and the average precision of each class at 0.5."""
        facts: dict[str, Any] = {"measures": {}, "by_class": {}}
        truth = list(truths(split))
        for role, network in networks.items():
            found = self.predict(network, split)
            facts["measures"][role] = measures(found, truth)
            precisions = by_class(found, truth)
            facts["by_class"][role] = {
                name: precisions[number + 1]
                for number, name in enumerate(self.classes)
                if number + 1 in precisions
            }
        return facts

    def record(self, networks: Mapping[str, Network | Teacher], split: Boxed, folder: Path) -> None:
        """Write ``detections.safetensors``: some images, their true boxes, each network's."""
        step = max(1, len(split) // PICTURES)
        shown = split.subset(torch.arange(0, len(split), step)[:PICTURES])
        assert shown.labels is not None, "scenes are labelled"
        tensors = {
            "images": torch.stack([shown.images.read(int(row)).cpu() for row in shown.rows]),
            "boxes": shown.boxes,
            "labels": shown.labels,
        }
        for role, network in networks.items():
            found = self.predict(network, shown)
            tensors[f"{role}.of"] = torch.cat(
                [torch.full((len(f["labels"]),), n) for n, f in enumerate(found)]
            )
            for key in ("boxes", "labels", "scores"):
                tensors[f"{role}.{key}"] = torch.cat([f[key] for f in found])
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "detections.safetensors",
            metadata={"classes": "\n".join(self.classes)},
        )


def box_loss(head: Head, bend: float = 1.0) -> Tensor:
    """Smooth L1 of the offsets of boxes that hold something, over the number of all boxes.

    Girshick, Fast R-CNN, ICCV 2015, Eq. 3, where ``bend`` is 1.

    >>> head = Head(torch.zeros(2, 2), torch.tensor([[1.0, 0, 0, 0], [9, 9, 9, 9]]),
    ...             torch.tensor([1, 0]), torch.zeros(2, 4))
    >>> box_loss(head)
    tensor(0.2500)
    """
    there = head.label > 0
    loss = F.smooth_l1_loss(head.offsets[there], head.target[there], beta=bend, reduction="sum")
    return loss / max(len(head.label), 1)


def truths(split: Boxed) -> Iterator[Found]:
    """The true boxes of each image as torchmetrics takes them; those not counted as a crowd."""
    assert split.labels is not None, "scenes are labelled"
    for boxes, labels in zip(split.boxes, split.labels, strict=True):
        there = labels != 0
        yield {
            "boxes": boxes[there],
            "labels": labels[there].abs(),
            "iscrowd": (labels[there] < 0).long(),
        }


def measures(found: Sequence[Found], truth: Sequence[Found]) -> dict[str, float]:
    """What is measured of a detector, as COCO does it.

    >>> box = {"boxes": torch.tensor([[0.0, 0, 8, 8]]), "labels": torch.tensor([1])}
    >>> measures([{**box, "scores": torch.tensor([0.9])}], [box])["mAP@0.5"]
    1.0
    """
    precision = _precision(found, truth)
    return {
        "mAP@0.5": max(0.0, float(precision["map_50"])),
        "mAP@0.75": max(0.0, float(precision["map_75"])),
        "mAP": max(0.0, float(precision["map"])),
    }


def by_class(found: Sequence[Found], truth: Sequence[Found]) -> dict[int, float]:
    """The average precision at an overlap of 0.5 of each label that is among the true ones."""
    precision = _precision(found, truth, iou_thresholds=[0.5], class_metrics=True)
    labels, values = precision["classes"].view(-1), precision["map_per_class"].view(-1)
    pairs = zip(labels.tolist(), values.tolist(), strict=True)
    return {int(label): value for label, value in pairs if value >= 0}


def _precision(found: Sequence[Found], truth: Sequence[Found], **options: Any) -> dict[str, Tensor]:
    need("pycocotools")
    from torchmetrics.detection import MeanAveragePrecision

    # One process measures alone, so the metric must not wait for the others.
    metric = MeanAveragePrecision(sync_on_compute=False, **options)
    metric.warn_on_many_detections = False
    metric.update(list(found), list(truth))
    values: dict[str, Tensor] = metric.compute()
    return values


def _single(network: Network | Teacher) -> Any:
    if isinstance(network, Network):
        return network
    if len(network.networks) > 1:
        raise UserError("what several detectors find cannot be averaged; give one teacher")
    return network.networks[0]


class DetectionWords(Words):
    """Where images with boxes come from, and what is done to them."""

    size: tuple[Side, Side] | None = Field(
        default=None, description="height and width that images are stretched to"
    )
    merge: bool = Field(default=False, description="one class for whatever is in the boxes")
    flip: bool = Field(default=True, description="mirror half of the training images")


class ImageDetection(Domain):
    """Images with boxes, of any source that :func:`limbeck.data.boxed.load` knows."""

    words_type: ClassVar[type[Words]] = DetectionWords
    source = "scenes"

    def __init__(
        self, words: DetectionWords, *, device: torch.device, workers: int, voice: Voice
    ) -> None:
        need("pycocotools")
        self.words, self.device, self.workers = words, device, workers
        data = sources.load(words.source, words.validation, words.size)
        voice.say(data.describe())
        if words.merge:
            data = sources.merged(data)
        train = data.train
        if words.limit is not None and words.limit < len(train):
            train = train.subset(torch.arange(words.limit))
            voice.say(f"trained on {len(train):,} of {len(data.train):,} images")
        self.classes = data.classes
        self.input = BoxedInput(3, data.size, data.mean, data.std)
        self.splits = {
            "train": train,
            "transfer": train,
            "validation": data.validation,
            "test": data.test,
        }
        self.facts = {"data": data.source, "fingerprint": data.fingerprint()}

    @staticmethod
    def kind_of(source: str) -> str:
        return sources.kind_of(source)

    def task(self, augment: Augment | None = None) -> Detection:
        if augment is not None:
            raise UserError(
                "images with boxes are augmented alike for all models, by data.flip; leave the "
                "model's augment out"
            )
        return Detection(self.classes, self.words.flip, self.workers, self.device)

    def network(self, name: str, seed: int | None = None) -> Network:
        return build(name, self.classes, self.input, seed)

    def sample(self) -> Tensor:
        return self.input.sample()
