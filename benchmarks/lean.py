"""Figure 7: a training step of a DenseNet that makes maps again in the backward pass."""

from __future__ import annotations

import tempfile
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from arena import Arena, Lap, Pace, resident
from figures import Figure, Options, absent, compare
from ground import BATCH, CLASSES, DECAY, LR, MOMENTUM, random_images

from limbeck.models.zoo import make

MODEL = "densenet-bc-100-12"
ROUNDS = 5


def train(pace: Pace, network: str) -> None:
    """Steps on the same 64 random images, channels last; each is a stretch.

    What is told is the loss and the memory that was in use before the first step, when weights,
    images and momentum were there already.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = make(network, CLASSES, 3, (32, 32)).to(device, memory_format=torch.channels_last)
    pixels, labels = (part.to(device) for part in random_images(BATCH))
    images = (pixels / 255 - 0.5).contiguous(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(
        model.parameters(), LR, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY
    )

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()
        return loss.detach()

    step(images[:2], labels[:2])  # loads what is needed
    before = torch.cuda.memory_allocated() if device.type == "cuda" else resident()[0]
    told = {"before": float(before)}
    for _ in count():
        pace.mark(lambda: told)
        told["loss"] = step(images, labels).item()


def measure(options: Options) -> list[Figure]:
    """Time and additional memory of the lean form over those of the normal one."""
    with tempfile.TemporaryDirectory() as place, Arena(Path(place)) as arena:
        for kind, name in (("lean", f"{MODEL}-lean"), ("normal", MODEL)):
            arena.enter(kind, "lean:train", network=name)
        arena.rounds(ROUNDS)
    time = f"time of a step, {MODEL}, lean over normal"
    figures = [compare(arena, 7, time, "lean", "normal")]
    memory = f"memory of a step, {MODEL}, lean over normal"
    if arena.absent:
        return [*figures, absent(7, memory, "", next(iter(arena.absent.values())))]
    losses = [arena.first[kind].facts["loss"] for kind in ("lean", "normal")]
    assert abs(losses[0] / losses[1] - 1) < 1e-4, f"lean and normal differ: {losses}"
    more = [max(map(_additional, arena.laps[kind])) for kind in ("lean", "normal")]
    note = f"{more[0] / 2**20:.0f} MiB and {more[1] / 2**20:.0f} MiB beside weights and momentum"
    return [*figures, Figure(7, memory, more[0] / more[1], note=note)]


def _additional(lap: Lap) -> float:
    return (lap.device_memory or lap.memory) - lap.facts["before"]
