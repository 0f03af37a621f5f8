import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.data.augment import Augment
from limbeck.data.data import ResidentImages, Split
from limbeck.data.pairs import (
    Conditioned,
    PairBatches,
    edges,
    grey,
    of_images,
    of_photographs,
    read_pairs,
)
from limbeck.errors import UserError


def picture(path, *colours, side=16):
    """Squares of colours side by side in one lossless picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    squares = [np.full((side, side, 3), colour, np.uint8) for colour in colours]
    Image.fromarray(np.concatenate(squares, 1)).save(path)


RED, BLUE = (250, 0, 0), (0, 0, 240)


@pytest.fixture
def halves(tmp_path):
    for split, number in (("train", 8), ("val", 2), ("test", 3)):
        for n in range(number):
            picture(tmp_path / split / f"{n}.png", (n, 0, 0), (0, 0, 100 + n))
    return tmp_path


def test_sobel_and_luma_are_those_of_the_formulas():
    pixels = torch.randint(0, 256, (2, 3, 5, 6), generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(torch.uint8)
    luma = (pixels.double() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    assert (grey(pixels)[:, 0].double() - luma).abs().max() <= 0.5001
    whole = grey(pixels)[0, 0].double()
    y, x = 2, 3
    patch = whole[y - 1 : y + 2, x - 1 : x + 2]
    across = patch[:, 2] - patch[:, 0]
    down = patch[2] - patch[0]
    weights = torch.tensor([1.0, 2, 1], dtype=torch.float64)
    length = float(((across @ weights) ** 2 + (down @ weights) ** 2).sqrt() / 4)
    assert int(edges(pixels)[0, 0, y, x]) == min(255, round(length))


def test_halves_of_a_picture_are_a_pair_either_way(halves):
    found = read_pairs(halves, None, "AtoB")
    assert {name: len(split) for name, split in found.splits.items()} == {
        "train": 8,
        "validation": 2,
        "test": 3,
    }
    assert (found.given, found.made, found.size) == (3, 3, (16, 16))
    test = found.splits["test"]
    first = test.images.read(int(test.rows[1]))
    assert first[:, 0, 0].tolist() == [1, 0, 0, 0, 0, 101]
    back = read_pairs(halves, None, "BtoA").splits["test"]
    assert back.images.read(int(back.rows[1]))[:, 0, 0].tolist() == [0, 0, 101, 1, 0, 0]
    assert back.fingerprint() != test.fingerprint()


def test_two_folders_hold_pairs_of_files_of_the_same_names(tmp_path):
    for n in range(3):
        picture(tmp_path / "A" / "train" / f"{n}.png", (9, 9, 9), side=8)
        picture(tmp_path / "B" / "train" / f"{n}.png", RED, side=16)
    found = read_pairs(tmp_path, (8, 8), "AtoB")
    pixels = found.splits["train"].images.read(2)
    assert pixels.shape == (6, 8, 8)
    assert pixels[:, 3, 3].tolist() == [9, 9, 9, *RED]
    (tmp_path / "B" / "train" / "1.png").unlink()
    with pytest.raises(UserError, match=r"A/train/1\.png has no partner .*B/train/1\.png"):
        read_pairs(tmp_path, None, "AtoB")


def test_what_is_missing_is_held_out_of_training(tmp_path):
    for n in range(20):
        picture(tmp_path / "train" / f"{n}.png", (n, 0, 0), BLUE)
    whole = read_pairs(tmp_path, None, "AtoB").completed(0.25)
    rows = [set(split.rows.tolist()) for split in whole.splits.values()]
    assert [len(part) for part in rows] == [12, 4, 4]
    assert not rows[0] & rows[1] | rows[0] & rows[2] | rows[1] & rows[2]
    assert "20 % held out for testing" in whole.describe("pairs:x")


def test_a_folder_that_is_none_or_empty_is_named(tmp_path):
    with pytest.raises(UserError, match="is no folder; wanted are folders train and test"):
        read_pairs(tmp_path / "none", None, "AtoB")
    with pytest.raises(UserError, match="holds no training pairs"):
        read_pairs(tmp_path, None, "AtoB")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "x.png").write_text("no picture")
    with pytest.raises(UserError, match=r"x\.png cannot be read as an image"):
        read_pairs(tmp_path, None, "AtoB")


def test_test_pieces_show_other_halves_of_the_photographs():
    pairs = of_photographs((16, 16), "grey")
    train, test = (pairs.splits[name] for name in ("train", "test"))
    assert not set(train.rows.tolist()) & set(test.rows.tolist())
    stacked = train.images.read(0)
    assert torch.equal(stacked[:1], grey(stacked[1:]))
    assert torch.equal(
        of_photographs((16, 16), "grey").splits["test"].images.read(605), test.images.read(605)
    )


def test_any_source_of_images_gives_pairs_whether_it_lies_in_memory_or_not():
    found = of_images("digits", None, "edges", 0.1)
    assert (found.given, found.made) == (1, 1)
    images = found.splits["train"].images
    whole = ResidentImages(images.pixels[:, 1:])
    streamed = Conditioned(whole, "edges")
    assert torch.equal(streamed.read(7), images.read(7))
    assert streamed.channels == 2
    assert streamed.fingerprint() != Conditioned(whole, "grey").fingerprint()


def test_both_images_of_a_pair_are_cropped_and_mirrored_alike():
    pixels = torch.randint(0, 256, (32, 1, 12, 12), generator=torch.Generator().manual_seed(1))
    pixels = pixels.to(torch.uint8).expand(-1, 4, -1, -1)
    split = Split("train", ResidentImages(pixels.contiguous()), None)
    augment = Augment(crop=3, flip=True, zoom=0.8, views=2)
    batches = PairBatches(split, 8, given=1, train=True, augment=augment)
    plain, moved = torch.cat([b["image"] for b in PairBatches(split, 8, given=1).epoch(0)]), []
    for batch in batches.epoch(0):
        assert batch["target"].shape == (8, 3, 12, 12)
        assert torch.allclose(batch["target"], 2 * batch["image"].expand(-1, 3, -1, -1) - 1)
        assert batch["view"].of == 2
        moved.append(not torch.equal(batch["image"], plain[batch["row"]]))
    assert all(moved)
