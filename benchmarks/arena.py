"""Contenders that work in turn, a stretch each, so that a ratio compares neighbours in time.

Each contender has a process of its own (or several, as ``torchrun`` would start them) and is
frozen by a signal while others work: no thread, progress bar or waiting loop of one takes time from
another. A contender is a function that is given a :class:`Pace` and works for ever, marking where
a stretch of its work ends; there it waits for its turn.

Run as a script, this module is the process of one contender.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

PATIENCE = 900.0
"""Seconds after which a contender that gives no sign is given up."""


class Failed(Exception):
    """A contender cannot work; the text says why."""


@dataclass(frozen=True)
class Lap:
    """One stretch of a contender: seconds, optimiser steps, peak memory in bytes, what it told.

    ``memory`` is resident memory of the (first) process, ``device_memory`` is on an accelerator.
    """

    seconds: float
    steps: int
    memory: int
    device_memory: int = 0
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def pace(self) -> float:
        """Seconds a step."""
        return self.seconds / self.steps


# In the contender's process.


class Pace:
    """Marks the stretches of a contender's work. ``every`` so many marks make a stretch."""

    def __init__(self, replies: IO[str] | None) -> None:
        self.every = 1
        self.steps = 0
        self._replies = replies  # without, another process of the same contender speaks
        self._marks = 0
        self._begun: float | None = None

    def mark(self, tell: Callable[[], Mapping[str, float]] | None = None) -> None:
        """End a stretch, say how long it took, and wait until the next may begin.

        ``tell`` gives facts about the work done, after the clock has been stopped.
        """
        self._marks += 1
        if self._replies is None or (self._marks - 1) % self.every:
            return
        if self._begun is None:
            self._count_steps()
            self._say({})
        else:
            _synchronise()
            seconds = time.perf_counter() - self._begun
            peak = {"memory": resident()[1], "device_memory": _device_peak()}
            facts = tell() if tell else {}
            self._say({"seconds": seconds, "steps": self.steps, **peak, "facts": facts})
        if not sys.stdin.readline():
            os._exit(0)
        _reset_peaks()
        self.steps = 0
        self._begun = time.perf_counter()

    def _say(self, said: Mapping[str, Any]) -> None:
        assert self._replies is not None
        self._replies.write(json.dumps(said) + "\n")
        self._replies.flush()

    def _count_steps(self) -> None:
        """Count the steps of whatever optimiser a contender uses."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        def count(*_: Any) -> None:
            self.steps += 1

        register_optimizer_step_post_hook(count)


def resident() -> tuple[int, int]:
    """Resident bytes of this process: now, and the most since the stretch began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    words = {line.split(":")[0]: line.split() for line in lines}
    return int(words["VmRSS"][1]) * 1024, int(words["VmHWM"][1]) * 1024


