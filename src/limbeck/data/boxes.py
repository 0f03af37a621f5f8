"""Annotations of boxes on disk: Pascal VOC's XML and COCO's JSON."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from limbeck import plain
from limbeck.data.faults import tolerated
from limbeck.data.images import SUFFIXES
from limbeck.errors import UserError, did_you_mean
from limbeck.files import regular

_WORDS = {"train": "train", "validation": "val", "test": "test"}
"""What each split is called in the names of files."""


@dataclass(frozen=True)
class Item:
    """An image file with its boxes: left, top, right, bottom in its pixels; labels as in scenes."""

    path: Path
    boxes: Sequence[tuple[float, float, float, float]]
    labels: Sequence[int]
    origin: Path

    def check(self, boxes: Tensor, height: int, width: int) -> None:
        """Raise where a box, of (G, 4), lies outside the image."""
        for left, top, right, bottom in boxes.tolist():
            if left >= width or top >= height or right <= 0 or bottom <= 0:
                raise UserError(
                    f"{self.origin} has a box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}), "
                    f"which lies outside the {width} x {height} pixels of {self.path.name}"
                )


@dataclass(frozen=True)
class Annotated:
    """What was read: items by split, of which ``train`` is one; class names; notes."""

    splits: Mapping[str, Sequence[Item]]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


# Pascal VOC.


def read_voc(root: Path) -> Annotated:
    """A folder with ``Annotations``, ``JPEGImages`` and, for splits, ``ImageSets/Main``.

    Corners count pixels from 1 and belong to the box. Classes are the lines of ``classes.txt``
    where there is one, else the names that occur, sorted. Boxes without area are left out.

    Raises:
        UserError: a missing folder, list, image or annotation; an annotation that is damaged or
            names a class that there is not.
    """
    for folder in ("Annotations", "JPEGImages"):
        if not (root / folder).is_dir():
            raise UserError(
                f"{root} has no folder {folder}; give the folder that has it, as VOC2007 within "
                "VOCdevkit"
            )
    lists = root / "ImageSets" / "Main"
    lines = {split: _listed(lists / f"{word}.txt") for split, word in _WORDS.items()}
    splits = {split: found for split, found in lines.items() if found}
    if "train" not in splits and (both := _listed(lists / "trainval.txt")):
        splits["train"] = [name for name in both if name not in splits.get("validation", [])]
    if not splits:
        splits["train"] = sorted(path.stem for path in (root / "Annotations").glob("*.xml"))
        if not splits["train"]:
            raise UserError(f"{root / 'Annotations'} holds no .xml file")
    if "train" not in splits:
        raise UserError(f"{lists} lists no images to train on: train.txt or trainval.txt is wanted")
    images = {path.stem: path for path in sorted((root / "JPEGImages").iterdir())}
    raw: dict[str, list[tuple[str, bool, Box]]] = {}
    for name in (name for found in splits.values() for name in found):
        with tolerated():
            raw[name] = _voc_boxes(root, name)
    occurring = {label for boxes in raw.values() for label, _, _ in boxes}
    listed = _listed(root / "classes.txt", whole=True)
    classes = tuple(listed or sorted(occurring))
    number = {name: place + 1 for place, name in enumerate(classes)}
    for name, boxes in raw.items():
        for label in {label for label, _, _ in boxes} - set(classes):
            with tolerated():
                raise UserError(
                    f"{_annotation(root, name)} names the class {label!r}, which "
                    f"{root / 'classes.txt'} has not; {did_you_mean(label, classes)}"
                )
    dropped = 0
    items: dict[str, list[Item]] = {}
    for split, found in splits.items():
        items[split] = []
        for name in found:
            with tolerated():
                if name not in images:
                    raise UserError(f"{root / 'JPEGImages'} has no image for {name}.xml")
            known = [entry for entry in raw.get(name, ()) if entry[0] in number]
            kept = [entry for entry in known if _has_area(entry[2])]
            dropped += len(known) - len(kept)
            labels = [-number[label] if hard else number[label] for label, hard, _ in kept]
            origin = _annotation(root, name)
            if name in images:
                items[split].append(Item(images[name], [box for _, _, box in kept], labels, origin))
    return Annotated(items, classes, _dropped(dropped))


Box = tuple[float, float, float, float]


def _has_area(box: Box) -> bool:
    return box[2] > box[0] and box[3] > box[1]


def _dropped(number: int) -> tuple[str, ...]:
    return (f"{number} boxes without area left out",) if number else ()


def _listed(path: Path, whole: bool = False) -> list[str]:
    """The lines of a file, or the first word of each; none where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    return [line.strip() if whole else line.split()[0] for line in lines if line.strip()]


