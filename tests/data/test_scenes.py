import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.data.composed import digit_scenes, roads
from limbeck.data.masks import read_masks
from limbeck.data.scenes import IGNORE, Lanes, Pools, SceneBatches, Warp
from limbeck.data.tusimple import drawn, places, read_tusimple
from limbeck.errors import UserError

# Folders of masks.


def folder(root: Path, splits=("train", "test"), size=(8, 12), number=3, highest=2) -> Path:
    """Images whose red says the class of each pixel, with masks."""
    chance = np.random.default_rng(0)
    for split in splits:
        for kind in (split, f"{split}annot"):
            (root / kind).mkdir(parents=True)
        for index in range(number):
            mask = chance.integers(0, highest + 1, size).astype(np.uint8)
            image = np.stack([mask * 40, mask, mask], 2)
            Image.fromarray(image).save(root / split / f"{index}.png")
            Image.fromarray(mask).save(root / f"{split}annot" / f"{index}.png")
    (root / "classes.txt").write_text("road\nsky\n")
    return root


def test_a_value_one_behind_the_last_class_is_no_class(tmp_path):
    pools = read_masks(folder(tmp_path / "set"), None, None)
    assert pools.classes == ("road", "sky")
    assert set(pools.splits) == {"train", "test"}
    train = pools.splits["train"]
    for row in train.rows.tolist():
        red = train.images.read(row)[0]
        mask = train.masks[row]
        assert torch.equal(torch.where(mask == IGNORE, 80, mask * 40), red)
    assert pools.splits["test"].rows.tolist() == [3, 4, 5], "no scene shares its identity"


def test_lists_name_the_pairs_and_may_begin_with_a_foreign_folder(tmp_path):
    root = folder(tmp_path / "set")
    (root / "train.txt").write_text("/SegNet/set/train/1.png /SegNet/set/trainannot/1.png\n\n")
    assert len(read_masks(root, None, None).splits["train"]) == 1


def test_masks_are_resized_without_new_values(tmp_path):
    train = read_masks(folder(tmp_path / "set"), (20, 30), None).splits["train"]
    assert train.masks.shape[1:] == train.images.size == (20, 30)
    assert set(train.masks.unique().tolist()) <= {0, 1, IGNORE}


def test_without_a_file_of_names_classes_are_numbered(tmp_path):
    root = folder(tmp_path / "set")
    (root / "classes.txt").unlink()
    assert read_masks(root, None, None).classes == ("0", "1", "2")
    assert read_masks(root, None, 2).classes == ("0", "1")


def spoilt(root: Path, what: str) -> None:
    annotation = root / "trainannot" / "1.png"
    if what == "missing":
        annotation.unlink()
    elif what == "colour":
        Image.new("RGB", (12, 8)).save(annotation)
    elif what == "size":
        Image.new("L", (5, 8)).save(annotation)
    elif what == "value":
        Image.new("L", (12, 8), 7).save(annotation)
    elif what == "damaged":
        annotation.write_bytes(b"no image")
    elif what == "words":
        (root / "train.txt").write_text("train/0.png\n")
    elif what == "listed":
        (root / "train.txt").write_text("train/0.png trainannot/9.png\n")
    elif what == "classes":
        (root / "classes.txt").write_text("road\n")
        for path in root.glob("*annot/*.png"):
            Image.new("L", (12, 8)).save(path)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("missing", r"train/1\.png has no mask .*trainannot/1\.png"),
        ("colour", r"trainannot/1\.png is an image in colours \(RGB\); wanted is one number a pix"),
        ("size", r"trainannot/1\.png has 8 x 5 pixels, its image 8 x 12"),
        ("value", r"trainannot/1\.png has the value 7, but classes run from 0 to 1"),
        ("damaged", r"trainannot/1\.png cannot be read as an image"),
        ("words", r"line 1 of .*train\.txt has 1 words; wanted are an image and its mask"),
        ("listed", r"trainannot/9\.png, which line 1 of .*train\.txt names, does not exist"),
        ("classes", r"masks of one class only"),
    ],
)
def test_a_folder_that_is_not_right_is_one_sentence(tmp_path, what, sentence):
    root = folder(tmp_path / "set")
    spoilt(root, what)
    with pytest.raises(UserError, match=sentence) as caught:
        read_masks(root, None, None)
    assert "\n" not in str(caught.value)


