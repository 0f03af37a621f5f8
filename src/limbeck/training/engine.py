"""How the engine works: one switch for each way to be fast."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from limbeck.training.cache import STORAGE

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def peak_memory() -> int | None:
    """The most bytes this process ever held: of the accelerator if it has one, else resident.

    ``None`` where the system does not tell.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = (line.split()[1] for line in status if line.startswith("VmHWM"))
    return next((1024 * int(k) for k in kilobytes), None)


class Engine(BaseModel):
    """How the engine works; but for a cache that keeps less, it changes what is learnt by rounding.

    ``precision`` bf16 rounds each product to 8 bits of mantissa, which training does not feel but
    a comparison of two runs does. ``cache`` keeps the teacher's answers on disk: ``full`` to the
    bit, ``fp16``, or ``top-K`` (the K most probable classes; see
    :class:`limbeck.training.cache.Cache`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    device: Literal["auto", "cpu"] = "auto"
    threads: int | None = Field(default=None, ge=1, le=1024, description="of the CPU")
    workers: int | None = Field(
        default=None, ge=0, le=1024, description="processes that read images from disk"
    )
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    teacher_precision: Literal["same", "fp32", "bf16", "fp16"] = "same"
    fold: bool = Field(default=True, description="the teacher's batch norms into its convolutions")
    channels_last: bool = Field(default=True, description="memory layout of convolutional networks")
    keep_memory: bool = Field(
        default=True, description="what a step has freed stays with the process (glibc)"
    )
    fused: bool | None = Field(default=None, description="optimiser steps; on where not the CPU")
    compile: bool | Literal["graphs"] = Field(
        default=False, description="networks with torch.compile; graphs: as CUDA graphs"
    )
    cache: str | None = Field(default=None, description="the teacher's: full, fp16 or top-K")
    cache_folder: Path | None = Field(default=None, description="beside the run folders otherwise")
    profile: bool = Field(default=False, description="where a step's time goes")
    log_every: int = Field(default=50, ge=1, description="steps between two lines of metrics")
    checkpoint_seconds: float = Field(default=60.0, ge=0)
    trackers: tuple[str, ...] = Field(default=(), description="such as tensorboard")

    def on_cpu(self) -> bool:
        """Whether the work is done on the CPU: by choice, or for want of anything else."""
        return self.device == "cpu" or not torch.accelerator.is_available()

    def settle(self) -> None:
        """Prepare this process: its threads, and what its allocator does with freed memory.

        By default glibc hands the activations of a step back to the system and asks for them
        again in the next, page by page, which takes up to a tenth of a step on a CPU. Single
        tensors above 32 MiB it still gives back, as they would leave large holes.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.keep_memory and sys.platform == "linux":
            mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
            if mallopt is not None:
                mallopt(_TRIM_THRESHOLD, 2**31 - 1)
                mallopt(_MMAP_THRESHOLD, 2**25)

    def readers(self) -> int:
        """How many processes read images from disk: where the CPU trains it has no time for them.

        >>> Engine(device="cpu").readers(), Engine(workers=3).readers()
        (0, 3)
        """
        if self.workers is not None:
            return self.workers
        return 0 if self.on_cpu() else min(8, max(1, (os.cpu_count() or 1) - 1))

    @field_validator("compile", mode="before")
    @classmethod
    def _said(cls, compile: object) -> object:
        if not isinstance(compile, bool) and compile != "graphs":
            raise ValueError("networks are compiled (true), not compiled (false) or as graphs")
        return compile

    @field_validator("cache")
    @classmethod
    def _known(cls, cache: str | None) -> str | None:
        if cache is not None and not re.fullmatch(STORAGE, cache):
            raise ValueError("answers are kept in full, in fp16, or as top-K, such as top-20")
        return cache

    @field_validator("trackers")
    @classmethod
    def _installed(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        if not trackers:
            return trackers
        from accelerate.tracking import get_available_trackers

        known = {str(tracker) for tracker in get_available_trackers()}
        for tracker in trackers:
            if tracker not in known:
                raise ValueError(
                    f"the tracker {tracker!r} is unknown or not installed; tensorboard comes with "
                    "pip install 'limbeck[track]'"
                )
        return trackers
