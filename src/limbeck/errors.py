"""What a user can do wrong, said in one sentence."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

MOST_CHARACTERS = 2000
"""A longer sentence is cut."""


class UserError(Exception):
    """A mistake of the user: one sentence that says what, where and what would work.

    The command line prints the sentence and exits with status 2; no traceback is shown. What it
    repeats of the user's words cannot break the line or command the terminal: characters that do
    not print are shown by their escapes, and the middle of very long words is left out.

    >>> print(UserError("there is no file a\\nb\\x1b"))
    there is no file a\\nb\\x1b
    """

    def __init__(self, sentence: str) -> None:
        printed = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode() for c in sentence
        )
        words = re.sub(r"\S{300,}", lambda word: _cut(word[0], 250), printed)
        super().__init__(_cut(words, MOST_CHARACTERS))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


@contextmanager
def readable(what: str) -> Iterator[None]:
    """What the operating system refuses within is the user's mistake about ``what``.

    >>> with readable("the list"):
    ...     open("no/such/file")
    Traceback (most recent call last):
    limbeck.errors.UserError: the list cannot be read: no such file or directory (no/such/file)
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The one is Python's and NumPy's, the other torch's.
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(f"{what} cannot be read: it wants more memory than there is") from None
    except OSError as error:
        reason = (error.strerror or str(error) or type(error).__name__).lower()
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"{what} cannot be read: {reason}{where}") from None


def did_you_mean(wrong: str, known: Iterable[str], most: int = 3) -> str:
    """The end of an error sentence: the near names, or all of them if they are few.

    >>> did_you_mean("resnet2O", ["resnet20", "vgg8"])
    'did you mean resnet20?'
    >>> did_you_mean("x", ["resnet20", "vgg8"])
    'known: resnet20, vgg8'
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(wrong, names, n=most, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    shown = ", ".join(names[:12])
    return f"known: {shown}" + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def shown(value: Any) -> str:
    """A value as an error sentence shows it: short, however much the value holds.

    >>> shown({"model": "vgg8"}), shown([1] * 99)
    ("{'model': 'vgg8'}", '[1, 1, 1, 1, 1, 1, ...]')
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    try:
        return short.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__}"
