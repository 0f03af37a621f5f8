"""Figure 6: how long it takes until something happens."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

from figures import Figure, Options, absent, of_rounds

FIRST_STEP = "first batch"
"""What a run says when it has looked at the first batch, just before the first step."""


def measure(options: Options) -> list[Figure]:
    """Seconds of ``limbeck list``, and of a run to its first step over those of importing torch."""
    listing, importing, running = [], [], []
    for _ in range(3 if options.quick else 7):
        listing.append(_seconds("-m", "limbeck", "list"))
        importing.append(_seconds("-c", "import torch"))
        running.append(_to_first_step())
    name = "limbeck run kd --preset smoke to its first step, over import torch"
    figures = [of_rounds(6, "limbeck list", listing, "<= 0.5", unit="s")]
    if None in running:
        return [*figures, absent(6, name, "", f"the run never said {FIRST_STEP!r}")]
    seconds = {"to the first step": statistics.median(running)}
    seconds["import torch"] = statistics.median(importing)
    ratios = [a / b for a, b in zip(running, importing, strict=True)]
    return [*figures, of_rounds(6, name, ratios, seconds=seconds)]


def _seconds(*words: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def _to_first_step() -> float | None:
    with tempfile.TemporaryDirectory() as place:
        words = ["-m", "limbeck", "run", "kd", "--preset", "smoke", "--out", f"{place}/run"]
        begun = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            spoken = any(FIRST_STEP in line for line in process.stdout)
            seconds = time.perf_counter() - begun
            process.kill()
    return seconds if spoken else None
