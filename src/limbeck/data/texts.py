"""Texts, or pairs of texts, with a label each: splits, batches, and the formats they come in."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from limbeck import plain
from limbeck.data import grammar
from limbeck.data.data import Samples
from limbeck.data.faults import tolerated
from limbeck.data.splits import split_off_test, split_off_validation
from limbeck.errors import UserError, did_you_mean
from limbeck.extras import need
from limbeck.training.seeding import derive
from limbeck.training.task import Batch

KINDS = ("grammar", "sst2", "qnli", "folder", "file", "hf")
COLUMNS = (
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("sentence_A", "sentence_B"),
    ("sentence",),
    ("text",),
)
"""Columns that hold the texts where nobody says which; pairs come first."""

SPLITS = {
    "train": ("train",),
    "validation": ("dev", "validation", "valid"),
    "test": ("test",),
}
SUFFIXES = (".tsv", ".csv", ".jsonl")
MOST_CLASSES = 1000
WINDOW = 32
"""So many batches are sorted by the length of their texts at a time."""

_SENTIMENT = {"0": "negative", "1": "positive"}
_EVERY = torch.empty(0, dtype=torch.int64)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Texts(Samples):
    """Some samples of a data set of texts.

    Args:
        name: of the split.
        texts: one or two strings a sample, of the whole data set that ``rows`` points into.
        labels: int64 of shape (N,), or ``None``.
        rows: which of the texts each sample is, its identity in every subset; all if not given.

    >>> split = Texts("train", (("good",), ("bad",)), torch.tensor([1, 0]))
    >>> split.subset([1]).read(0)
    ('bad',)
    """

    name: str
    texts: tuple[tuple[str, ...], ...]
    labels: Tensor | None
    rows: Tensor = _EVERY

    def __post_init__(self) -> None:
        if self.rows is _EVERY:
            object.__setattr__(self, "rows", torch.arange(len(self.texts)))
        if self.labels is not None and len(self.labels) != len(self.rows):
            raise ValueError(f"{len(self.rows)} texts have {len(self.labels)} labels")

    def read(self, position: int) -> tuple[str, ...]:
        """One sample's strings."""
        return self.texts[int(self.rows[position])]

    def fingerprint(self) -> str:
        """A hash of texts, labels and choice of samples."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return self._chosen(json.dumps(self.texts).encode())


class TextBatches:
    """Batches of a split: ``text`` a list of B tuples of strings, ``row`` and ``label`` int64 (B,).

    The order is a function of (seed, epoch). Training batches are made of texts that are about as
    long, as all are filled up to the longest, and come in any order.

    >>> split = Texts("train", (("good",), ("bad",)), None)
    >>> next(iter(TextBatches(split, 2).epoch(0)))
    {'text': [('good',), ('bad',)], 'row': tensor([0, 1])}
    """

    def __init__(
        self, split: Texts, batch_size: int, *, seed: int = 0, train: bool = False
    ) -> None:
        self.split = split
        self.batch_size = batch_size
        self.seed = seed
        self.train = train

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step ``start`` on, this process's share of each."""
        rank, world = 0, 1
        if self.train and dist.is_available() and dist.is_initialized():
            rank, world = dist.get_rank(), dist.get_world_size()
        for chunk in self._chunks(epoch)[start:]:
            # A process left without a sample takes one with no weight, so that all step together.
            mine = chunk[rank::world] if len(chunk) > rank else chunk[:1]
            rows = self.split.rows[mine]
            batch: Batch = {"text": [self.split.texts[r] for r in rows.tolist()], "row": rows}
            if self.split.labels is not None:
                batch["label"] = self.split.labels[mine]
            if world > 1:
                batch["share"] = len(mine) * world / len(chunk) if len(chunk) > rank else 0.0
            yield batch

    @cached_property
    def _lengths(self) -> Tensor:
        texts = self.split.texts
        return torch.tensor([sum(map(len, texts[row])) for row in self.split.rows.tolist()])

    def _chunks(self, epoch: int) -> list[Tensor]:
        """The positions of each batch of an epoch."""
        if not self.train:
            return list(torch.arange(len(self.split)).split(self.batch_size))
        generator = torch.Generator().manual_seed(derive(self.seed, epoch) >> 1)
        order = torch.randperm(len(self.split), generator=generator)
        windows = order.split(WINDOW * self.batch_size)
        alike = [window[self._lengths[window].argsort(stable=True)] for window in windows]
        chunks = [chunk for window in alike for chunk in window.split(self.batch_size)]
        return [chunks[n] for n in torch.randperm(len(chunks), generator=generator).tolist()]


