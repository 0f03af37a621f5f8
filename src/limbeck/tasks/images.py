"""Images with a label each: where they come from, and the networks that tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from limbeck import data as sources
from limbeck.data.augment import Augment
from limbeck.errors import UserError
from limbeck.models import Input, build
from limbeck.tasks.attributes import Attributes
from limbeck.tasks.classification import Classification
from limbeck.tasks.sequence import SequentialClassification
from limbeck.training.domain import Domain, Part, Words
from limbeck.training.network import Network
from limbeck.training.progress import Voice
from limbeck.training.task import model_output

Side = Annotated[int, Field(ge=1, le=2**13)]


class Transfer(Part):
    """The part of the training split that students see."""

    exclude: tuple[int, ...] = Field(default=(), description="classes left out")
    only: tuple[int, ...] = Field(default=(), description="the only classes kept")
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    labels: bool = True


class ImageWords(Words):
    """Where images come from and how those for training are augmented."""

    size: tuple[Side, Side] | None = None
    label: str | None = None
    labelled: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="share of the training samples that have labels; below 1 students learn from "
        "all of them without",
    )
    augment: Augment = Augment()
    unlabelled: str | None = Field(default=None, description="source of the students' images")
    transfer: Transfer = Transfer()

    def for_teacher(self) -> dict[str, Any]:
        # What is a share of labelled samples to students is the whole training split to a teacher.
        return super().for_teacher() | {
            "labelled": 1.0,
            "unlabelled": None,
            "transfer": {"fraction": self.labelled},
        }


class ImageClassification(Domain):
    """Images of one class each, of any size and source that :func:`limbeck.data.load` knows."""

    words_type: ClassVar[type[Words]] = ImageWords
    source = "digits"

    def __init__(
        self, words: ImageWords, *, device: torch.device, workers: int, voice: Voice
    ) -> None:
        self.words, self.device, self.workers = words, device, workers
        data = sources.load(
            words.source, validation=words.validation, size=words.size, label=words.label
        )
        voice.say(data.describe())
        train = data.train
        if words.limit is not None and words.limit < len(train):
            train = sources.transfer(train, fraction=words.limit / len(train))
        transfer = train
        if words.labelled < 1:
            transfer = train.unlabelled()
            train = sources.transfer(train, fraction=words.labelled)
        if words.unlabelled is not None:
            transfer = sources.unlabelled(words.unlabelled, data.size)
            voice.say(
                f"students learn from {len(transfer):,} unlabelled images of {words.unlabelled}"
            )
        if words.transfer != Transfer():
            transfer = sources.transfer(transfer, **words.transfer.model_dump())
        if words.unlabelled is None and min(len(transfer), len(train)) < len(data.train):
            voice.say(
                f"teachers learn from {len(train):,} of {len(data.train):,} training samples, "
                f"students from {len(transfer):,}"
            )
        self.classes = data.classes
        self.input = Input(data.channels, data.size, data.mean, data.std)
        self.splits = {
            "train": train,
            "transfer": transfer,
            "validation": data.validation,
            "test": data.test,
        }
        self.facts = {"data": data.source, "fingerprint": data.fingerprint()}

    @staticmethod
    def kind_of(source: str) -> str:
        return sources.kind_of(source)

    def task(self, augment: Augment | None = None) -> Classification:
        return Classification(
            self.classes, augment or self.words.augment, self.workers, self.device
        )

    def network(self, name: str, seed: int | None = None) -> Network:
        return build(name, self.task().outputs, self.input, seed)

    def sample(self) -> Tensor:
        return self.input.sample()

    @classmethod
    def recognise(cls, network: Network, files: Sequence[Path], top: int) -> list[dict[str, Any]]:
        """The most probable classes of image files."""
        if not network.classes or not isinstance(network.input, Input):
            raise UserError("the network does not say which classes it knows and what it is fed")
        view = torch.stack(
            [sources.read_image(p, network.input.channels, network.input.size) for p in files]
        )
        with torch.no_grad():
            logits = model_output(network.eval()(view.float() / 255))
        best = cls.probabilities(logits).topk(min(top, len(network.classes)))
        return [
            {
                "image": str(file),
                "classes": [
                    {"class": network.classes[i], "probability": p}
                    for p, i in zip(values, indices, strict=True)
                ],
            }
            for file, values, indices in zip(
                files, best.values.tolist(), best.indices.tolist(), strict=True
            )
        ]

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        """What logits (N, C) say in probabilities."""
        return Classification.probabilities(logits)


class AttributeWords(ImageWords):
    """Images whose classes have attributes."""

    attributes: dict[str, tuple[int | str, ...]] = Field(
        min_length=1, description="the classes, by name or number, that have each attribute"
    )


class ImageAttributes(ImageClassification):
    """Images that have attributes or lack them, as their classes do."""

    words_type = AttributeWords
    words: AttributeWords

    def task(self, augment: Augment | None = None) -> Attributes:
        return Attributes(
            self.classes,
            augment or self.words.augment,
            self.workers,
            self.device,
            attributes=self.words.attributes,
        )

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        return Attributes.probabilities(logits)


class SequenceWords(ImageWords):
    """Images whose classes come task after task."""

    sequence: int | tuple[tuple[int | str, ...], ...] = Field(
        description="how many tasks the classes are parted into, or the classes of each"
    )


class ImageSequence(ImageClassification):
    """Images whose classes are parted into tasks that come one after another."""

    words_type = SequenceWords
    words: SequenceWords

    def task(self, augment: Augment | None = None) -> SequentialClassification:
        return SequentialClassification(
            self.classes,
            augment or self.words.augment,
            self.workers,
            self.device,
            sequence=self.words.sequence,
        )
