"""Images with boxes around the things in them, whatever they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck import plain
from limbeck.data.augment import uniforms
from limbeck.data.batches import ImageBatches
from limbeck.data.boxes import Annotated, Item, read_coco, read_voc
from limbeck.data.data import Images, ResidentImages, Split
from limbeck.data.faults import tolerated
from limbeck.data.images import FileImages, decode, decode_all, facts
from limbeck.data.splits import split_off_test
from limbeck.errors import UserError, did_you_mean
from limbeck.training.task import Batch

KINDS = ("scenes", "voc", "coco")
_RESIDENT = 512 * 2**20
_VALIDATION, _TEST = 21, 22
_NONE = torch.zeros(0, 0, 4)

SIDE = 64
"""Height and width of an embedded scene, in pixels."""
SCENES = {"train": 400, "test": 100}


@dataclass(frozen=True)
class Boxed(Split):
    """Some images with boxes.

    ``boxes`` (N, G, 4) are left, top, right and bottom in pixels of the view, ``labels`` (N, G)
    what is in them: class number + 1, or 0 where an image has fewer boxes than G. A label below 0
    is that of a box which is neither learnt nor counted (difficult, or a crowd).
    """

    boxes: Tensor = _NONE

    def subset(self, positions: Tensor | Sequence[int], name: str | None = None) -> Self:
        chosen = torch.as_tensor(positions, dtype=torch.int64)
        return replace(super().subset(chosen, name), boxes=self.boxes[chosen])

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode())
        digest.update(self.boxes.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class BoxedData:
    """Boxed in splits, the names of what is in their boxes, and what their pixels are like."""

    source: str
    classes: tuple[str, ...]
    train: Boxed
    validation: Boxed
    test: Boxed
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """What was found, in one sentence, said before training."""
        splits = (self.train, self.validation, self.test)
        counts = ", ".join(f"{len(s):,} {s.name}" for s in splits)
        boxes = sum(int((s.labels != 0).sum()) for s in splits if s.labels is not None)
        text = (
            f"{self.source}: {counts} images, {boxes:,} boxes of {len(self.classes)} classes, "
            f"{self.size[0]} x {self.size[1]}"
        )
        return "; ".join([text, *self.notes])

    def fingerprint(self) -> str:
        """A hash of all three splits."""
        parts = [s.fingerprint() for s in (self.train, self.validation, self.test)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


class BoxedBatches(ImageBatches):
    """Batches of scenes: as of images, with ``boxes`` (B, G, 4) and ``label`` (B, G).

    In training half of the images, chosen by (seed, sample, epoch), are mirrored with their boxes,
    where ``flip`` says so; boxes that are not learnt have the label 0.
    """

    def __init__(
        self,
        split: Boxed,
        batch_size: int,
        *,
        seed: int = 0,
        train: bool = False,
        flip: bool = True,
        workers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(split, batch_size, seed=seed, train=train, workers=workers, device=device)
        self.scenes = split
        self.flip = flip

    def _batch(self, wanted: Tensor, pixels: Tensor, epoch: int) -> Batch:
        batch = super()._batch(wanted, pixels, epoch)
        # What a teacher says depends on the student's proposals, so no view of it is remembered.
        batch.pop("view", None)
        batch["boxes"] = self.scenes.boxes[wanted[0]]
        if not self.train:
            return batch
        batch["label"] = batch["label"].clamp(min=0)
        if self.flip:
            turned = uniforms(batch["row"], 1, self.seed, epoch)[:, 0] < 0.5
            return mirrored(batch, turned)
        return batch


def mirrored(batch: Batch, turned: Tensor) -> Batch:
    """A batch with some of its images, bool (B,), turned left to right, and their boxes too.

    >>> batch = {"image": torch.zeros(1, 3, 4, 10), "boxes": torch.tensor([[[1.0, 0, 3, 4]]])}
    >>> mirrored(batch, torch.tensor([True]))["boxes"].tolist()
    [[[7.0, 0.0, 9.0, 4.0]]]
    """
    image, boxes = batch["image"], batch["boxes"]
    there = turned.to(image.device)[:, None, None, None]
    left, top, right, bottom = boxes.unbind(2)
    width = image.shape[3]
    other = torch.stack([width - right, top, width - left, bottom], 2)
    return {
        **batch,
        "image": torch.where(there, image.flip(3), image),
        "boxes": torch.where(turned[:, None, None], other, boxes),
    }


def load(source: str, validation: float = 0.1, size: tuple[int, int] | None = None) -> BoxedData:
    """Load images with boxes.

    Args:
        source: ``scenes`` (digits on photographs, embedded), ``voc:PATH``, ``coco:PATH``, or a
            path whose content tells which of these it is.
        validation: the share of the training images that is held out, in [0, 1), where the source
            has no validation split of its own; at 0 that is trained on too.
        size: height and width that images are stretched to; their own if not given.

    Raises:
        UserError: the source does not exist or cannot be read; the sentence names the file.

    >>> load("scenes").describe()
    'scenes: 360 train, 40 validation, 100 test images, 1,193 boxes of 10 classes, 64 x 64'
    """
    kind, path = _parse(source)
    if path is None:
        splits, classes, notes = _embedded(size or (SIDE, SIDE)), tuple("0123456789"), []
    else:
        if not path.exists():
            raise UserError(f"the data path {path} does not exist")
        try:
            found = (read_voc if kind == "voc" else read_coco)(path)
            splits = _scenes(found, size)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            where = f" ({error.filename})" if error.filename else ""
            raise UserError(f"the data source {source} cannot be read: {reason}{where}") from None
        classes, notes = found.classes, list(found.notes)
    train = splits["train"]
    if "test" in splits:
        test = splits["test"]
    elif "validation" in splits:
        test = splits.pop("validation")
        notes.append("no test split, so the validation split is for testing")
    else:
        train, test = _held_out(train, 0.2, _TEST)
        notes.append("20 % held out for testing")
    held = splits.get("validation", train.subset([]))
    if not validation:
        train, held = _joined(train, held), held.subset([])
    elif not len(held):
        train, held = _held_out(train, validation, _VALIDATION)
    train, held, test = (
        replace(s, name=n) for s, n in ((train, "train"), (held, "validation"), (test, "test"))
    )
    if not len(train) or not bool((_labels(train) > 0).any()):
        raise UserError(f"{source} has no box to learn from in its training images")
    if not len(test):
        raise UserError(f"{source} has no image to test on")
    mean, std = _statistics(train)
    size = train.images.size
    assert size is not None, "images were stretched to one size"
    return BoxedData(source, classes, train, held, test, size, mean, std, tuple(notes))


def merged(data: BoxedData) -> BoxedData:
    """The same boxes, all of one class.

    >>> merged(load("scenes")).classes
    ('thing',)
    """
    train, validation, test = (
        replace(split, labels=_labels(split).sign())
        for split in (data.train, data.validation, data.test)
    )
    return replace(data, classes=("thing",), train=train, validation=validation, test=test)


def kind_of(source: str) -> str:
    """The family of data a source belongs to, found without reading the images."""
    return _parse(source)[0]


def _parse(source: str) -> tuple[str, Path | None]:
    kind, colon, rest = source.partition(":")
    if kind == "scenes":
        if colon:
            raise UserError(f"scenes are composed here and take no path, as in {source}")
        return kind, None
    if kind in KINDS:
        if not rest:
            raise UserError(f"{kind}: wants a path behind the colon, as in {kind}:PATH")
        return kind, plain.path(rest)
    path = plain.path(source)
    if not source or not path.exists():
        if "/" in source or source.startswith(("~", ".")):
            raise UserError(f"the data path {source} does not exist")
        raise UserError(
            f"there is no source of images with boxes {source!r}; {did_you_mean(kind, KINDS)}"
        )
    if (path / "Annotations").is_dir():
        return "voc", path
    if path.suffix == ".json" or any(path.glob("*.json")) or any(path.glob("*/*.json")):
        return "coco", path
    raise UserError(
        f"{path} holds neither a folder Annotations, as Pascal VOC has, nor COCO's .json files"
    )


def _labels(scenes: Split) -> Tensor:
    assert scenes.labels is not None, "scenes are labelled"
    return scenes.labels


def _held_out(split: Boxed, share: float, purpose: int) -> tuple[Boxed, Boxed]:
    """The images whose identities hash lowest are held out: the same in every run."""
    order = uniforms(split.rows, 1, seed=purpose, view=0).flatten().argsort(stable=True)
    number = min(max(1, round(share * len(split))), len(split) - 1)
    held, kept = order[:number].sort().values, order[number:].sort().values
    return split.subset(kept), split.subset(held)


def _joined(one: Boxed, other: Boxed) -> Boxed:
    """Two parts of one set of images as one."""
    return replace(
        one,
        labels=torch.cat([_labels(one), _labels(other)]),
        rows=torch.cat([one.rows, other.rows]),
        boxes=torch.cat([one.boxes, other.boxes]),
    )


def _statistics(train: Boxed) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation a channel, white being 1, of at most 300 training images."""
    step = max(1, len(train) // 300)
    pixels = torch.stack([train.images.read(int(r)) for r in train.rows[::step]])
    flat = pixels.transpose(0, 1).flatten(1).double() / 255
    mean, std = flat.mean(1), flat.std(1).clamp(min=1e-3)
    return tuple(round(float(x), 6) for x in mean), tuple(round(float(x), 6) for x in std)


# Files.


class _Stretched(FileImages):
    """Images from files, stretched to one size, so that a box scales with its image."""

    def read(self, index: int) -> Tensor:
        path = self.paths[index]
        with tolerated():
            pixels = decode(path, self.channels, None, str(path))
            return pixels if tuple(pixels.shape[1:]) == self.size else _stretched(pixels, self.size)
        return self.blank()


def _stretched(pixels: Tensor, size: Any) -> Tensor:
    resized = F.interpolate(pixels[None].float(), size, mode="bilinear", antialias=True)
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def _scenes(found: Annotated, size: tuple[int, int] | None) -> dict[str, Boxed]:
    """Annotated files as splits over one store of pixels."""
    every = [item for items in found.splits.values() for item in items]
    # An image that has no header is laid out as the first that has one, while faults are gathered.
    headers: list[tuple[int, int]] = []
    broken: list[Item] = []
    for item in every:
        with tolerated():
            headers.append(facts(item.path, str(item.path))[:2])
            continue
        broken.append(item)
        headers.append(headers[0] if headers else (SIDE, SIDE))
    if size is None:
        size = headers[0]
        other = next((n for n, header in enumerate(headers) if header != size), None)
        if other is not None:
            raise UserError(
                f"{every[0].path} has {size[0]} x {size[1]} pixels and {every[other].path} "
                f"{headers[other][0]} x {headers[other][1]}; say what all are stretched to, as in "
                "--set 'data.size=[192, 256]'"
            )
    images: Images = _Stretched([item.path for item in every], 3, size)
    if len(every) * 3 * size[0] * size[1] <= _RESIDENT:
        images = ResidentImages(decode_all(len(every), images.read))
    most = max(1, *(len(item.labels) for item in every))
    boxes, labels = torch.zeros(len(every), most, 4), torch.zeros(len(every), most).long()
    for row, (item, (height, width)) in enumerate(zip(every, headers, strict=True)):
        own = torch.tensor(item.boxes, dtype=torch.float64).view(-1, 4)
        with tolerated():
            if item not in broken:
                item.check(own, height, width)
        scale = torch.tensor([size[1] / width, size[0] / height] * 2, dtype=torch.float64)
        limits = torch.tensor([size[1], size[0]] * 2, dtype=torch.float64)
        boxes[row, : len(own)] = (own * scale).clamp(min=0).minimum(limits).float()
        labels[row, : len(own)] = torch.tensor(item.labels, dtype=torch.int64)
    splits, row = {}, 0
    for name, items in found.splits.items():
        rows = torch.arange(row, row + len(items))
        splits[name] = Boxed(name, images, labels[rows], rows, boxes[rows])
        row += len(items)
    return splits


# Digits on photographs.


def _embedded(size: tuple[int, int]) -> dict[str, Boxed]:
    """Scikit-learn's digits, enlarged and tinted, on parts of its photographs.

    Test scenes show other handwriting on other halves of the photographs than training scenes.
    """
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    ink = torch.from_numpy(digits.images / 16).float()[:, None]
    whole = Split("train", ResidentImages((ink * 255).byte()), torch.from_numpy(digits.target))
    parts = dict(zip(("train", "test"), split_off_test(whole), strict=True))
    halves = [
        torch.from_numpy(p.copy()).permute(2, 0, 1)[:, :, side]
        for p in load_sample_images().images
        for side in (slice(None, 320), slice(320, None))
    ]
    generator = torch.Generator().manual_seed(8)
    scenes: list[tuple[Tensor, Tensor, Tensor]] = []
    for name, number in SCENES.items():
        own = parts[name].rows
        for _ in range(number):
            half = halves[2 * _below(2, generator) + (name == "test")]
            scenes.append(_composed(half, ink[own], digits.target[own], size, generator))
    pixels, boxes, labels = (torch.stack(part) for part in zip(*scenes, strict=True))
    images, row, splits = ResidentImages(pixels), 0, {}
    for name, number in SCENES.items():
        rows = torch.arange(row, row + number)
        splits[name] = Boxed(name, images, labels[rows], rows, boxes[rows])
        row += number
    return splits


MOST = 4
"""So many digits a scene has at most."""


def _composed(
    photograph: Tensor, ink: Tensor, digits: Any, size: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """One scene: pixels uint8 (3, H, W), boxes (4, 4), labels (4,)."""
    side = 96 + _below(128, generator)
    top, left = (_below(n - side, generator) for n in photograph.shape[1:])
    scene = _stretched(photograph[:, top : top + side, left : left + side], size).float() / 255
    boxes, labels = torch.zeros(MOST, 4), torch.zeros(MOST, dtype=torch.int64)
    shorter = min(size)
    for place in range(1 + _below(MOST, generator)):
        for _ in range(20):  # places are tried until one is free
            tall = round(shorter * (0.25 + 0.25 * float(torch.rand(1, generator=generator))))
            top, left = (_below(n - tall, generator) for n in size)
            box = torch.tensor([left, top, left + tall, top + tall]).float()
            overlap = torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])
            if not bool((overlap.clamp(min=0).prod(1) > 0).any()):
                break
        else:
            break
        which = _below(len(ink), generator)
        shape = F.interpolate(ink[which][None], (tall, tall), mode="bilinear")[0, 0]
        window = scene[:, top : top + tall, left : left + tall]
        # Ink that stands out: dark on bright places and bright on dark ones.
        tint = 0.3 * torch.rand(3, 1, 1, generator=generator)
        tint = tint if float(window.mean()) > 0.5 else 1 - tint
        window.copy_(window * (1 - shape) + tint * shape)
        there = shape > 0.3
        rows, columns = there.any(1).nonzero().flatten(), there.any(0).nonzero().flatten()
        boxes[place] = torch.tensor(
            [left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1]
        )
        labels[place] = int(digits[which]) + 1
    return (scene * 255).round().to(torch.uint8), boxes, labels


def _below(number: int, generator: torch.Generator) -> int:
    """A random whole number in [0, number), or 0 where there is none."""
    return int(torch.randint(max(1, number), (1,), generator=generator))
