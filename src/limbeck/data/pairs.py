"""Images in pairs, one that is given and one that is to be made of it, each pair as one stack."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.data import sources
from limbeck.data.batches import ImageBatches
from limbeck.data.data import Images, ResidentImages, Split
from limbeck.data.faults import tolerated
from limbeck.data.images import SUFFIXES, FileImages, decode, decode_all, facts
from limbeck.data.masks import resized
from limbeck.data.splits import completed
from limbeck.errors import UserError
from limbeck.training.task import Batch

KINDS = sources.KINDS
"""Sources of single images, of which conditions are made."""
kind_of = sources.kind_of

Direction = Literal["AtoB", "BtoA"]
_SPLITS = {"train": "train", "val": "validation", "valid": "validation", "test": "test"}
_RESIDENT = 512 * 2**20
_WANTED = (
    "wanted are folders train and test (val too, if any) of pictures with a pair side by side, or "
    "folders A and B with these in them and files of the same names"
)

PIECES = {"train": 600, "test": 150}
SIDE = 32
"""Height and width of an embedded piece of a photograph, in pixels."""


@dataclass(frozen=True)
class Pairs:
    """What a source of pairs holds.

    ``splits`` are ``train``, ``validation`` and ``test``, whose images stack a pair: the first
    ``given`` channels are the condition, the ``made`` behind them what is to be made of it.
    """

    splits: Mapping[str, Split]
    given: int
    made: int
    size: tuple[int, int]
    notes: tuple[str, ...] = ()

    def completed(self, validation: float) -> Pairs:
        """With all three splits: what is missing is held out of ``train``."""
        splits, notes = completed(self.splits, validation)
        return replace(self, splits=splits, notes=(*self.notes, *notes))

    def describe(self, source: str) -> str:
        """What was found, in one sentence."""
        counts = ", ".join(f"{len(split):,} {name}" for name, split in self.splits.items())
        kinds = ["grey" if n == 1 else "colour" for n in (self.given, self.made)]
        text = (
            f"{source}: {counts} pairs, {kinds[0]} to {kinds[1]}, {self.size[0]} x {self.size[1]}"
        )
        return "; ".join([text, *self.notes]).encode(errors="backslashreplace").decode()


def grey(pixels: Tensor) -> Tensor:
    """The luma (ITU-R BT.601) of images, uint8 (..., C, H, W) to uint8 (..., 1, H, W).

    >>> grey(torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)).item()
    76
    """
    if pixels.shape[-3] == 1:
        return pixels
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (pixels * weights).sum(-3, keepdim=True).round().to(torch.uint8)


def edges(pixels: Tensor) -> Tensor:
    """Where images change, by Sobel's filters, uint8 (..., C, H, W) to uint8 (..., 1, H, W).

    A quarter of the gradient's length: a straight step from black to white is 255.

    >>> step = torch.tensor([0, 0, 255, 255], dtype=torch.uint8).expand(1, 4, 4)
    >>> edges(step)[0, 1].tolist()
    [0, 255, 255, 0]
    """
    luma = grey(pixels).float()
    flat = F.pad(luma.reshape(-1, 1, *luma.shape[-2:]), (1, 1, 1, 1), mode="replicate")
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    gradient = F.conv2d(flat, torch.stack([across, across.T])[:, None])
    length = gradient.pow(2).sum(1).sqrt() / 4
    return length.round().clamp(0, 255).to(torch.uint8).view(luma.shape)


CONDITIONS: dict[str, Callable[[Tensor], Tensor]] = {"edges": edges, "grey": grey}


class Conditioned:
    """Images behind what is made of them: the condition's one channel comes first."""

    def __init__(self, images: Images, condition: str) -> None:
        self.images = images
        self.condition = condition
        self.channels = 1 + images.channels
        self.size = images.size

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        pixels = self.images.read(index)
        return torch.cat([CONDITIONS[self.condition](pixels), pixels])

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.images.fingerprint()} {self.condition}".encode()).hexdigest()


class PairedFiles(FileImages):
    """Pairs from files: two halves of one picture, or two pictures, each stretched to one size."""

    def __init__(
        self,
        pairs: Sequence[tuple[Path, ...]],
        channels: tuple[int, int],
        size: tuple[int, int],
        direction: Direction,
    ) -> None:
        super().__init__([path for pair in pairs for path in pair], sum(channels), size)
        self.pairs = pairs
        self.parts = channels
        self.direction = direction

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> Tensor:
        with tolerated():
            return self._stacked(index)
        return self.blank()

    def _stacked(self, index: int) -> Tensor:
        given, made = self.parts
        deepest = max(self.parts)
        both = [decode(path, deepest, None, str(path)) for path in self.pairs[index]]
        if len(both) == 1:
            width = both[0].shape[2] // 2
            both = [both[0][:, :, :width], both[0][:, :, -width:]]
        assert self.size is not None, "pairs are read at one size"
        one, other = (resized(part, self.size) for part in both)
        if self.direction == "BtoA":
            one, other = other, one
        return torch.cat(
            [part if n == deepest else grey(part) for part, n in ((one, given), (other, made))]
        )

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{super().fingerprint()} {self.direction}".encode()).hexdigest()


