"""Tables with a class in one column: CSV, Parquet, and those that scikit-learn brings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from limbeck import plain
from limbeck.data.data import Samples
from limbeck.data.faults import tolerated
from limbeck.data.splits import split_off_test, split_off_validation
from limbeck.errors import UserError, did_you_mean
from limbeck.models.table import Column, TableInput

EMBEDDED = {
    "iris": "load_iris",
    "wine": "load_wine",
    "breast-cancer": "load_breast_cancer",
    "digits": "load_digits",
}
"""Real tables that come with scikit-learn, and what loads them."""

FILES = ("csv", "parquet")
MOST_CATEGORIES = 1000
NULLS = ["", "?", "NA", "N/A", "NaN", "nan", "null", "NULL"]


@dataclass(frozen=True)
class Rows(Samples):
    """Some rows of a table.

    ``cells`` is float32 of shape (all rows, columns), what :class:`limbeck.models.table.TableInput`
    is called with; ``rows`` says which of its rows each sample is, its identity in every subset;
    ``labels`` is int64 of shape (N,), or ``None`` where there are none.
    """

    name: str
    cells: Tensor
    labels: Tensor | None
    rows: Tensor

    def fingerprint(self) -> str:
        """A hash of cells, labels and choice of samples."""
        return self._chosen(self.cells.numpy().tobytes())


@dataclass(frozen=True)
class TableData:
    """A table's splits, the names of its classes and what models are fed of it."""

    source: str
    classes: tuple[str, ...]
    input: TableInput
    train: Rows
    validation: Rows
    test: Rows

    def describe(self) -> str:
        """What was found, in one sentence, said before training."""
        splits = (self.train, self.validation, self.test)
        counts = ", ".join(f"{len(s):,} {s.name}" for s in splits)
        categories = sum(bool(column.categories) for column in self.input.columns)
        columns = f"{len(self.input.columns)} columns"
        if categories:
            columns += f" ({categories} of categories)"
        return f"{self.source}: {counts} rows, {columns}, {len(self.classes)} classes"

    def fingerprint(self) -> str:
        """A hash of all three splits."""
        parts = [s.fingerprint() for s in (self.train, self.validation, self.test)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def load(
    source: str,
    *,
    validation: float = 0.1,
    test: float = 0.2,
    label: str | None = None,
    drop: Sequence[str] = (),
    categorical: Sequence[str] = (),
) -> TableData:
    """Load a table.

    Columns of numbers are numbers, columns of text are categories; categories, means and
    deviations are those of the training split.

    Args:
        source: ``iris``, ``wine``, ``breast-cancer``, ``digits``, ``csv:PATH``, ``parquet:PATH``
            or a path. It is one file, or a folder with files named ``train``, ``test`` and, if
            there is one, ``validation``.
        validation: share of the training rows that is held out, where there is no such file.
        test: share of all rows that is held out, where there is no such file.
        label: the column of classes; the last one if not given.
        drop: columns that are left out.
        categorical: columns of numbers that stand for categories.

    Raises:
        UserError: the table cannot be had or used; the sentence names file and column.

    >>> load("iris").describe()
    'iris: 108 train, 12 validation, 30 test rows, 4 columns, 3 classes'
    """
    kind, path = _parse(source)
    if path is None:
        if label or drop or categorical:
            raise UserError(f"{kind} has columns of its own: label, drop and categorical are not")
        tables, names = {"all": _embedded(kind)[0]}, _embedded(kind)[1]
    else:
        tables, names = {part: _read(file) for part, file in _files(path).items()}, None
    first = next(iter(tables.values()))
    chosen = first.column_names[-1] if label is None else label
    for wanted in (chosen, *drop, *categorical):
        if wanted not in first.column_names:
            raise UserError(
                f"{source} has no column {wanted!r}; {did_you_mean(wanted, first.column_names)}"
            )
    if chosen in (*drop, *categorical):
        raise UserError(f"{source}: {chosen!r} is the column of classes and no input")
    whole = _joined(tables, source)
    labels, classes = _labels(whole[chosen], chosen, source)
    splits = _split(tables, labels, validation, test)
    inputs = [n for n in first.column_names if n != chosen and n not in drop]
    if not inputs:
        raise UserError(f"{source} has no column beside the classes to learn from")
    seen = splits["train"].rows.numpy()
    found = []
    for n in inputs:
        with tolerated():
            found.append(_column(whole[n], n, n in categorical, seen, source))
            continue
        # While faults are gathered, it stands for a column that is of no use.
        found.append((Column(n), np.zeros(len(labels), np.float32)))
    cells = torch.from_numpy(np.stack([numbers for _, numbers in found], 1))
    splits = {name: replace(rows, cells=cells) for name, rows in splits.items()}
    _check_classes(splits, classes, source)
    return TableData(
        source,
        names or classes,
        TableInput(tuple(column for column, _ in found)),
        splits["train"],
        splits["validation"],
        splits["test"],
    )


def kind_of(source: str) -> str:
    """The table's name that presets are fitted to: an embedded one's, or its file's or folder's.

    >>> kind_of("wine")
    'wine'
    """
    kind, path = _parse(source)
    return kind if path is None else path.stem


def _parse(source: str) -> tuple[str, Path | None]:
    if source in EMBEDDED:
        return source, None
    kind, colon, rest = source.partition(":")
    known = [*EMBEDDED, *(f"{k}:PATH" for k in FILES)]
    text = rest if colon and kind in FILES else source
    path = plain.path(text)
    if text and path.exists():
        return kind, path
    if (colon and kind in FILES) or "/" in source or source.startswith((".", "~")):
        raise UserError(f"the table {text!r} does not exist")
    raise UserError(f"there is no table {source!r}; {did_you_mean(source, known)}")


def _embedded(name: str) -> tuple[pa.Table, tuple[str, ...]]:
    from sklearn import datasets

    found = getattr(datasets, EMBEDDED[name])()
    columns = {str(n): found.data[:, i] for i, n in enumerate(found.feature_names)}
    table = pa.table({**columns, "class": found.target})
    return table, tuple(str(n) for n in found.target_names)


def _files(path: Path) -> dict[str, Path]:
    """The files of a table by split; ``all`` where there is one alone."""
    if path.is_file():
        return {"all": path}
    there = sorted(p for p in path.iterdir() if p.suffix.lstrip(".") in FILES)
    named = {p.stem: p for p in there if p.stem in ("train", "validation", "test")}
    if len(there) == 1 and not named:
        return {"all": there[0]}
    if "train" not in named:
        names = ", ".join(p.name for p in there) or "none"
        raise UserError(
            f"{path} has no train.csv or train.parquet; of tables it holds {names}: name one file, "
            "or name the files train, test and validation"
        )
    return named


def _read(path: Path) -> pa.Table:
    from pyarrow import csv, parquet

    if path.suffix.lstrip(".") not in FILES:
        raise UserError(f"{path} is no table: a name that ends in .csv or .parquet is wanted")
    try:
        if path.suffix == ".parquet":
            table = parquet.read_table(path)
        else:
            options = csv.ConvertOptions(null_values=NULLS, strings_can_be_null=True)
            table = csv.read_csv(path, convert_options=options)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or ["error"])[0].strip().rstrip(".:")
        raise UserError(f"{path} cannot be read as a table: {reason}") from None
    names = table.column_names
    if table.num_rows < 2 or len(names) < 2:
        raise UserError(
            f"{path} holds {table.num_rows} rows of {len(names)} columns; a table to learn from "
            "has 2 or more of both"
        )
    if path.suffix == ".csv" and all(_is_number(n) for n in names[:-1]):
        raise UserError(f"{path} has no line of column names: its first line holds numbers")
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UserError(f"{path} has two columns named {twice!r}")
    return table


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _joined(tables: dict[str, pa.Table], source: str) -> pa.Table:
    """All rows one below the other; columns are found by their names."""
    first, *others = tables.items()
    for name, table in others:
        if set(table.column_names) != set(first[1].column_names):
            odd = sorted(set(table.column_names) ^ set(first[1].column_names))[0]
            raise UserError(
                f"{source}: the columns of {first[0]} and {name} differ; {odd!r} is in one alone"
            )
    aligned = [table.select(first[1].column_names) for table in tables.values()]
    try:
        return pa.concat_tables(aligned, promote_options="permissive")
    except (pa.ArrowException, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source}: the files' columns differ in type: {reason}") from None