def test_a_folder_without_training_images_says_what_is_wanted(tmp_path):
    with pytest.raises(UserError, match="holds no training images with masks; wanted are folders"):
        read_masks(folder(tmp_path / "set", splits=("test",)), None, None)
    with pytest.raises(UserError, match="is no folder"):
        read_masks(tmp_path / "nowhere", None, None)


def test_camvid_has_its_published_splits_and_classes(real_data):
    pools = read_masks(real_data("camvid"), (24, 32), None)
    found = {name: len(split) for name, split in pools.splits.items()}
    assert found == {"train": 367, "validation": 101, "test": 233}
    assert (len(pools.classes), pools.classes[3]) == (11, "Road")
    masks = pools.splits["train"].masks
    assert 0.02 < float((masks == IGNORE).float().mean()) < 0.06
    assert 0.24 < float((masks == 3).float().mean()) < 0.34


# Lanes.

ROWS = torch.arange(10, 100, 10)


def straight(*ends: float) -> Lanes:
    """Lanes from the middle of the top to these columns at the bottom, in 100 x 200 pixels."""
    x = torch.stack([100 + (end - 100) * ROWS / 99 for end in ends])
    return Lanes(x, ROWS, (100, 200))


def test_a_place_is_counted_from_the_middle_of_the_lower_edge():
    assert places(straight(160, 20, 120, 80), 4) == [4, 1, 3, 2]
    assert places(straight(130), 4) == [3]
    assert places(straight(20, 40, 60), 4) == [0, 1, 2], "the outermost has no place"
    hidden = Lanes(torch.full((1, 9), -2.0), ROWS, (100, 200))
    assert places(hidden, 4) == [0]


def test_a_drawn_lane_lies_on_its_points():
    lanes = straight(20, 120)
    mask = drawn(lanes, 4, (50, 100))
    assert sorted(mask.unique().tolist()) == [0, 2, 3]
    for x, place in zip(lanes.x, (2, 3), strict=True):
        for column, row in zip(x.tolist(), ROWS.tolist(), strict=True):
            middle = int(column / 2)
            seen = mask[row // 2 - 1 : row // 2 + 1, middle - 2 : middle + 3]
            assert place in seen or row < 30  # near the top the lanes meet


def test_the_published_frames_have_lanes_where_their_masks_do(real_data):
    root = real_data("tusimple_lane_sample")
    pools = read_tusimple(root, (180, 320), 4)
    train = pools.splits["train"]
    assert (len(train), pools.classes[0]) == (6, "background")
    entries = [json.loads(line) for line in (root / "label_data.json").open()]
    for row, entry in enumerate(entries):
        clip = Path(entry["raw_file"]).parent.name
        theirs = np.array(Image.open(root / "seg_label" / f"{clip}.png").resize((320, 180), 0)) > 0
        ours = train.masks[row].numpy() > 0
        assert (ours & theirs).sum() > 0.6 * theirs.sum() * min(1, ours.sum() / theirs.sum())
        assert torch.equal(train.lanes[row].x, torch.tensor(entry["lanes"], dtype=torch.float64))


def test_nearly_all_published_lanes_have_a_place_of_six(real_data):
    path = real_data("tusimple_lane_sample") / "labels_without_images" / "label_data_0601.json.gz"
    with gzip.open(path, "rt") as file:
        entries = [json.loads(line) for line in file]
    assert len(entries) == 410
    kept = total = 0
    for entry in entries:
        x = torch.tensor(entry["lanes"], dtype=torch.float64)
        found = places(Lanes(x, torch.tensor(entry["h_samples"]), (720, 1280)), 6)
        used = [place for place in found if place]
        assert len(set(used)) == len(used)
        kept, total = kept + len(used), total + len(found)
    assert kept > 0.97 * total


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", r"line 1 of .*label_data_1\.json is no label"),
        ('{"lanes": [[1]], "h_samples": [1, 2], "raw_file": "a.jpg"}', "is no label"),
        ('{"lanes": [[1, 2]], "h_samples": [1, 2], "raw_file": "a.jpg"}', r"a\.jpg, which line 1"),
        ("", "holds no lanes"),
    ],
)
def test_a_label_file_that_is_not_right_is_one_sentence(tmp_path, line, sentence):
    (tmp_path / "label_data_1.json").write_text(line)
    with pytest.raises(UserError, match=sentence) as caught:
        read_tusimple(tmp_path, (32, 64), 4)
    assert "\n" not in str(caught.value)


