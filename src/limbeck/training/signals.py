"""Being asked to stop: Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_signals(heard: Callable[[int], None]) -> Iterator[None]:
    """Call ``heard`` with the number of an interrupt or a termination while the block runs.

    Signals can be heard in the main thread only; elsewhere the block just runs.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(number, lambda n, _: heard(n)) for number in numbers]
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
