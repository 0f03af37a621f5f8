"""How much memory there is, and what would need more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from limbeck.errors import UserError


def available() -> int | None:
    """Bytes that are to be had without others losing theirs; ``None`` where nothing tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = (line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return next((int(k) * 1024 for k in kilobytes), None)


def check(what: str, wanted: int) -> None:
    """Refuse what needs more bytes than there are.

    >>> check("a whale", 10**18)
    Traceback (most recent call last):
    limbeck.errors.UserError: a whale would take 1,000,000,000.0 GB of memory, and ... GB are free

    Raises:
        UserError: there is no room.
    """
    free = available()
    if free is not None and wanted > free:
        raise UserError(
            f"{what} would take {wanted / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free"
        )


@contextmanager
def enough(what: Callable[[], str], lower: str) -> Iterator[None]:
    """Say in a sentence what wanted more memory than there is, and which recipe key to ``lower``.

    >>> with enough(lambda: "step 4", "batch_size"):
    ...     raise MemoryError
    Traceback (most recent call last):
    limbeck.errors.UserError: step 4 wanted more memory than there is; lower batch_size, ...
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error).partition("\n")[0]
        # The one is of accelerators, the other of the CPU.
        out = "out of memory" in said.lower() or "can't allocate memory" in said
        if not isinstance(error, MemoryError) and not out:
            raise
        raise UserError(
            f"{what()} wanted more memory than there is{f' ({said})' if said else ''}; lower "
            f"{lower}, raise training.accumulate or set engine.precision=bf16 (the last good "
            "checkpoint stands)"
        ) from None