# Generated scenes.


def test_generated_scenes_are_the_same_each_time_and_know_their_classes():
    one, other = (digit_scenes((32, 48), train=20, test=5) for _ in range(2))
    assert one.splits["train"].fingerprint() == other.splits["train"].fingerprint()
    assert one.classes == ("background", *"0123456789")
    assert one.splits["train"].masks.max() <= 10
    assert one.splits["train"].images.size == (32, 48)


def test_generated_roads_have_their_lanes_painted_in_the_mask():
    pools = roads((48, 80), 4, train=10, test=2)
    split = pools.splits["train"]
    for row in split.rows.tolist():
        lanes = split.lanes[row]
        there = {place for place in places(lanes, 4) if place}
        assert there == set(split.masks[row].unique().tolist()) - {0}


def test_what_is_missing_is_held_out_of_the_training_scenes():
    pools = digit_scenes((16, 16), train=40, test=10).completed(0.25)
    assert {n: len(s) for n, s in pools.splits.items()} == {
        "train": 30,
        "validation": 10,
        "test": 10,
    }
    rows = torch.cat([s.rows for s in pools.splits.values()])
    assert len(rows.unique()) == 50
    alone = Pools({"train": pools.splits["train"]}, pools.classes).completed(0)
    assert (len(alone.splits["test"]), len(alone.splits["validation"])) == (6, 0)
    assert "20 % held out" in alone.describe("digit-scenes")


# Augmentation.


def told(number: int = 4, size=(20, 28)) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of blocks whose grey says their class, with masks."""
    generator = torch.Generator().manual_seed(3)
    small = torch.randint(0, 3, (number, 5, 7), generator=generator)
    masks = small.repeat_interleave(4, 1).repeat_interleave(4, 2).to(torch.uint8)
    return (masks * 60 + 60)[:, None], masks


def test_a_mirrored_image_has_a_mirrored_mask():
    pixels, masks = told(32)
    rows = torch.arange(32)
    images, labels = Warp(flip=True)(pixels, masks, rows, seed=0, view=0)
    flipped = (labels != masks).flatten(1).any(1)
    assert 5 < int(flipped.sum()) < 27
    wanted = torch.where(flipped[:, None, None], masks.flip(2), masks)
    assert torch.equal(labels, wanted)
    assert torch.equal(images[:, 0], wanted * 60 + 60)


def test_image_and_mask_are_turned_and_cut_alike_and_what_comes_from_outside_has_no_class():
    pixels, masks = told()
    images, labels = Warp(zoom=0.6, rotate=20)(pixels, masks, torch.arange(4), seed=1, view=2)
    known = labels != IGNORE
    assert 0.5 < float(known.float().mean()) < 1
    wanted = (labels.float() * 60 + 60)[known]
    off = (images[:, 0].float()[known] - wanted).abs()
    assert float((off < 1).float().mean()) > 0.6, "equal but where two blocks meet"
    assert not images[:, 0][~known].float().gt(190).any()


def test_augmentation_is_a_function_of_seed_sample_and_view_alone():
    pixels, masks = told()
    warp = Warp(zoom=0.5, rotate=10, flip=True)
    whole = warp(pixels, masks, torch.arange(4), seed=5, view=1)
    alone = warp(pixels[2:3], masks[2:3], torch.tensor([2]), seed=5, view=1)
    assert all(torch.equal(a[2:3], b) for a, b in zip(whole, alone, strict=True))
    other = warp(pixels, masks, torch.arange(4), seed=5, view=2)
    assert not torch.equal(whole[1], other[1])


def test_batches_hold_image_label_and_row_of_the_same_scene():
    split = digit_scenes((16, 24), train=12, test=2).splits["train"]
    batches = SceneBatches(split, 5, warp=Warp(), seed=3, train=True)
    assert len(batches) == 3
    seen = []
    for batch in batches.epoch(4):
        for image, label, row in zip(batch["image"], batch["label"], batch["row"], strict=True):
            assert torch.equal(label, split.masks[row].long())
            assert torch.equal((image * 255).round().to(torch.uint8), split.images.read(int(row)))
            seen.append(int(row))
    assert sorted(seen) == list(range(12))
    later = [b["row"].tolist() for b in batches.epoch(4, start=1)]
    assert later == [b["row"].tolist() for b in batches.epoch(4)][1:]
