"""Batches come in an order that is a function of (seed, epoch), from memory or from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from limbeck.data.augment import Augment
from limbeck.data.batches import ImageBatches, LoaderBatches
from limbeck.data.data import ResidentImages, Split
from limbeck.data.images import FileImages
from limbeck.errors import UserError


def numbered(number: int, channels: int = 1) -> Split:
    """Image i is all i and has the label 3 i mod 7; identities begin at 0."""
    pixels = torch.arange(number, dtype=torch.uint8).view(-1, 1, 1, 1)
    labels = torch.arange(number) * 3 % 7
    return Split("train", ResidentImages(pixels.repeat(1, channels, 4, 4)), labels)


def joined(batches: list[dict[str, Any]], key: str) -> Tensor:
    return torch.cat([b[key] for b in batches])


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Split, Split]:
    """The same 23 colour images from disk and from memory; the identities are no positions."""
    pixels = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), dtype=np.uint8)
    paths = []
    for i, image in enumerate(pixels):
        paths.append(tmp_path / f"{i:02}.png")
        Image.fromarray(image).save(paths[-1])
    labels = torch.arange(23) % 5
    chosen = torch.arange(22, -1, -2)
    resident = ResidentImages(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
    return (
        Split("train", FileImages(paths, 3, (8, 8)), labels).subset(chosen),
        Split("train", resident, labels).subset(chosen),
    )


def test_every_sample_comes_exactly_once_an_epoch() -> None:
    for epoch in range(3):
        batches = list(ImageBatches(numbered(50), 8, train=True).epoch(epoch))
        assert [len(b["row"]) for b in batches] == [8, 8, 8, 8, 8, 8, 2]
        assert sorted(joined(batches, "row").tolist()) == list(range(50))


def test_a_label_and_a_row_belong_to_their_image() -> None:
    split = numbered(50).subset(range(49, 3, -3))
    for train in (False, True):
        for batch in ImageBatches(split, 5, train=train).epoch(1):
            rows = batch["row"]
            assert torch.equal((batch["image"][:, 0, 0, 0] * 255).round().long(), rows)
            assert torch.equal(batch["label"], rows * 3 % 7)


def test_pixels_run_from_0_to_1() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    split = Split("test", ResidentImages(pixels), None)
    (batch,) = ImageBatches(split, 3).epoch(0)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].flatten().tolist() == pytest.approx([0, 0.2, 1])


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return ImageBatches(numbered(40), 8, seed=seed, train=True).order(epoch).tolist()

    torch.manual_seed(1)
    first = order(0, 0)
    torch.manual_seed(2)
    assert order(0, 0) == first
    assert order(0, 1) != first
    assert order(1, 0) != first
    assert first != sorted(first)


def test_making_batches_draws_nothing_from_the_generator_of_torch(
    stored: tuple[Split, Split],
) -> None:
    for split in stored:
        torch.manual_seed(3)
        list(ImageBatches(split, 4, train=True, augment=Augment(crop=1, flip=True)).epoch(0))
        after = torch.rand(1)
        torch.manual_seed(3)
        assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("start", [0, 1, 3, 6, 7, 9])
def test_an_epoch_begun_in_the_middle_is_the_tail_of_the_whole_one(start: int) -> None:
    augment = Augment(crop=1, flip=True, erase=0.5)
    batches = ImageBatches(numbered(50), 8, seed=4, train=True, augment=augment)
    whole, tail = list(batches.epoch(2)), list(batches.epoch(2, start))
    assert len(tail) == max(0, 7 - start)
    for a, b in zip(whole[start:], tail, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [False, True])
def test_images_from_disk_equal_those_in_memory_bit_for_bit(
    stored: tuple[Split, Split], workers: int, train: bool
) -> None:
    augment = Augment(crop=2, flip=True, zoom=0.6, erase=0.5)
    disk, memory = (
        list(ImageBatches(s, 5, seed=1, train=train, augment=augment, workers=w).epoch(3, 1))
        for s, w in zip(stored, (workers, 0), strict=True)
    )
    assert len(disk) == len(memory) == 2
    for a, b in zip(disk, memory, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_damaged_since_it_was_found_is_one_sentence_without_traceback(
    stored: tuple[Split, Split], workers: int
) -> None:
    split = stored[0]
    assert isinstance(split.images, FileImages)
    broken = split.images.paths[4]
    broken.write_bytes(broken.read_bytes()[:80])
    with pytest.raises(UserError, match=r"04\.png") as caught:
        list(ImageBatches(split, 6, workers=workers).epoch(0))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_evaluation_keeps_the_order_and_the_pixels() -> None:
    split = numbered(20)
    augment = Augment(crop=2, flip=True, zoom=0.5, erase=1.0)
    batches = list(ImageBatches(split, 6, seed=9, augment=augment).epoch(5))
    assert joined(batches, "row").tolist() == list(range(20))
    expected = torch.arange(20).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) / 255
    assert torch.equal(joined(batches, "image"), expected)


def test_training_pixels_are_those_of_the_augmentation_for_this_epoch() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (10, 3, 6, 6), generator=generator, dtype=torch.uint8)
    split = Split("train", ResidentImages(pixels), None)
    augment = Augment(crop=2, flip=True)
    for epoch in (0, 1):
        batches = list(ImageBatches(split, 4, seed=6, train=True, augment=augment).epoch(epoch))
        rows = joined(batches, "row")
        expected = augment(pixels, torch.arange(10), 6, epoch)[rows].float() / 255
        assert torch.equal(joined(batches, "image"), expected)


def test_without_labels_there_are_none_in_the_batches() -> None:
    split = Split("train", numbered(4).images, None)
    (batch,) = ImageBatches(split, 4, train=True).epoch(0)
    assert set(batch) == {"image", "row"}


@pytest.mark.parametrize(("number", "size", "steps"), [(0, 4, 0), (4, 4, 1), (5, 4, 2), (3, 9, 1)])
def test_the_length_is_the_number_of_batches(number: int, size: int, steps: int) -> None:
    batches = ImageBatches(numbered(8).subset(range(number)), size, train=True)
    assert len(batches) == steps
    assert sum(len(b["row"]) > 0 for b in batches.epoch(0)) == steps


def test_an_empty_choice_of_samples_is_empty_and_not_everything() -> None:
    for labels in (None, torch.arange(8)):
        none = Split("train", numbered(8).images, labels).subset([])
        assert len(none) == 0
        assert list(none.subset([]).rows) == []


def test_a_subset_of_a_subset_keeps_the_identities() -> None:
    split = numbered(30).subset([5, 10, 15, 20]).subset([3, 1], "part")
    assert split.name == "part"
    assert split.rows.tolist() == [20, 10]
    assert split.labels is not None
    assert split.labels.tolist() == [60 % 7, 30 % 7]


def loader(**options: Any) -> DataLoader[Any]:
    images, labels = torch.arange(10.0).view(10, 1), torch.arange(10) * 2
    return DataLoader(TensorDataset(images, labels), batch_size=3, **options)


@pytest.mark.parametrize("own", [False, True])
def test_a_shuffling_loader_is_a_function_of_seed_and_epoch(own: bool) -> None:
    def order(seed: int, epoch: int, start: int = 0) -> list[list[float]]:
        options = {"generator": torch.Generator()} if own else {}
        batches = LoaderBatches(loader(shuffle=True, **options), seed)
        return [b["image"].flatten().tolist() for b in batches.epoch(epoch, start)]

    first = order(0, 0)
    torch.manual_seed(99)
    assert order(0, 0) == first
    assert order(0, 0, 2) == first[2:]
    assert order(0, 1) != first
    assert order(1, 0) != first
    assert sorted(x for batch in first for x in batch) == list(range(10))


def test_pairs_and_dicts_of_a_loader_become_named() -> None:
    batches = LoaderBatches(loader())
    assert len(batches) == 4
    for batch in batches.epoch(0):
        assert torch.equal(batch["image"][:, 0] * 2, batch["label"].float())
    records: Any = [{"image": torch.zeros(2), "label": 1, "word": "a"}]
    (batch,) = LoaderBatches(DataLoader(records)).epoch(0)
    assert set(batch) == {"image", "label", "word"}


def test_a_loader_of_something_else_is_refused() -> None:
    plain: Any = torch.zeros(4, 2)
    with pytest.raises(UserError, match=r"pairs or dicts .* not Tensor"):
        list(LoaderBatches(DataLoader(plain)).epoch(0))
    triples: Any = [(torch.zeros(2), 1, 2)]
    with pytest.raises(UserError, match="pairs"):
        list(LoaderBatches(DataLoader(triples)).epoch(0))


def test_images_lie_in_memory_as_models_with_a_view_want_them():
    pixels = torch.zeros(4, 3, 6, 5, dtype=torch.uint8)
    split = Split("train", ResidentImages(pixels), None)
    batches = ImageBatches(split, 4, train=True, augment=Augment(crop=1, flip=True))
    assert next(batches.epoch(0))["image"].view(4, -1).shape == (4, 90)
