"""Figure 4: what a sample costs as data sets grow, and what a second process brings."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from arena import Arena
from figures import Figure, Options, absent, compare
from ground import BATCH, CLASSES, lay_out, lay_out_photographs, random_images
from step import OFF, enter_limbeck

TINY = "cnn-4-8"
ROUNDS = 3
CPU = {"device": "cpu"}


def measure(options: Options) -> list[Figure]:
    """All figures of the group; ``quick`` is as long as the rest."""
    return [*_in_memory(), *_from_disk(), _cache_bytes(), *_processes()]


def _in_memory() -> list[Figure]:
    """Time a sample, tiny networks on random pixels in memory, for as many samples a stretch."""
    epochs = {1024: 58, 7424: 8, 59392: 1}
    with tempfile.TemporaryDirectory() as place, Arena(Path(place)) as arena:
        for number, every in epochs.items():
            folder = Path(place) / str(number)
            folder.mkdir()
            lay_out(folder, *random_images(number), teacher=TINY, student=TINY)
            options = {"student": TINY, "every": every, "augment": {"crop": 4, "flip": True}}
            enter_limbeck(arena, _samples(number), str(folder), len(epochs), CPU, **options)
        arena.rounds(ROUNDS)
    least, *more = map(_samples, epochs)
    return [compare(arena, 4, f"time a sample, {n} over {least}", n, least, "<= 1.1") for n in more]


def _samples(number: int) -> str:
    return f"{number:,} samples"


def _from_disk() -> list[Figure]:
    """Peak memory while photographs are decoded on the way, for four times as many of them."""
    numbers = (3840, 15360)
    with tempfile.TemporaryDirectory() as place, Arena(Path(place)) as arena:
        for number in numbers:
            folder = Path(place) / str(number)
            folder.mkdir()
            lay_out_photographs(folder, number)
            data = {"source": f"folder:{folder / 'photographs'}"}
            options = {"student": "mlp-8", "data": data, "lr": 1e-4}
            enter_limbeck(arena, _samples(number), str(folder), 2, CPU, **options)
        arena.rounds(1)
    few, many = map(_samples, numbers)
    name = f"peak memory streaming from disk, {many} over {few}"
    for contender in (few, many):
        if contender in arena.absent:
            return [absent(4, name, "<= 1.05", arena.absent[contender])]
    sizes = [arena.laps[contender][0].memory for contender in (many, few)]
    note = f"{sizes[0] / 2**20:.0f} MiB and {sizes[1] / 2**20:.0f} MiB"
    return [
        Figure(4, name, sizes[0] / sizes[1], target="<= 1.05", note=note),
        compare(arena, 4, f"time a sample streaming from disk, {many} over {few}", many, few),
    ]


def _cache_bytes() -> Figure:
    """Bytes on disk over the bytes of the numbers that are remembered."""
    number, views = 7424, 2
    name, target = f"bytes of a cache, fp16, {number:,} samples, {views} views", "<= 1.1"
    with tempfile.TemporaryDirectory() as place, Arena(Path(place)) as arena:
        lay_out(Path(place), *random_images(number), teacher=TINY, student=TINY)
        augment: dict[str, Any] = {"crop": 4, "views": views}
        engine = {**CPU, "cache": "fp16"}
        more = {"student": TINY, "augment": augment, "warm_up": views}
        enter_limbeck(arena, "cached", place, 1, engine, **more)
        if "cached" in arena.absent:
            return absent(4, name, target, arena.absent["cached"])
        files = [p for p in Path(place, "cache of cached").rglob("*") if p.is_file()]
        found = sum(p.stat().st_size for p in files)
    expected = number * views * CLASSES * torch.float16.itemsize
    note = f"{found / number / views:.1f} bytes a sample and view; {expected / number / views:.0f} "
    note += "are the numbers themselves"
    return Figure(4, name, found / expected, target=target, note=note)


def _processes() -> list[Figure]:
    """Two processes of one thread, against one process of one thread and one of two."""
    with tempfile.TemporaryDirectory() as place, Arena(Path(place)) as arena:
        lay_out(Path(place), *random_images(8 * BATCH))
        entries = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2)}
        entries["2 processes, 1 thread each"] = (2, 1)
        for name, (processes, threads) in entries.items():
            # Several processes look at a first batch before they begin: one stretch more.
            enter_limbeck(
                arena,
                name,
                place,
                len(entries),
                OFF | CPU,
                threads=threads,
                processes=processes,
                warm_up=processes,
            )
        arena.rounds(ROUNDS)
    one, threads, two = entries
    return [
        compare(arena, 4, f"epoch, {one} over {two}", one, two, note="2 would be ideal"),
        compare(arena, 4, f"epoch, {threads} over {two}", threads, two),
    ]
