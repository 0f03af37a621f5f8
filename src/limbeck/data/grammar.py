"""Short remarks on things, made by a grammar: the embedded data of texts.

Nothing in them was ever said by anyone. A remark is favourable or not, and no single word decides
it: words of praise and of blame may be negated, and behind "but" or "although" stands what counts.
What is learned from it says how a method works and nothing about language.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any


def _words(said: str) -> tuple[str, ...]:
    return tuple(said.split())


THINGS = _words(
    "film story play cast tune book meal room view plot song scene tale show trip voice ending "
    "script soup garden"
)
GOOD = _words("good fine warm clever lovely fresh moving funny bright rich")
BAD = _words("bad dull cold stupid ugly stale boring sad dim poor")
HEDGES = _words("very quite rather truly really somewhat always often")
OPENINGS = ("i think", "they say", "people say", "to me", "in the end", "it seems", "")
TAILS = ("", "this time", "from start to end", "for most of us", "last night", "all in all")
_TRAIN, _TEST = 4000, 1000


def remark(draw: random.Random) -> tuple[str, str]:
    """A remark and what it is, ``favourable`` or ``unfavourable``.

    >>> remark(random.Random(0))
    ('people say although the view was lovely the story is stupid this time', 'unfavourable')
    """
    good = draw.random() < 0.5
    form = draw.randrange(4)
    thing, other = draw.sample(THINGS, 2)
    if form < 2:
        core = _says(draw, thing, good)
    elif form == 2:
        core = f"{_says(draw, other, not good)} but {_says(draw, thing, good)}"
    else:
        core = f"although {_says(draw, other, not good)} {_says(draw, thing, good)}"
    text = " ".join(f"{draw.choice(OPENINGS)} {core} {draw.choice(TAILS)}".split())
    return text, "favourable" if good else "unfavourable"


def _says(draw: random.Random, thing: str, good: bool) -> str:
    negated = draw.random() < 0.3
    hedge = draw.choice(HEDGES) if draw.random() < 0.4 else ""
    word = draw.choice(GOOD if good != negated else BAD)
    verb = draw.choice(("is", "was"))
    return " ".join(f"the {thing} {verb} {'not' if negated else ''} {hedge} {word}".split())


def tables() -> dict[str, list[Mapping[str, Any]]]:
    """4,000 remarks for training and 1,000 for testing, none of which is in both."""
    draw, seen = random.Random(2020), set()
    rows: list[Mapping[str, Any]] = []
    while len(rows) < _TRAIN + _TEST:
        text, label = remark(draw)
        if text not in seen:
            seen.add(text)
            rows.append({"text": text, "label": label})
    return {"train": rows[:_TRAIN], "test": rows[_TRAIN:]}
