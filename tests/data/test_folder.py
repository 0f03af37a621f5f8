"""A folder of images becomes a data set, or one sentence says what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.data import folder as module
from limbeck.data.data import ResidentImages, Split
from limbeck.data.folder import Found, read_folder
from limbeck.data.images import FileImages
from limbeck.data.sources import load
from limbeck.errors import UserError


def picture(path: Path, value: int = 0, size: tuple[int, int] = (8, 8), grey: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (value, 255 - value, 7)
    Image.new("L" if grey else "RGB", size, value if grey else colour).save(path)
    return path


def classes(root: Path, counts: dict[str, int], grey: bool = False) -> Path:
    """Image i of class number c is all 50 c + i."""
    for c, (name, number) in enumerate(counts.items()):
        for i in range(number):
            picture(root / name / f"{i:02}.png", 50 * c + i, grey=grey)
    return root


def refused(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_folder(root, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def values(split: Split) -> list[int]:
    return [int(split.images.read(int(row))[0, 0, 0]) for row in split.rows]


def only(found: Found) -> Split:
    (split,) = found.splits.values()
    return split


def test_class_folders_name_the_classes_in_alphabetical_order(tmp_path: Path) -> None:
    found = read_folder(classes(tmp_path, {"ant": 3, "bee": 4, "cow": 3}), (8, 8))
    assert found.classes == ("ant", "bee", "cow")
    split = only(found)
    assert split.labels is not None
    assert split.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 3
    assert values(split) == [0, 1, 2, 50, 51, 52, 53, 100, 101, 102]
    assert found.notes == ()


def test_images_in_sub_folders_of_a_class_belong_to_it(tmp_path: Path) -> None:
    classes(tmp_path, {"ant": 3, "bee": 3})
    picture(tmp_path / "ant" / "more" / "deep" / "x.jpeg", 40)
    split = only(read_folder(tmp_path, (8, 8)))
    assert split.labels is not None
    assert torch.bincount(split.labels).tolist() == [4, 3]


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "VALID", "Test")])
def test_split_folders_are_kept_apart(tmp_path: Path, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        classes(tmp_path / name, {"ant": 3 - number, "bee": 3})
    found = read_folder(tmp_path, None)
    assert set(found.splits) == {"train", "validation", "test"}
    rows = [found.splits[n].rows.tolist() for n in ("train", "validation", "test")]
    assert [len(r) for r in rows] == [6, 5, 4]
    assert sorted(r for part in rows for r in part) == list(range(15))
    labels = found.splits["test"].labels
    assert labels is not None
    assert labels.tolist() == [0, 1, 1, 1]
    assert values(found.splits["test"]) == [0, 50, 51, 52]


def test_validation_is_held_out_of_training_where_there_is_only_a_test_folder(
    tmp_path: Path,
) -> None:
    classes(tmp_path / "train", {"ant": 10, "bee": 10})
    classes(tmp_path / "test", {"ant": 4, "bee": 4})
    data = load(f"folder:{tmp_path}")
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 2, 8)
    assert not set(data.train.rows.tolist()) & set(data.test.rows.tolist())


def test_the_only_training_image_of_a_class_is_not_held_out(tmp_path: Path) -> None:
    classes(tmp_path / "train", {"ant": 1, "bee": 10})
    classes(tmp_path / "test", {"ant": 1, "bee": 1})
    data = load(f"folder:{tmp_path}")
    assert data.train.labels is not None
    assert 0 in data.train.labels.tolist()


def test_three_images_a_class_are_one_for_each_split(tmp_path: Path) -> None:
    data = load(str(classes(tmp_path, {"ant": 3, "bee": 3})))
    for split in (data.train, data.validation, data.test):
        assert split.labels is not None
        assert sorted(split.labels.tolist()) == [0, 1]


def test_images_without_class_folders_are_unlabelled(tmp_path: Path) -> None:
    for i in range(10):
        picture(tmp_path / f"{i}.png", i)
    found = read_folder(tmp_path, (8, 8))
    assert found.classes == ()
    assert only(found).labels is None
    assert values(only(found)) == list(range(10))


def test_images_for_testing_may_be_unlabelled(tmp_path: Path) -> None:
    classes(tmp_path / "train", {"ant": 3, "bee": 3})
    picture(tmp_path / "test" / "a.png", 9)
    test = read_folder(tmp_path, None).splits["test"]
    assert test.labels is None
    assert values(test) == [9]


def test_an_image_beside_class_folders_is_refused(tmp_path: Path) -> None:
    loose = picture(classes(tmp_path, {"ant": 3, "bee": 3}) / "loose.png")
    text = refused(tmp_path)
    assert str(loose) in text
    assert "move it into one of them" in text


def test_one_class_is_no_classification(tmp_path: Path) -> None:
    assert "the one class 'ant'" in refused(classes(tmp_path, {"ant": 5}))


@pytest.mark.parametrize("number", [1, 2])
def test_a_class_too_small_for_three_splits_is_named(tmp_path: Path, number: int) -> None:
    text = refused(classes(tmp_path, {"ant": 5, "bee": number}))
    assert f"the class 'bee' in {tmp_path} has {number} images" in text


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    classes(tmp_path, {"ant": 3, "bee": 3})
    (tmp_path / "cow").mkdir()
    assert f"the class folder {tmp_path / 'cow'} holds no images" in refused(tmp_path)


def test_a_class_only_in_testing_is_named(tmp_path: Path) -> None:
    classes(tmp_path / "train", {"ant": 3, "bee": 3})
    classes(tmp_path / "test", {"ant": 1, "bee": 1, "cow": 1})
    assert "the class 'cow' has images for testing but none for training" in refused(tmp_path)


def test_a_class_missing_in_testing_is_no_fault(tmp_path: Path) -> None:
    classes(tmp_path / "train", {"ant": 3, "bee": 3, "cow": 3})
    picture(tmp_path / "test" / "bee" / "a.png")
    labels = read_folder(tmp_path, None).splits["test"].labels
    assert labels is not None
    assert labels.tolist() == [1]


def test_splits_without_training_are_refused(tmp_path: Path) -> None:
    classes(tmp_path / "test", {"ant": 3, "bee": 3})
    classes(tmp_path / "val", {"ant": 3, "bee": 3})
    assert "has test and val but no train folder" in refused(tmp_path)


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train", "val", "validation"):
        classes(tmp_path / name, {"ant": 3, "bee": 3})
    assert "both a validation split" in refused(tmp_path)


def test_a_folder_beside_the_splits_is_mentioned(tmp_path: Path) -> None:
    classes(tmp_path / "train", {"ant": 3, "bee": 3})
    classes(tmp_path / "spare", {"ant": 3})
    assert "the folder spare ignored" in load(str(tmp_path)).describe()


@pytest.mark.parametrize("directory", [False, True])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, directory: bool) -> None:
    outside = picture(tmp_path / "outside" / "secret.png")
    root = classes(tmp_path / "root", {"ant": 3, "bee": 3})
    link = root / "bee" / "link.png"
    link.symlink_to(outside.parent if directory else outside)
    text = refused(root)
    assert str(link) in text
    assert "leads out" in text


def test_a_class_folder_that_is_a_link_out_is_refused(tmp_path: Path) -> None:
    classes(tmp_path / "outside", {"cow": 3})
    root = classes(tmp_path / "root", {"ant": 3, "bee": 3})
    (root / "cow").symlink_to(tmp_path / "outside" / "cow")
    assert "leads out" in refused(root)


def test_a_link_within_the_folder_is_followed_and_a_dead_one_or_a_circle_passed_over(
    tmp_path: Path,
) -> None:
    root = classes(tmp_path, {"ant": 3, "bee": 3})
    (root / "bee" / "again.png").symlink_to(root / "ant" / "02.png")
    (root / "bee" / "dead.png").symlink_to(root / "ant" / "gone.png")
    (root / "bee" / "circle.png").symlink_to(root / "bee" / "circle.png")
    split = only(read_folder(root, None))
    assert split.labels is not None
    assert torch.bincount(split.labels).tolist() == [3, 4]


def test_a_name_that_is_no_utf8_is_shown_escaped(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    try:
        (tmp_path / odd).mkdir()
    except OSError:
        pytest.skip("this file system admits UTF-8 names only")
    classes(tmp_path, {"ant": 3, odd: 3})
    (tmp_path / odd / os.fsdecode(b"x.\xff")).write_text("no image")
    data = load(f"folder:{tmp_path}")
    assert data.classes == ("ant", "caf\\xe9")
    data.describe().encode()
    assert len(data.fingerprint()) == 64


def test_other_files_are_counted_and_hidden_ones_are_not(tmp_path: Path) -> None:
    root = classes(tmp_path, {"ant": 3, "bee": 3})
    for name in ("ant/a.txt", "ant/b.txt", "bee/c.csv", "README", "bee/.DS_Store", ".hidden"):
        (root / name).write_text("x")
    picture(root / "ant" / ".ipynb_checkpoints" / "copy.png")
    picture(root / ".cache" / "thumbnail.png")
    found = read_folder(root, None)
    assert sorted(found.notes) == [
        "1 .csv files ignored",
        "1 suffixless files ignored",
        "2 .txt files ignored",
    ]
    assert len(only(found)) == 6


def test_grey_folders_have_one_channel_and_one_colour_image_makes_three(tmp_path: Path) -> None:
    root = classes(tmp_path, {"ant": 3, "bee": 3}, grey=True)
    grey = only(read_folder(root, None))
    assert grey.images.channels == 1
    assert values(grey) == [0, 1, 2, 50, 51, 52]
    picture(root / "bee" / "colour.png", 9)
    mixed = only(read_folder(root, None))
    assert mixed.images.channels == 3
    assert mixed.images.read(1)[:, 0, 0].tolist() == [1, 1, 1]
    assert mixed.images.read(6)[:, 0, 0].tolist() == [9, 246, 7]


@pytest.mark.parametrize(
    ("shapes", "side"),
    [
        ([(8, 8)] * 6, 32),
        ([(70, 60)] * 6, 64),
        ([(300, 100), (100, 300), (90, 97)] * 2, 96),
        ([(500, 400)] * 6, 224),
    ],
)
def test_the_size_is_the_usual_side_nearest_to_the_median_shorter_one(
    tmp_path: Path, shapes: list[tuple[int, int]], side: int
) -> None:
    for i, shape in enumerate(shapes):
        picture(tmp_path / "ab"[i % 2] / f"{i}.png", size=shape)
    assert read_folder(tmp_path, None).size == (side, side)
    found = read_folder(tmp_path, (12, 20))
    assert found.size == (12, 20)
    assert only(found).images.read(0).shape == (3, 12, 20)


def test_a_large_folder_stays_on_disk_with_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(5):
            noise = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{i}.png")
    resident = load(str(tmp_path), size=(16, 16))
    monkeypatch.setattr(module, "_RESIDENT", 100)
    streamed = load(str(tmp_path), size=(16, 16))
    assert isinstance(resident.train.images, ResidentImages)
    assert isinstance(streamed.train.images, FileImages)
    assert torch.equal(resident.train.rows, streamed.train.rows)
    for row in range(10):
        assert torch.equal(resident.train.images.read(row), streamed.train.images.read(row))
    assert (resident.mean, resident.std) == (streamed.mean, streamed.std)


def test_a_folder_without_images_says_which_are_known(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    text = refused(tmp_path)
    assert str(tmp_path) in text
    assert ".jpeg" in text


def test_a_file_or_nothing_in_place_of_the_folder_is_told_apart(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "gone")
    (tmp_path / "file").write_text("x")
    assert "is no folder" in refused(tmp_path / "file")


@pytest.mark.parametrize("raw", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, raw: bytes) -> None:
    broken = classes(tmp_path, {"ant": 3, "bee": 3}) / "ant" / "broken.png"
    broken.write_bytes(raw)
    assert str(broken) in refused(tmp_path)


def test_a_folder_that_may_not_be_read_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    for source in (str(tmp_path), f"folder:{tmp_path}"):
        with pytest.raises(UserError, match=r"cannot be read: permission denied"):
            load(source)
