"""What is wrong with a data set: the first fault ends a run, a check gathers them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from limbeck.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

# Of the process and not of a thread, as images are decoded by several.
_gathered: dict[str, None] | None = None


@contextmanager
def tolerated() -> Iterator[None]:
    """Around the reading of one sample: its fault is let through, or kept where all are gathered.

    The code behind it goes on without the sample; what it comes to is of no use but for further
    faults.
    """
    try:
        yield
    except UserError as error:
        if _gathered is None:
            raise
        _gathered[str(error)] = None


def each(read: Callable[[T], R], parts: Iterable[T]) -> list[R]:
    """What is read of every part of a whole that is of no use without one of them.

    Where faults are gathered, the parts behind a faulty one are read all the same.

    Raises:
        UserError: of a part that cannot be read.
    """
    read_ones = []
    fault: UserError | None = None
    for part in parts:
        try:
            read_ones.append(read(part))
        except UserError as error:
            fault = error
            with tolerated():
                raise
    if fault is not None:
        raise fault
    return read_ones


@contextmanager
def gathered() -> Iterator[dict[str, None]]:
    """Faults of samples read inside, in order, instead of an error at the first.

    >>> with gathered() as faults:
    ...     for number in range(2):
    ...         with tolerated():
    ...             raise UserError(f"sample {number} is damaged")
    >>> list(faults)
    ['sample 0 is damaged', 'sample 1 is damaged']
    """
    global _gathered
    found: dict[str, None] = {}
    before, _gathered = _gathered, found
    try:
        yield found
    finally:
        _gathered = before