@dataclass(frozen=True)
class TextData:
    """A data set of texts: its splits by name and its classes.

    ``columns`` are the names of the one or two strings of a sample.
    """

    source: str
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    splits: Mapping[str, Texts]

    def describe(self) -> str:
        """One line on what there is."""
        sizes = ", ".join(f"{len(self.splits[name]):,} {name}" for name in SPLITS)
        what = "texts" if len(self.columns) == 1 else "pairs of texts"
        return (
            f"{self.source}: {sizes} {what} ({', '.join(self.columns)}), "
            f"{len(self.classes)} classes"
        )

    def fingerprint(self) -> str:
        """A hash of all splits."""
        digest = hashlib.sha256()
        for name in SPLITS:
            digest.update(self.splits[name].fingerprint().encode())
        return digest.hexdigest()


def kind_of(source: str) -> str:
    """The family that a source of texts belongs to, which presets are fitted to.

    >>> kind_of("sst2:data/SST-2"), kind_of("grammar")
    ('sst2', 'grammar')

    Raises:
        UserError: it is neither one of the families nor a file or folder.
    """
    kind = source.partition(":")[0]
    return kind if kind in KINDS else _parse(source)[0]


def _parse(source: str) -> tuple[str, Path]:
    kind, colon, rest = source.partition(":")
    if kind in KINDS and (colon or kind == "grammar"):
        if not rest and kind != "grammar":
            raise UserError(f"{source} names no place; say where the texts lie, as in {kind}:PATH")
        return kind, plain.path(rest)
    path = plain.path(source)
    if path.is_dir():
        return "folder", path
    if path.is_file():
        return "file", path
    if kind in KINDS:
        raise UserError(f"{kind} lies in a folder of yours; say which, as in {kind}:PATH")
    raise UserError(
        f"there are no texts at {source!r}: it is neither a file nor a folder; "
        + did_you_mean(kind, KINDS)
    )


def load(
    source: str,
    validation: float = 0.1,
    columns: Sequence[str] | None = None,
    label: str = "label",
) -> TextData:
    """Load texts with a label each.

    Where there are labelled development and test files, the former is the validation split; where
    there is one of them it is the test split, and validation samples are held out from the training
    ones; where there is none, so is a fifth for testing.

    Args:
        source: ``grammar`` (made, see :mod:`limbeck.data.grammar`), ``sst2:PATH``, ``qnli:PATH`` or
            ``folder:PATH`` (a folder of ``train``, ``dev`` and ``test``), ``file:PATH``, or a path;
            files are ``.tsv`` (as of GLUE, without quotes), ``.csv`` or ``.jsonl``, headings first;
            ``hf:NAME`` for a data set of the hub or of ``save_to_disk``.
        validation: the share of the training samples that is held out, in [0, 1).
        columns: of the one or two texts; found by their names if not given.
        label: the column of the labels.

    Raises:
        UserError: there is nothing, or what there is cannot be read so.

    >>> load("grammar").describe()
    'grammar: 3,600 train, 400 validation, 1,000 test texts (text), 2 classes'
    """
    kind, path = _parse(source)
    if kind == "grammar":
        tables = grammar.tables()
        origin = dict.fromkeys(tables, "grammar")
    elif kind == "hf":
        tables, origin = _hub(str(path))
    elif kind == "file":
        tables, origin = {"train": _read(path)}, {"train": str(path)}
    else:
        tables, origin = _folder(path)
    found = _columns(tables["train"][0], columns, label, origin["train"])
    return _data(source, kind, tables, origin, found, label, validation)


