"""`limbeck check-data` tells all that is wrong with a data set at once, each fault one line."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from limbeck import memory
from limbeck.data import folder as folders
from limbeck.data import load
from limbeck.distillation import faults
from limbeck.errors import UserError

Call = Callable[..., tuple[int, str, str]]
GENERATOR = np.random.default_rng(4)


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (6, 6), value).save(buffer, "PNG")
    return buffer.getvalue()


def images(root: Path, *classes: str, number: int = 3) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(number):
            (root / name / f"{i}.png").write_bytes(png(i))
    return root


def idx(folder: Path, stem: str, number: int = 40, side: int = 4) -> None:
    values = {
        f"{stem}-images-idx3-ubyte": np.zeros((number, side, side), np.uint8),
        f"{stem}-labels-idx1-ubyte": (np.arange(number) % 10).astype(np.uint8),
    }
    for name, array in values.items():
        sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
        (folder / name).write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def records(number: int = 50) -> bytes:
    pixels = GENERATOR.integers(0, 256, (number, 3073), dtype=np.uint8)
    pixels[:, 0] = np.arange(number) % 10
    return pixels.tobytes()


def batch(**changed: Any) -> bytes:
    content = {"data": np.zeros((20, 3072), np.uint8), "labels": [i % 2 for i in range(20)]}
    return pickle.dumps(content | changed, protocol=2)


def parquet(path: Path, cells: list[Any], labels: list[Any]) -> Path:
    pq.write_table(pa.table({"image": cells, "label": labels}), path)
    return path


def broken_folder(root: Path) -> tuple[str, list[str]]:
    images(root, "ant", "bee")
    (root / "bee" / "away.png").symlink_to("/etc/passwd")
    (root / "bee" / "off.png").symlink_to("/etc/group")
    os.mkfifo(root / "bee" / "pipe.png")
    (root / "loose.png").write_bytes(png())
    for name in ("cow", "dog"):
        (root / name).mkdir()
    images(root, "elk", "fox", number=1)
    (root / "ant" / "empty.png").touch()
    (root / "ant" / "new\nline.png").write_bytes(b"words")
    (root / "ant" / "short.png").write_bytes(png()[:-30])
    return f"folder:{root}", [
        "bee/away.png is a link that leads out",
        "bee/off.png is a link that leads out",
        "bee/pipe.png is a device or a pipe",
        "loose.png lies beside class folders",
        "cow holds no images",
        "dog holds no images",
        "'elk' in ",
        "'fox' in ",
        "ant/empty.png cannot be read as an image",
        "ant/new\\nline.png cannot be read as an image",
        "ant/short.png cannot be read as an image",
    ]


def only_broken_images(root: Path) -> tuple[str, list[str]]:
    images(root, "ant", "bee")
    paths = sorted(root.rglob("*.png"))
    for path in paths:
        path.write_bytes(b"words")
    return f"folder:{root}", [f"{path} cannot be read" for path in paths]


def broken_idx(root: Path) -> tuple[str, list[str]]:
    for stem in ("train", "t10k"):
        idx(root, stem)
    names = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"]
    for name in names:
        (root / name).write_bytes(b"words")
    return f"mnist:{root}", [f"{name} is no IDX file" for name in names]


def broken_binary(root: Path) -> tuple[str, list[str]]:
    (root / "data_batch_1.bin").write_bytes(records()[:-1])
    (root / "data_batch_2.bin").write_bytes(records())
    (root / "test_batch.bin").write_bytes(b"x")
    return f"cifar10:{root}", ["data_batch_1.bin holds", "test_batch.bin holds 1 bytes"]


def broken_pickles(root: Path) -> tuple[str, list[str]]:
    for name, raw in (
        ("data_batch_1", pickle.dumps(os.getcwd)),
        ("data_batch_2", b"words"),
        ("data_batch_3", batch()),
        ("data_batch_4", batch(data=np.full((20, 3072), 256))),
        ("data_batch_5", batch(data=np.zeros((20, 32, 32, 3), np.uint8))),
        ("test_batch", batch(labels=[0.7] * 20)),
    ):
        (root / name).write_bytes(raw)
    return f"cifar10:{root}", [
        "data_batch_1 is a pickle that wants",
        "data_batch_2 is no batch",
        "data_batch_4 is no batch of CIFAR's Python version: data are int64",
        "data_batch_5 is no batch of CIFAR's Python version: data are uint8 of shape (20, 32, 32",
        "test_batch is no batch of CIFAR's Python version: labels are float64",
    ]


def broken_archive(root: Path) -> tuple[str, list[str]]:
    path = root / "cifar-10.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for number in (1, 2):
            member = tarfile.TarInfo(f"c/data_batch_{number}.bin")
            member.size = 99
            archive.addfile(member, io.BytesIO(bytes(99)))
    return str(path), [f"{path}/c/data_batch_{number}.bin holds 99 bytes" for number in (1, 2)]


def broken_rows(root: Path) -> tuple[str, list[str]]:
    cells = [png(i) for i in range(20)]
    wrong = dict(zip((0, 3, 7, 19), (b"words", None, b"", png()[:40]), strict=True))
    train = [wrong.get(i, cell) for i, cell in enumerate(cells)]
    labels = [{4: None, 5: -1}.get(i, i % 2) for i in range(20)]
    parquet(root / "train.parquet", train, labels)
    parquet(root / "test.parquet", [*cells[:-1], b"words"], [0, 1] * 10)
    (root / "val.parquet").write_bytes(b"PAR1 words PAR1")
    return f"parquet:{root}", [
        "train.parquet, row 3: column 'image' holds no image bytes",
        "train.parquet, row 7: column 'image' holds no image bytes",
        "train.parquet, row 4: column 'label' holds no label",
        "train.parquet, row 5: column 'label' holds -1",
        "train.parquet, row 0 cannot be read as an image",
        "train.parquet, row 19 cannot be read as an image",
        "val.parquet cannot be read as Parquet",
        "test.parquet, row 19 cannot be read as an image",
    ]


BROKEN = [
    broken_folder,
    only_broken_images,
    broken_idx,
    broken_binary,
    broken_pickles,
    broken_archive,
    broken_rows,
]


@pytest.mark.parametrize("broken", BROKEN)
def test_all_faults_are_told_at_once_and_each_one_once(
    tmp_path: Path, command: Call, broken: Callable[[Path], tuple[str, list[str]]]
) -> None:
    source, expected = broken(tmp_path)
    status, out, err = command("check-data", source)
    lines = out.splitlines()
    assert (status, len(lines)) == (2, len(expected)), out + err
    assert f"{source} has {len(expected)} faults" in err
    for part in expected:
        assert sum(part in line for line in lines) == 1, (part, out)
    status, out, err = command("check-data", source, "--json")
    assert status == 2
    assert json.loads(out)["faults"] == lines


@pytest.mark.parametrize("broken", BROKEN)
def test_a_run_ends_at_the_first_of_the_faults(
    tmp_path: Path, broken: Callable[[Path], tuple[str, list[str]]]
) -> None:
    source, _ = broken(tmp_path)
    with pytest.raises(UserError) as caught:
        load(source)
    assert str(caught.value) in faults(source, "classification")


def test_what_was_found_is_told_where_nothing_is_wrong(tmp_path: Path, command: Call) -> None:
    source = f"folder:{images(tmp_path, 'ant', 'bee', number=5)}"
    status, out, _ = command("check-data", source)
    assert (status, out.splitlines()) == (0, [load(source).describe(), f"{source} has no fault"])
    status, out, _ = command("check-data", source, "--json")
    assert status == 0
    found = [load(source).describe()]
    assert json.loads(out) == {"data": source, "found": found, "faults": []}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_too_large_for_memory_is_checked_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(folders, "_RESIDENT", 100)
    images(tmp_path, "ant", "bee", number=12)
    short = [tmp_path / "ant" / "3.png", tmp_path / "bee" / "7.png"]
    for path in short:
        path.write_bytes(png()[:-30])
    found = faults(f"folder:{tmp_path}", "classification", [f"engine.workers={workers}"])
    assert sorted(text.partition(" ")[0] for text in found) == sorted(map(str, short))


def test_faults_of_the_unlabelled_images_are_told_too(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"words")
    (tmp_path / "good.png").write_bytes(png())
    (found,) = faults("digits", "classification", [f"data.unlabelled=folder:{tmp_path}"])
    assert f"{tmp_path / 'bad.png'} cannot be read" in found


@pytest.mark.parametrize(
    "name",
    ["mnist/train-images-idx3-ubyte", "cifar10/data_batch_2.bin", "parquet/train.parquet"],
)
@pytest.mark.parametrize("device", [False, True])
def test_a_pipe_or_a_device_in_place_of_a_file_is_refused_by_name(
    tmp_path: Path, name: str, device: bool
) -> None:
    path = tmp_path / name
    path.parent.mkdir()
    if "idx" in name:
        idx(path.parent, "train")
        path.unlink()
    elif "bin" in name:
        path.with_name("data_batch_1.bin").write_bytes(records())
    if device:
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    (found,) = faults(f"{name.partition('/')[0]}:{path.parent}", "classification")
    assert str(path) in found
    assert "neither a file nor a folder" in found


def zeros(number: int, before: bytes = b"") -> bytes:
    """So many zeros behind some bytes, as a gzip file of a thousandth of the size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    blocks = [packer.compress(bytes(2**20)) for _ in range(number >> 20)]
    return gzip.compress(before) + b"".join(blocks) + packer.flush()


