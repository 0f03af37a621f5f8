"""Semantic segmentation: a class for every pixel of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from limbeck.data.scenes import IGNORE, SceneBatches, Scenes, Warp
from limbeck.errors import UserError
from limbeck.training.network import Network
from limbeck.training.taps import Taps
from limbeck.training.task import Answer, Batch, Batches, Task, model_output, moved
from limbeck.training.teacher import Teacher

SHOWN = 6
"""So many test scenes are kept for the report."""


class Segmentation(Task):
    """``image`` (B, C, H, W), ``label`` (B, H, W) in a batch, ``logits`` (B, H, W, C) in an answer.

    The classes come last, so what a loss does for rows of logits it does for pixels. A label of
    :data:`limbeck.data.scenes.IGNORE` counts nowhere.

    Args:
        classes: the class names in the order of the labels.
        weights: of the classes in the loss; all 1 if not given.
        warp: what is done at random to training images.
        workers: processes that read images which do not fit into memory.
        device: where networks and batches live.
        size: scenes that are measured at once.
    """

    name: ClassVar[str] = "segmentation"
    distributions: ClassVar[tuple[str, ...]] = ("logits",)
    metric: ClassVar[str] = "mean IoU"
    higher_is_better: ClassVar[bool] = True

    def __init__(
        self,
        classes: Sequence[str],
        weights: Sequence[float] | None = None,
        warp: Warp | None = None,
        workers: int = 0,
        device: torch.device | None = None,
        size: int = 16,
    ) -> None:
        self.classes = tuple(classes)
        self.weights = torch.tensor(weights or [1.0] * len(self.classes))
        self.warp = warp or Warp()
        self.workers = workers
        self.device = device or torch.device("cpu")
        self.size = size

    @property
    def objects(self) -> range:
        """The numbers of the classes that are things; a class ``background`` is none."""
        return range(int(self.classes[0] == "background"), len(self.classes))

    def batches(
        self, split: Scenes, *, batch_size: int, seed: int = 0, train: bool = False
    ) -> Batches:
        return SceneBatches(
            split,
            batch_size,
            warp=self.warp,
            more=self.more,
            seed=seed,
            train=train,
            workers=self.workers,
            device=self.device,
        )

    def more(self, labels: Tensor) -> Batch:
        """What a batch holds beside the labels (B, H, W), made from them."""
        return {}

    def run(self, network: Network, batch: Batch, taps: Taps | None = None) -> Answer:
        if taps is None or not taps.paths:
            return Answer(self.outputs(network(batch["image"]), batch))
        output, features = taps.watch(network, batch["image"])
        return Answer({} if output is None else self.outputs(output, batch), features)

    def outputs(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """The outputs by name of what a model put out; logits at the size of the images."""
        logits = model_output(output)
        size = batch["image"].shape[2:]
        if logits.shape[2:] != size:
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return {"logits": logits.permute(0, 2, 3, 1)}

    def loss(self, answer: Answer, batch: Batch) -> Tensor:
        """Cross-entropy (nats), the weighted mean over pixels that have a class; 0 if none has."""
        logits, labels = answer["logits"].float(), batch["label"]
        weights, known = self.weights.to(logits.device), labels != IGNORE
        total = F.cross_entropy(
            logits.flatten(0, 2), labels.flatten(), weights, ignore_index=IGNORE, reduction="sum"
        )
        share = weights[labels.where(known, 0)] * known
        mean: Tensor = total / share.sum().clamp(min=1e-6)
        return mean

    def combine(
        self,
        answers: Sequence[Answer],
        weights: Tensor,
        mean: Literal["probabilities", "logits"],
    ) -> Answer:
        """One answer for an ensemble, pixel by pixel, as in classification."""
        stacked = torch.stack([a["logits"].float() for a in answers])
        shares = weights.to(stacked).view(-1, 1, 1, 1, 1)
        if mean == "logits":
            return Answer({"logits": (shares * stacked).sum(0)})
        logits = torch.logsumexp(stacked.log_softmax(-1) + shares.log(), 0)
        return Answer({"logits": logits}, members=tuple(answers), weights=weights)

    @torch.no_grad()
    def answers(self, network: Network | Teacher, split: Scenes) -> list[tuple[Answer, Batch]]:
        """What a network says of a split, batch by batch, in eval mode, with the labels.

        Of each answer the predicted classes alone are kept, ``mask`` uint8 (B, H, W), and what
        :meth:`kept` adds.

        Raises:
            UserError: there are no scenes.
        """
        if not len(split):
            raise UserError("there are no scenes to measure on")
        was_training = network.training
        network.eval()
        found = []
        for batch in self.batches(split, batch_size=self.size).epoch(0):
            answer = self.answer(network, moved(batch, self.device))
            mask = answer["logits"].argmax(-1).to(torch.uint8).cpu()
            said = {"mask": mask, **self.kept(answer, batch, split)}
            found.append((Answer(said), {"label": batch["label"].cpu(), "row": batch["row"]}))
        network.train(was_training)
        return found

    def kept(self, answer: Answer, batch: Batch, split: Scenes) -> dict[str, Tensor]:
        """What else is kept of an answer to be measured."""
        return {}

    def measure(self, network: Network | Teacher, split: Scenes) -> dict[str, float]:
        """Mean IoU over the classes that occur, and pixel accuracy (both 0..1)."""
        return self.measures(self.answers(network, split), split)

    def measures(self, found: Sequence[tuple[Answer, Batch]], split: Scenes) -> dict[str, float]:
        """The measures of what :meth:`answers` found."""
        counts = self.confusion(found)
        there = _union(counts) > 0
        return {
            "mean IoU": float(iou(counts)[there].mean()),
            "pixel accuracy": float(counts.diagonal().sum() / counts.sum().clamp(min=1)),
        }

    def confusion(self, found: Sequence[tuple[Answer, Batch]]) -> Tensor:
        """Pixels by true (rows) and predicted class, float64 (C, C)."""
        # Here, as it takes longer to import than a small network to train.
        from torchmetrics.classification import MulticlassConfusionMatrix

        # One process measures alone, so the metric must not wait for the others.
        counted = MulticlassConfusionMatrix(
            len(self.classes), ignore_index=IGNORE, sync_on_compute=False
        )
        for answer, batch in found:
            counted.update(answer["mask"].long(), batch["label"])
        counts: Tensor = counted.compute()
        return counts.double()

    def compare(self, networks: Mapping[str, Network | Teacher], split: Scenes) -> dict[str, Any]:
        """All measures of each network, and its IoU of each class (``None``: never seen)."""
        facts: dict[str, Any] = {"measures": {}, "class_iou": {}}
        for name, network in networks.items():
            found = self.answers(network, split)
            counts = self.confusion(found)
            values = zip(self.classes, iou(counts).tolist(), _union(counts).tolist(), strict=True)
            facts["measures"][name] = self.measures(found, split)
            facts["class_iou"][name] = {c: value if seen else None for c, value, seen in values}
        return facts

    def record(
        self, networks: Mapping[str, Network | Teacher], split: Scenes, folder: Path
    ) -> None:
        """Write ``predictions.safetensors``: a few scenes, evenly spaced, true and predicted masks.

        ``images`` uint8 (M, C, H, W), ``labels`` and ``masks.ROLE`` uint8 (M, H, W).
        """
        chosen = torch.linspace(0, len(split) - 1, min(SHOWN, len(split))).round().long()
        few = split.subset(chosen)
        tensors = {
            "images": torch.stack([few.images.read(int(row)).cpu() for row in few.rows]),
            "labels": few.masks[few.rows],
        }
        for name, network in networks.items():
            said = [answer["mask"] for answer, _ in self.answers(network, few)]
            tensors[f"masks.{name}"] = torch.cat(said)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "predictions.safetensors",
            metadata={"classes": "\n".join(self.classes)},
        )


def iou(counts: Tensor) -> Tensor:
    """Intersection over union (0..1) of each class, from pixels by true and predicted class (C, C).

    0 for a class that is neither there nor predicted.

    >>> iou(torch.tensor([[2.0, 1.0], [0.0, 1.0]])).tolist()
    [0.6666666865348816, 0.5]
    """
    return counts.diagonal() / _union(counts).clamp(min=1)


def _union(counts: Tensor) -> Tensor:
    return counts.sum(0) + counts.sum(1) - counts.diagonal()
