"""Being asked to stop: Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopped(BaseException):
    """A signal that ends the process at once; ``status`` is the exit status.

    No ``except Exception`` on the way up keeps it.
    """

    def __init__(self, number: int) -> None:
        super().__init__("stopped")
        self.status = 128 + number


def stop(number: int) -> None:
    """What :func:`on_signals` may call: the process ends at once."""
    raise Stopped(number)


def deaf(_: int = 0) -> None:
    """Leave a process that serves another one to it: Ctrl-C in a terminal reaches both."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
