"""Figure 5: soft targets over a vocabulary, worked off in rows, against the plain loss."""

from __future__ import annotations

import tempfile
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from arena import Arena, Lap, Pace, resident
from figures import Figure, Options, absent, compare
from ground import TEMPERATURE
from torch import Tensor

from limbeck.losses import kd
from limbeck.systems.classification.kd import ENTRIES

TOKENS = 4096
ROUNDS = 5


def loss(pace: Pace, kind: str) -> None:
    """The loss of random logits and its gradient, again and again: ``plain``, ``rows``, ``liger``.

    Student and teacher logits, (4096, V) of float32, are there before; V is 32,000, and 128,000 on
    a GPU. What is told is the memory that was in use before.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classes = 128_000 if device.type == "cuda" else 32_000
    torch.manual_seed(0)
    student = torch.randn(TOKENS, classes, device=device, requires_grad=True)
    teacher = torch.randn(TOKENS, classes, device=device)
    if kind == "liger":
        from liger_kernel.transformers.kl_div import LigerKLDIVLoss

        divergence = LigerKLDIVLoss(reduction="batchmean")
    kd(torch.randn(2, 8, requires_grad=True), torch.randn(2, 8)).backward()  # loads what is needed
    before = torch.cuda.memory_allocated() if device.type == "cuda" else resident()[0]
    told: dict[str, float | Tensor] = {"before": before}
    for _ in count():
        pace.mark(lambda: {name: float(value) for name, value in told.items()})
        student.grad = None
        if kind == "liger":
            log_q, p = F.log_softmax(student / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1)
            value = TEMPERATURE**2 * divergence(log_q, p)
        else:
            rows = max(1, ENTRIES // classes) if kind == "rows" else None
            value = kd(student, teacher, TEMPERATURE, rows)
        value.backward()
        told["loss"] = value.detach()
        pace.steps += 1


def measure(options: Options) -> list[Figure]:
    """Time and additional memory in rows, against plain, and against Liger's kernel on a GPU."""
    others = ["plain", *(["liger"] if torch.cuda.is_available() else [])]
    figures = []
    with tempfile.TemporaryDirectory() as place, Arena(Path(place)) as arena:
        for kind in ("rows", *others):
            arena.enter(kind, "vocabulary:loss", kind=kind)
        arena.rounds(ROUNDS)
    for other in others:
        figures.append(compare(arena, 5, f"time, rows over {other}", "rows", other))
        name = f"memory beside the logits, rows over {other}"
        if other in arena.absent:
            figures.append(absent(5, name, "", arena.absent[other]))
            continue
        losses = [arena.first[kind].facts["loss"] for kind in ("rows", other)]
        assert abs(losses[0] / losses[1] - 1) < 1e-4, f"rows and {other} differ: {losses}"
        more = [max(map(_additional, arena.laps[kind])) for kind in ("rows", other)]
        note = f"{more[0] / 2**20:.0f} MiB and {more[1] / 2**20:.0f} MiB, the gradient included"
        figures.append(Figure(5, name, more[0] / more[1], note=note))
    return figures


def _additional(lap: Lap) -> float:
    return (lap.device_memory or lap.memory) - lap.facts["before"]
