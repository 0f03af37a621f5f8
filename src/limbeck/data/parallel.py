"""Parallel text: sentences with their translations, from files or made of numbers."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from limbeck import plain
from limbeck.data.augment import uniforms
from limbeck.data.faults import tolerated
from limbeck.errors import UserError, did_you_mean
from limbeck.files import regular

KINDS = ("numbers", "parallel", "tsv", "jsonl")

_STEMS = {
    "train": ("train",),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test",),
}
_TEST, _VALIDATION, _LIMIT, _SPEECH = 21, 22, 23, 24
_NUMBERS = 4000


@dataclass(frozen=True)
class Pairs:
    """Some sentences with their translations; ``rows`` (N,) says which ones, in every subset."""

    name: str
    source: tuple[str, ...]
    target: tuple[str, ...]
    rows: Tensor

    def __len__(self) -> int:
        return len(self.source)

    def subset(self, positions: Tensor | Sequence[int], name: str | None = None) -> Pairs:
        """The pairs at these positions, identities kept."""
        chosen = torch.as_tensor(positions, dtype=torch.int64)
        places = chosen.tolist()
        return Pairs(
            name or self.name,
            tuple(self.source[p] for p in places),
            tuple(self.target[p] for p in places),
            self.rows[chosen],
        )

    def rewritten(self, target: Sequence[str]) -> Pairs:
        """The same sentences with other translations."""
        return replace(self, target=tuple(target))

    def at_most(self, number: int) -> Pairs:
        """So many pairs at most, chosen by their identities, in their order."""
        return self.subset(_lowest(self, number, _LIMIT))

    def fingerprint(self) -> str:
        """A hash of the text and of which pairs these are."""
        digest = hashlib.sha256(self.rows.numpy().tobytes())
        digest.update(json.dumps([self.source, self.target]).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Corpus:
    """A data set of pairs: its splits, the two languages, and what was noticed on reading."""

    source: str
    languages: tuple[str, str]
    train: Pairs
    validation: Pairs
    test: Pairs
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """What was found, in one sentence."""
        counts = ", ".join(
            f"{len(pairs):,} {pairs.name}" for pairs in (self.train, self.validation, self.test)
        )
        text = f"{self.source}: {counts} sentences, {' to '.join(self.languages)}"
        return "; ".join([text, *self.notes])

    def fingerprint(self) -> str:
        """A hash of all three splits."""
        parts = [s.fingerprint() for s in (self.train, self.validation, self.test)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def load(source: str, languages: tuple[str, str] | None = None, validation: float = 0.1) -> Corpus:
    """Load a corpus.

    Args:
        source: ``numbers`` (made up, see :func:`numbers`); ``parallel:FOLDER`` with files such as
            ``train.en`` and ``train.de``, a sentence a line, plain or ``.gz``; ``tsv:FILE`` with
            two columns; ``jsonl:FILE`` with an object a line; or a path whose name or content
            tells which of these it is.
        languages: from which to which; the ends of the files' names, the columns of a TSV file
            with a heading, the keys of JSON objects. Where there are but two they need not be
            said and are taken in the order of the columns, or of the alphabet.
        validation: the share of the training pairs that is held out, in [0, 1), where the source
            has no validation split of its own; for tests it is at least a tenth. The choice is
            the same in every run.

    Raises:
        UserError: the source does not exist or is malformed; the sentence names the place.

    >>> load("numbers").describe()
    'numbers: 2,669 train, 296 validation, 329 test sentences, English to German'
    """
    kind, path = _parse(source)
    try:
        spoken, pools = _READERS[kind](path, languages)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{error.filename or path} cannot be read: {reason}") from None
    splits, notes, row = {}, [], 0
    for name, (sources, targets) in pools.items():
        rows = torch.arange(row, row + len(sources))
        row += len(sources)
        pairs = Pairs(name, tuple(sources), tuple(targets), rows)
        whole = [n for n, both in enumerate(zip(sources, targets, strict=True)) if all(both)]
        if len(whole) < len(pairs):
            notes.append(f"{len(pairs) - len(whole):,} {name} pairs with an empty side left out")
            pairs = pairs.subset(whole)
        splits[name] = pairs
    train = splits["train"]
    if "test" not in splits:
        train, splits["test"] = _hold_out(train, max(validation, 0.1), "test", _TEST)
    if "validation" not in splits:
        train, splits["validation"] = _hold_out(train, validation, "validation", _VALIDATION)
    if not len(train) or not len(splits["test"]):
        raise UserError(f"{source} has too few sentences to train and to test on: {row}")
    return Corpus(source, spoken, train, splits["validation"], splits["test"], notes=tuple(notes))


def kind_of(source: str) -> str:
    """Which of :data:`KINDS` a source is, found without reading the text."""
    return _parse(source)[0]


def numbers() -> tuple[list[str], list[str]]:
    """Numbers from 100 to 9,999 in English words, and in German ones written apart.

    There is no real text in it: it is made by rules, which put ones before tens and leave a choice
    where people have one (an "und" behind the hundreds, "ein" before hundred and thousand, eleven
    to nineteen hundreds), decided by a hash of the number. So a sentence has several translations
    and the data shows one, which is what sequence-level distillation is about.

    >>> english, german = numbers()
    >>> english[3], german[3]
    ('seven thousand one hundred eighty three', 'sieben tausend hundert und drei und achtzig')
    """
    order = torch.arange(_NUMBERS)
    chance = uniforms(order, 5, seed=_SPEECH, view=0)
    values = (100 + 9900 * chance[:, 0]).long().tolist()
    unique = dict(zip(values, (chance[:, 1:] < 0.5).tolist(), strict=True))
    return [english(n) for n in unique], [german(n, choices) for n, choices in unique.items()]


_ENGLISH = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
"""
_GERMAN = """
null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn
sechzehn siebzehn achtzehn neunzehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig
"""
_ONES, _EINS = _ENGLISH.split(), _GERMAN.split()


