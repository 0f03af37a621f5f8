"""What a data set is to the rest of Limbeck: splits of images with an identity each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from limbeck.data.colour import pca_colours


class Images(Protocol):
    """A row of images, in memory or on disk.

    ``channels`` is 1 or 3; ``size`` is (height, width), or ``None`` where images differ in size.
    """

    channels: int
    size: tuple[int, int] | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """One image, uint8 of shape (C, H, W)."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when any image does (file sizes and times may stand for bytes)."""
        ...


class ResidentImages:
    """Images of one size held in memory as uint8, (N, C, H, W)."""

    def __init__(self, pixels: Tensor) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4:
            raise ValueError(
                f"resident images are uint8 of shape (N, C, H, W), not {pixels.dtype} of shape "
                f"{tuple(pixels.shape)}"
            )
        self.pixels = pixels
        self.channels = pixels.shape[1]
        self.size: tuple[int, int] | None = (pixels.shape[2], pixels.shape[3])

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> Tensor:
        return self.pixels[index]

    def on(self, device: torch.device) -> Tensor:
        """All pixels on a device; they are moved there once."""
        if self.pixels.device != device:
            self.pixels = self.pixels.to(device)
        return self.pixels

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(self.pixels.cpu().flatten().numpy().data).hexdigest()


_COLOURED = 10_000

_EVERY = torch.empty(0, dtype=torch.int64)


class Samples:
    """Some samples of a data set of any kind; subclasses are frozen dataclasses.

    ``rows`` says which sample of the data set each is, its identity in every subset; ``labels`` is
    ``None`` where there are none.
    """

    name: str
    labels: Tensor | None
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, positions: Tensor | Sequence[int], name: str | None = None) -> Self:
        """The samples at these positions, identities kept."""
        chosen = torch.as_tensor(positions, dtype=torch.int64)
        changed: dict[str, Any] = {"name": name or self.name, "rows": self.rows[chosen]}
        if self.labels is not None:
            changed["labels"] = self.labels[chosen]
        return replace(self, **changed)  # type: ignore[type-var]

    def unlabelled(self) -> Self:
        """The same samples without labels."""
        return replace(self, labels=None)  # type: ignore[type-var]

    def _chosen(self, content: bytes) -> str:
        """A hash of the data set's content, given as one, and of the choice and labels."""
        digest = hashlib.sha256(content)
        digest.update(self.rows.numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Split(Samples):
    """Some images of a data set.

    ``labels`` is int64 of shape (N,), or ``None`` where there are none. ``rows`` says which image
    each sample is (all in turn if not given): a sample keeps its ``rows`` entry, its identity, in
    every subset it is part of, so augmentation and remembered teacher answers follow the sample
    and not its position.
    """

    name: str
    images: Images
    labels: Tensor | None
    rows: Tensor = _EVERY

    def __post_init__(self) -> None:
        if self.rows is _EVERY:
            object.__setattr__(self, "rows", torch.arange(len(self.images)))
        if self.labels is not None and len(self.labels) != len(self.rows):
            raise ValueError(
                f"split {self.name!r} has {len(self.rows)} samples but {len(self.labels)} labels"
            )

    @cached_property
    def colours(self) -> tuple[Tensor, Tensor]:
        """The principal components of the pixels' colours, as :func:`pca_colours` gives them.

        Of at most 10,000 images, evenly spaced in the split.
        """
        step = max(1, -(-len(self) // _COLOURED))
        rows = self.rows[::step].tolist()
        return pca_colours(self.images.read(row)[None] for row in rows)

    def fingerprint(self) -> str:
        """A hash of images, labels and choice of samples."""
        return self._chosen(self.images.fingerprint().encode())


@dataclass(frozen=True)
class Data:
    """A data set: its splits, the names of its classes and what its pixels are like.

    ``kind`` names the family (``digits``, ``mnist``, ``cifar100``, ``folder`` ...) that presets are
    chosen by; ``source`` is the string that it was loaded by. ``size`` is the height and width of a
    view. ``mean`` and ``std`` hold one number a channel on the scale where white is 1.
    """

    source: str
    kind: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        return self.train.images.channels

    def describe(self) -> str:
        """What was found, in one sentence, said before training."""
        height, width = self.size
        colour = "grey" if self.channels == 1 else "colour"
        counts = ", ".join(
            f"{len(s):,} {s.name}" + (" (unlabelled)" if s.labels is None and len(s) else "")
            for s in (self.train, self.validation, self.test)
        )
        text = (
            f"{self.source}: {counts} images, {len(self.classes)} classes, {colour}, "
            f"{height} x {width}"
        )
        # Names that are no text (a path's stray bytes) are shown escaped.
        return "; ".join([text, *self.notes]).encode(errors="backslashreplace").decode()

    def fingerprint(self) -> str:
        """A hash of all three splits."""
        parts = [s.fingerprint() for s in (self.train, self.validation, self.test)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()
