"""Batches come in an order that is a function of (seed, epoch), from memory or from disk."""

from __future__ import annotations

import os
from collections.abc import Callable
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
from limbeck.training.task import View


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


@pytest.mark.parametrize("replace", [lambda path: None, Path.mkdir, os.mkfifo])
def test_an_image_that_is_gone_or_something_else_since_it_was_found_is_named(
    stored: tuple[Split, Split], replace: Callable[[Path], None]
) -> None:
    split = stored[0]
    assert isinstance(split.images, FileImages)
    path = split.images.paths[4]
    path.unlink()
    replace(path)
    with pytest.raises(UserError, match=r"04\.png cannot be read as an image"):
        list(ImageBatches(split, 4).epoch(0))


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
    for augment in (Augment(flip=True), Augment(flip=True, mixup=1.0, cutmix=1.0)):
        (batch,) = ImageBatches(split, 4, train=True, augment=augment).epoch(0)
        assert set(batch) == {"image", "row"}


MIXING = Augment(crop=2, flip=True, zoom=0.6, rand_ops=2, erase=0.5, mixup=0.5, cutmix=1.0)


def by_row(batches: ImageBatches, epoch: int) -> dict[str, Tensor]:
    """An epoch's tensors, sorted by the samples' identities."""
    every = list(batches.epoch(epoch))
    order = joined(every, "row").argsort()
    tensors = [key for key, value in every[0].items() if isinstance(value, Tensor)]
    return {key: joined(every, key)[order] for key in tensors}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_is_mixed_the_same_from_memory_and_disk_in_batches_of_any_size(
    stored: tuple[Split, Split], workers: int
) -> None:
    disk, memory = stored
    expected = by_row(ImageBatches(memory, 12, train=True, augment=MIXING), 3)
    assert set(expected) == {"image", "row", "label", "partner_label", "mix"}
    for size in (1, 5):
        batches = ImageBatches(disk, size, train=True, augment=MIXING, workers=workers)
        assert equal(by_row(batches, 3), expected)


@pytest.mark.parametrize("augment", [Augment(mixup=1.0), Augment(cutmix=1.0)], ids=str)
def test_the_labels_of_a_mixed_image_are_those_of_what_it_shows(augment: Augment) -> None:
    images = ResidentImages(
        torch.arange(50, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 8, 8)
    )
    split = Split("train", images, torch.arange(50)).subset(range(49, 3, -3))
    for batch in ImageBatches(split, 5, train=True, augment=augment).epoch(1):
        own, partner, mix = batch["label"], batch["partner_label"], batch["mix"]
        assert torch.equal(own, batch["row"])
        assert set(partner.tolist()) <= set(split.rows.tolist())
        mean = batch["image"].double().mean((1, 2, 3)) * 255
        assert torch.allclose(mean, mix.double() * own + (1 - mix.double()) * partner, atol=1e-4)


def test_a_partner_is_shown_in_its_own_view_of_the_epoch() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (30, 3, 6, 6), generator=generator, dtype=torch.uint8)
    split = Split("train", ResidentImages(pixels), torch.arange(30))
    augment = Augment(crop=2, flip=True, mixup=1.0)
    found = by_row(ImageBatches(split, 7, seed=6, train=True, augment=augment), 2)
    alone = augment(pixels, torch.arange(30), 6, 2).double() / 255
    mix = found["mix"].double().view(-1, 1, 1, 1)
    expected = mix * alone + (1 - mix) * alone[found["partner_label"]]
    assert torch.allclose(found["image"].double(), expected, atol=1e-6)


def test_evaluation_mixes_nothing() -> None:
    plain, mixing = (
        list(ImageBatches(numbered(9), 4, augment=augment).epoch(0))
        for augment in (Augment(), MIXING)
    )
    assert all(equal(a, b) for a, b in zip(plain, mixing, strict=True))


