import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from limbeck.data import boxed
from limbeck.data.boxed import BoxedBatches
from limbeck.errors import UserError


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> None:
    """An image of width and height ``size``, red on the left and black on the right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size)
    image.paste((255, 0, 0), (0, 0, size[0] // 2, size[1]))
    image.save(path)


def thing(name: str, box: tuple, difficult: int = 0) -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, box, strict=True))
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<bndbox>{corners}</bndbox></object>"
    )


def voc(root: Path, number: int = 6, lists: dict[str, range] | None = None, **objects) -> Path:
    """A small set in Pascal VOC's format."""
    (root / "Annotations").mkdir(parents=True)
    for n in range(number):
        picture(root / "JPEGImages" / f"im{n}.png")
        found = objects.get(f"im{n}", thing("cat", (1, 1, 20, 15)))
        (root / "Annotations" / f"im{n}.xml").write_text(f"<annotation>{found}</annotation>")
    for name, which in (lists or {}).items():
        file = root / "ImageSets" / "Main" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"im{n}\n" for n in which))
    return root


def coco(root: Path, splits=("train2017", "val2017"), change=lambda content: None) -> Path:
    """A small set in COCO's format."""
    for name in splits:
        images = [{"id": 7 + n, "file_name": f"{n}.png"} for n in range(4)]
        for image in images:
            picture(root / name / image["file_name"])
        content = {
            "images": images,
            "categories": [
                {"id": 3, "name": "dog"},
                {"id": 1, "name": "cat"},
                {"id": 9, "name": "none"},
            ],
            "annotations": [
                {"image_id": 7, "category_id": 3, "bbox": [4, 6, 8, 12]},
                {"image_id": 7, "category_id": 1, "bbox": [0, 0, 40, 30], "iscrowd": 1},
                {"image_id": 9, "category_id": 1, "bbox": [10, 10, 0, 5]},
                *({"image_id": n, "category_id": 1, "bbox": [2, 2, 9, 9]} for n in (8, 9, 10)),
            ],
        }
        change(content)
        file = root / "annotations" / f"instances_{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return root


# The embedded scenes.


def test_a_box_holds_the_ink_of_its_digit_and_boxes_lie_inside():
    data = boxed.load("scenes")
    for split in (data.train, data.validation, data.test):
        there = split.boxes[split.labels > 0]
        assert bool((there >= 0).all())
        assert bool((there <= boxed.SIDE).all())
        sides = there[:, 2:] - there[:, :2]
        assert float(sides.min()) >= 2
        assert float(sides[:, 1].median()) > float(sides[:, 0].median()), "digits stand upright"
    assert set(data.train.labels.unique().tolist()) == set(range(11))


def test_scenes_are_the_same_every_time_and_each_is_in_one_split():
    data, again = boxed.load("scenes"), boxed.load("scenes")
    assert data.fingerprint() == again.fingerprint()
    rows = [set(s.rows.tolist()) for s in (data.train, data.validation, data.test)]
    assert len(rows[0] | rows[1] | rows[2]) == 500


# Batches.


def test_boxes_are_mirrored_with_their_images_and_only_in_training(tmp_path):
    data = boxed.load(f"voc:{voc(tmp_path, 24)}", validation=0)
    plain = next(BoxedBatches(data.train, 64).epoch(0))
    turned = next(BoxedBatches(data.train, 64, train=True, seed=1).epoch(0))
    red_left = turned["image"][:, 0, 0, 0] > 0.9
    assert 0 < int(red_left.sum()) < len(red_left)
    assert torch.equal(
        turned["boxes"][red_left][:, 0],
        torch.tensor([0.0, 0, 20, 15]).expand(int(red_left.sum()), 4),
    )
    assert turned["boxes"][~red_left][0, 0].tolist() == [20, 0, 40, 15]
    assert bool((plain["image"][:, 0, 0, 0] > 0.9).all())
    still = next(BoxedBatches(data.train, 64, train=True, flip=False).epoch(0))
    assert bool((still["image"][:, 0, 0, 0] > 0.9).all())