class PairBatches(ImageBatches):
    """Batches of pairs: ``image`` float (B, given, H, W) in [0, 1], the condition, and ``target``
    float (B, made, H, W) in [-1, 1], which is to be made of it.

    Args:
        split: images that stack a pair.
        given: channels of the condition, which come first.
    """

    def __init__(self, split: Split, batch_size: int, *, given: int, **more: object) -> None:
        super().__init__(split, batch_size, **more)  # type: ignore[arg-type]
        self.given = given

    def _batch(self, wanted: Tensor, pixels: Tensor, epoch: int) -> Batch:
        batch = super()._batch(wanted, pixels, epoch)
        condition, target = batch["image"].tensor_split([self.given], 1)
        return {**batch, "image": condition, "target": 2 * target - 1}


def of_photographs(size: tuple[int, int], condition: str) -> Pairs:
    """Pieces of scikit-learn's two photographs, which need no download.

    Those for testing are cut from other halves of the photographs than those for training.
    """
    from sklearn.datasets import load_sample_images

    halves: dict[str, list[Tensor]] = {"train": [], "test": []}
    for photograph in load_sample_images().images:
        pixels = torch.from_numpy(photograph.copy()).permute(2, 0, 1)
        middle = pixels.shape[2] // 2
        halves["train"].append(pixels[:, :, :middle])
        halves["test"].append(pixels[:, :, middle:])
    generator = torch.Generator().manual_seed(11)
    pieces, splits, row = [], {}, 0
    for name, number in PIECES.items():
        for turn in range(number):
            half = halves[name][turn % 2]
            side = int(torch.randint(96, 257, (1,), generator=generator))
            top, left = (
                int(torch.randint(0, n - side + 1, (1,), generator=generator))
                for n in half.shape[1:]
            )
            pieces.append(resized(half[:, top : top + side, left : left + side], size))
    pixels = torch.stack(pieces)
    images = ResidentImages(torch.cat([CONDITIONS[condition](pixels), pixels], 1))
    for name, number in PIECES.items():
        splits[name] = Split(name, images, None, torch.arange(row, row + number))
        row += number
    return Pairs(splits, 1, 3, size)


def of_images(
    source: str, size: tuple[int, int] | None, condition: str, validation: float
) -> Pairs:
    """Any source of images that :func:`limbeck.data.load` knows, with a condition made of each."""
    data = sources.load(source, validation, size)
    images: Images = data.train.images
    if isinstance(images, ResidentImages):
        pixels = images.pixels
        images = ResidentImages(torch.cat([CONDITIONS[condition](pixels), pixels], 1))
    else:
        images = Conditioned(images, condition)
    splits = {
        split.name: replace(split, images=images, labels=None)
        for split in (data.train, data.validation, data.test)
    }
    return Pairs(splits, 1, data.channels, data.size, data.notes)


def read_pairs(root: Path, size: tuple[int, int] | None, direction: Direction) -> Pairs:
    """Pairs from a folder, as pix2pix has them.

    ``train/NAME`` with a pair side by side, A on the left; or ``A/train/NAME`` and
    ``B/train/NAME``. ``val`` and ``test`` likewise.

    Args:
        root: the folder.
        size: height and width that all are stretched to; the first pair's if not given.
        direction: which of the two is given, and which is to be made of it.

    Raises:
        UserError: no such folder, a picture without its partner or that cannot be read.
    """
    if not root.is_dir():
        raise UserError(f"the data path {root} is no folder; {_WANTED}")
    found = {name: pairs for folder, name in _SPLITS.items() if (pairs := _pairs(root, folder))}
    if "train" not in found:
        raise UserError(f"{root} holds no training pairs; {_WANTED}")
    every = [pair for pairs in found.values() for pair in pairs]
    headers = []
    for path in (path for pair in every for path in pair):
        with tolerated():
            headers.append(facts(path, str(path)))
            continue
        # While faults are gathered, it stands for a picture that cannot be read.
        headers.append((SIDE, 2 * SIDE, False))
    halved = len(every[0]) == 1
    if halved:
        for (path, *_), (height, width, _) in zip(every, headers, strict=True):
            if width < 2:
                raise UserError(f"{path} is too narrow, {height} x {width}, to hold a pair")
    channels = [1 if all(h[2] for h in headers[part :: len(every[0])]) else 3 for part in (0, -1)]
    if size is None:
        size = headers[0][0], headers[0][1] // (2 if halved else 1)
    one, other = channels if direction == "AtoB" else reversed(channels)
    images: Images = PairedFiles(every, (one, other), size, direction)
    if len(every) * images.channels * size[0] * size[1] <= _RESIDENT:
        images = ResidentImages(decode_all(len(every), images.read))
    splits, row = {}, 0
    for name, pairs in found.items():
        splits[name] = Split(name, images, None, torch.arange(row, row + len(pairs)))
        row += len(pairs)
    return Pairs(splits, one, other, size)


def _pairs(root: Path, name: str) -> list[tuple[Path, ...]]:
    """The files of each pair of one split; none where it is not there."""
    first, second = root / "A" / name, root / "B" / name
    if not first.is_dir():
        first = second = root / name
    if not first.is_dir():
        return []
    files = sorted(p for p in first.iterdir() if p.suffix.lower() in SUFFIXES)
    if first == second:
        return [(path,) for path in files]
    for path in files:
        with tolerated():
            if not (second / path.name).is_file():
                raise UserError(f"{path} has no partner {second / path.name}")
    return [(path, second / path.name) for path in files if (second / path.name).is_file()]
