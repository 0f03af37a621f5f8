"""One string names a data set; here it becomes splits of images."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from limbeck import memory, plain
from limbeck.data import cifar, formats
from limbeck.data.data import Data, ResidentImages, Split
from limbeck.data.faults import each
from limbeck.data.folder import read_folder
from limbeck.data.images import decode
from limbeck.data.splits import sample, split_off_test, split_off_validation
from limbeck.errors import UserError, did_you_mean, readable

KINDS = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "folder", "parquet", "hf")

_FASHION = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle_boot"
_BATCH = re.compile(r"(data_batch\w*|test_batch|train|test)(\.bin)?")
_FINE_NAMES = ("classes.txt", "batches.meta.txt", "fine_label_names.txt")
_COARSE_NAMES = ("coarse_classes.txt", "coarse_label_names.txt")


def load(
    source: str,
    validation: float = 0.1,
    size: tuple[int, int] | None = None,
    label: str | None = None,
) -> Data:
    """Load a data set.

    Args:
        source: ``digits``, ``mnist[:PATH]``, ``fashion-mnist[:PATH]``, ``cifar10[:PATH]``,
            ``cifar100[:PATH]``, ``folder:PATH``, ``parquet:PATH``, ``hf:NAME``, or a path whose
            content tells which of these it is.
        validation: the share of the training split that is held out, in [0, 1), where the source
            has no validation split of its own. The choice is the same in every run.
        size: height and width of a view; the source's own if not given.
        label: the label column of Parquet; ``coarse`` for CIFAR-100's superclasses.

    Raises:
        UserError: the source does not exist or cannot be read; the sentence names the file.

    >>> load("digits").describe()
    'digits: 1,295 train, 143 validation, 359 test images, 10 classes, grey, 8 x 8'
    """
    if not 0 <= validation < 1:
        raise UserError(f"the validation share lies in [0, 1), not at {validation}")
    if size is not None and min(size) < 1:
        raise UserError(f"a view is at least 1 x 1 pixels large, not {size[0]} x {size[1]}")
    with readable(f"the data source {source}"):
        kind, path = _parse(source)
        if label is not None and kind not in ("cifar10", "cifar100", "parquet", "hf"):
            raise UserError(
                f"{source} has no label column {label!r}: only Parquet and CIFAR-100 have several"
            )
        pools = _READERS[kind](path, size, label)
    return _finish(source, kind, pools, validation)


def unlabelled(source: str, size: tuple[int, int]) -> Split:
    """All images of a source as one split without labels."""
    with readable(f"the data source {source}"):
        kind, path = _parse(source)
        splits = list(_READERS[kind](path, size, None).splits.values())
    return Split("unlabelled", splits[0].images, None, torch.cat([s.rows for s in splits]))


def kind_of(source: str) -> str:
    """The family of data a source belongs to, found without reading the images."""
    with readable(f"the data source {source}"):
        return _parse(source)[0]


def read_image(path: Path, channels: int, size: tuple[int, int]) -> Tensor:
    """One image file as the networks' view: uint8 (C, H, W), fitted to ``size``."""
    with readable(f"the image {path}"):
        if not path.is_file():
            raise UserError(f"the image {path} does not exist")
    return decode(path, channels, size, str(path))


class _Pools:
    """What a reader found: splits by name, class names, notes."""

    def __init__(
        self, splits: dict[str, Split], classes: Sequence[str], notes: Sequence[str] = ()
    ) -> None:
        self.splits = splits
        self.classes = tuple(classes)
        self.notes = list(notes)

    @classmethod
    def of(cls, pools: dict[str, formats.Pool], classes: Sequence[str]) -> _Pools:
        """Splits over one store of pixels, so that every sample has an identity of its own."""
        channels = max(pixels.shape[1] for pixels, _ in pools.values())
        every = [pixels.expand(-1, channels, -1, -1) for pixels, _ in pools.values()]
        images = ResidentImages(torch.cat(every))
        splits, row = {}, 0
        for name, (pixels, labels) in pools.items():
            rows = torch.arange(row, row + len(pixels))
            splits[name] = Split(name, images, labels, rows)
            row += len(pixels)
        return cls(splits, classes)


def _parse(source: str) -> tuple[str, Path | None]:
    kind, colon, rest = source.partition(":")
    if kind in KINDS:
        if kind == "digits" and colon:
            raise UserError(f"digits come with scikit-learn and take no path, as in {source}")
        if kind in ("folder", "parquet", "hf") and not rest:
            raise UserError(f"{kind}: wants a path or name behind the colon, as in {kind}:PATH")
        return kind, plain.path(rest) if colon and rest else None
    path = plain.path(source)
    if source and path.exists():
        return _sniff(path), path
    if "/" in source or source.startswith(("~", ".")):
        raise UserError(f"the data path {source} does not exist")
    raise UserError(f"there is no data source {source!r}; {did_you_mean(kind, KINDS)}")


