"""What a batch means: the face that a domain shows to the core."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.training.network import Network
from limbeck.training.taps import Taps

if TYPE_CHECKING:
    from limbeck.training.teacher import Teacher

Batch = dict[str, Any]
"""A batch of samples by name; which names there are is the task's business."""

Terms = dict[str, Tensor]
"""Named loss terms, weights included; their sum is what an update minimises."""


@dataclass(frozen=True)
class Answer:
    """What a network says about a batch.

    ``outputs`` holds the tensors that the task names (``logits`` ...), ``features`` the captures
    by tap path. Where an answer stands for an ensemble whose probabilities are averaged,
    ``members`` holds the single answers and ``weights``, (K,), their shares.
    """

    outputs: Mapping[str, Tensor]
    features: Mapping[str, Tensor] = field(default_factory=dict)
    members: tuple[Answer, ...] = ()
    weights: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.outputs:
            raise KeyError(
                f"the answer has no {name!r}, only {sorted(self.outputs)}; a method with "
                "teacher_outputs = False gets the teacher's features alone"
            )
        return self.outputs[name]


@dataclass(frozen=True)
class View:
    """Which of a training set's finitely many views a batch shows, in ``batch["view"]``.

    A row, a view's number and its source decide a sample's pixels, so what a frozen teacher says
    about them can be remembered and is true in every run that meets the three again.

    Attributes:
        source: a hash of the images and of how they are augmented, the number of views left out.
        number: the view that is shown, 0 <= number < of.
        of: how many views there are.
        samples: how many samples the split has.
        rows: every ``batch["row"]`` lies below this.
    """

    source: str
    number: int
    of: int
    samples: int
    rows: int


class Batches(Protocol):
    """A source of batches whose order is a function of the epoch, so that any step can be found."""

    def __len__(self) -> int:
        """Steps in an epoch."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from step ``start`` on.

        In a run of several processes each yields its share; ``batch["share"]`` is then the weight
        that makes the mean over processes equal the mean over the whole batch (1 if absent).
        """
        ...


class Task(ABC):
    """What a batch means in a domain: how a model is run on it, its loss, its measures.

    ``metric`` names the measure that decides (a key of what :meth:`measure` returns);
    ``distributions`` the outputs that are logits over classes, in the last dimension.
    """

    name: ClassVar[str]
    distributions: ClassVar[tuple[str, ...]] = ()
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]

    @abstractmethod
    def batches(
        self, split: Any, *, batch_size: int, seed: int = 0, train: bool = False
    ) -> Batches:
        """Batches of a split: shuffled and augmented for training, in order otherwise."""

    @abstractmethod
    def run(self, network: Network, batch: Batch, taps: Taps | None = None) -> Answer:
        """Run a network on a batch; ``taps``, if any, watch its model.

        Taps may stop the pass; the model's output is then ``None``, and the answer has features
        only.
        """

    @abstractmethod
    def loss(self, answer: Answer, batch: Batch) -> Tensor:
        """The supervised loss, a scalar; raises :class:`UserError` where labels are missing."""

    def solve(self, network: Network, split: Any, seed: int) -> None:
        """Fit a network to a split's labels whose model is a :class:`Solved`."""
        raise UserError(
            f"{network.name} learns by no gradient, and the task {self.name} knows no other way"
        )

    def answer(self, network: Network | Teacher, batch: Batch) -> Answer:
        """The answer of a network, or of a teacher that may be an ensemble."""
        return self.run(network, batch) if isinstance(network, Network) else network(self, batch)

    def question(self, batch: Batch, student: Answer) -> Batch:
        """The batch as a teacher is asked about it when the student has answered; as it is.

        A task overrides it where the teacher is to judge what the student proposes.
        """
        return batch

    @abstractmethod
    def measure(self, network: Network | Teacher, split: Any) -> dict[str, float]:
        """The network's measures on a split, in eval mode; the mode it was in is restored."""

    def combine(
        self,
        answers: Sequence[Answer],
        weights: Tensor,
        mean: Literal["probabilities", "logits"],
    ) -> Answer:
        """One answer for several teachers; ``weights`` (K,) sum to one."""
        raise UserError(
            f"several teachers cannot be averaged in the task {self.name}; route each sample to "
            "one teacher, or give one teacher"
        )

    def labelled(self, batch: Batch) -> bool:
        """Whether a batch holds what the supervised loss needs."""
        return "label" in batch

    def better(self, one: float, other: float) -> bool:
        """Whether the deciding metric ``one`` is better than ``other``."""
        return one > other if self.higher_is_better else one < other

    def compare(self, networks: Mapping[str, Network | Teacher], split: Any) -> dict[str, Any]:
        """Facts about the finished networks beside their metric, for the result and the report."""
        return {}

    def record(self, networks: Mapping[str, Network | Teacher], split: Any, folder: Path) -> None:
        """Write into ``folder`` what the report's pictures are drawn from."""


def moved(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device; who the samples are (``row``) stays where it is looked up."""
    return {
        name: value.to(device, non_blocking=True)
        if isinstance(value, Tensor) and name != "row"
        else value
        for name, value in batch.items()
    }


def model_output(output: Any) -> Tensor:
    """The tensor in a model's output: itself, its ``logits``, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return model_output(output.logits)
    if isinstance(output, Mapping) and "logits" in output:
        return model_output(output["logits"])
    if isinstance(output, (tuple, list)) and output:
        return model_output(output[0])
    raise UserError(
        f"the model returned {type(output).__name__}, in which no tensor of logits was found; "
        "return a tensor, a mapping with 'logits', or an object with .logits"
    )
