"""One string names a data set."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from limbeck.data import kind_of, load, read_image, unlabelled
from limbeck.data.data import Data, Split
from limbeck.errors import UserError

GENERATOR = np.random.default_rng(2)


def refused(source: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def splits(data: Data) -> list[Split]:
    return [data.train, data.validation, data.test]


def histogram(split: Split, classes: int) -> list[int]:
    assert split.labels is not None
    return torch.bincount(split.labels, minlength=classes).tolist()


def assert_sound(data: Data) -> None:
    """No sample in two splits; every label has a name."""
    rows = [set(s.rows.tolist()) for s in splits(data)]
    assert [len(r) for r in rows] == [len(s) for s in splits(data)]
    assert len(set.union(*rows)) == sum(map(len, rows))
    for split in splits(data):
        if split.labels is not None and len(split):
            assert int(split.labels.min()) >= 0
            assert int(split.labels.max()) < len(data.classes)


def write_idx(folder: Path, stem: str, number: int, side: int = 4, top: int = 10) -> Any:
    folder.mkdir(exist_ok=True)
    images = GENERATOR.integers(0, 256, (number, side, side), dtype=np.uint8)
    labels = (np.arange(number) % top).astype(np.uint8)
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
        raw = bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()
        (folder / f"{stem}-{kind}-ubyte").write_bytes(raw)
    return images


def records(number: int, extra: int = 1, top: int = 10) -> bytes:
    labels = np.stack([np.arange(number) % (top // k) for k in ((5, 1) if extra == 2 else (1,))], 1)
    pixels = GENERATOR.integers(0, 256, (number, 3072), dtype=np.uint8)
    return np.concatenate([labels.astype(np.uint8), pixels], 1).tobytes()


def png(value: int, mode: str = "L", side: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side), value if mode == "L" else (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path: Path, values: range, labels: list[Any] | None, mode: str = "L") -> Path:
    columns: dict[str, Any] = {"image": [png(v, mode) for v in values]}
    if labels is not None:
        columns["label"] = labels
    pq.write_table(pa.table(columns), path)
    return path


# digits


def test_digits_are_those_of_scikit_learn_in_a_stable_stratified_split() -> None:
    data, again = load("digits"), load("digits")
    assert_sound(data)
    original = load_digits()
    for split, same, share in zip(splits(data), splits(again), (0.72, 0.08, 0.2), strict=True):
        assert torch.equal(split.rows, same.rows)
        assert split.labels is not None
        assert split.labels.tolist() == original.target[split.rows].tolist()
        for counted, whole in zip(
            histogram(split, 10), np.bincount(original.target).tolist(), strict=True
        ):
            assert abs(counted - share * whole) <= 1
    pixels = torch.stack([data.test.images.read(int(r))[0] for r in data.test.rows]).numpy()
    expected = original.images[data.test.rows] * 255 / 16
    assert np.abs(pixels - expected).max() <= 0.5
    assert data.fingerprint() == again.fingerprint()


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_validation_share_leaves_the_test_split_alone(share: float) -> None:
    data = load("digits", validation=share)
    assert torch.equal(data.test.rows, load("digits").test.rows)
    assert abs(len(data.validation) - share * 1438) <= 10
    assert_sound(data)


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, float("nan")])
def test_a_validation_share_out_of_range_is_refused(share: float) -> None:
    assert "validation share lies in [0, 1)" in refused("digits", validation=share)


def test_mean_and_deviation_are_those_of_the_training_pixels() -> None:
    data = load("digits")
    pixels = np.stack([data.train.images.read(int(r)).numpy() for r in data.train.rows]) / 255
    assert data.mean == pytest.approx((pixels.mean(),), abs=1e-5)
    assert data.std == pytest.approx((pixels.std(),), abs=1e-5)


def test_mean_and_deviation_of_a_large_set_do_not_follow_a_pattern_in_its_order(
    tmp_path: Path,
) -> None:
    for number in (12_000, 24_000, 33_000):
        images = np.zeros((number, 1, 1))
        images[::2] = images[::3] = 255
        raw = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
        (tmp_path / "train-images-idx3-ubyte").write_bytes(raw + images.astype(np.uint8).tobytes())
        raw = bytes([0, 0, 8, 1]) + number.to_bytes(4, "big") + bytes(range(10)) * (number // 10)
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(raw)
        data = load(f"mnist:{tmp_path}")
        rows = data.train.rows.numpy()
        expected = images[rows].mean() / 255
        assert data.mean[0] == pytest.approx(expected, abs=4 * 0.5 / 100)
        assert data.std[0] == pytest.approx((expected * (1 - expected)) ** 0.5, abs=0.02)


def test_a_size_resizes_the_views() -> None:
    data = load("digits", size=(12, 16))
    assert data.size == (12, 16)
    assert data.train.images.read(0).shape == (1, 12, 16)
    assert "at least 1 x 1" in refused("digits", size=(0, 8))


# strings


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("digit", "did you mean digits?"),
        ("cifar-10", "did you mean cifar10"),
        ("fashion_mnist:x", "did you mean fashion-mnist?"),
        ("xyzzy", "known: cifar10, cifar100, digits"),
        ("", "known: cifar10"),
        ("folder", "folder:PATH"),
        ("folder:", "folder:PATH"),
        ("parquet:", "parquet:PATH"),
        ("hf:", "hf:PATH"),
        ("digits:here", "take no path"),
        ("./gone", "the data path ./gone does not exist"),
        ("/no/such/place", "/no/such/place does not exist"),
        ("folder:/no/such/place", "/no/such/place does not exist"),
        ("mnist:/no/such/place", "/no/such/place does not exist"),
        ("cifar100:/no/such/place", "/no/such/place does not exist"),
        ("parquet:/no/such/place", "/no/such/place does not exist"),
        ("folder:~nobody_of_this_name/x", "home of a user who is not known"),
        ("~nobody_of_this_name/x", "home of a user who is not known"),
        ("folder:" + "x" * 5000, "too long"),
        ("folder:a\0b", "does not exist"),
    ],
)
def test_a_wrong_source_is_one_sentence(source: str, reason: str) -> None:
    assert reason in refused(source)


def test_a_label_column_is_refused_where_there_are_no_columns(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", 40)
    for source in ("digits", f"mnist:{tmp_path}", f"folder:{tmp_path}"):
        assert "no label column 'coarse'" in refused(source, label="coarse")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("cifar10", "CIFAR10")],
)
def test_a_download_that_fails_says_what_would_work(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(root: str, download: bool) -> None:
        raise RuntimeError("Error downloading\nover two lines")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, name, offline)
    assert f"give its folder instead: {kind}:PATH" in refused(kind)


# MNIST


def test_idx_folders_are_read_and_told_apart(tmp_path: Path) -> None:
    train, test = write_idx(tmp_path, "train", 40), write_idx(tmp_path, "t10k", 20)
    for source in (f"mnist:{tmp_path}", str(tmp_path), f"fashion-mnist:{tmp_path}"):
        data = load(source, validation=0.25)
        assert [len(s) for s in splits(data)] == [30, 10, 20]
        assert_sound(data)
        whole = np.concatenate([train, test])
        for split in splits(data):
            assert split.labels is not None
            for row, label in zip(split.rows.tolist(), split.labels.tolist(), strict=True):
                assert np.array_equal(split.images.read(row)[0].numpy(), whole[row])
                assert label == (row if row < 40 else row - 40) % 10
    assert kind_of(str(tmp_path)) == "mnist"
    assert load(f"fashion-mnist:{tmp_path}").classes[-1] == "Ankle boot"
    (tmp_path / "classes.txt").write_text("T-shirt/top\nTrouser\n" + "c\n" * 8)
    assert kind_of(str(tmp_path)) == "fashion-mnist"


def test_one_idx_file_stands_for_its_folder(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", 40)
    write_idx(tmp_path, "t10k", 20)
    data = load(str(tmp_path / "train-images-idx3-ubyte"))
    assert (data.kind, len(data.test)) == ("mnist", 20)


def test_a_test_split_alone_is_divided_and_said_to_be(tmp_path: Path) -> None:
    write_idx(tmp_path, "t10k", 100)
    data = load(f"mnist:{tmp_path}")
    assert [len(s) for s in splits(data)] == [70, 10, 20]
    assert "no training split, so the test split was divided" in data.describe()
    assert_sound(data)


def test_wrong_idx_folders_are_refused(tmp_path: Path) -> None:
    tmp_path.joinpath("a").mkdir()
    assert "holds no IDX files" in refused(f"mnist:{tmp_path / 'a'}")
    write_idx(tmp_path / "b", "train", 30, top=15)
    assert "has the label 14, but labels run from 0 to 9" in refused(f"mnist:{tmp_path / 'b'}")
    write_idx(tmp_path / "c", "train", 30)
    write_idx(tmp_path / "c", "t10k", 30, side=5)
    assert "differ in size" in refused(f"mnist:{tmp_path / 'c'}")
    assert load(f"mnist:{tmp_path / 'c'}", size=(4, 4)).size == (4, 4)


# CIFAR


def cifar10_binary(folder: Path) -> None:
    for i in range(1, 3):
        (folder / f"data_batch_{i}.bin").write_bytes(records(50))
    (folder / "test_batch.bin").write_bytes(records(20))
    (folder / "readme.html").write_text("x")


def cifar10_python(folder: Path) -> None:
    for name, number in (("data_batch_1", 50), ("data_batch_2", 50), ("test_batch", 20)):
        pixels = GENERATOR.integers(0, 256, (number, 3072), dtype=np.uint8)
        batch = {b"data": pixels, b"labels": [i % 10 for i in range(number)]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"x"]}, protocol=2))


def cifar100_binary(folder: Path) -> None:
    (folder / "train.bin").write_bytes(records(400, 2, 100))
    (folder / "test.bin").write_bytes(records(100, 2, 100))


def cifar100_python(folder: Path) -> None:
    for name, number in (("train", 400), ("test", 100)):
        pixels = GENERATOR.integers(0, 256, (number, 3072), dtype=np.uint8)
        fine = [i % 100 for i in range(number)]
        batch = {b"data": pixels, b"fine_labels": fine, b"coarse_labels": [i % 20 for i in fine]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({}, protocol=2))
    (folder / "file.txt~").write_text("x")


@pytest.mark.parametrize("write", [cifar10_binary, cifar10_python])
def test_cifar10_is_read_from_folders_of_both_versions_and_from_archives(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    inside = tmp_path / "cifar-10-batches"
    inside.mkdir()
    write(inside)
    path = tmp_path / "cifar-10.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(inside, inside.name)
    loaded = [load(s) for s in (f"cifar10:{inside}", str(inside), f"cifar10:{path}", str(path))]
    for data in loaded:
        assert data.kind == "cifar10"
        assert [len(s) for s in splits(data)] == [90, 10, 20]
        assert data.classes[3] == "cat"
        assert_sound(data)
        assert data.fingerprint() == loaded[0].fingerprint()


@pytest.mark.parametrize("write", [cifar100_binary, cifar100_python])
def test_cifar100_has_fine_and_coarse_labels(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    assert kind_of(str(tmp_path)) == "cifar100"
    for label, number in ((None, 100), ("fine", 100), ("coarse", 20), ("coarse_label", 20)):
        data = load(f"cifar100:{tmp_path}", label=label)
        assert len(data.classes) == number
        assert set(histogram(data.test, number)) == {100 // number}
    assert "fine and coarse labels and no 'middle'" in refused(
        f"cifar100:{tmp_path}", label="middle"
    )
    (tmp_path / "fine_label_names.txt").write_text("".join(f"f{i}\n" for i in range(100)))
    (tmp_path / "coarse_label_names.txt").write_text("".join(f"c{i}\n" for i in range(20)))
    assert load(f"cifar100:{tmp_path}").classes[99] == "f99"
    assert load(f"cifar100:{tmp_path}", label="coarse").classes[19] == "c19"


def test_one_binary_batch_is_divided(tmp_path: Path) -> None:
    file = tmp_path / "data_batch_small.bin"
    file.write_bytes(records(100))
    for source in (str(file), f"cifar10:{file}", f"cifar10:{tmp_path}"):
        assert [len(s) for s in splits(load(source))] == [70, 10, 20]


def test_wrong_cifar_is_refused(tmp_path: Path) -> None:
    assert "holds no cifar10" in refused(f"cifar10:{tmp_path}")
    file = tmp_path / "data_batch_1.bin"
    file.write_bytes(records(30)[:-7])
    assert f"{file} holds" in refused(f"cifar10:{tmp_path}")
    file.write_bytes(records(30, top=11))
    assert "has the label 10, but labels run from 0 to 9" in refused(f"cifar10:{tmp_path}")
    file.write_bytes(records(30))
    assert "one kind of label and no 'coarse'" in refused(f"cifar10:{tmp_path}", label="coarse")
    cifar10_python(tmp_path)
    assert "both the binary and the Python version" in refused(f"cifar10:{tmp_path}")
    archive = tmp_path / "cifar-10.tar.gz"
    archive.write_bytes(b"\x1f\x8b broken")
    assert f"{archive} is no readable tar archive" in refused(str(archive))


# Parquet


def test_parquet_files_are_splits_by_their_names(tmp_path: Path) -> None:
    labels = [0, 1] * 10
    parquet(tmp_path / "train-00000-of-00002.parquet", range(20), labels)
    parquet(tmp_path / "train-00001-of-00002.parquet", range(20, 40), labels)
    parquet(tmp_path / "val.parquet", range(40, 60), labels)
    parquet(tmp_path / "test-00000-of-00001.parquet", range(60, 80), labels)
    parquet(tmp_path / "extra.parquet", range(80, 100), labels)
    data = load(str(tmp_path))
    assert_sound(data)
    for split, values in zip(splits(data), ((0, 40), (40, 60), (60, 80)), strict=True):
        found = [int(split.images.read(int(r))[0, 0, 0]) for r in split.rows]
        assert found == list(range(*values))
        assert split.labels is not None
        assert split.labels.tolist() == [v % 2 for v in found]
    assert "extra.parquet ignored" in data.describe()
    assert (data.kind, data.size, data.channels) == ("parquet", (6, 6), 1)


def test_parquet_files_of_other_names_are_one_pool(tmp_path: Path) -> None:
    for i, name in enumerate(("photo", "sketch")):
        parquet(tmp_path / f"{name}.parquet", range(20 * i, 20 * i + 20), [0, 1] * 10)
    data = load(f"parquet:{tmp_path}")
    assert sum(len(s) for s in splits(data)) == 40
    assert_sound(data)


def test_one_parquet_file_is_divided_whatever_its_name(tmp_path: Path) -> None:
    path = parquet(tmp_path / "test.parquet", range(40), ["a", "b"] * 20)
    for source in (str(path), f"parquet:{path}", f"parquet:{tmp_path}"):
        data = load(source)
        assert [len(s) for s in splits(data)] == [28, 4, 8]
        assert data.classes == ("a", "b")


def test_names_beside_parquet_files_name_the_classes(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", range(40), [0, 1] * 20)
    assert load(str(tmp_path)).classes == ("0", "1")
    (tmp_path / "classes.txt").write_text("no\nyes\n")
    for source in (str(tmp_path), str(path)):
        assert load(source).classes == ("no", "yes")
        assert load(source, label="label").classes == ("no", "yes")
    (tmp_path / "classes.txt").write_text("no\n")
    assert "has the label 1, but labels run from 0 to 0" in refused(str(tmp_path))


def test_splits_that_number_their_classes_otherwise_are_brought_together(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", range(30), ["ant", "bee", "cow"] * 10)
    parquet(tmp_path / "test.parquet", range(30, 34), ["cow", "bee", "cow", "bee"])
    data = load(str(tmp_path))
    assert data.classes == ("ant", "bee", "cow")
    assert data.test.labels is not None
    assert data.test.labels.tolist() == [2, 1, 2, 1]
    parquet(tmp_path / "test.parquet", range(30, 32), ["dog", "bee"])
    assert "the class 'dog'" in refused(str(tmp_path))


def test_grey_and_colour_splits_become_colour(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", range(20), [0, 1] * 10)
    parquet(tmp_path / "test.parquet", range(20, 30), [0, 1] * 5, mode="RGB")
    data = load(str(tmp_path))
    assert data.channels == 3
    assert data.test.images.read(int(data.test.rows[4]))[:, 0, 0].tolist() == [24, 0, 0]
    row = int(data.train.rows[0])
    assert data.train.images.read(row)[:, 0, 0].tolist() == [row] * 3


def test_images_without_labels_are_no_set_to_measure_on(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", range(20), None)
    text = refused(str(path))
    assert f"{path} has no labels" in text
    assert f"data.unlabelled={path}" in text


def test_any_source_gives_all_its_images_without_labels(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", range(20), None)
    split = unlabelled(str(path), (6, 6))
    assert split.labels is None
    assert [int(split.images.read(int(r))[0, 0, 0]) for r in split.rows] == list(range(20))
    digits = unlabelled("digits", (8, 8))
    assert digits.labels is None
    assert sorted(digits.rows.tolist()) == list(range(1797))
    assert unlabelled("digits", (5, 6)).images.size == (5, 6)
    with pytest.raises(UserError, match="did you mean digits"):
        unlabelled("digit", (8, 8))


@pytest.mark.parametrize(
    ("labels", "reason"),
    [([3] * 20, "one class only"), ([5_000_000, 7] * 10, "number the classes from 0")],
)
def test_labels_that_make_no_classes_are_refused(
    tmp_path: Path, labels: list[int], reason: str
) -> None:
    path = parquet(tmp_path / "a.parquet", range(20), labels)
    assert reason in refused(str(path))


def test_a_folder_without_parquet_is_refused(tmp_path: Path) -> None:
    assert "holds no .parquet files" in refused(f"parquet:{tmp_path}")


def test_a_file_of_no_known_format_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.docx"
    file.write_text("x")
    assert f"{file} is no data set in a known format" in refused(str(file))


# Hugging Face, offline


def hub_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    datasets.disable_progress_bars()
    features = datasets.Features(
        {"picture": datasets.Image(), "label": datasets.ClassLabel(names=["yes", "no"])}
    )
    (folder / "set").mkdir(parents=True)
    for name, number in (("train", 20), ("test", 10)):
        pictures = [Image.new("RGB", (5, 5), (i, 9, 8)) for i in range(number)]
        columns = {"picture": pictures, "label": [i % 2 for i in range(number)]}
        made = datasets.Dataset.from_dict(columns, features=features)
        made.to_parquet(str(folder / "set" / f"{name}.parquet"))
    return folder / "set"


def test_a_data_set_that_the_datasets_library_saved_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub_folder(tmp_path, monkeypatch)
    for source in (f"hf:{folder}", f"parquet:{folder}", str(folder)):
        data = load(source)
        assert data.classes == ("yes", "no")
        assert [len(s) for s in splits(data)] == [18, 2, 10]
        assert_sound(data)
        assert data.test.labels is not None
        assert data.test.labels.tolist() == [0, 1] * 5
        found = [data.test.images.read(int(r))[:, 0, 0].tolist() for r in data.test.rows]
        assert found == [[i, 9, 8] for i in range(10)]
    text = refused(f"hf:{folder}", label="colour")
    assert f"hf:{folder}/train.parquet has no column 'colour'" in text


def test_a_data_set_the_hub_cannot_give_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_folder(tmp_path, monkeypatch)
    (tmp_path / "empty").mkdir()
    assert "could not be loaded" in refused(f"hf:{tmp_path / 'empty'}")


# single images


def test_a_single_image_is_fitted_to_the_view(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 20), (1, 2, 3)).save(path)
    found = read_image(path, 3, (8, 8))
    assert found.shape == (3, 8, 8)
    assert found[:, 4, 4].tolist() == [1, 2, 3]
    for missing in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(UserError, match="does not exist"):
            read_image(missing, 3, (8, 8))


# the real sets

Real = Callable[[str], Path]


def test_real_mnist_has_its_counts_and_statistics(real_data: Real) -> None:
    folder = real_data("mnist")
    data = load(str(folder), validation=0)
    assert data.kind == "mnist"
    assert [len(s) for s in splits(data)] == [15_000, 0, 1_600]
    assert data.train.labels is not None
    assert data.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.mean == pytest.approx((0.1325,), abs=0.002)
    assert data.std == pytest.approx((0.3104,), abs=0.002)


def test_real_fashion_mnist_is_a_divided_test_split(real_data: Real) -> None:
    data = load(str(real_data("fashion_mnist")))
    assert data.kind == "fashion-mnist"
    assert sum(len(s) for s in splits(data)) == 1_599
    assert data.classes[9] == "Ankle boot"
    assert_sound(data)


def test_real_cifar10_has_its_counts_statistics_and_equal_forms(real_data: Real) -> None:
    folder = real_data("cifar10")
    data = load(str(folder), validation=0)
    assert data.kind == "cifar10"
    assert [len(s) for s in splits(data)] == [10_000, 0, 2_000]
    assert histogram(data.train, 10) == [1_000] * 10
    assert histogram(data.test, 10) == [200] * 10
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.006)
    assert data.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=0.006)
    binary = load(f"cifar10:{folder / 'data_batch_small.bin'}")
    assert sum(len(s) for s in splits(binary)) == 1_000
    for row in range(0, 1_000, 37):
        assert torch.equal(binary.train.images.read(row), data.train.images.read(row))


def test_real_cifar100_has_its_counts_and_statistics_in_both_labellings(real_data: Real) -> None:
    folder = real_data("cifar100")
    assert kind_of(str(folder)) == "cifar100"
    data = load(f"cifar100:{folder}", validation=0.1)
    assert [len(s) for s in splits(data)] == [45_000, 5_000, 8_000]
    assert histogram(data.train, 100) == [450] * 100
    assert histogram(data.test, 100) == [80] * 100
    assert data.classes[1] == "aquarium_fish"
    assert data.mean == pytest.approx((0.5071, 0.4865, 0.4409), abs=0.006)
    assert data.std == pytest.approx((0.2673, 0.2564, 0.2762), abs=0.006)
    assert_sound(data)


def test_one_file_of_real_cifar100_has_twenty_superclasses(real_data: Real) -> None:
    file = real_data("cifar100") / "test.parquet"
    data = load(str(file), label="coarse")
    assert data.kind == "cifar100"
    assert sum(len(s) for s in splits(data)) == 8_000
    assert len(data.classes) == 20
    assert data.classes[0] == "aquatic_mammals"


def test_real_faces_are_grey_upright_and_of_39_people(real_data: Real) -> None:
    data = load(str(real_data("orl_faces")))
    assert (data.kind, data.channels, data.size) == ("parquet", 1, (112, 92))
    assert len(data.classes) == 39
    assert histogram(data.test, 39) == [3] * 39
    assert histogram(data.train, 39) == [6] * 39
    assert histogram(data.validation, 39) == [1] * 39


def test_real_domains_are_one_pool_labelled_by_domain_or_by_class(real_data: Real) -> None:
    folder = real_data("pacs")
    data = load(f"parquet:{folder}", label="domain")
    counts = np.sum([histogram(s, 4) for s in splits(data)], 0).tolist()
    assert sorted(counts) == [680, 700, 700, 700]
    assert data.size == (64, 64)
    assert_sound(data)
    sketch = load(str(folder / "sketch.parquet"))
    counts = np.sum([histogram(s, 7) for s in splits(sketch)], 0).tolist()
    assert sorted(counts) == [80, 100, 100, 100, 100, 100, 100]
    assert "house" in sketch.classes
