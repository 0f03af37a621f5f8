"""Figure 3: epochs of real images with real augmentation, beside the neighbours' own loops."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from arena import Arena
from figures import Figure, Options, absent, compare
from ground import lay_out
from step import BF16, CACHED_BF16, CACHED_FP32, FP32, enter_limbeck

AUGMENT = {"crop": 4, "flip": True}
VIEWS = 4
"""How many views of an image are remembered."""

LIMBECK: dict[str, tuple[dict[str, Any], str]] = {
    "limbeck fp32": (FP32, ""),
    "limbeck bf16": (BF16, ">= 2.0"),
    "limbeck fp32 cached": (CACHED_FP32, ""),
    "limbeck bf16 cached": (CACHED_BF16, ">= 3.5"),
}
"""Contender -> its engine, and how many times as fast as each neighbour it should be."""


def measure(options: Options) -> list[Figure]:
    """How many times as fast as each neighbour, and with how much of its memory."""
    peers: dict[str, dict[str, Any]] = {"torchdistill": {}, "repdistiller": {}}
    if options.repdistiller is not None:
        peers["repdistiller"]["checkout"] = str(options.repdistiller.resolve())
    if options.data is None:
        reason = "it needs --data cifar100:PATH"
        return [absent(3, f"epoch, {n}", t, reason) for n, (_, t) in LIMBECK.items()]
    with tempfile.TemporaryDirectory() as place, Arena(Path(place)) as arena:
        lay_out(Path(place), *_images(options))
        entries = {peer: _enter(arena, peer, place, more) for peer, more in peers.items()}
        for name, (engine, _) in LIMBECK.items():
            cached = "cache" in engine
            augment = AUGMENT | ({"views": VIEWS} if cached else {})
            # A view is remembered when it is first seen: the warm-up fills the cache.
            warm_up = VIEWS if cached else 1
            number = len(LIMBECK) + len(peers)
            enter_limbeck(arena, name, place, number, engine, augment=augment, warm_up=warm_up)
        arena.rounds(3, generations=1 if options.quick else 2)
        memory = {name: arena.memory(name) for name in arena.laps}
    figures = []
    for peer, entry in entries.items():
        for name, (_, target) in LIMBECK.items():
            title = f"epoch, {peer} over {name}"
            figures.append(compare(arena, 3, title, entry, name, target))
            if {name, entry} <= set(memory):
                title = f"memory, {name} over {peer}"
                figures.append(_sizes(title, memory[name], memory[entry]))
    return figures


def _images(options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Some of the training images and their labels."""
    from limbeck.data import load
    from limbeck.data.splits import sample

    assert options.data is not None
    number = options.images or (1280 if options.quick else 3200)
    split = sample(load(options.data, validation=0.0).train, number)
    assert split.labels is not None
    return torch.stack([split.images.read(int(row)) for row in split.rows]), split.labels


def _enter(arena: Arena, peer: str, place: str, more: dict[str, Any]) -> str:
    """Let a neighbour take part with the number of loader workers that suits it; its full name."""
    paces: dict[str, float] = {}
    for workers in (0, 2):
        name = f"{peer}, {workers} workers"
        arena.enter(name, f"peers:{peer}", folder=place, workers=workers, **more)
        if name not in arena.absent:
            paces[name] = arena.lap(name).pace
    best = min(paces, key=paces.__getitem__, default=f"{peer}, 0 workers")
    for name in paces:
        if name != best:
            arena.retire(name)
    return best


def _sizes(name: str, ours: int, theirs: int) -> Figure:
    note = f"at the peak {ours / 2**20:.0f} MiB and {theirs / 2**20:.0f} MiB, children included"
    return Figure(3, name, ours / theirs, target="<= 1.0", note=note)
