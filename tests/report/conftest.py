"""Run folders as a training leaves them, made without training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from limbeck.report.verdict import verdict
from limbeck.training.run import Run

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROLES = {"teacher": 3.6, "baseline": 2.4, "student": 2.8}


def _metrics(phases: dict[str, tuple[str, ...]], epochs: int, noise: np.random.Generator) -> Any:
    for phase, terms in phases.items():
        place = {"phase": phase, "seed": int((phase + "@0").split("@")[1]), "epoch": 0.0, "step": 0}
        shares = dict(zip(terms, (0.62, 0.38) if len(terms) == 2 else (1.0,), strict=True))
        sizes = {"weights_and_optimiser": 1_200_000, "activations": 800_000}
        values = dict.fromkeys(terms, 2.3)
        yield {**place, "audit": {"values": values, "gradient_share": shares, "bytes": sizes}}
        for step in range(1, 8 * epochs + 1):
            place |= {"epoch": step / 8, "step": step}
            sunk = {t: math.exp(-step / 16) * 2.2 + 0.05 + 0.03 * noise.random() for t in terms}
            yield {**place, "lr": 0.1, "terms": sunk}
            if step % 8 == 0:
                best = 0.98 if phase == "teacher" else 0.93 + 0.02 * phase.startswith("student")
                reached = best - 0.6 * math.exp(-step / 14) + 0.01 * noise.random()
                yield {**place, "validation": {"accuracy": reached, "cross_entropy": 1 - reached}}


def _make_run(
    path: Path,
    *,
    classes: tuple[str, ...] = DIGITS,
    data: str = "digits",
    seeds: int = 1,
    roles: tuple[str, ...] = ("teacher", "baseline", "student"),
    recipe: dict[str, Any] | None = None,
) -> Run:
    """A finished run with all that it records, for the roles given."""
    run = Run.create(path, {"system": "kd", "data": data, "seed": 0, **(recipe or {})})
    noise = np.random.default_rng(0)
    digits = load_digits()
    number = 360
    labels = digits.target[:number].astype(np.int64) % len(classes)
    if len(classes) > 10:
        labels = noise.integers(len(classes), size=number)
    tensors = {"labels": torch.from_numpy(labels), "rows": torch.arange(number)}
    shared = noise.normal(size=(number, len(classes)))
    answers, measures = {}, {}
    for role in roles:
        logits = 1.3 * (0.6 * shared + 0.8 * noise.normal(size=shared.shape))
        logits[np.arange(number), labels] += 1.6 * ROLES[role]
        shares = torch.from_numpy(logits).softmax(1)
        tensors[f"probabilities.{role}"] = shares.half()
        answers[role] = shares.argmax(1).numpy()
        measures[role] = {
            "accuracy": float((answers[role] == labels).mean()),
            "top5": 0.999,
            "cross_entropy": 0.2,
            "calibration_error": 0.0123,
        }
    votes = np.stack(list(answers.values()))
    differing = np.flatnonzero((votes != votes[0]).any(0))[:64]
    if len(differing):
        images = np.clip(digits.images[differing] * 15.9, 0, 255).astype(np.uint8)
        tensors["example_positions"] = torch.from_numpy(differing)
        tensors["example_images"] = torch.from_numpy(images[:, None])
    save_file(tensors, path / "predictions.safetensors", metadata={"classes": "\n".join(classes)})
    suffixes = [f"@{seed}" for seed in range(seeds)] if seeds > 1 else [""]
    phases = {"teacher": ("loss",)} if "teacher" in roles else {}
    for suffix in suffixes:
        if "baseline" in roles:
            phases[f"baseline{suffix}"] = ("loss",)
        distilled = ("kd", "label") if "teacher" in roles else ("loss",)
        phases[f"student{suffix}"] = distilled
    for line in _metrics(phases, 8, noise):
        run.log(line)
    run.logged()
    accuracy = {role: measures[role]["accuracy"] for role in roles}
    pairs = [
        {
            "seed": s,
            **{
                r: accuracy[r] + 0.004 * s * (1 + (r == "student")) for r in roles if r != "teacher"
            },
        }
        for s in range(seeds)
    ]
    result: dict[str, Any] = {
        "system": "kd",
        "preset": "smoke",
        "data": data,
        "seed": 0,
        "task": "classification",
        "metric": {"name": "accuracy", "higher_is_better": True},
        **{role: accuracy.get(role) for role in ROLES},
        "parameters": {r: 271_000 if r == "teacher" else 20_410 for r in roles},
        "multiply_adds": {r: 4_100_000 if r == "teacher" else 310_500 for r in roles},
        "bytes": {r: 1_084_000 if r == "teacher" else 81_640 for r in roles},
        "latency_ms": {
            r: {"p50": 4.21 if r == "teacher" else 1.13, "p90": 5.0, "p99": 6.0} for r in roles
        },
        "measures": measures,
        "seeds": pairs,
        "verdict": {
            "word": "none",
            "sentence": "no plain student was trained to compare with",
        },
        "seconds": {**dict.fromkeys(roles, 8.2), "total": 95.0},
        "limbeck": "0.1.0",
    }
    if "teacher" in roles and "baseline" in roles:
        result["agreement"] = {
            r: float((answers[r] == answers["teacher"]).mean()) for r in ("baseline", "student")
        }
        found = verdict([p["baseline"] for p in pairs], [p["student"] for p in pairs])
        result["verdict"] = {"word": found.word, "sentence": found.sentence}
    (path / "result.json").write_text(json.dumps(result))
    return run


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Run]:
    """Makes run folders of other kinds."""
    return _make_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A distillation with one seed."""
    return _make_run(tmp_path_factory.mktemp("runs") / "kd")
