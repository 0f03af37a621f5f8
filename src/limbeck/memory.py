"""How much memory there is, and what would need more."""

from __future__ import annotations

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