def _split(
    tables: dict[str, pa.Table], labels: Tensor, validation: float, test: float
) -> dict[str, Rows]:
    parts, begun = {}, 0
    for name, table in tables.items():
        rows = torch.arange(begun, begun + table.num_rows)
        parts[name] = Rows("train" if name == "all" else name, torch.empty(0), labels[rows], rows)
        begun += table.num_rows
    train = parts.get("train", parts.get("all"))
    assert train is not None, "a table is one file or has one for training"
    if "test" not in parts:
        train, parts["test"] = split_off_test(train, test)
    if "validation" not in parts and validation:
        train, parts["validation"] = split_off_validation(train, validation)
    parts.setdefault("validation", train.subset([], "validation"))
    return {"train": train, "validation": parts["validation"], "test": parts["test"]}


def _labels(column: pa.ChunkedArray, name: str, source: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels (N,) and the names of the classes, in order."""
    if column.null_count:
        row = column.is_null().to_pylist().index(True) + 1
        raise UserError(f"{source}: row {row:,} has no class in the column {name!r}")
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        raise UserError(
            f"{source}: the column {name!r} holds {column.type} and no classes: numbers or text "
            "in UTF-8 are wanted; another one is named with --set data.label=NAME"
        )
    values = column.unique().to_pylist()
    if pa.types.is_floating(column.type) and not all(float(v).is_integer() for v in values):
        raise UserError(
            f"{source}: the column {name!r} holds fractions, which are no classes; name the column "
            "of classes with --set data.label=NAME"
        )
    if len(values) > MOST_CATEGORIES:
        raise UserError(
            f"{source}: the column {name!r} holds {len(values):,} different values, too many for "
            "classes; name the column of classes with --set data.label=NAME"
        )
    ordered = sorted(values, key=lambda v: (isinstance(v, str), v))
    places = {value: place for place, value in enumerate(ordered)}
    labels = torch.tensor([places[value] for value in column.to_pylist()])
    whole = [int(v) if isinstance(v, float) else v for v in ordered]
    return labels, tuple(str(v) for v in whole)


def _column(
    column: pa.ChunkedArray, name: str, categorical: bool, seen: np.ndarray[Any, Any], source: str
) -> tuple[Column, np.ndarray[Any, Any]]:
    """What is fed of a column, and its cells as float32."""
    kind = column.type
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if pa.types.is_nested(kind) or pa.types.is_binary(kind):
        raise UserError(
            f"{source}: the column {name!r} holds {kind}, neither numbers nor text in UTF-8; leave "
            f"it out with --set data.drop=[{name}]"
        )
    if number and not categorical:
        cells = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        if np.isinf(cells).any() or np.isinf(cells.astype(np.float32)).any():
            row = int(np.isinf(cells.astype(np.float32)).argmax()) + 1
            raise UserError(f"{source}: row {row:,} of the column {name!r} is infinite")
        known = cells[seen][~np.isnan(cells[seen])]
        if not len(known):
            raise UserError(
                f"{source}: the column {name!r} is empty in training; leave it out "
                f"with --set data.drop=[{name}]"
            )
        deviation = float(known.std())
        return Column(name, float(known.mean()), deviation or 1.0), cells.astype(np.float32)
    text = pc.cast(column, pa.string()).to_pylist()
    categories = sorted({text[row] for row in seen.tolist()} - {None})
    if not 1 <= len(categories) <= MOST_CATEGORIES:
        found = f"{len(categories):,} different values" if categories else "nothing"
        raise UserError(
            f"{source}: the column {name!r} holds {found} in training; categories are 1 to "
            f"{MOST_CATEGORIES:,}: leave it out with --set data.drop=[{name}]"
        )
    places = {value: place for place, value in enumerate(categories)}
    codes = [places.get(value, np.nan) for value in text]
    return Column(name, categories=tuple(categories)), np.array(codes, np.float32)


def _check_classes(splits: dict[str, Rows], classes: tuple[str, ...], source: str) -> None:
    found = splits["train"].labels
    assert found is not None, "a table has a column of classes"
    if len(classes) < 2:
        raise UserError(f"{source} has rows of one class only; a classifier needs two or more")
    lacking = sorted(set(range(len(classes))) - set(found.tolist()))
    if lacking:
        raise UserError(
            f"{source}: the class {classes[lacking[0]]!r} does not occur in training; every class "
            "needs a row there"
        )