def test_what_is_mirrored_is_a_function_of_sample_seed_and_epoch():
    data = boxed.load("scenes")
    whole = list(BoxedBatches(data.train, 16, train=True, seed=2).epoch(3))
    later = list(BoxedBatches(data.train, 16, train=True, seed=2).epoch(3, start=5))
    assert torch.equal(whole[5]["image"], later[0]["image"])
    assert torch.equal(whole[5]["boxes"], later[0]["boxes"])
    assert "view" not in whole[0], "a teacher's answers cannot be remembered"


def test_a_difficult_box_is_not_learnt_but_known_in_measuring(tmp_path):
    hard = thing("cat", (1, 1, 20, 15), difficult=1) + thing("dog", (5, 5, 30, 25))
    lists = {"train": range(5), "test": range(5, 6)}
    data = boxed.load(f"voc:{voc(tmp_path, im0=hard, im5=hard, lists=lists)}", validation=0)
    learnt = torch.cat([b["label"] for b in BoxedBatches(data.train, 8, train=True).epoch(0)])
    assert int(learnt.min()) == 0
    assert int((learnt == 2).sum()) == 1
    assert sorted(data.test.labels[0].tolist()) == [-1, 2]


# Pascal VOC.


def test_voc_counts_pixels_from_one_and_boxes_scale_with_their_images(tmp_path):
    root = voc(tmp_path, im0=thing("dog", (11, 7, 20, 18)))
    data = boxed.load(str(root), size=(60, 120))
    assert data.classes == ("cat", "dog")
    every = torch.cat([s.boxes[s.labels == 2] for s in (data.train, data.validation, data.test)])
    assert every.tolist() == [[30, 12, 60, 36]]
    assert data.train.images.size == (60, 120)


def test_the_lists_of_voc_make_the_splits(tmp_path):
    lists = {"train": range(3), "val": range(3, 4), "test": range(4, 6)}
    data = boxed.load(f"voc:{voc(tmp_path / 'a', lists=lists)}")
    assert [len(s) for s in (data.train, data.validation, data.test)] == [3, 1, 2]
    whole = boxed.load(f"voc:{tmp_path / 'a'}", validation=0)
    assert [len(s) for s in (whole.train, whole.validation, whole.test)] == [4, 0, 2]
    both = boxed.load(f"voc:{voc(tmp_path / 'b', lists={'trainval': range(6)})}", validation=0.4)
    assert [len(s) for s in (both.train, both.validation, both.test)] == [3, 2, 1]


def test_the_blood_cells_are_read_as_their_description_says(real_data):
    data = boxed.load(f"voc:{real_data('bccd')}", size=(60, 80))
    assert data.classes == ("RBC", "WBC", "Platelets")
    assert [len(s) for s in (data.train, data.validation, data.test)] == [205, 87, 72]
    labels = torch.cat([s.labels.flatten() for s in (data.train, data.validation, data.test)])
    counts = torch.bincount(labels.abs())[1:].tolist()
    assert counts == [4153, 372, 361]