@pytest.mark.parametrize("number", [24, 25])
def test_each_of_several_processes_gets_what_the_one_would_have(
    stored: tuple[Split, Split], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    split = numbered(number, 3)
    one = list(ImageBatches(split, 8, train=True, augment=MIXING).epoch(1))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        for whole, part in zip(
            one, ImageBatches(split, 8, train=True, augment=MIXING).epoch(1), strict=True
        ):
            share = part.pop("share")
            expected = {k: v[rank::3] if share else v[:1] for k, v in whole.items()}
            assert equal(part, expected)
            assert share == pytest.approx(len(whole["row"][rank::3]) * 3 / len(whole["row"]))


@pytest.mark.parametrize("augment", [Augment(crop=1, flip=True), MIXING], ids=str)
def test_views_that_come_round_again_show_the_same_pixels_to_every_seed(augment: Augment) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 3, 6, 6), generator=generator, dtype=torch.uint8)
    split = Split("train", ResidentImages(pixels), torch.arange(20))

    def shown(augment: Augment, seed: int, epoch: int) -> dict[str, Tensor]:
        return by_row(ImageBatches(split, 8, seed=seed, train=True, augment=augment), epoch)

    few = augment.model_copy(update={"views": 3})
    first = shown(few, 0, 0)
    assert equal(first, shown(few, 0, 3))
    assert equal(first, shown(few, 1, 0))
    assert equal(first, shown(augment.model_copy(update={"views": 5}), 2, 10))
    assert not equal(first, shown(few, 0, 1))
    assert not equal(shown(augment, 0, 0), shown(augment, 0, 3))
    assert not equal(shown(augment, 0, 0), shown(augment, 1, 0))


def view(split: Split, augment: Augment, epoch: int = 0) -> View:
    found = [b["view"] for b in ImageBatches(split, 4, train=True, augment=augment).epoch(epoch)]
    assert len(set(found)) == 1
    assert isinstance(found[0], View)
    return found[0]


def test_a_batch_says_which_of_finitely_many_views_it_shows() -> None:
    split = numbered(50).subset([3, 9, 20, 31, 42])
    found = view(split, Augment(flip=True, views=3), epoch=7)
    assert (found.number, found.of, found.samples, found.rows) == (1, 3, 5, 50)
    found = view(split, Augment(views=3), epoch=7)
    assert (found.number, found.of) == (0, 1)


def test_a_batch_without_end_of_views_or_for_evaluation_names_none() -> None:
    split = numbered(8)
    for batches in (
        ImageBatches(split, 4, train=True, augment=Augment(flip=True)),
        ImageBatches(split, 4, augment=Augment(flip=True, views=2)),
        ImageBatches(split, 4),
    ):
        assert all("view" not in batch for batch in batches.epoch(0))


def test_a_source_of_views_is_the_images_and_their_augmentation_and_no_number(
    stored: tuple[Split, Split],
) -> None:
    split = numbered(20)
    source = view(split, Augment(crop=2, views=3)).source
    assert source == view(split, Augment(crop=2, views=9), epoch=5).source
    assert source == view(numbered(20).subset([4, 2]), Augment(crop=2, views=3)).source
    assert source != view(split, Augment(crop=3, views=3)).source
    assert source != view(numbered(21), Augment(crop=2, views=3)).source
    assert source != view(stored[0], Augment(crop=2, views=3)).source
    assert len(source) == 64


def test_a_source_of_mixtures_is_the_choice_of_samples_too() -> None:
    split, augment = numbered(20), Augment(mixup=1.0, views=3)
    source = view(split, augment).source
    assert source == view(numbered(20), augment.model_copy(update={"views": 4})).source
    assert source != view(split.subset(range(19)), augment).source
    assert source != view(split.subset(range(19, -1, -1)), augment).source


def test_pixels_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    split = numbered(20)
    before = split.images.fingerprint()
    monkeypatch.setattr("limbeck.data.data.hashlib.sha256", None)
    assert split.images.fingerprint() == before


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
