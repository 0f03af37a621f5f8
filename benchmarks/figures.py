"""What was measured, against what it should be, and on which machine."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arena import Arena


@dataclass(frozen=True)
class Options:
    """What the command line asked for; ``command`` repeats it."""

    only: frozenset[int]
    quick: bool = False
    data: str | None = None
    repdistiller: Path | None = None
    images: int | None = None

    def command(self, group: int) -> str:
        """How a group of figures is measured again, with PATH for what lies on this machine."""
        words = ["python benchmarks/run.py", f"--only {group}"]
        if self.quick:
            words.append("--quick")
        if group == 3:
            words += ["--data cifar100:PATH"] if self.data else []
            words += ["--repdistiller PATH"] if self.repdistiller else []
            words += [f"--images {self.images}"] if self.images else []
        return " ".join(words)


@dataclass(frozen=True)
class Figure:
    """A ratio, as the median over rounds, with its lowest and highest round.

    ``target`` is what it should be, as in ``<= 1.02``; empty where nothing is promised. ``ratio``
    is ``None`` where it could not be measured, and ``note`` then says why. ``seconds`` are medians
    of a step, by contender. A figure with a ``unit`` is no ratio but a quantity.
    """

    group: int
    name: str
    ratio: float | None
    spread: tuple[float, float] | None = None
    target: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    unit: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; ``None`` without a target or a ratio."""
        if self.ratio is None or not self.target:
            return None
        sign, number = self.target.split()
        return self.ratio <= float(number) if sign == "<=" else self.ratio >= float(number)

    def as_json(self, command: str, machine: Mapping[str, Any]) -> dict[str, Any]:
        """Everything, with how to repeat it and where it was measured."""
        return {**asdict(self), "met": self.met, "command": command, "machine": dict(machine)}


def compare(
    arena: Arena, group: int, name: str, one: str, other: str, target: str = "", note: str = ""
) -> Figure:
    """Seconds a step of one contender over those of another, round by round."""
    for contender in (one, other):
        if contender in arena.absent:
            return absent(group, name, target, arena.absent[contender])
    pairs = list(zip(arena.laps[one], arena.laps[other], strict=True))
    seconds = {c: statistics.median(lap.pace for lap in arena.laps[c]) for c in (one, other)}
    ratios = [a.pace / b.pace for a, b in pairs]
    return of_rounds(group, name, ratios, target, seconds=seconds, note=note)


def absent(group: int, name: str, target: str, reason: str) -> Figure:
    """A figure that could not be measured."""
    return Figure(group, name, None, target=target, note=f"not measured: {reason}")


def of_rounds(
    group: int,
    name: str,
    ratios: Sequence[float],
    target: str = "",
    *,
    seconds: Mapping[str, float] | None = None,
    unit: str = "",
    note: str = "",
) -> Figure:
    """A figure from the ratios of the rounds."""
    spread = (min(ratios), max(ratios))
    return Figure(group, name, statistics.median(ratios), spread, target, seconds or {}, unit, note)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory": f"{pages * size / 2**30:.0f} GiB",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