def _reset_peaks() -> None:
    Path("/proc/self/clear_refs").write_text("5")
    torch = sys.modules["torch"]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _device_peak() -> int:
    torch = sys.modules["torch"]
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _synchronise() -> None:
    torch = sys.modules["torch"]
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _perform(target: str, options: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a contender prints goes into its log
    module, _, name = target.partition(":")
    pace = Pace(replies if os.environ.get("RANK", "0") == "0" else None)
    getattr(importlib.import_module(module), name)(pace, **json.loads(options))


# In the process that measures.


@dataclass(frozen=True)
class _Entry:
    target: str
    warm_up: int
    processes: int
    environment: Mapping[str, str]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class _Contender:
    leader: subprocess.Popen[str]
    others: list[subprocess.Popen[str]]
    log: Path


class Arena:
    """Starts contenders, lets them work in turn and ends them.

    ``absent`` says why a contender could not take part, ``first`` holds the stretch that each one
    began with (not counted), ``laps`` those of the rounds.

    Args:
        folder: where logs and working folders of the contenders lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.absent: dict[str, str] = {}
        self.first: dict[str, Lap] = {}
        self.laps: dict[str, list[Lap]] = {}
        self._entries: dict[str, _Entry] = {}
        self._contenders: dict[str, _Contender] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in list(self._contenders):
            self.retire(name)

    def enter(
        self,
        name: str,
        target: str,
        *,
        warm_up: int = 1,
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Start a contender and warm it up; why it cannot take part is kept in ``absent``.

        Args:
            name: what it is called.
            target: ``module:function``.
            warm_up: stretches that are not counted.
            processes: how many work together, with the environment that ``torchrun`` gives.
            environment: more variables.
            options: keyword arguments of the function, after its pace.
        """
        self._entries[name] = _Entry(target, warm_up, processes, environment or {}, options)
        self._start(name)

    def _start(self, name: str) -> None:
        entry = self._entries[name]
        try:
            self._contenders[name] = self._started(self.folder / f"{name}.log", entry)
            self._read(name)
            self.first[name], *_ = (self.lap(name) for _ in range(entry.warm_up))
        except Failed as failure:
            self._lose(name, failure)
        else:
            _note(f"{name} is ready")

    def lap(self, name: str) -> Lap:
        """Let a contender work for one stretch, alone."""
        with self._awake(name) as contender:
            self._go(contender)
            return Lap(**self._read(name))

    def memory(self, name: str) -> int:
        """Peak resident bytes of a contender with its children, over one more stretch.

        Of a child, such as a worker of a data loader, what it shares with its parent is not counted
        again.
        """
        import psutil

        highest = 0
        with self._awake(name) as contender:
            self._go(contender)
            while not select.select([contender.leader.stdout], [], [], 0.1)[0]:
                own = 0
                for child in psutil.Process(contender.leader.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        own += child.memory_full_info().uss
                highest = max(highest, own)
            return Lap(**self._read(name)).memory + highest

    def rounds(self, number: int, generations: int = 1) -> None:
        """So many stretches of each contender, in turn; the order moves on from round to round.

        Every generation starts the contenders afresh and does all its rounds: where a process finds
        its memory is luck, which makes it a few hundredths faster or slower for all its life.
        """
        self.laps = {name: [] for name in self._contenders}
        for turn in range(number * generations):
            if turn and turn % number == 0:
                for name in list(self._contenders):
                    self.retire(name)
                    self._start(name)
            names = list(self._contenders)
            shift = turn % max(len(names), 1)
            for name in names[shift:] + names[:shift]:
                self._add_lap(name)
            paces = ", ".join(f"{name} {laps[-1].pace:.4f}" for name, laps in self.laps.items())
            _note(f"round {turn + 1} of {number * generations}, seconds a step: {paces}")

    def _add_lap(self, name: str) -> None:
        try:
            lap = self.lap(name)
            if not lap.steps:
                raise Failed("it made no step of an optimiser")
            self.laps[name].append(lap)
        except Failed as failure:
            self._lose(name, failure)

    def _lose(self, name: str, failure: Failed) -> None:
        self.absent[name] = str(failure)
        self.laps.pop(name, None)
        self.retire(name)
        _note(f"{name} cannot take part: {failure}")

    def retire(self, name: str) -> None:
        """End a contender with everything it started."""
        contender = self._contenders.pop(name, None)
        if contender is not None:
            with suppress(ProcessLookupError):
                os.killpg(contender.leader.pid, signal.SIGKILL)
            for process in (contender.leader, *contender.others):
                process.wait()

    def _started(self, log: Path, entry: _Entry) -> _Contender:
        command = [sys.executable, __file__, entry.target, json.dumps(entry.options)]
        shared = {**os.environ, **entry.environment}
        if entry.processes > 1:
            port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            shared |= {**port, "WORLD_SIZE": str(entry.processes)}
        group: list[subprocess.Popen[str]] = []
        for rank in range(entry.processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if entry.processes > 1 else {}
            with log.open("a") as errors:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=shared | place,
                    text=True,
                    # A group of its own can be frozen as a whole. Should this process die, the
                    # group is orphaned, and the system ends what is frozen in it.
                    process_group=group[0].pid if group else 0,
                )
            group.append(process)
        return _Contender(group[0], group[1:], log)

    @contextmanager
    def _awake(self, name: str) -> Iterator[_Contender]:
        contender = self._contenders[name]
        os.killpg(contender.leader.pid, signal.SIGCONT)
        yield contender
        os.killpg(contender.leader.pid, signal.SIGSTOP)

    def _go(self, contender: _Contender) -> None:
        assert contender.leader.stdin is not None
        with suppress(BrokenPipeError):  # it has died; reading from it tells why
            contender.leader.stdin.write("\n")
            contender.leader.stdin.flush()

    def _read(self, name: str) -> dict[str, Any]:
        contender = self._contenders[name]
        replies = contender.leader.stdout
        assert replies is not None
        if not select.select([replies], [], [], PATIENCE)[0]:
            raise Failed(f"no sign of it for {PATIENCE:.0f} s")
        line = replies.readline()
        if not line:
            said = contender.log.read_text(errors="replace").strip().splitlines()
            raise Failed(said[-1].strip() if said else "it ended without a word")
        found: dict[str, Any] = json.loads(line)
        return found


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _note(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    _perform(*sys.argv[1:])