@pytest.mark.parametrize(
    ("objects", "sentence"),
    [
        ("<object>", "im0.xml is damaged"),
        (thing("", (1, 1, 2, 2)), "without a name or without the four numbers"),
        (thing("cat", (1, "x", 2, 2)), "im0.xml has an object without a name or without"),
        (thing("cat", (50, 1, 60, 9)), "lies outside the 40 x 30 pixels of im0.png"),
    ],
)
def test_a_wrong_annotation_is_one_sentence(tmp_path, objects, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        boxed.load(f"voc:{voc(tmp_path, im0=objects)}")
    assert "\n" not in str(caught.value)


def test_what_is_missing_in_voc_is_one_sentence(tmp_path):
    root = voc(tmp_path / "a", lists={"train": range(7)})
    with pytest.raises(UserError, match="lists im6, but there is no"):
        boxed.load(f"voc:{root}")
    root = voc(tmp_path / "b")
    (root / "classes.txt").write_text("catt\n")
    with pytest.raises(UserError, match=r"'cat', which .*classes.txt has not; did you mean catt"):
        boxed.load(f"voc:{root}")
    root = voc(tmp_path / "c")
    (root / "JPEGImages" / "im1.png").unlink()
    with pytest.raises(UserError, match=r"has no image for im1\.xml"):
        boxed.load(f"voc:{root}")
    root = voc(tmp_path / "d", lists={"test": range(2)})
    with pytest.raises(UserError, match=r"train\.txt or trainval\.txt is wanted"):
        boxed.load(f"voc:{root}")
    root = voc(tmp_path / "e")
    picture(root / "JPEGImages" / "im1.png", (50, 30))
    with pytest.raises(UserError, match=r"30 x 40 pixels and .* 30 x 50; say what all are"):
        boxed.load(f"voc:{root}")
    (root / "JPEGImages").rename(root / "Images")
    with pytest.raises(UserError, match="has no folder JPEGImages; give the folder that has it"):
        boxed.load(f"voc:{root}")
    root = voc(tmp_path / "f", lists={"train": range(2)})
    (root / "ImageSets" / "Main" / "train.txt").write_text("../secret\n")
    with pytest.raises(UserError, match=r"lists '\.\./secret', which is no image's name"):
        boxed.load(f"voc:{root}")


# COCO.


def test_coco_has_its_categories_by_id_and_crowds_are_not_learnt(tmp_path):
    data = boxed.load(f"coco:{coco(tmp_path)}", validation=0.25)
    assert data.classes == ("cat", "dog"), "a category without boxes is no class"
    assert [len(s) for s in (data.train, data.validation, data.test)] == [3, 1, 4]
    first = data.test.labels[0].tolist()
    assert sorted(first) == [-1, 2]
    assert data.test.boxes[0][first.index(2)].tolist() == [4, 6, 12, 18]
    assert "no test split" in data.describe()
    assert "2 boxes without area left out" in data.describe()


def test_one_file_beside_its_images_is_divided(tmp_path):
    root = coco(tmp_path, ["train"])
    (root / "annotations" / "instances_train.json").rename(root / "train" / "_annotations.json")
    data = boxed.load(str(root), validation=0.34)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [2, 1, 1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.pop("images"), "is no COCO file: lists of images, annotations, categories"),
        (lambda c: c["annotations"][0].update(image_id=99), "a box in image 99, which it does not"),
        (lambda c: c["annotations"][0].update(category_id=5), "a box of category 5, which it does"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "x, y, width and height are wanted"),
        (lambda c: c["images"][0].update(file_name="none.png"), "lists none.png, which is in none"),
        (lambda c: c["images"][0].update(file_name="a.txt"), "'a.txt', which is no image file's"),
        (lambda c: c["categories"][0].pop("name"), "without a whole number as id or without a na"),
        (lambda c: c["annotations"].clear(), "has no box to learn from in its training images"),
    ],
)
def test_a_wrong_coco_file_is_one_sentence(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        boxed.load(f"coco:{coco(tmp_path, change=change)}")
    assert "\n" not in str(caught.value)


# Sources.


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("scene", "no source of images with boxes 'scene'; did you mean scenes"),
        ("scenes:here", "scenes are composed here and take no path"),
        ("voc:", "voc: wants a path behind the colon"),
        ("voc:/nowhere", "the data path /nowhere does not exist"),
        ("/nowhere", "the data path /nowhere does not exist"),
    ],
)
def test_a_source_that_there_is_not_is_one_sentence(source, sentence):
    with pytest.raises(UserError, match=sentence):
        boxed.load(source)


def test_a_folder_of_neither_format_says_what_is_wanted(tmp_path):
    picture(tmp_path / "cats" / "1.png")
    with pytest.raises(UserError, match="neither a folder Annotations, as Pascal VOC has, nor"):
        boxed.load(str(tmp_path))
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(UserError, match=r"train\.json is damaged: it is not JSON"):
        boxed.load(str(tmp_path))
    assert boxed.kind_of(str(tmp_path)) == "coco"
