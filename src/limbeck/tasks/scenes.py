"""Scenes in which every pixel has a class: where they come from, and the networks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from limbeck import plain
from limbeck.data import composed
from limbeck.data.masks import read_masks
from limbeck.data.scenes import Pools, Scenes, Warp
from limbeck.data.tusimple import read_tusimple
from limbeck.errors import UserError, did_you_mean
from limbeck.models.build import build
from limbeck.models.dense import LaneInput, SceneInput
from limbeck.tasks.lanes import BACKGROUND, LaneDetection
from limbeck.tasks.segmentation import Segmentation
from limbeck.training.domain import Domain, Words
from limbeck.training.network import Network
from limbeck.training.progress import Voice

Side = Annotated[int, Field(ge=16, le=2**13)]


class SceneWords(Words):
    """Where images with masks come from and how those for training are augmented."""

    size: tuple[Side, Side] | None = Field(default=None, description="height and width")
    augment: Warp = Warp()
    void: Annotated[int, Field(ge=0, le=255)] | None = Field(
        default=None, description="the value in masks of pixels without a class, beside 255"
    )


class MaskWords(SceneWords):
    """How much each class weighs, beside."""

    balance: bool = Field(
        default=False,
        description="weigh a class of the share p of all pixels by 1 / ln(1.02 + p), as ENet does",
    )


class ImageSegmentation(Domain):
    """Photographs or pictures with a mask of classes each."""

    words_type: ClassVar[type[Words]] = MaskWords
    source = "digit-scenes"
    embedded: ClassVar[str] = "digit-scenes"
    files: ClassVar[str] = "masks"
    usual: ClassVar[tuple[int, int]] = (64, 64)
    input_type: ClassVar[type[SceneInput]] = SceneInput

    def __init__(self, words: Any, *, device: torch.device, workers: int, voice: Voice) -> None:
        self.words, self.device, self.workers = words, device, workers
        pools = self.pools().completed(words.validation)
        voice.say(pools.describe(words.source))
        train = pools.splits["train"]
        if words.limit is not None and words.limit < len(train):
            step = torch.linspace(0, len(train) - 1, words.limit).round().long()
            train = train.subset(step)
        self.classes = pools.classes
        self.splits = {
            "train": train,
            "transfer": train,
            "validation": pools.splits["validation"],
            "test": pools.splits["test"],
        }
        height, width = train.masks.shape[1:]
        self.input = self.input_type(3, (height, width), *_statistics(train))
        self.facts = {
            "data": words.source,
            "fingerprint": "-".join(s.fingerprint()[:16] for s in self.splits.values()),
        }

    @classmethod
    def kind_of(cls, source: str) -> str:
        return cls._parsed(source)[0]

    @classmethod
    def _parsed(cls, source: str) -> tuple[str, Path | None]:
        """The kind of data, and where it lies."""
        kind, colon, rest = source.partition(":")
        if source == cls.embedded:
            return source, None
        if colon and kind == cls.files and rest:
            return kind, plain.path(rest)
        if plain.path(source).exists() and source:
            return cls.files, plain.path(source)
        if "/" in source or source.startswith("."):
            raise UserError(f"the data path {source} does not exist")
        raise UserError(
            f"there is no data source {source!r} for this task; "
            + did_you_mean(kind, [cls.embedded, f"{cls.files}:PATH"])
        )

    def pools(self) -> Pools:
        """What the source holds."""
        _, path = self._parsed(self.words.source)
        if path is None:
            return composed.digit_scenes(self.words.size or self.usual)
        return read_masks(path, self.words.size, self.words.void)

    def task(self, augment: Any = None) -> Segmentation:
        weights = _rarity(self.splits["train"], len(self.classes)) if self.words.balance else None
        return Segmentation(self.classes, weights, self._warp(augment), self.workers, self.device)

    def _warp(self, augment: Any) -> Warp:
        if augment is not None:
            raise UserError(
                "scenes are augmented alike for all models; leave a model's own augment out, and "
                "set data.augment"
            )
        warp: Warp = self.words.augment
        return warp

    def network(self, name: str, seed: int | None = None) -> Network:
        return build(name, self.classes, self.input, seed)

    def sample(self) -> Tensor:
        return self.input.sample()


class LaneWords(SceneWords):
    """Where roads with lanes come from, and how many lanes are told apart."""

    lanes: Annotated[int, Field(ge=2, le=20, multiple_of=2)] = Field(
        default=4, description="half of them to either side of the image's middle"
    )


class ImageLanes(ImageSegmentation):
    """Roads whose lanes are told apart by their places."""

    words_type = LaneWords
    source = "roads"
    embedded = "roads"
    files = "tusimple"
    usual = (96, 160)
    input_type = LaneInput

    def pools(self) -> Pools:
        _, path = self._parsed(self.words.source)
        if self.words.augment.flip:
            raise UserError(
                "a mirrored road has its lanes at other places; leave flip out of data.augment"
            )
        if path is None:
            return composed.roads(self.words.size or self.usual, self.words.lanes)
        return read_tusimple(path, self.words.size or (368, 640), self.words.lanes)

    def task(self, augment: Any = None) -> LaneDetection:
        weights = [BACKGROUND, *(1.0 for _ in self.classes[1:])]
        return LaneDetection(self.classes, weights, self._warp(augment), self.workers, self.device)


def _rarity(train: Scenes, classes: int) -> list[float]:
    """1 / ln(1.02 + p) for each class of the share p of the pixels (ENet, section 5.2)."""
    counts = torch.bincount(train.masks[train.rows].flatten().int(), minlength=256)[:classes]
    shares = counts.double() / counts.sum().clamp(min=1)
    return [float(weight) for weight in 1 / (1.02 + shares).log()]


def _statistics(train: Scenes) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation a channel, white being 1, of at most 500 training images."""
    step = max(1, len(train) // 500)
    pixels = torch.stack([train.images.read(int(row)) for row in train.rows[::step]])
    flat = pixels.transpose(0, 1).flatten(1).double() / 255
    mean, std = flat.mean(1), flat.std(1).clamp(min=1e-3)
    return tuple(round(float(x), 6) for x in mean), tuple(round(float(x), 6) for x in std)