def english(number: int) -> str:
    """A number from 1 to 9,999 in English words.

    >>> english(4217)
    'four thousand two hundred seventeen'
    """
    words = []
    if number >= 1000:
        words += [_ONES[number // 1000], "thousand"]
    if number % 1000 >= 100:
        words += [_ONES[number % 1000 // 100], "hundred"]
    rest = number % 100
    if rest >= 20:
        words.append(_ONES[rest // 10 + 18])
        rest %= 10
    if rest:
        words.append(_ONES[rest])
    return " ".join(words)


def german(number: int, choices: Sequence[bool] = (False,) * 4) -> str:
    """A number from 1 to 9,999 in German words; ``choices`` in the order of :func:`numbers`.

    >>> german(4243), german(1217, (True, False, False, True))
    ('vier tausend zwei hundert drei und vierzig', 'zwölf hundert und siebzehn')
    """
    joined, one_hundred, one_thousand, by_hundreds = choices
    if by_hundreds and 1100 <= number < 2000:
        words = [_EINS[number // 100], "hundert"]
    else:
        words = _counted(number // 1000, "tausend", one_thousand)
        words += _counted(number % 1000 // 100, "hundert", one_hundred)
    tens, ones = divmod(number % 100, 10)
    if joined and number % 100 and words and words[-1] == "hundert":
        words.append("und")
    if tens < 2:
        words += [_EINS[number % 100]] if number % 100 else []
    else:
        words += [_EINS[ones], "und"] if ones else []
        words.append(_EINS[tens + 18])
    if words[-1] == "ein":
        words[-1] = "eins"
    return " ".join(words)


def _counted(number: int, unit: str, one: bool) -> list[str]:
    """So many of a unit; a single one is counted or not."""
    if number == 1 and not one:
        return [unit]
    return [_EINS[number], unit] if number else []


# Readers: languages, and sentences with translations by split.

_Pools = dict[str, tuple[list[str], list[str]]]
_Languages = tuple[str, str] | None


def _parse(source: str) -> tuple[str, Path]:
    kind, colon, rest = source.partition(":")
    if kind in KINDS:
        if (kind == "numbers") == bool(colon and rest):
            wanted = "takes no path" if kind == "numbers" else f"wants a path, as in {kind}:PATH"
            raise UserError(f"{kind} {wanted}")
        path = plain.path(rest)
    else:
        kind, path = "", plain.path(source)
    if kind == "numbers":
        return kind, path
    if not path.exists():
        if kind or "/" in source or source.startswith("."):
            raise UserError(f"the data path {path} does not exist")
        raise UserError(
            f"there is no parallel text {source!r}; {did_you_mean(source, KINDS)}, or a path"
        )
    if path.is_dir():
        if kind in ("tsv", "jsonl"):
            raise UserError(f"{path} is a folder; {kind}: wants a file")
        return "parallel", path
    if kind == "parallel":
        raise UserError(f"{path} is a file; parallel: wants the folder that it lies in")
    if not kind:
        ends = path.name.removesuffix(".gz").rpartition(".")[2]
        kind = {"tsv": "tsv", "jsonl": "jsonl", "json": "jsonl"}.get(ends, "")
        if not kind:
            raise UserError(
                f"{path} is no parallel text that is known: give a folder with train.en and "
                "train.de, or a file that ends in .tsv or .jsonl"
            )
    return kind, path


def _numbers(path: Path, languages: _Languages) -> tuple[tuple[str, str], _Pools]:
    if languages not in (None, ("English", "German")):
        raise UserError("numbers are in English and German only; leave data.languages out")
    return ("English", "German"), {"train": numbers()}


def _folder(path: Path, languages: _Languages) -> tuple[tuple[str, str], _Pools]:
    files: dict[str, dict[str, Path]] = {}
    for file in sorted(path.iterdir()):
        name, _, language = file.name.removesuffix(".gz").rpartition(".")
        if name and file.is_file() and file.suffix != ".md":
            files.setdefault(name, {}).setdefault(language, file)
    stems = {
        split: next((s for s in files if s.startswith(beginnings)), None)
        for split, beginnings in _STEMS.items()
    }
    train = stems["train"]
    if train is None:
        raise UserError(f"{path} has no file that begins with train, such as train.en")
    there = sorted(files[train])
    if languages is None:
        if len(there) != 2:
            raise UserError(
                f"{path} has {train} in {', '.join(there)}; say which two with "
                "data.languages, as in --set 'data.languages=[en, de]'"
            )
        languages = there[0], there[1]
    pools: _Pools = {}
    for split, stem in stems.items():
        if stem is None:
            continue
        for language in languages:
            if language not in files[stem]:
                raise UserError(
                    f"{path} has no {stem}.{language}; {did_you_mean(language, files[stem])}"
                )
        first, second = (_lines(files[stem][language]) for language in languages)
        if len(first) != len(second):
            raise UserError(
                f"{files[stem][languages[0]]} has {len(first):,} lines, but "
                f"{files[stem][languages[1]]} has {len(second):,}; line by line they must be "
                "translations of each other"
            )
        pools[split] = (first, second)
    return languages, pools


def _tsv(path: Path, languages: _Languages) -> tuple[tuple[str, str], _Pools]:
    rows = [line.split("\t") for line in _lines(path, strip=False) if line.strip()]
    columns, begin = (0, 1), 0
    if languages is not None:
        heading = [cell.strip() for cell in rows[0]] if rows else []
        for language in languages:
            if language not in heading:
                raise UserError(
                    f"{path} has no column {language!r}; {did_you_mean(language, heading)}"
                )
        columns, begin = (heading.index(languages[0]), heading.index(languages[1])), 1
    pairs: tuple[list[str], list[str]] = ([], [])
    for number, row in enumerate(rows[begin:], begin + 1):
        with tolerated():
            if len(row) <= max(columns):
                raise UserError(
                    f"row {number} of {path} has {len(row)} columns, not {max(columns) + 1} or "
                    "more parted by tabs"
                )
            for cells, column in zip(pairs, columns, strict=True):
                cells.append(_clean(row[column]))
    return languages or ("column 1", "column 2"), {"train": pairs}


def _jsonl(path: Path, languages: _Languages) -> tuple[tuple[str, str], _Pools]:
    pairs: tuple[list[str], list[str]] = ([], [])
    for number, line in enumerate(_lines(path), 1):
        if not line:
            continue
        try:
            found = plain.parse_json(line)
        except ValueError:
            raise UserError(f"line {number} of {path} is no JSON") from None
        # As in data sets of translations on the Hugging Face Hub.
        found = found.get("translation", found) if isinstance(found, dict) else None
        if not isinstance(found, dict) or not found:
            raise UserError(f"line {number} of {path} is no JSON object with the two sentences")
        if languages is None:
            keys = [str(key) for key in found]
            if len(keys) != 2:
                raise UserError(
                    f"the objects of {path} have the keys {', '.join(keys)}; say which two are "
                    "the sentences with data.languages"
                )
            languages = (keys[0], keys[1])
        for cells, language in zip(pairs, languages, strict=True):
            if language not in found:
                raise UserError(
                    f"line {number} of {path} has no {language!r}; {did_you_mean(language, found)}"
                )
            if not isinstance(found[language], str):
                raise UserError(f"line {number} of {path} has {language!r} that is no text")
            cells.append(_clean(found[language]))
    if languages is None:
        raise UserError(f"{path} is empty")
    return languages, {"train": pairs}


_READERS: dict[str, Callable[[Path, _Languages], tuple[tuple[str, str], _Pools]]] = {
    "numbers": _numbers,
    "parallel": _folder,
    "tsv": _tsv,
    "jsonl": _jsonl,
}


MOST_BYTES = 2**30
"""A longer text is no corpus to be held in memory, or a small file that swells."""


def _lines(path: Path, strip: bool = True) -> list[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(regular(path), "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{path} holds more than the {MOST_BYTES:,} bytes that are read")
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{path} is damaged: it is no whole gzip file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8: byte {error.start:,} is foreign") from None
    if lines[-1] == "":
        del lines[-1]
    return [_clean(line) for line in lines] if strip else lines


def _clean(text: str) -> str:
    """The text with single plain blanks."""
    return " ".join(text.split())


def _lowest(pairs: Pairs, number: int, purpose: int) -> Tensor:
    """The positions of so many pairs whose identities hash lowest, in their order."""
    order = uniforms(pairs.rows, 1, seed=purpose, view=0).flatten().argsort(stable=True)
    return order[:number].sort().values


def _hold_out(pairs: Pairs, share: float, name: str, purpose: int) -> tuple[Pairs, Pairs]:
    """Part pairs in two by their identities: what stays, and what is held out."""
    chosen = torch.zeros(len(pairs), dtype=torch.bool)
    chosen[_lowest(pairs, round(share * len(pairs)), purpose)] = True
    keep, held = (~chosen).nonzero().flatten(), chosen.nonzero().flatten()
    return pairs.subset(keep), pairs.subset(held, name)
