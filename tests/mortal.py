"""Runs in processes of their own, which can be killed at any moment or die at a chosen one.

Each process is forked from a server that has all imported. A *moment* lies before each change
that a process makes to the files of its test, before each sync, and in the middle of what a cache
remembers; so a test can enumerate the moments of a run and have another run die at each.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = [
    "limbeck.cli",
    "limbeck.distillation",
    "limbeck.report.page",
    "matplotlib.figure",
    "sklearn.datasets",
    "torch._dynamo",
    "torchmetrics",
]
_CHANGES = {"os.rename", "os.remove", "os.truncate", "os.rmdir", "os.mkdir"}


@cache
def _serve() -> None:
    """Start the server, whose processes count on one thread, and wait until it is ready."""
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "6"}
    try:
        _CONTEXT.set_forkserver_preload(_IMPORTED)
        first = _CONTEXT.Process()
        first.start()
        first.join()
    finally:
        os.environ.clear()
        os.environ |= before


@dataclass(frozen=True)
class Life:
    """A process at work, or what is left of it."""

    process: BaseProcess
    diary: Path

    @property
    def group(self) -> int:
        """The number of the process, and of the group of those it has begun."""
        assert self.process.pid is not None
        return self.process.pid

    def end(self, within: float = 300) -> int:
        """Its exit status, negative if a signal ended it."""
        self.process.join(within)
        assert self.process.exitcode is not None, f"it is still at work:\n{self.said()}"
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def said(self) -> str:
        return self.diary.with_suffix(".said").read_text(errors="replace")

    def moments(self) -> list[str]:
        """What it was about to do, in order."""
        return self.diary.read_text().splitlines()

    def offspring(self, within: float) -> list[int]:
        """Processes that it began and that outlive it by so many seconds."""
        until = time.monotonic() + within
        while (alive := _members(self.group)) and time.monotonic() < until:
            time.sleep(0.05)
        return alive


def _members(group: int) -> list[int]:
    """The living processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(number) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def live(
    root: Path,
    words: list[Any],
    die_at: int = 0,
    streams: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Life:
    """Let a process carry out a command line.

    Args:
        root: the folder whose files are watched; its diary lies beside them.
        words: the command line.
        die_at: the moment at which it kills itself; 0 for none.
        streams: whether images from disk are read on the way, however few there are.
        environment: what it finds there besides.
    """
    _serve()
    diary = root.parent / f"{root.name}.{time.monotonic_ns()}.diary"
    given = (root, list(map(str, words)), diary, die_at, streams, dict(environment or {}))
    process = _CONTEXT.Process(target=_carry_out, args=given)
    process.start()
    return Life(process, diary)


def _carry_out(
    root: Path,
    words: list[str],
    diary: Path,
    die_at: int,
    streams: bool,
    environment: Mapping[str, str],
) -> None:
    os.setpgid(0, 0)
    # It inherits how it was begun; what it begins is begun as from the command line.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    os.environ |= environment
    said = os.open(diary.with_suffix(".said"), os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv = ["limbeck", *words]
    if streams:
        from limbeck.data import boxed, folder

        boxed._RESIDENT = folder._RESIDENT = 0
    _watch(root, diary, die_at)
    from limbeck.cli import main

    main()


def _watch(root: Path, diary: Path, die_at: int) -> None:
    """Write each moment into the diary, and die at one."""
    written = os.open(diary, os.O_WRONLY | os.O_CREAT)
    own, seen = os.getpid(), 0

    def moment(what: str, path: Any) -> None:
        nonlocal seen
        name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if os.getpid() != own or not name.startswith(f"{root}/"):
            return
        seen += 1
        os.write(written, f"{what} {name[len(str(root)) + 1 :]}\n".encode())
        if seen == die_at:
            os.kill(own, signal.SIGKILL)

    def heard(event: str, given: tuple[Any, ...]) -> None:
        if event in _CHANGES:
            moment(event.removeprefix("os."), given[1] if event == "os.rename" else given[0])
        elif event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR):
            moment("open", given[0])

    sys.addaudithook(heard)
    sync = os.fsync

    def synced(number: int) -> None:
        moment("fsync", Path(f"/proc/self/fd/{number}").readlink())
        sync(number)

    os.fsync = synced
    _tear(moment)


def _tear(moment: Callable[[str, Path], None]) -> None:
    """Let there be a moment when a batch's answers are half written, one of them torn."""
    from limbeck.training.cache import _Store

    whole = _Store.write

    def torn(self: Any, view: int, rows: Any, tensors: Any) -> Any:
        half = len(rows) // 2
        if half:
            whole(self, view, rows[:half], {n: t[:half] for n, t in tensors.items()})
        self.mapped(view)[rows[half], : self.record // 2] = 1
        moment("remember", self._path(view))
        return whole(self, view, rows, tensors)

    _Store.write = torn  # type: ignore[method-assign]
