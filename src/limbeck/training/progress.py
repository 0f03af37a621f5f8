"""What a run says while it works: sentences, and a bar or plain lines for its steps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from limbeck.training.checkpoint import written


class Voice:
    """Speaks to the terminal and keeps what was said in a log file.

    Args:
        quiet: say nothing on the terminal (other processes than the first, and tests).
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = 120
        self._log: IO[str] | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._title = ""
        self._total = 0
        self._begun = 0.0
        self._first = self._done = 0
        self._spoken = 0.0

    def keep(self, log: Path) -> None:
        """Append to this file what is said from now on."""
        with written(log):
            self._log = log.open("a", encoding="utf-8")

    def say(self, text: str, style: str | None = None) -> None:
        """Say a sentence."""
        self.console.print(text, style=style, markup=False)
        if self._log:
            self._log.write(text + "\n")
            self._log.flush()

    def warn(self, text: str) -> None:
        """Say what the user should look at."""
        self.say(f"warning: {text}", style="yellow")

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """Start counting the steps of a phase."""
        self._title, self._total, self._first, self._done = title, total, done, done
        self._begun = self._spoken = time.monotonic()
        if self.console.is_terminal and not self.console.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}"),
                console=self.console,
                # A thread that draws would take turns from those that compute.
                auto_refresh=False,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, facts="")
            self._bar.start()

    def step(self, done: int, terms: Mapping[str, float] | None = None, samples: int = 0) -> None:
        """Count steps; ``terms`` are the latest mean loss terms, if they are known."""
        now, self._done = time.monotonic(), done
        if self._bar is not None and self._task is not None:
            if terms is not None:
                self._bar.update(self._task, facts=self._facts(done, terms, samples, now))
            if now - self._spoken >= 0.5:
                self._spoken = now
                self._bar.update(self._task, completed=done, refresh=True)
        elif terms is not None and now - self._spoken >= 5.0:
            self._spoken = now
            left = (now - self._begun) / max(done - self._first, 1) * (self._total - done)
            self.console.print(
                f"{self._title}: step {done:,} of {self._total:,}, "
                f"{self._facts(done, terms, samples, now)}, {left:.0f} s left",
                markup=False,
            )

    def _facts(self, done: int, terms: Mapping[str, float], samples: int, now: float) -> str:
        rate = (done - self._first) * samples / max(now - self._begun, 1e-9)
        values = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        return f"{values}, {rate:,.0f} samples/s"

    def end(self) -> None:
        """Stop counting."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, refresh=True)
            self._bar.stop()
        self._bar = self._task = None
