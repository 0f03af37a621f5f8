"""Image classification as tasks that come one after another, each with classes of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from limbeck.data.augment import Augment
from limbeck.data.data import Split
from limbeck.errors import UserError
from limbeck.tasks.classification import Classification, class_number
from limbeck.training.network import Network
from limbeck.training.teacher import Teacher


class SequentialClassification(Classification):
    """Classification whose classes are parted into tasks; which task a sample is of is known.

    So a network is asked only which of the task's classes a sample is of: its other logits count
    as minus infinity.

    Args:
        classes: the class names in the order of the labels.
        augment: what is done at random to training images.
        workers: processes that read images which do not fit into memory.
        device: where networks and batches live.
        sequence: how many tasks, of classes in their order, as equal as may be; or the classes of
            each task by name or number. Each class is in one of them.

    Raises:
        UserError: fewer than two tasks, a task of fewer than two classes, a class that is in none
            or in two or that there is not.

    Example:
        >>> SequentialClassification("abcde", sequence=2).parts
        ((0, 1, 2), (3, 4))
    """

    name: ClassVar[str] = "sequence"

    def __init__(
        self,
        classes: Sequence[str],
        augment: Augment | None = None,
        workers: int = 0,
        device: torch.device | None = None,
        *,
        sequence: int | Sequence[Sequence[int | str]],
    ) -> None:
        super().__init__(classes, augment, workers, device)
        self.parts = parts(self.classes, sequence)
        self.task_of = torch.zeros(len(self.classes), dtype=torch.int64)
        for number, part in enumerate(self.parts):
            self.task_of[list(part)] = number

    def predict(
        self, network: Network | Teacher, split: Split | DataLoader[Any]
    ) -> tuple[Tensor, Tensor]:
        """As of :class:`Classification`, the logits of other tasks' classes being -infinity."""
        logits, labels = super().predict(network, split)
        other = self.task_of[labels][:, None] != self.task_of[None]
        return logits.masked_fill(other, float("-inf")), labels

    def of(self, split: Split, number: int) -> Split:
        """A split's samples of one task, identities kept."""
        if split.labels is None:
            raise UserError("tasks are told apart by labels; give labelled data")
        return split.subset((self.task_of[split.labels] == number).nonzero().flatten())


def parts(
    classes: Sequence[str], sequence: int | Sequence[Sequence[int | str]]
) -> tuple[tuple[int, ...], ...]:
    """The class numbers of each task.

    >>> parts(["cat", "dog", "car", "bus"], [["car", "bus"], [0, 1]])
    ((2, 3), (0, 1))
    """
    count = len(classes)
    if isinstance(sequence, int):
        if not 2 <= sequence <= count // 2:
            raise UserError(
                f"{count} classes make 2 to {count // 2} tasks of two classes or more, not "
                f"{sequence}"
            )
        found = [tuple(t.tolist()) for t in torch.arange(count).tensor_split(sequence)]
    else:
        found = [
            tuple(class_number(which, classes, "the sequence") for which in part)
            for part in sequence
        ]
    named = [number for part in found for number in part]
    if len(found) < 2 or min(map(len, found)) < 2:
        raise UserError("a sequence has two tasks or more, each of two classes or more")
    if len(set(named)) < len(named):
        twice = next(n for n in named if named.count(n) > 1)
        raise UserError(f"the class {classes[twice]!r} is in two tasks of the sequence")
    if len(named) < count:
        missing = next(n for n in range(count) if n not in named)
        raise UserError(
            f"the class {classes[missing]!r} is in no task of the sequence; put it into one, or "
            "leave its samples out of the data"
        )
    return tuple(found)
