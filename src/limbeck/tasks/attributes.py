"""Attributes of images: each is there or not, independently of the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from limbeck.data.augment import Augment
from limbeck.data.data import Split
from limbeck.errors import UserError
from limbeck.tasks.classification import Classification, class_number
from limbeck.training.network import Network
from limbeck.training.task import Answer, Batch, Batches
from limbeck.training.teacher import Teacher


class Attributes(Classification):
    """Attributes: ``label`` (B, A) of zeros and ones in a batch, ``logits`` (B, A) in an answer.

    A class has all its attributes or lacks them, as in zero-shot learning (Lampert, Nickisch,
    Harmeling: Learning to Detect Unseen Object Classes by Between-Class Attribute Transfer, CVPR
    2009), so labels of classes become labels of attributes. Labels of shape (B, A) are kept.

    Args:
        classes: the class names in the order of the labels.
        augment: what is done at random to training images.
        workers: processes that read images which do not fit into memory.
        device: where networks and batches live.
        attributes: the classes that have each attribute, by name or by number.

    Raises:
        UserError: no attributes, one that is true of all classes or of none, or a class that
            there is not.

    Example:
        >>> task = Attributes(["cat", "car", "bird"], attributes={"animal": ["cat", 2]})
        >>> task.table.tolist()
        [[1.0], [0.0], [1.0]]
    """

    name: ClassVar[str] = "attributes"
    # Not over classes: what is most probable of them says nothing of the rest.
    distributions: ClassVar[tuple[str, ...]] = ()
    metric: ClassVar[str] = "mean average precision"
    higher_is_better: ClassVar[bool] = True

    def __init__(
        self,
        classes: Sequence[str],
        augment: Augment | None = None,
        workers: int = 0,
        device: torch.device | None = None,
        *,
        attributes: Mapping[str, Sequence[int | str]],
    ) -> None:
        super().__init__(classes, augment, workers, device)
        self.table = attribute_table(self.classes, attributes)
        self.attributes = tuple(attributes)

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.attributes

    def batches(
        self,
        split: Split | DataLoader[Any],
        *,
        batch_size: int,
        seed: int = 0,
        train: bool = False,
    ) -> AttributeBatches:
        """Batches of a split, with attributes for labels."""
        found = super().batches(split, batch_size=batch_size, seed=seed, train=train)
        return AttributeBatches(found, self.table)

    def loss(self, answer: Answer, batch: Batch) -> Tensor:
        """Binary cross-entropy, mean over attributes and batch; of a mixed image by the shares."""
        self.check_labelled(batch)
        labels: Tensor = batch["label"]
        if "mix" in batch:
            # The loss is linear in the label, so this is the mixture of both labels' losses.
            share = batch["mix"].to(labels)[:, None]
            labels = share * labels + (1 - share) * batch["partner_label"]
        logits = answer["logits"].float()
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits))

    def combine(
        self,
        answers: Sequence[Answer],
        weights: Tensor,
        mean: Literal["probabilities", "logits"],
    ) -> Answer:
        """One answer for an ensemble: the mean logits, or the logits of the mean probabilities."""
        stacked = torch.stack([a["logits"].float() for a in answers])
        shares = weights.to(stacked).view(-1, 1, 1)
        if mean == "logits":
            return Answer({"logits": (shares * stacked).sum(0)})
        yes, no = (
            torch.logsumexp(F.logsigmoid(sign * stacked) + shares.log(), 0) for sign in (1, -1)
        )
        return Answer({"logits": yes - no}, members=tuple(answers), weights=weights)

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        return logits.sigmoid()

    @staticmethod
    def measures(logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Mean average precision and mean accuracy (0..1), binary cross-entropy (nats)."""
        return measures(logits, labels)

    def compare(
        self, networks: Mapping[str, Network | Teacher], split: Split | DataLoader[Any]
    ) -> dict[str, Any]:
        """Measures, the precisions of single attributes, and agreement with the teacher.

        Agreement is the share of samples (0..1) with the teacher's answer to all attributes.
        """
        facts: dict[str, Any] = {"measures": {}, "attributes": {}}
        answers = {}
        for name, network in networks.items():
            logits, labels = self.predict(network, split)
            answers[name] = logits > 0
            facts["measures"][name] = measures(logits, labels)
            found = average_precisions(logits, labels).tolist()
            facts["attributes"][name] = {
                attribute: None if math.isnan(value) else value
                for attribute, value in zip(self.attributes, found, strict=True)
            }
            facts["frequencies"] = dict(zip(self.attributes, labels.mean(0).tolist(), strict=True))
        if "teacher" in answers:
            facts["agreement"] = {
                name: float((answer == answers["teacher"]).all(1).float().mean())
                for name, answer in answers.items()
                if name != "teacher"
            }
        return facts

    def record(
        self,
        networks: Mapping[str, Network | Teacher],
        split: Split | DataLoader[Any],
        folder: Path,
    ) -> None:
        """Write ``predictions.safetensors``: labels (N, A), rows, each network's probabilities."""
        tensors: dict[str, Tensor] = {}
        for name, network in networks.items():
            logits, labels = self.predict(network, split)
            tensors["labels"] = labels.to(torch.uint8)
            tensors[f"probabilities.{name}"] = self.probabilities(logits).half().contiguous()
        if isinstance(split, Split):
            tensors["rows"] = split.rows
        save_file(
            tensors,
            folder / "predictions.safetensors",
            metadata={"classes": "\n".join(self.attributes)},
        )


