"""Files that are whole or recognised as not: written beside, synced, renamed, with a checksum."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any

import torch

from limbeck.errors import UserError

_MAGIC = b"limbeck1"


def write_atomically(path: Path, content: bytes) -> None:
    """Put a file in place in one move: a reader sees the old content or the new, never a part.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
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
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UserError(
            f"{path} cannot be written: {(error.strerror or str(error)).lower()}; free some space "
            "or choose another folder with --out"
        ) from None


def write_state(path: Path, state: Any) -> None:
    """Write a tree of tensors and plain values, its SHA-256 in front."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_atomically(path, _MAGIC + hashlib.sha256(content).digest() + content)


def read_state(path: Path) -> Any:
    """Read what :func:`write_state` wrote; nothing in the file is executed.

    Raises:
        UserError: the file is missing, truncated or altered.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {(error.strerror or 'error').lower()}") from None
    digest, content = raw[8:40], raw[40:]
    if raw[:8] != _MAGIC or hashlib.sha256(content).digest() != digest:
        raise UserError(f"{path} is damaged: its checksum does not match its content")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


class Checkpoints:
    """The last checkpoints of a run, newest last; a damaged one gives way to the one before."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep
        self.skipped: list[Path] = []

    def paths(self) -> list[Path]:
        """The checkpoint files there are, oldest first."""
        found = [p for p in self.folder.glob("*.ckpt") if re.fullmatch(r"\d+\.ckpt", p.name)]
        return sorted(found, key=lambda p: int(p.stem))

    def write(self, state: Any) -> Path:
        """Write the next checkpoint and drop the ones no longer kept."""
        before = self.paths()
        path = self.folder / f"{int(before[-1].stem) + 1 if before else 0:06d}.ckpt"
        write_state(path, state)
        for old in before[: len(before) + 1 - self.keep]:
            old.unlink(missing_ok=True)
        return path

    def newest(self) -> Any | None:
        """The newest whole checkpoint, or ``None`` if there never was one.

        Raises:
            UserError: there are checkpoints, and none is whole.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return read_state(path)
            except UserError:
                self.skipped.append(path)
        if paths:
            raise UserError(
                f"none of the {len(paths)} checkpoints in {self.folder} is whole; start the run "
                "again under another name"
            )
        return None

    def clear(self) -> None:
        """Remove all checkpoints; the phase they belong to is done."""
        for path in self.paths():
            path.unlink(missing_ok=True)