def _sniff(path: Path) -> str:
    names = [path.name] if path.is_file() else sorted(p.name for p in path.iterdir())
    text = " ".join(names)
    classes = _class_file(path, _FINE_NAMES)
    if "idx" in text and "ubyte" in text:
        return "fashion-mnist" if classes and "rouser" in " ".join(classes) else "mnist"
    if any(n.endswith(".parquet") for n in names):
        if classes and len(classes) == 100 and "aquarium_fish" in classes:
            return "cifar100"
        return "cifar10" if classes == cifar.CIFAR10 else "parquet"
    if "cifar-100" in text or {"train.bin", "test.bin"} <= set(names) or "fine_label" in text:
        return "cifar100"
    if {"meta", "train", "test"} <= set(names) and (path / "meta").is_file():
        return "cifar100"
    if "cifar-10" in text or any(n.startswith(("data_batch", "test_batch")) for n in names):
        return "cifar10"
    if path.is_file():
        raise UserError(f"{path} is no data set in a known format; known: {', '.join(KINDS)}")
    return "folder"


def _finish(source: str, kind: str, pools: _Pools, validation: float) -> Data:
    splits, notes = dict(pools.splits), list(pools.notes)
    classes = pools.classes
    train = splits.get("train")
    if train is None:
        train = next(iter(splits.values()))
        notes.append(f"no training split, so the {train.name} split was divided")
        splits = {}
    if "test" in splits:
        test = splits["test"]
    else:
        train, test = split_off_test(train)
        notes.append("20 % held out for testing")
    if "validation" in splits:
        held = splits["validation"]
    elif validation:
        train, held = split_off_validation(train, validation)
    else:
        held = train.subset([], "validation")
    if not len(test):
        raise UserError(
            f"{source} has too few samples: of {len(train):,} in {len(classes)} classes none is "
            "left for testing"
        )
    train = Split("train", train.images, train.labels, train.rows)
    for split in (train, held, test):
        if split.labels is not None and len(split.labels):
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or (classes and high >= len(classes)):
                raise UserError(
                    f"{source}: the {split.name} split has the label {low if low < 0 else high}, "
                    f"but labels run from 0 to {len(classes) - 1}"
                )
    if not classes and train.labels is not None:
        high = max(
            int(s.labels.max()) for s in (train, held, test) if s.labels is not None and len(s)
        )
        # Numbers that are spread out are somebody's keys; a network of so many outputs is no use.
        if high > 1000 + 10 * len(train.labels.unique()):
            raise UserError(
                f"{source} has the label {high:,}, but only {len(train.labels.unique()):,} labels "
                "occur in training; number the classes from 0"
            )
        classes = tuple(str(c) for c in range(high + 1))
    if train.labels is None:
        raise UserError(
            f"{source} has no labels; name it with --set data.unlabelled={source} beside a "
            "labelled source to measure on"
        )
    if len(train.labels.unique()) < 2:
        raise UserError(f"{source} has samples of one class only; a classifier needs two or more")
    mean, std = _statistics(train)
    size = train.images.size
    assert size is not None, "every reader settles on one size"
    return Data(source, kind, classes, train, held, test, size, mean, std, tuple(notes))


