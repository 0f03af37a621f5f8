"""Folders of images: class sub-folders, optional splits, or no labels at all."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from limbeck.data.data import Images, ResidentImages, Split
from limbeck.data.faults import tolerated
from limbeck.data.images import SUFFIXES, FileImages, decode_all, facts
from limbeck.errors import UserError

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
_FOREIGN = {"__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
_SIDES = (32, 64, 96, 128, 160, 224)
_RESIDENT = 512 * 2**20


@dataclass(frozen=True)
class Found:
    """What a folder of images holds: splits by name (``""`` where there are none), class names."""

    splits: dict[str, Split]
    classes: tuple[str, ...]
    size: tuple[int, int]
    notes: tuple[str, ...]


def read_folder(root: Path, size: tuple[int, int] | None) -> Found:
    """Find the images of a folder; small sets are decoded into memory, large ones on the way.

    Raises:
        UserError: no images, an image that cannot be read, a link out of the folder, classes that
            differ between splits.
    """
    if not root.is_dir():
        reason = "is no folder" if root.exists() else "does not exist"
        raise UserError(f"the data folder {root} {reason}")
    ignored: Counter[str] = Counter()
    pools: dict[str, Path] = {}
    notes: list[str] = []
    for folder in _sub_folders(root, root):
        name = _SPLITS.get(folder.name.lower(), "")
        if name in pools:
            raise UserError(f"{pools[name]} and {folder} are both a {name} split; keep one of them")
        if name:
            pools[name] = folder
        else:
            notes.append(f"the folder {folder.name} ignored")
    if "train" not in pools:
        if pools and not notes:
            there = " and ".join(p.name for p in pools.values())
            raise UserError(f"the data folder {root} has {there} but no train folder")
        pools, notes = {"": root}, []
    found = {name: _by_class(folder, root, ignored) for name, folder in pools.items()}
    paths = [p for classes in found.values() for files in classes.values() for p in files]
    if not paths:
        raise UserError(
            f"the data folder {root} holds no images ({', '.join(sorted(SUFFIXES))}); one "
            "sub-folder for each class is expected"
        )
    classes = tuple(sorted({c for names in found.values() for c in names if c}))
    _check(root, found, classes)
    headers = []
    for path in paths:
        with tolerated():
            headers.append(facts(path, str(path)))
    channels = 1 if all(grey for _, _, grey in headers) else 3
    if size is None:
        shorter = statistics.median(min(h, w) for h, w, _ in headers)
        side = min(_SIDES, key=lambda s: abs(s - shorter))
        size = (side, side)
    images: Images = FileImages(paths, channels, size)
    if len(paths) * channels * size[0] * size[1] <= _RESIDENT:
        images = ResidentImages(decode_all(len(paths), images.read))
    number = {c: i for i, c in enumerate(classes)}
    splits, row = {}, 0
    for name, by_class in found.items():
        files = sum(len(f) for f in by_class.values())
        labels = [number[c] for c, f in by_class.items() if c for _ in f]
        splits[name] = Split(
            name or "train",
            images,
            torch.tensor(labels) if classes and labels else None,
            torch.arange(row, row + files),
        )
        row += files
    notes += [
        f"{count} {suffix or 'suffixless'} files ignored" for suffix, count in ignored.items()
    ]
    return Found(splits, classes, size, tuple(notes))


def _sub_folders(folder: Path, root: Path) -> list[Path]:
    return [p for p in _entries(folder, root) if p.is_dir()]


def _entries(folder: Path, root: Path) -> list[Path]:
    """What a folder holds, in order, but what is hidden or an operating system's own."""
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    return [p for p in entries if p.name not in _FOREIGN and _sound(p, root)]


def _sound(path: Path, root: Path) -> bool:
    """Whether a path may be read; a link that leads out, a pipe and a device are faults."""
    with tolerated():
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root.resolve()):
            raise UserError(f"{path} is a link that leads out of {root}; copy the file instead")
        if not (path.is_file() or path.is_dir()) and path.exists():
            raise UserError(f"{path} is a device or a pipe and no image; remove it")
        return True
    return False


def _by_class(folder: Path, root: Path, ignored: Counter[str]) -> dict[str, list[Path]]:
    """Image files by class name; those directly inside have the class ``""``: no label."""
    found: dict[str, list[Path]] = {}
    for path in _entries(folder, root):
        if path.is_file():
            _file(path, found.setdefault("", []), ignored)
        elif path.is_dir():
            name = os.fsencode(path.name).decode("utf-8", "backslashreplace")
            own = found.setdefault(name, [])
            for inside in sorted(path.rglob("*")):
                if any(part.startswith(".") for part in inside.relative_to(path).parts):
                    continue
                if _sound(inside, root) and inside.is_file():
                    _file(inside, own, ignored)
    return {name: files for name, files in found.items() if files or name}


def _file(path: Path, files: list[Path], ignored: Counter[str]) -> None:
    if path.suffix.lower() in SUFFIXES:
        files.append(path)
    else:
        ignored[path.suffix] += 1


def _check(root: Path, found: dict[str, dict[str, list[Path]]], classes: tuple[str, ...]) -> None:
    for name, by_class in found.items():
        where = root / name if name else root
        if "" in by_class and len(by_class) > 1:
            with tolerated():
                raise UserError(
                    f"{by_class[''][0]} lies beside class folders in {where}; move it into one of "
                    "them"
                )
        for label, files in by_class.items():
            with tolerated():
                if not files:
                    raise UserError(f"the class folder {where / label} holds no images")
    if len(classes) == 1:
        raise UserError(
            f"the data folder {root} has the one class {classes[0]!r}; a classifier needs two or "
            "more sub-folders with images"
        )
    train = found.get("train", found.get("", {}))
    for label in classes:
        with tolerated():
            if label not in train:
                raise UserError(f"the class {label!r} has images for testing but none for training")
            if "" in found and 0 < len(found[""][label]) < 3:
                raise UserError(
                    f"the class {label!r} in {root} has {len(found[''][label])} images; training, "
                    "validation and test need at least 3"
                )
