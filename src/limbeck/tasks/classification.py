"""Image classification: one label an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from limbeck.data.augment import Augment
from limbeck.data.batches import ImageBatches, LoaderBatches
from limbeck.data.data import Split
from limbeck.errors import UserError, did_you_mean
from limbeck.training.network import Network
from limbeck.training.taps import Taps
from limbeck.training.task import Answer, Batch, Batches, Task, model_output, moved
from limbeck.training.teacher import Teacher


class Classification(Task):
    """Image classification: ``image`` and ``label`` in a batch, ``logits`` (B, C) in an answer.

    Classification of something else names in ``seen`` what its batches hold instead of ``image``.

    Args:
        classes: the class names in the order of the labels.
        augment: what is done at random to training images.
        workers: processes that read images which do not fit into memory.
        device: where networks and batches live.
    """

    name: ClassVar[str] = "classification"
    seen: ClassVar[str] = "image"
    distributions: ClassVar[tuple[str, ...]] = ("logits",)
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def __init__(
        self,
        classes: Sequence[str],
        augment: Augment | None = None,
        workers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.classes = tuple(classes)
        self.augment = augment or Augment()
        self.workers = workers
        self.device = device or torch.device("cpu")

    @property
    def outputs(self) -> tuple[str, ...]:
        """What a network's outputs stand for, in order."""
        return self.classes

    def batches(
        self,
        split: Split | DataLoader[Any],
        *,
        batch_size: int,
        seed: int = 0,
        train: bool = False,
    ) -> Batches:
        """Batches of a split; a data loader keeps its own batch size, order and augmentation."""
        if isinstance(split, DataLoader):
            return LoaderBatches(split, seed)
        return ImageBatches(
            split,
            batch_size,
            seed=seed,
            train=train,
            augment=self.augment,
            workers=self.workers,
            device=self.device,
        )

    def run(self, network: Network, batch: Batch, taps: Taps | None = None) -> Answer:
        if taps is None or not taps.paths:
            return Answer({"logits": model_output(network(batch[self.seen]))})
        output, features = taps.watch(network, batch[self.seen])
        return Answer({} if output is None else {"logits": model_output(output)}, features)

    def loss(self, answer: Answer, batch: Batch) -> Tensor:
        """Cross-entropy, mean over the batch; of a mixed image with both labels, by their shares.

        Mixed batches hold ``partner_label`` (B,) and ``mix`` (B,), the share of ``label``.
        """
        self.check_labelled(batch)
        logits = answer["logits"].float()
        if "mix" not in batch:
            return F.cross_entropy(logits, batch["label"])
        own = F.cross_entropy(logits, batch["label"], reduction="none")
        partner = F.cross_entropy(logits, batch["partner_label"], reduction="none")
        mix: Tensor = batch["mix"]
        return (mix * own + (1 - mix) * partner).mean()

    def check_labelled(self, batch: Batch) -> None:
        """Raise a :class:`UserError` where a batch lacks what the supervised loss needs."""
        if not self.labelled(batch):
            raise UserError(
                "the data has no labels, which the supervised loss needs; set the method's label "
                "weight to 0, or give a labelled set"
            )

    def combine(
        self,
        answers: Sequence[Answer],
        weights: Tensor,
        mean: Literal["probabilities", "logits"],
    ) -> Answer:
        """One answer for an ensemble.

        Mean of ``logits``: their weighted mean. Mean of ``probabilities``: the logarithm of the
        mean at temperature 1, with the single answers as ``members`` for other temperatures.
        """
        stacked = torch.stack([a["logits"].float() for a in answers])
        shares = weights.to(stacked).view(-1, 1, 1)
        if mean == "logits":
            return Answer({"logits": (shares * stacked).sum(0)})
        logits = torch.logsumexp(stacked.log_softmax(-1) + shares.log(), 0)
        return Answer({"logits": logits}, members=tuple(answers), weights=weights)

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        """What logits (N, C) say in probabilities."""
        return logits.softmax(-1)

    @torch.no_grad()
    def predict(
        self, network: Network | Teacher, split: Split | DataLoader[Any]
    ) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and labels (N,) of a split, on the CPU; the network's mode is restored.

        Raises:
            UserError: the split is empty or has no labels.
        """
        was_training = network.training
        network.eval()
        logits: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in self.batches(split, batch_size=256).epoch(0):
            if "label" not in batch:
                raise UserError("what a network is measured on needs labels, and these have none")
            logits.append(self.answer(network, moved(batch, self.device))["logits"].float())
            labels.append(batch["label"])
        network.train(was_training)
        if not sum(map(len, logits)):
            raise UserError("there are no samples to measure on")
        # Read once at the end, so that the host does not wait for each batch.
        return torch.cat(logits).cpu(), torch.cat(labels).cpu()

    def measure(
        self, network: Network | Teacher, split: Split | DataLoader[Any]
    ) -> dict[str, float]:
        """Accuracy and top-5 accuracy (0..1), cross-entropy (nats), calibration error (0..1)."""
        return self.measures(*self.predict(network, split))

    @staticmethod
    def measures(logits: Tensor, labels: Tensor) -> dict[str, float]:
        """What is measured, from logits (N, C) and labels (N,)."""
        return measures(logits, labels)

    def compare(
        self, networks: Mapping[str, Network | Teacher], split: Split | DataLoader[Any]
    ) -> dict[str, Any]:
        """Agreement with the teacher (share of equal predictions, 0..1), measures and errors."""
        facts: dict[str, Any] = {"measures": {}, "errors": {}}
        predicted = {}
        for name, network in networks.items():
            logits, labels = self.predict(network, split)
            predicted[name] = logits.argmax(1)
            facts["measures"][name] = self.measures(logits, labels)
            wrong = labels[predicted[name] != labels]
            facts["errors"][name] = {
                "total": len(wrong),
                "of": len(labels),
                "by_class": torch.bincount(wrong, minlength=len(self.classes)).tolist(),
            }
        if "teacher" in predicted:
            facts["agreement"] = {
                name: float((answers == predicted["teacher"]).float().mean())
                for name, answers in predicted.items()
                if name != "teacher"
            }
        return facts

    def record(
        self,
        networks: Mapping[str, Network | Teacher],
        split: Split | DataLoader[Any],
        folder: Path,
    ) -> None:
        """Write ``predictions.safetensors``: labels, rows, each network's probabilities, images.

        Images are kept for at most 64 samples on which the networks disagree.
        """
        tensors: dict[str, Tensor] = {}
        answers = []
        for name, network in networks.items():
            logits, tensors["labels"] = self.predict(network, split)
            answers.append(logits.argmax(1))
            tensors[f"probabilities.{name}"] = self.probabilities(logits).half()
        if isinstance(split, Split):
            tensors["rows"] = split.rows
            votes = torch.stack(answers)
            differing = (votes != votes[0]).any(0).nonzero().flatten()[:64]
            if len(differing):
                tensors["example_positions"] = differing
                tensors["example_images"] = torch.stack(
                    [split.images.read(int(row)).cpu() for row in split.rows[differing]]
                )
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "predictions.safetensors",
            metadata={"classes": "\n".join(self.classes)},
        )


def class_number(which: int | str, classes: Sequence[str], who: str) -> int:
    """The number of a class that is named or numbered; ``who`` names it, for the sentence.

    >>> class_number("dog", ["cat", "dog"], "the sequence")
    1

    Raises:
        UserError: there is no such class.
    """
    if isinstance(which, str):
        if which not in classes:
            raise UserError(
                f"{who} names the class {which!r}, which the data has not; "
                + did_you_mean(which, classes)
            )
        return classes.index(which)
    if not 0 <= which < len(classes):
        raise UserError(f"{who} names class {which}, but classes run from 0 to {len(classes) - 1}")
    return which


def measures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """What is measured of a classifier, from its logits (N, C) and labels (N,).

    >>> measures(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))["accuracy"]
    0.5
    """
    # Here, as it takes longer to import than a small network to train.
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

    classes = logits.shape[1]
    # One process measures alone, so the metrics must not wait for the others.
    alone: dict[str, Any] = {"num_classes": classes, "sync_on_compute": False}
    collection = MetricCollection(
        {
            "accuracy": MulticlassAccuracy(average="micro", **alone),
            "top5": MulticlassAccuracy(average="micro", top_k=min(5, classes), **alone),
            "calibration_error": MulticlassCalibrationError(n_bins=15, **alone),
        }
    )
    collection.update(logits.softmax(1), labels)
    found = {name: float(value) for name, value in collection.compute().items()}
    return {
        "accuracy": found["accuracy"],
        "top5": found["top5"],
        "cross_entropy": float(F.cross_entropy(logits, labels)),
        "calibration_error": found["calibration_error"],
    }
