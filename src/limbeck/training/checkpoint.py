"""Files that are whole or recognised as not: written beside, synced, renamed, with a checksum."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from limbeck.errors import UserError
from limbeck.files import regular

_MAGIC = b"limbeck2"


def write_atomically(path: Path, content: bytes) -> None:
    """Put a file in place in one move: a reader sees the old content or the new, never a part.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with written(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Say in a sentence that a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {(error.strerror or str(error)).lower()}; free some space "
            "or choose another folder with --out"
        ) from None


def write_state(path: Path, state: Any, key: bytes = b"") -> None:
    """Write a tree of tensors and plain values, its SHA-256 in front.

    ``key`` says what the state belongs to.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    belongs = hashlib.sha256(key).digest()
    content = belongs + buffer.getvalue()
    write_atomically(path, _MAGIC + hashlib.sha256(content).digest() + content)


def read_state(path: Path, key: bytes | None = None) -> Any:
    """Read what :func:`write_state` wrote, with this key if any; nothing in it is executed.

    Raises:
        UserError: the file is missing, truncated, altered, or belongs to something else.
    """
    try:
        raw = regular(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {(error.strerror or 'error').lower()}") from None
    magic, digest, belongs, content = raw[:8], raw[8:40], raw[40:72], raw[72:]
    if magic != _MAGIC or hashlib.sha256(belongs + content).digest() != digest:
        raise UserError(f"{path} is damaged: its checksum does not match its content")
    if key is not None and belongs != hashlib.sha256(key).digest():
        raise UserError(
            f"{path} was written under another recipe than recipe.yaml, or in another place"
        )
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # Foreign bytes can fail in any way.
        raise UserError(f"{path} is refused: it holds more than tensors and plain values") from None


class Checkpoints:
    """The last checkpoints of a run, newest last; a damaged one gives way to the one before.

    ``key`` gives what they belong to; one that belongs elsewhere gives way too. ``skipped`` says
    of each that did why.
    """

    def __init__(self, folder: Path, keep: int = 2, key: Callable[[], bytes] = bytes) -> None:
        self.folder = folder
        self.keep = keep
        self.key = key
        self.skipped: list[str] = []

    def paths(self) -> list[Path]:
        """The checkpoint files there are, oldest first."""
        named = [p for p in self.folder.glob("*.ckpt") if re.fullmatch(r"\d+\.ckpt", p.name)]
        found = [p for p in named if not p.is_dir()]
        return sorted(found, key=lambda p: int(p.stem))

    def write(self, state: Any) -> Path:
        """Write the next checkpoint and drop the ones no longer kept."""
        before = self.paths()
        path = self.folder / f"{int(before[-1].stem) + 1 if before else 0:06d}.ckpt"
        write_state(path, state, self.key())
        for old in before[: len(before) + 1 - self.keep]:
            old.unlink(missing_ok=True)
        return path

    def newest(self) -> Any | None:
        """The newest checkpoint that is whole and belongs here, or ``None`` if there are none.

        Raises:
            UserError: there are checkpoints, and none is such.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return read_state(path, self.key())
            except UserError as error:
                self.skipped.append(str(error))
        if paths:
            raise UserError(
                f"none of the {len(paths)} checkpoints in {self.folder} can be taken "
                f"({self.skipped[-len(paths)]}); remove them to go on from the last finished phase"
            )
        return None

    def clear(self) -> None:
        """Remove all checkpoints; the phase they belong to is done."""
        for path in self.paths():
            path.unlink(missing_ok=True)
