"""A folder that is the whole truth about one training."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from limbeck import plain
from limbeck.errors import UserError
from limbeck.files import regular
from limbeck.training.checkpoint import (
    Checkpoints,
    read_state,
    write_atomically,
    write_state,
    written,
)

RECIPE, METRICS, ENVIRONMENT = "recipe.yaml", "metrics.jsonl", "environment.json"
RESULT, FINDINGS = "result.json", "findings.json"
LOCK = ".lock"

FREE = ("workers", "cache_folder", "profile", "keep_memory", "checkpoint_seconds", "trackers")
"""Settings of the engine that change no bit of a run."""


class Run:
    """A run folder: recipe, environment, metrics, phases done, checkpoints and deliverables.

    Layout: ``recipe.yaml`` (resolved), ``environment.json``, ``metrics.jsonl``, ``log.txt``,
    ``phases/NN-name.state`` (what each finished phase left), ``checkpoints/`` (of the phase under
    way), ``student.safetensors`` with ``student.json``, ``result.json``, ``findings.json`` (what
    only the method shows), ``report.html``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints", key=lambda: self.key("checkpoint"))
        self._metrics: IO[bytes] | None = None

    @classmethod
    def create(cls, path: Path, recipe: Mapping[str, Any]) -> Run:
        """Make a fresh run folder.

        Raises:
            UserError: the folder exists and is not empty, or cannot be written.
        """
        cls.check_free(path)
        run = cls(path)
        with run.held():
            # Again, as another process may have wanted the same folder at the same moment.
            cls.check_free(path)
            write_atomically(path / RECIPE, plain.written(recipe).encode())
        return run

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise the sentence for a folder that is already taken.

        One whose run was killed before its recipe was in place is not.
        """
        own = (LOCK, ENVIRONMENT, ".*.part")
        if path.exists() and (
            not path.is_dir() or any(not any(map(p.match, own)) for p in path.iterdir())
        ):
            known = path / RECIPE
            hint = f"continue it with: limbeck resume {path}, or " if known.is_file() else ""
            raise UserError(f"{path} already exists; {hint}choose another name with --out")

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open an existing run folder.

        Raises:
            UserError: there is no run in this folder.
        """
        if not (path / RECIPE).is_file():
            raise UserError(f"{path} is no run folder: it has no {RECIPE}")
        return cls(path)

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe."""
        return self._mapping(RECIPE, plain.parse)

    def key(self, *place: object) -> bytes:
        """What a state belongs to that is kept at a place in this run: the recipe decides its bits.

        Settings that change no bit may be changed between a stop and going on.
        """
        return json.dumps([self._deciding, *place]).encode()

    @cached_property
    def _deciding(self) -> str:
        recipe = self.recipe()
        if isinstance(engine := recipe.get("engine"), dict):
            recipe["engine"] = {k: v for k, v in engine.items() if k not in FREE}
        return json.dumps(recipe, sort_keys=True, default=str)

    def result(self) -> dict[str, Any]:
        """What the run found; raises :class:`UserError` while it is not finished."""
        if not (self.path / RESULT).is_file():
            raise UserError(
                f"{self.path} is not finished; continue it with: limbeck resume {self.path}"
            )
        return self._mapping(RESULT, json.loads)

    def environment(self) -> dict[str, Any]:
        """Where it was made: versions, machine, threads, command."""
        return self._mapping(ENVIRONMENT, json.loads)

    def findings(self) -> list[dict[str, Any]]:
        """What the method alone has to show; empty where it has nothing."""
        if not (self.path / FINDINGS).is_file():
            return []
        found = self._mapping(FINDINGS, json.loads).get("findings")
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise self._strange(FINDINGS)
        return found

    def _mapping(self, name: str, parse: Any) -> dict[str, Any]:
        try:
            content = parse(regular(self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise self._strange(name)
        return content

    def _strange(self, name: str) -> UserError:
        return UserError(f"{self.path / name} cannot be read: it is not what Limbeck wrote")

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file into the folder in one move."""
        write_atomically(self.path / name, json.dumps(content, indent=2).encode())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of the folder; a dead owner holds nothing.

        What a killed one was about to put in place is swept away.

        Raises:
            UserError: another process is training in this folder.
        """
        import fcntl

        with written(self.path / LOCK):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise UserError(
                f"another process is training in {self.path}; wait for it, stop it, or choose "
                "another name with --out"
            ) from None
        _locks.add(lock)
        try:
            for beside in self.path.rglob(".*.part"):
                beside.unlink()
            if not (self.path / ENVIRONMENT).is_file():
                self.write_json(ENVIRONMENT, environment())
            yield
        finally:
            _locks.discard(lock)
            lock.close()

    # Metrics: one JSON object a line; a resumed run cuts the file back to its checkpoint.

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to the metrics."""
        with written(self.path / METRICS):
            if self._metrics is None:
                self._metrics = (self.path / METRICS).open("ab")
            self._metrics.write(json.dumps(line).encode() + b"\n")

    def logged(self) -> int:
        """How many bytes of metrics there are, all of them on disk."""
        with written(self.path / METRICS):
            if self._metrics is None:
                self._metrics = (self.path / METRICS).open("ab")
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
            return self._metrics.tell()

    def close(self) -> None:
        """Let go of the metrics; what cannot be written of them is lost and was not counted on."""
        if self._metrics is not None:
            with suppress(OSError):
                self._metrics.close()
            self._metrics = None

    def cut_log(self, length: int) -> None:
        """Forget the metrics written after ``length`` bytes.

        Raises:
            UserError: what is left is damaged.
        """
        fresh = self._metrics is None
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        path = self.path / METRICS
        if path.is_file() and path.stat().st_size > length:
            os.truncate(path, length)
        if fresh:
            self.metrics()

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of the metrics.

        Raises:
            UserError: a line is damaged.
        """
        if self._metrics is not None:
            self._metrics.flush()
        path = self.path / METRICS
        if not path.exists():
            return []
        found: list[dict[str, Any]] = []
        try:
            for number, line in enumerate(regular(path).read_bytes().splitlines(), start=1):
                with suppress(ValueError, RecursionError):
                    found.append(json.loads(line))
                if len(found) < number or not isinstance(found[-1], dict):
                    raise UserError(
                        f"line {number:,} of {path} is not what Limbeck wrote; remove the line to "
                        "go on without it"
                    )
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"{path} cannot be read: {reason}") from None
        return found

    # Phases: what a finished phase left is written once and never again.

    def phase_path(self, index: int, name: str) -> Path:
        """Where the outcome of a phase lies."""
        safe = "".join(c if c.isalnum() or c in "-_@." else "-" for c in name)
        return self.path / "phases" / f"{index:03d}-{safe}.state"

    def journal_path(self, index: int, name: str) -> Path:
        """Where the pieces of a ``Solve`` lie until it is finished."""
        return self.phase_path(index, name).with_suffix(".journal")

    def finish_phase(self, index: int, name: str, state: Mapping[str, Any]) -> None:
        """Record the outcome of a phase; its checkpoints are no longer needed."""
        state = {**state, "phase": name, "log": self.logged()}
        write_state(self.phase_path(index, name), state, self.key(index, name))
        self.checkpoints.clear()

    def drop_journal(self, index: int, name: str) -> None:
        """Remove the pieces of a ``Solve`` whose outcome is recorded."""
        shutil.rmtree(self.journal_path(index, name), ignore_errors=True)

    def finished_phase(self, index: int, name: str) -> dict[str, Any] | None:
        """The outcome of a phase, or ``None`` if it is not finished.

        Raises:
            UserError: it is damaged, or another recipe's.
        """
        path = self.phase_path(index, name)
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = read_state(path, self.key(index, name))
            return found
        except UserError as error:
            raise UserError(
                f"{error}; remove it to have the phase done again, or put back what was there"
            ) from None


_locks: set[IO[bytes]] = set()


def _let_go() -> None:
    """Hold no folder in a forked process, which outlives a killed one by some seconds."""
    for lock in _locks:
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def environment() -> dict[str, Any]:
    """What decides beside the recipe which bits a run here comes to."""
    from importlib.metadata import version

    import torch

    names = (
        "limbeck",
        "torch",
        "torchvision",
        "accelerate",
        "numpy",
        "safetensors",
        "torchmetrics",
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: version(name) for name in names},
        "command": sys.argv,
    }
