"""CIFAR-10 and CIFAR-100 byte by byte, their names, and their official files' checksums."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from limbeck.data import load, sources
from limbeck.data.formats import cifar_binary, write_cifar_binary
from limbeck.errors import UserError

# The very module that the reader asks.
cifar = sources.cifar


def images(number: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, 32, 32), generator=generator, dtype=torch.uint8)


def test_there_are_the_official_numbers_of_classes_in_alphabetical_order() -> None:
    assert len(cifar.CIFAR10) == 10
    assert len(cifar.FINE) == len(set(cifar.FINE)) == len(cifar.FINE_TO_COARSE) == 100
    assert len(cifar.COARSE) == len(set(cifar.COARSE)) == 20
    for names in (cifar.FINE, cifar.COARSE):
        assert list(names) == sorted(names, key=lambda name: name.replace("_", " "))
    assert (cifar.CIFAR10[0], cifar.CIFAR10[9]) == ("airplane", "truck")
    assert (cifar.FINE[0], cifar.FINE[99]) == ("apple", "worm")


def test_each_superclass_has_five_classes() -> None:
    assert Counter(cifar.FINE_TO_COARSE) == dict.fromkeys(range(20), 5)
    wanted = {
        "apple": "fruit_and_vegetables",
        "aquarium_fish": "fish",
        "maple_tree": "trees",
        "woman": "people",
        "worm": "non-insect_invertebrates",
    }
    for fine, coarse in wanted.items():
        number = cifar.coarse_labels(torch.tensor([cifar.FINE.index(fine)]))
        assert cifar.COARSE[int(number)] == coarse
    for wrong in ([3, 100], [-1]):
        with pytest.raises(UserError, match=r"run from 0 to 99, but there are some from"):
            cifar.coarse_labels(torch.tensor(wrong))


def test_names_and_superclasses_are_those_of_the_real_set(
    real_data: Callable[[str], Path],
) -> None:
    folder = real_data("cifar100")
    assert tuple((folder / "classes.txt").read_text().split()) == cifar.FINE
    assert tuple((folder / "coarse_classes.txt").read_text().split()) == cifar.COARSE
    table = pq.read_table(folder / "test.parquet", columns=["fine_label", "coarse_label"])
    fine, coarse = (torch.tensor(column.to_pylist()) for column in table.columns)
    assert torch.equal(cifar.coarse_labels(fine), coarse)
    ten = real_data("cifar10")
    assert tuple((ten / "classes.txt").read_text().split()) == cifar.CIFAR10


@pytest.mark.parametrize("hundred", [False, True])
def test_every_pixel_lies_at_its_offset(tmp_path: Path, hundred: bool) -> None:
    pixels, labels = images(3), torch.tensor([7, 2, 9])
    coarse = cifar.coarse_labels(labels) if hundred else None
    file = tmp_path / "records.bin"
    write_cifar_binary(file, pixels, labels, coarse)
    raw = file.read_bytes()
    extra = 2 if hundred else 1
    length = extra + 3072
    assert len(raw) == 3 * length
    for i in range(3):
        assert raw[length * i + extra - 1] == labels[i]
        if coarse is not None:
            assert raw[length * i] == coarse[i]
        for k, r, c in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2, 31, 31), (1, 17, 5)):
            assert raw[length * i + extra + 1024 * k + 32 * r + c] == pixels[i, k, r, c]


def test_two_records_have_6146_bytes_and_official_files_their_sizes(tmp_path: Path) -> None:
    file = tmp_path / "data_batch_1.bin"
    write_cifar_binary(file, images(2), torch.tensor([7, 2]))
    assert file.stat().st_size == 6_146
    assert 5_000 * file.stat().st_size == 30_730_000
    write_cifar_binary(file, images(2), torch.tensor([7, 2]), torch.tensor([7, 0]))
    assert 25_000 * file.stat().st_size == 153_700_000


@pytest.mark.parametrize("number", [0, 1, 20])
def test_reading_what_was_written_is_the_identity(tmp_path: Path, number: int) -> None:
    file = tmp_path / "x.bin"
    pixels, ten = images(number), torch.arange(number) % 10
    hundred = torch.arange(number) * 5 % 100
    coarse = cifar.coarse_labels(hundred)
    write_cifar_binary(file, pixels, ten)
    first = file.read_bytes()
    write_cifar_binary(file, pixels.flip(3).flip(3), hundred.to(torch.uint8), coarse)
    second = file.read_bytes()
    if not number:
        assert first == second == b""
        return
    for raw, which, labels in (
        (first, None, ten),
        (second, False, hundred),
        (second, True, coarse),
    ):
        read, found = cifar_binary(raw, file.name, which)
        assert torch.equal(read, pixels)
        assert found is not None
        assert torch.equal(found, labels)


@pytest.mark.parametrize("cut", [1, 3072, 3073 * 2 - 1])
def test_a_length_that_is_no_multiple_of_a_record_is_refused(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "data_batch_1.bin"
    write_cifar_binary(file, images(2), torch.tensor([7, 2]))
    with pytest.raises(UserError, match=r"no multiple of a record's 3073"):
        cifar_binary(file.read_bytes()[:-cut], file.name, None)


GOOD = (images(2), torch.tensor([7, 2]))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((images(2).float(), GOOD[1]), r"images of torch.float32 of shape \(2, 3, 32, 32\)"),
        ((images(2)[:, :, :16], GOOD[1]), r"of shape \(2, 3, 16, 32\) do not fit in"),
        ((GOOD[0], torch.tensor([7])), r"2 records want as many whole numbers as labels"),
        ((GOOD[0], torch.tensor([7.0, 2.0])), r"not torch.float32"),
        ((GOOD[0], torch.tensor([7, 10])), r"label of CIFAR-10 runs from 0 to 9, .* from 7 to 10"),
        ((*GOOD, torch.tensor([20, 0])), r"coarse label of CIFAR-100 runs from 0 to 19"),
        ((GOOD[0], torch.tensor([-1, 99]), torch.tensor([3, 0])), r"fine label .* from -1 to 99"),
    ],
)
def test_what_no_record_can_hold_is_one_sentence(
    tmp_path: Path, arguments: tuple[Tensor, ...], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        write_cifar_binary(tmp_path / "x.bin", *arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.bin").exists()


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.bin cannot be written: no such file or directory"):
        write_cifar_binary(tmp_path / "gone" / "x.bin", *GOOD)


def hundred_binary(folder: Path) -> Path:
    fine = torch.arange(200) % 100
    for name in ("train.bin", "test.bin"):
        write_cifar_binary(folder / name, images(200), fine, cifar.coarse_labels(fine))
    return folder


def hundred_parquet(folder: Path) -> Path:
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    fine = (torch.arange(200) % 100).tolist()
    columns = {
        "image": [(folder / "a.png").read_bytes()] * 200,
        "fine_label": fine,
        "coarse_label": [cifar.FINE_TO_COARSE[n] for n in fine],
    }
    (folder / "a.png").unlink()
    for name in ("train", "test"):
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


@pytest.mark.parametrize("write", [hundred_binary, hundred_parquet])
def test_classes_without_a_file_of_names_have_the_official_ones(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    source = f"cifar100:{write(tmp_path)}"
    assert load(source).classes == load(source, label="fine").classes == cifar.FINE
    assert load(source, label="coarse").classes == cifar.COARSE
    data = load(source, label="coarse", validation=0)
    assert data.train.labels is not None
    assert data.train.labels[:3].tolist() == [4, 1, 14]


def batches(folder: Path) -> Path:
    for name, number in (("data_batch_1", 60), ("test_batch", 40)):
        data = np.asarray(images(number).flatten(1))
        labels = (torch.arange(number) % 10).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}, protocol=2))
    return folder


def digest(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def test_an_official_file_with_other_bytes_gets_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = batches(tmp_path)
    assert load(f"cifar10:{folder}").notes == ()  # a subset has the right to its own bytes
    monkeypatch.setattr(cifar, "IMAGES", {**cifar.IMAGES, "data_batch_1": 60, "test_batch": 40})
    monkeypatch.setitem(cifar.MD5, "test_batch", digest(folder / "test_batch"))
    (note,) = load(f"cifar10:{folder}").notes
    assert note == "data_batch_1 is not the official file: its MD5 differs"
    monkeypatch.setitem(cifar.MD5, "data_batch_1", digest(folder / "data_batch_1"))
    assert load(f"cifar10:{folder}").notes == ()


def test_an_official_archive_with_other_bytes_gets_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, number in (("data_batch_1.bin", 60), ("test_batch.bin", 40)):
            write_cifar_binary(tmp_path / name, images(number), torch.arange(number) % 10)
            archive.add(tmp_path / name, f"cifar-10-batches-bin/{name}")
    assert load(f"cifar10:{path}").notes == ()
    monkeypatch.setitem(cifar.IMAGES, path.name, 100)
    (note,) = load(f"cifar10:{path}").notes
    assert note == "cifar-10-binary.tar.gz is not the official archive: its MD5 differs"
    monkeypatch.setitem(cifar.MD5, path.name, digest(path))
    assert load(f"cifar10:{path}").notes == ()


def test_every_checksum_is_of_a_file_whose_images_are_known() -> None:
    assert set(cifar.MD5) == set(cifar.IMAGES)
    assert all(len(value) == 32 and int(value, 16) for value in cifar.MD5.values())


def test_the_checksums_are_those_that_torchvision_downloads_by() -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    for kind in (CIFAR10, CIFAR100):
        assert cifar.MD5[kind.filename] == kind.tgz_md5
        for name, md5 in [*kind.train_list, *kind.test_list]:
            assert cifar.MD5[name] == md5