class AttributeBatches:
    """Batches whose class labels have become rows of a table (C, A) of attributes."""

    def __init__(self, batches: Batches, table: Tensor) -> None:
        self.batches = batches
        self.table = table

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step ``start`` on."""
        for batch in self.batches.epoch(epoch, start):
            for name in ("label", "partner_label"):
                label = batch.get(name)
                if label is not None and label.ndim == 1:
                    batch[name] = self.table.to(label.device)[label]
            yield batch


def attribute_table(
    classes: Sequence[str], attributes: Mapping[str, Sequence[int | str]]
) -> Tensor:
    """Which class has which attribute: float (C, A) of zeros and ones.

    >>> attribute_table(["0", "1"], {"odd": [1]}).tolist()
    [[0.0], [1.0]]

    Raises:
        UserError: no attributes, one that is true of all classes or of none, or a class that
            there is not.
    """
    if not attributes:
        raise UserError("there are no attributes; name the classes that have each of them")
    table = torch.zeros(len(classes), len(attributes))
    for column, (name, having) in enumerate(attributes.items()):
        for which in having:
            table[class_number(which, classes, f"the attribute {name!r}"), column] = 1
        number = int(table[:, column].sum())
        if number in (0, len(classes)):
            raise UserError(
                f"the attribute {name!r} is true of {'all' if number else 'none'} of the "
                f"{len(classes)} classes, so there is nothing to learn; leave it out, or name "
                "some of the classes"
            )
    return table


def average_precisions(logits: Tensor, labels: Tensor) -> Tensor:
    """Average precision (0..1) of each attribute, (A,); NaN for one that no sample has.

    >>> logits = torch.tensor([[2.0], [1.0], [0.0]])
    >>> average_precisions(logits, torch.tensor([[1.0], [0.0], [1.0]]))
    tensor([0.8333])
    """
    from torchmetrics.functional.classification import binary_average_precision

    # In double precision, as the sigmoids of large logits are ties in single.
    return torch.stack(
        [
            binary_average_precision(scores, truth).float()
            if truth.any()
            else torch.tensor(float("nan"))
            for scores, truth in zip(logits.double().sigmoid().T, labels.long().T, strict=True)
        ]
    )


def measures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """What is measured of attributes, from logits (N, A) and labels (N, A) of zeros and ones.

    ``mean average precision`` is the mean over the attributes that some sample has.

    >>> measures(torch.tensor([[2.0], [-1.0]]), torch.tensor([[1.0], [1.0]]))["accuracy"]
    0.5
    """
    return {
        "mean average precision": float(average_precisions(logits, labels).nanmean()),
        "accuracy": float(((logits > 0) == (labels > 0.5)).float().mean()),
        "cross_entropy": float(F.binary_cross_entropy_with_logits(logits, labels.to(logits))),
    }
