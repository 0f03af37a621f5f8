"""Figures 1 and 2: what a distillation step costs, against the same step by hand."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arena import Arena
from figures import Figure, Options, compare
from ground import BATCH, lay_out, random_images

OFF: dict[str, Any] = {
    "precision": "fp32",
    "fold": False,
    "channels_last": False,
    "fused": False,
    "compile": False,
    "keep_memory": False,
}
"""Every acceleration off: what is left is the engine's own overhead."""

FP32: dict[str, Any] = {"precision": "fp32"}
BF16: dict[str, Any] = {"precision": "bf16"}
CACHED_FP32: dict[str, Any] = {**FP32, "cache": "full"}
CACHED_BF16: dict[str, Any] = {**BF16, "cache": "fp16"}
"""The engine as it works when only this is asked for."""

CONTENDERS: dict[str, tuple[set[int], str, dict[str, Any] | None]] = {
    "hand kd": ({1, 2}, "kd", None),
    "limbeck kd, all off": ({1}, "kd", OFF),
    "hand maps": ({1}, "maps", None),
    "limbeck maps, all off": ({1}, "maps", OFF),
    "limbeck fp32": ({2}, "kd", FP32),
    "limbeck bf16": ({2}, "kd", BF16),
    "limbeck fp32 cached": ({2}, "kd", CACHED_FP32),
    "plain fp32": ({2}, "plain", FP32),
    "limbeck bf16 cached": ({2}, "kd", CACHED_BF16),
    "plain bf16": ({2}, "plain", BF16),
}
"""Contender -> the groups that need it, its method, its engine; in the order of their turns."""

RATIOS: tuple[tuple[int, str, str, str, str], ...] = (
    (1, "overhead, soft targets", "limbeck kd, all off", "hand kd", "<= 1.02"),
    (1, "overhead, three feature maps", "limbeck maps, all off", "hand maps", "<= 1.02"),
    (2, "step, fp32", "limbeck fp32", "hand kd", "<= 0.78"),
    (2, "step, bf16", "limbeck bf16", "hand kd", "<= 0.53"),
    (2, "step, fp32, cached teacher", "limbeck fp32 cached", "hand kd", "<= 0.44"),
    (2, "step, bf16, cached teacher", "limbeck bf16 cached", "hand kd", "<= 0.31"),
    (2, "cached epoch over plain training, fp32", "limbeck fp32 cached", "plain fp32", "<= 1.03"),
    (2, "cached epoch over plain training, bf16", "limbeck bf16 cached", "plain bf16", "<= 1.03"),
)
"""Group, name, what is measured, over what, target."""


def measure(options: Options) -> list[Figure]:
    """The figures of the groups 1 and 2 that are asked for."""
    steps, rounds, generations = (8, 3, 2) if options.quick else (16, 3, 5)
    with tempfile.TemporaryDirectory() as place, Arena(Path(place)) as arena:
        lay_out(Path(place), *random_images(steps * BATCH))
        entries = {name: e for name, e in CONTENDERS.items() if e[0] & options.only}
        for name, (_, method, engine) in entries.items():
            if engine is None:
                arena.enter(name, "contenders:hand", folder=place, method=method)
            else:
                enter_limbeck(arena, name, place, len(entries), engine, method=method)
        arena.rounds(rounds, generations)
    return [
        compare(arena, group, name, one, other, target, note=_equal_work(arena, one, other))
        for group, name, one, other, target in RATIOS
        if group in options.only
    ]


def enter_limbeck(
    arena: Arena,
    name: str,
    place: str,
    contenders: int,
    engine: Mapping[str, Any],
    threads: int | None = None,
    **options: Any,
) -> None:
    """Let Limbeck take part, with a progress bar, and a checkpoint a minute of its own time.

    It works for about one n-th of the time, n being the number of contenders.
    """
    own: dict[str, Any] = {"checkpoint_seconds": 60.0 * contenders}
    if "cache" in engine:
        own["cache_folder"] = f"{place}/cache of {name}"
    environment = {"TTY_COMPATIBLE": "1", "TERM": "xterm"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    arena.enter(
        name,
        "contenders:limbeck",
        environment=environment,
        folder=place,
        engine={**engine, **own},
        **options,
    )


def _equal_work(arena: Arena, one: str, other: str) -> str:
    """The students' losses after the first stretch, if it was the same work as by hand.

    Raises:
        AssertionError: two that should be equal to rounding are not.
    """
    if one in arena.absent or other in arena.absent or not other.startswith("hand"):
        return ""
    losses = [arena.first[name].facts["loss"] for name in (one, other)]
    exact = one.endswith("all off")
    assert not exact or abs(losses[0] / losses[1] - 1) < 1e-3, f"{one}, {other}: {losses}"
    return f"student's loss after {arena.first[one].steps} steps {losses[0]:.5f}, {losses[1]:.5f}"