@pytest.mark.parametrize(
    ("shape", "reason"), [((), "is no IDX file"), ((40, 4, 4), "announces 40 x 4 x 4 bytes")]
)
def test_a_gzip_bomb_is_read_no_further_than_its_header_says(
    tmp_path: Path, shape: tuple[int, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0
    read = gzip.GzipFile.read

    def counted(file: gzip.GzipFile, size: int | None = -1) -> bytes:
        nonlocal taken
        part = read(file, size)
        taken += len(part)
        return part

    monkeypatch.setattr(gzip.GzipFile, "read", counted)
    idx(tmp_path, "train")
    path = tmp_path / "train-images-idx3-ubyte"
    sizes = b"".join(n.to_bytes(4, "big") for n in shape)
    path.write_bytes(zeros(2**26, bytes([0, 0, 8, 3]) + sizes if shape else b""))
    (found,) = faults(f"mnist:{tmp_path}", "classification")
    assert f"{path} {reason}" in found
    assert 0 < taken < 2**22


def test_what_would_not_fit_into_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mnist", "cifar10", "parquet"):
        (tmp_path / name).mkdir()
    idx(tmp_path / "mnist", "train", side=100)
    (tmp_path / "cifar10" / "data_batch_1.bin").write_bytes(records())
    parquet(tmp_path / "parquet" / "a.parquet", [bytes(10**6)] * 2, [0, 1])
    images(tmp_path / "folder", "ant", "bee", number=20)
    monkeypatch.setattr(memory, "available", lambda: 100_000)
    for name, what in (
        ("mnist", "train-images-idx3-ubyte"),
        ("cifar10", "data_batch_1.bin"),
        ("parquet", "a.parquet"),
        ("folder", "40 images of 64 x 64 pixels"),
    ):
        size = ["data.size=[64, 64]"] if name == "folder" else []
        (found,) = faults(f"{name}:{tmp_path / name}", "classification", size)
        assert what in found
        assert "GB are free" in found


def test_files_that_are_no_part_of_a_set_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(records())
    with (tmp_path / "model.bin").open("wb") as file:
        file.truncate(2**42)
    assert faults(f"cifar10:{tmp_path}", "classification") == []


def test_a_header_of_an_archive_that_is_no_name_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10.tar.gz"
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 2**24
    path.write_bytes(gzip.compress(member.tobuf(tarfile.GNU_FORMAT) + bytes(2**24)))
    (found,) = faults(str(path), "classification")
    assert str(path) in found
    assert "it holds 'x' of 16,777,216 bytes" in found


def test_links_and_devices_in_an_archive_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("c/data_batch_1.bin")
        member.size = len(records())
        archive.addfile(member, io.BytesIO(records()))
        for number, kind in enumerate((tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.SYMTYPE)):
            member = tarfile.TarInfo(f"c/data_batch_{number + 2}.bin")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert faults(str(path), "classification") == []
    data = load(str(path))
    assert sum(len(split) for split in (data.train, data.validation, data.test)) == 50


def test_a_lonely_idx_file_is_named(tmp_path: Path) -> None:
    idx(tmp_path, "train")
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    (found,) = faults(f"mnist:{tmp_path}", "classification")
    assert "train-images-idx3-ubyte has no train-labels beside it" in found


def test_a_set_that_leaves_nothing_for_testing_is_refused(tmp_path: Path) -> None:
    idx(tmp_path, "train", number=2)
    (found,) = faults(f"mnist:{tmp_path}", "classification")
    assert f"mnist:{tmp_path} has too few samples" in found


def test_folders_of_operating_systems_are_no_classes(tmp_path: Path) -> None:
    images(tmp_path, "ant", "bee")
    images(tmp_path / "__MACOSX", "ant")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "ant" / "Thumbs.db").write_text("x")
    assert faults(f"folder:{tmp_path}", "classification") == []
    assert load(f"folder:{tmp_path}").classes == ("ant", "bee")