def _folder(path: Path) -> tuple[dict[str, list[Row]], dict[str, str]]:
    if not path.is_dir():
        raise UserError(
            f"there is no folder {path}; a folder of texts holds train, dev and test files that "
            f"end in {', '.join(SUFFIXES)}"
        )
    tables, origin = {}, {}
    for split, stems in SPLITS.items():
        there = [path / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        file = next((f for f in there if f.is_file()), None)
        if file is not None:
            tables[split], origin[split] = _read(file), str(file)
    if "train" not in tables:
        raise UserError(
            f"{path} holds no training texts; wanted is a file named "
            + " or ".join(f"train{suffix}" for suffix in SUFFIXES)
        )
    return tables, origin


def _read(path: Path) -> list[Row]:
    readers: dict[str, Callable[[Path], list[Row]]] = {
        ".tsv": lambda p: _table(p, delimiter="\t", quoting=csv.QUOTE_NONE),
        ".csv": lambda p: _table(p),
        ".jsonl": _lines,
    }
    if path.suffix not in readers:
        raise UserError(f"{path} is no file of texts; they end in {', '.join(SUFFIXES)}")
    try:
        rows = readers[path.suffix](path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {(error.strerror or 'error').lower()}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from None
    if not rows:
        raise UserError(f"{path} holds no samples below its headings")
    return rows


def _table(path: Path, **style: Any) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, **style)
        headings = next(lines, [])
        if len(set(headings)) < len(headings):
            raise UserError(f"{path} names a column twice in its first line: {', '.join(headings)}")
        rows: list[Row] = []
        for cells in lines:
            if not cells:
                continue
            with tolerated():
                if len(cells) != len(headings):
                    raise UserError(
                        f"{path}, line {lines.line_num}: {len(cells)} columns instead of the "
                        f"{len(headings)} that the first line names ({', '.join(headings)})"
                    )
                rows.append(dict(zip(headings, cells, strict=True)))
    return rows


def _lines(path: Path) -> list[Row]:
    rows: list[Row] = []
    # Not splitlines(): a text may hold what that takes for the end of a line.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = plain.parse_json(line)
        except ValueError:
            row = None
        with tolerated():
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: no JSON object, as in {{'text': ...}}")
            rows.append(row)
    return rows


def _hub(name: str) -> tuple[dict[str, list[Row]], dict[str, str]]:
    datasets = need("datasets")
    try:
        kept = Path(name).is_dir() and not _folder_of_files(Path(name))
        found = datasets.load_from_disk(name) if kept else datasets.load_dataset(name)
    except Exception as error:  # Whatever a library raises is its own affair.
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"hf:{name} cannot be had: {line}") from None
    named = found if hasattr(found, "keys") else {"train": found}
    tables: dict[str, list[Row]] = {}
    for split, stems in SPLITS.items():
        key = next((stem for stem in stems if stem in named), None)
        if key is not None and len(named[key]):
            tables[split] = [_named(named[key].features, row) for row in named[key]]
    if "train" not in tables:
        raise UserError(f"hf:{name} has no samples in a split named train")
    return tables, {split: f"hf:{name} ({split})" for split in tables}


def _folder_of_files(path: Path) -> bool:
    return any(path.glob(f"*{suffix}") for suffix in SUFFIXES) and not list(path.glob("*.json"))


def _named(features: Mapping[str, Any], row: Row) -> Row:
    """A sample whose class numbers have become the classes' names; -1 stands for none."""
    return {
        key: ("" if value == -1 else features[key].int2str(value))
        if hasattr(features[key], "int2str") and isinstance(value, int)
        else value
        for key, value in row.items()
    }