def _statistics(train: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation a channel, white being 1, of at most 10,000 training images."""
    # Not every n-th sample: a set may alternate, as MNIST does between its two sources.
    if isinstance(train.images, ResidentImages):
        pixels = train.images.pixels[sample(train, 10_000).rows]
    else:
        pixels = torch.stack([train.images.read(int(r)) for r in sample(train, 500).rows])
    flat = pixels.transpose(0, 1).flatten(1).double() / 255
    mean, std = flat.mean(1), flat.std(1).clamp(min=1e-3)
    return tuple(round(float(x), 6) for x in mean), tuple(round(float(x), 6) for x in std)


def _class_file(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    """The names in the first of these files in a folder, or beside a file; one a line."""
    for name in names:
        file = (path if path.is_dir() else path.parent) / name
        if file.is_file():
            lines = file.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
            return tuple(line.strip() for line in lines if line.strip())
    return ()


def _existing(path: Path | None, name: str) -> Path:
    if path is None:
        raise UserError(f"{name} needs a path: {name}:PATH")
    if not path.exists():
        raise UserError(f"the data path {path} does not exist")
    return path


def _digits(path: Path | None, size: tuple[int, int] | None, label: str | None) -> _Pools:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    whole = _Pools.of(
        {"train": (_sized(pixels, size), torch.from_numpy(digits.target).long())},
        [str(d) for d in range(10)],
    ).splits["train"]
    train, test = split_off_test(whole)
    return _Pools({"train": train, "test": test}, [str(d) for d in range(10)])


def _sized(pixels: Tensor, size: tuple[int, int] | None) -> Tensor:
    if size is None or tuple(pixels.shape[-2:]) == size:
        return pixels
    wanted = 4 * pixels[:, :, 0, 0].numel() * math.prod(size)
    memory.check(f"{len(pixels):,} images of {size[0]:,} x {size[1]:,} pixels", wanted)
    resized = torch.nn.functional.interpolate(pixels.float(), size, mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _idx(names: str) -> Callable[[Path | None, tuple[int, int] | None, str | None], _Pools]:
    def read(path: Path | None, size: tuple[int, int] | None, label: str | None) -> _Pools:
        kind = "fashion-mnist" if "Trouser" in names else "mnist"
        folder = _existing(path, kind) if path else _downloaded(kind)
        folder = folder.parent if "ubyte" in folder.name and folder.is_file() else folder
        pools: dict[str, formats.Pool] = {}
        stems = {"train": "train", "test": "t10k"}
        found = each(lambda stem: formats.idx_pool(folder, stem), stems.values())
        for split, pool in zip(stems, found, strict=True):
            if pool is not None:
                pools[split] = (_sized(pool[0], size), pool[1])
        if not pools:
            raise UserError(
                f"{folder} holds no IDX files such as train-images-idx3-ubyte.gz with their labels"
            )
        if len({pixels.shape[1:] for pixels, _ in pools.values()}) > 1:
            raise UserError(f"the training and test images in {folder} differ in size; give a size")
        classes = _class_file(folder, _FINE_NAMES) or names.split(" ")
        return _Pools.of(pools, [name.replace("_", " ") for name in classes])

    return read


def _cifar(kind: str) -> Callable[[Path | None, tuple[int, int] | None, str | None], _Pools]:
    def read(path: Path | None, size: tuple[int, int] | None, label: str | None) -> _Pools:
        folder = _existing(path, kind) if path else _downloaded(kind)
        kinds = ("fine", "coarse") if kind == "cifar100" else ()
        wanted = (label or "").removesuffix("_label")
        official = cifar.CIFAR10 if not kinds else cifar.FINE
        official = cifar.COARSE if wanted == "coarse" else official
        if folder.suffix == ".parquet" or (folder.is_dir() and any(folder.glob("*.parquet"))):
            found = _parquet(folder, size, label)
            found.classes = found.classes or official
            return found
        if wanted and wanted not in kinds:
            known = f"{' and '.join(kinds)} labels" if kinds else "one kind of label"
            raise UserError(f"{folder} has {known} and no {label!r}")
        coarse = wanted == "coarse" if kinds else None
        versions = set()
        parts: dict[str, list[formats.Pool]] = {"train": [], "test": []}
        notes: list[str] = []

        def add(member: tuple[str, bytes]) -> None:
            name, raw = member
            file = Path(name).name
            versions.add(file.endswith(".bin"))
            decoder = formats.cifar_binary if file.endswith(".bin") else formats.cifar_pickle
            split = "test" if file.startswith("test") else "train"
            pool = decoder(raw, name, coarse)
            parts[split].append(pool)
            if cifar.altered(file, len(pool[0]), raw):
                notes.append(f"{file} is not the official file: its MD5 differs")

        each(add, formats.members(folder, _BATCH.fullmatch))
        if len(versions) > 1:
            raise UserError(f"{folder} holds both the binary and the Python version; name one")
        pools = {split: _joined(found, size) for split, found in parts.items() if found}
        if not pools:
            raise UserError(
                f"{folder} holds no {kind} in the binary version, the Python version or Parquet"
            )
        images = sum(len(pixels) for pixels, _ in pools.values())
        if folder.name.endswith(".tar.gz") and cifar.altered(folder.name, images, folder):
            notes.append(f"{folder.name} is not the official archive: its MD5 differs")
        classes = _class_file(folder, _COARSE_NAMES if coarse else _FINE_NAMES) or official
        found = _Pools.of(pools, classes)
        found.notes += notes
        return found

    return read


def _joined(batches: Sequence[formats.Pool], size: tuple[int, int] | None) -> formats.Pool:
    labels = [y for _, y in batches if y is not None]
    return _sized(torch.cat([pixels for pixels, _ in batches]), size), torch.cat(labels)


def _downloaded(kind: str) -> Path:
    """The official files, by torchvision's own download, which checks their integrity."""
    from torchvision import datasets

    home = Path("~/.cache/limbeck").expanduser() / kind
    sets = {
        "mnist": (datasets.MNIST, "MNIST/raw"),
        "fashion-mnist": (datasets.FashionMNIST, "FashionMNIST/raw"),
        "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
        "cifar100": (datasets.CIFAR100, "cifar-100-python"),
    }
    make, inside = sets[kind]
    try:
        make(str(home), download=True)
    except Exception as error:  # whatever the network or the disk does
        raise UserError(
            f"{kind} could not be downloaded ({type(error).__name__}); give its folder instead: "
            f"{kind}:PATH"
        ) from None
    return home / inside


def _folder(path: Path | None, size: tuple[int, int] | None, label: str | None) -> _Pools:
    found = read_folder(_existing(path, "folder"), size)
    splits = {name or "train": split for name, split in found.splits.items()}
    return _Pools(splits, found.classes, found.notes)


def _parquet(path: Path | None, size: tuple[int, int] | None, label: str | None) -> _Pools:
    root = _existing(path, "parquet")
    files = sorted(root.glob("*.parquet")) if root.is_dir() else [root]
    if not files:
        raise UserError(f"{root} holds no .parquet files")
    groups: dict[str, list[Path]] = {}
    for file in files:
        stem = file.stem.split("-")[0].lower()
        split = {"val": "validation", "valid": "validation"}.get(stem, stem)
        known = split in ("train", "validation", "test") and len(files) > 1
        groups.setdefault(split if known else "", []).append(file)
    others, notes = groups.pop("", []), []
    if "train" in groups:
        notes = [f"{file.name} ignored" for file in others]
    elif others:
        groups["train"] = others
    pools: dict[str, formats.Pool] = {}
    classes: tuple[str, ...] = ()

    def add(split: str) -> None:
        nonlocal size, classes
        pixels, labels, names = formats.parquet_pool(groups[split], label, size)
        size = (pixels.shape[2], pixels.shape[3])
        if classes and names and labels is not None and names != classes:
            labels = _renumbered(labels, names, classes, root, split)
        classes = classes or names
        pools[split] = (pixels, labels)

    each(add, sorted(groups, key=("train", "validation", "test").index))
    if not classes:
        prefix = (label or "").removesuffix("_label")
        own = _FINE_NAMES if prefix in ("", "label", "labels", "fine") else ()
        classes = _class_file(root, own or (f"{prefix}_classes.txt",))
    found = _Pools.of(pools, classes)
    found.notes += notes
    return found


def _renumbered(
    labels: Tensor, names: tuple[str, ...], classes: tuple[str, ...], root: Path, split: str
) -> Tensor:
    """The labels of a split whose classes are numbered otherwise than those of training."""
    occurring = labels.unique().tolist()
    if not all(0 <= number < len(names) for number in occurring):
        raise UserError(f"the {split} split in {root} has labels beyond its {len(names)} names")
    unknown = sorted({names[number] for number in occurring} - set(classes))
    if unknown:
        raise UserError(
            f"the class {unknown[0]!r} in {root} occurs in the {split} split but not in training"
        )
    number_of = {name: number for number, name in enumerate(classes)}
    return torch.tensor([number_of[names[int(number)]] for number in labels])


def _hub(path: Path | None, size: tuple[int, int] | None, label: str | None) -> _Pools:
    try:
        import datasets
    except ImportError:
        raise UserError("hf: needs the datasets library: pip install 'limbeck[text]'") from None
    try:
        found = datasets.load_dataset(str(path))
    except Exception as error:  # the hub, the network, or the data set's own faults
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"hf:{path} could not be loaded: {first}") from None
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, split in found.items():
            split.to_parquet(str(Path(folder) / f"{name}.parquet"))
        if not list(Path(folder).iterdir()):
            raise UserError(f"hf:{path} has no splits")
        try:
            return _parquet(Path(folder), size, label)
        except UserError as error:
            raise UserError(str(error).replace(folder, f"hf:{path}")) from None


_READERS: dict[str, Callable[[Path | None, tuple[int, int] | None, str | None], _Pools]] = {
    "digits": _digits,
    "mnist": _idx("0 1 2 3 4 5 6 7 8 9"),
    "fashion-mnist": _idx(_FASHION),
    "cifar10": _cifar("cifar10"),
    "cifar100": _cifar("cifar100"),
    "folder": _folder,
    "parquet": _parquet,
    "hf": _hub,
}