def _annotation(root: Path, name: str) -> Path:
    if "/" in name or "\\" in name or name.startswith("."):
        raise UserError(f"{root / 'ImageSets'} lists {name!r}, which is no image's name")
    return root / "Annotations" / f"{name}.xml"


def _voc_boxes(root: Path, name: str) -> list[tuple[str, bool, Box]]:
    """Class, whether it is difficult, and corners of each object of an image."""
    path = _annotation(root, name)
    if not path.is_file():
        raise UserError(f"{root / 'ImageSets' / 'Main'} lists {name}, but there is no {path}")
    try:
        root_element = ET.parse(path).getroot()
    except (ET.ParseError, LookupError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if root_element.tag != "annotation":
        raise UserError(f"{path} is no annotation but holds <{root_element.tag}>")
    found: list[tuple[str, bool, Box]] = []
    for thing in root_element.findall("object"):
        label = (thing.findtext("name") or "").strip()
        corners = [thing.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            left, top, right, bottom = (float(text or "") for text in corners)
            if not label or not math.isfinite(left + top + right + bottom):
                raise ValueError
        except ValueError:
            raise UserError(
                f"{path} has an object without a name or without the four numbers xmin, ymin, "
                "xmax and ymax"
            ) from None
        hard = (thing.findtext("difficult") or "0").strip() == "1"
        found.append((label, hard, (left - 1, top - 1, right, bottom)))
    return found


# COCO.


def read_coco(path: Path) -> Annotated:
    """A folder with a ``.json`` file for each split, or one such file, and the images.

    Files lie in ``annotations`` or in a folder for each split, and their names or folders say
    ``train``, ``val`` or ``test``; one alone is for training. Images lie in a folder that is called
    as the split or the file (``instances_train2017.json``: ``train2017``), in ``images``, or beside
    the file. Classes are the categories that have boxes, by id. Boxes without area are left out.

    Raises:
        UserError: no such file, a damaged one, an image that there is not, categories that differ.
    """
    root = path if path.is_dir() else path.parent
    if root.name == "annotations":
        root = root.parent
    files = _coco_files(path)
    contents = {split: _coco_content(file) for split, file in files.items()}
    first = files["train"]
    categories = _categories(contents["train"], first)
    used = set()
    for split, content in contents.items():
        if _categories(content, files[split]) != categories:
            raise UserError(f"{files[split]} has other categories than {first}")
        used |= {_key(entry.get("category_id")) for entry in content["annotations"]}
    order = [key for key in sorted(categories) if key in used]
    number = {key: place + 1 for place, key in enumerate(order)}
    dropped, items = 0, {}
    for split, content in contents.items():
        items[split], fewer = _coco_items(content, files[split], root, number)
        dropped += fewer
    return Annotated(items, tuple(categories[key] for key in order), _dropped(dropped))


def _coco_files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {"train": path}
    files = sorted([*path.glob("*.json"), *path.glob("*/*.json")])
    found: dict[str, Path] = {}
    for file in files:
        said = f"{file.parent.name if file.parent != path else ''} {file.stem}".lower()
        split = next((name for name, word in _WORDS.items() if word in said), "")
        if not split or any(word in said for word in ("captions", "keypoints", "image_info")):
            continue
        if split in found:
            raise UserError(f"{found[split]} and {file} are both a {split} split; keep one of them")
        found[split] = file
    if not found and len(files) == 1:
        return {"train": files[0]}
    if "train" not in found:
        raise UserError(
            f"{path} has no .json file to train on, such as annotations/instances_train2017.json"
        )
    return found


def _coco_content(file: Path) -> dict[str, Any]:
    try:
        content = plain.parse_json(regular(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged: it is not JSON ({error})") from None
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) and all(isinstance(e, dict) for e in content[key])
        for key in lists
    ):
        raise UserError(f"{file} is no COCO file: lists of {', '.join(lists)} are wanted in it")
    return content


def _categories(content: Mapping[str, Any], file: Path) -> dict[int, str]:
    found: dict[int, str] = {}
    for entry in content["categories"]:
        key, name = entry.get("id"), entry.get("name")
        if not isinstance(key, int) or not isinstance(name, str):
            raise UserError(f"{file} has a category without a whole number as id or without a name")
        if key in found:
            raise UserError(f"{file} has two categories with the id {key}")
        found[key] = name
    return found


def _coco_items(
    content: Mapping[str, Any], file: Path, root: Path, number: Mapping[int, int]
) -> tuple[list[Item], int]:
    """The items of one file, and how many boxes without area were left out."""
    boxes: dict[Any, list[Box]] = {}
    for entry in content["images"]:
        key = _key(entry.get("id"))
        if key in boxes:
            raise UserError(f"{file} has two images with the id {key!r}")
        boxes[key] = []
    labels: dict[Any, list[int]] = {key: [] for key in boxes}
    dropped = 0
    for entry in content["annotations"]:
        with tolerated():
            image, category = (_key(entry.get(k)) for k in ("image_id", "category_id"))
            box = entry.get("bbox")
            if image not in boxes:
                raise UserError(f"{file} has a box in image {image!r}, which it does not list")
            if category not in number:
                raise UserError(
                    f"{file} has a box of category {category!r}, which it does not list"
                )
            corners = _corners(box)
            if corners is None:
                raise UserError(f"{file} has the box {box!r}; x, y, width and height are wanted")
            if not _has_area(corners):
                dropped += 1
                continue
            boxes[image].append(corners)
            labels[image].append(-number[category] if entry.get("iscrowd") else number[category])
    items = []
    for entry in content["images"]:
        with tolerated():
            key = _key(entry.get("id"))
            items.append(Item(_coco_image(entry, file, root), boxes[key], labels[key], file))
    return items, dropped


def _key(value: Any) -> Any:
    """An id as it was read; text in place of what can be none."""
    return value if isinstance(value, int | str) else repr(value)


def _corners(box: Any) -> Box | None:
    if not isinstance(box, list) or len(box) != 4:
        return None
    try:
        finite = all(isinstance(n, int | float) and math.isfinite(float(n)) for n in box)
    except OverflowError:
        finite = False
    if not finite:
        return None
    x, y, width, height = box
    return (x, y, x + width, y + height)


def _coco_image(entry: Mapping[str, Any], file: Path, root: Path) -> Path:
    name = entry.get("file_name")
    if not isinstance(name, str) or Path(name).suffix.lower() not in SUFFIXES:
        raise UserError(f"{file} lists the image {name!r}, which is no image file's name")
    stem = file.stem.removeprefix("instances_")
    said = f"{file.parent.name} {stem}".lower()
    words = [stem, *(word for word in _WORDS.values() if word in said)]
    folders = [
        *(base / word for word in words for base in (root, root / "images")),
        root / "images",
        file.parent,
        root,
    ]
    for folder in folders:
        path = folder / name
        if path.is_file() and path.resolve().is_relative_to(root.resolve()):
            return path
    raise UserError(
        f"{file} lists {name}, which is in none of the folders where its images may lie: "
        f"{folders[0]}, {root / 'images'}, {file.parent}"
    )