def _columns(first: Row, wanted: Sequence[str] | None, label: str, where: str) -> tuple[str, ...]:
    headings = [str(name) for name in first]
    for name in (*(wanted or ()), label):
        if name not in first:
            raise UserError(f"{where} has no column {name!r}; " + did_you_mean(name, headings))
    if wanted is not None:
        if not 1 <= len(wanted) <= 2:
            raise UserError(f"a sample has one text or two, not {len(wanted)}; name its columns")
        return tuple(wanted)
    for known in COLUMNS:
        if all(name in first for name in known):
            return known
    raise UserError(
        f"{where} does not say which column holds the texts; name one or two of "
        f"{', '.join(h for h in headings if h != label)}, as in --set data.columns=[text]"
    )


def _data(
    source: str,
    kind: str,
    tables: Mapping[str, list[Row]],
    origin: Mapping[str, str],
    columns: tuple[str, ...],
    label: str,
    validation: float,
) -> TextData:
    kept = {
        name: rows
        for name, rows in tables.items()
        if name == "train" or any(str(row.get(label, "")) not in ("", "-1") for row in rows)
    }
    names = set()
    for number, row in enumerate(kept["train"]):
        with tolerated():
            names.add(_label(row, label, origin["train"], number))
    said = sorted(names)
    if not 2 <= len(said) <= MOST_CLASSES:
        raise UserError(
            f"{origin['train']}: the column {label!r} holds {len(said)} different values; labels "
            f"are of 2 to {MOST_CLASSES} classes"
        )
    if all(name.isdecimal() for name in said):
        said.sort(key=int)
    split = {
        name: Texts(name, *_samples(rows, columns, label, said, origin[name]))
        for name, rows in kept.items()
    }
    # One of two is what students are measured on.
    if "test" not in split and "validation" in split:
        split["test"] = replace(split.pop("validation"), name="test")
    if "test" not in split:
        split["train"], split["test"] = split_off_test(split["train"])
    if "validation" not in split:
        split["train"], split["validation"] = split_off_validation(split["train"], validation)
    classes = [_SENTIMENT.get(name, name) for name in said] if kind == "sst2" else said
    return TextData(source, columns, tuple(classes), split)


def _label(row: Row, label: str, where: str, number: int) -> str:
    value = row.get(label)
    if value is None or value == "" or isinstance(value, float | list | dict):
        raise UserError(
            f"{where}, sample {number + 1}: the column {label!r} holds {value!r}, which is no class"
        )
    return str(value)


def _samples(
    rows: list[Row], columns: tuple[str, ...], label: str, classes: list[str], where: str
) -> tuple[tuple[tuple[str, ...], ...], Tensor]:
    numbers = {name: number for number, name in enumerate(classes)}
    texts, labels = [], []
    for number, row in enumerate(rows):
        with tolerated():
            said = _label(row, label, where, number)
            if said not in numbers:
                raise UserError(
                    f"{where}, sample {number + 1}: the label {said!r} is none of the training "
                    f"samples'; {did_you_mean(said, classes)}"
                )
            strings = tuple(row.get(column) for column in columns)
            if not all(map(_is_text, strings)):
                raise UserError(
                    f"{where}, sample {number + 1}: the column {columns[0]!r} holds no text"
                    if len(columns) == 1
                    else f"{where}, sample {number + 1}: {' and '.join(columns)} do not both hold "
                    "text"
                )
            texts.append(tuple(map(str, strings)))
            labels.append(numbers[said])
    return tuple(texts), torch.tensor(labels)


def _is_text(value: Any) -> bool:
    """Whether it is a string that can be written; half of a pair of surrogates cannot."""
    try:
        return isinstance(value, str) and bool(value.encode("utf-8") or True)
    except UnicodeEncodeError:
        return False


def passages(path: Path) -> tuple[str, ...]:
    """The lines of a file of raw text that say something: headings and blank ones are left out.

    Raises:
        UserError: the file cannot be read or holds nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        reason = (error.strerror or "error").lower()
        raise UserError(f"the text {path} cannot be read: {reason}") from None
    except UnicodeDecodeError:
        raise UserError(f"the text {path} is not in UTF-8") from None
    found = tuple(line.strip() for line in lines if line.strip() and not line.startswith(" ="))
    if not found:
        raise UserError(f"{path} holds no passage of text, which are lines of words")
    return found
