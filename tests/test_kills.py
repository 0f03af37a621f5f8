"""Runs that are killed at any moment, again and again, go on to the same bits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from limbeck.catalogue import systems
from limbeck.reproduction import compare
from limbeck.training.run import RECIPE, RESULT, Run

# The soak draws its moments anew each time unless this says otherwise.
SEED = int(os.environ.get("LIMBECK_KILL_SEED") or time.time())
KILLS = int(os.environ.get("LIMBECK_KILLS") or 10)
OFTEN = ["--set", "engine.checkpoint_seconds=0.1", "--set", "engine.device=cpu"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def limbeck(*words: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "limbeck", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ONE_THREAD
    )


def finished(process: subprocess.Popen[bytes]) -> None:
    _, wrong = process.communicate(timeout=600)
    assert process.returncode == 0, wrong.decode()


def survive(folder: Path, words: list[object], kills: int, at_work: float, seed: int) -> int:
    """Start a run, kill it so many times and let it end; how often it was hit.

    ``at_work`` is how many seconds an undisturbed run takes from its folder on.
    """
    draw, hit = random.Random(seed), 0
    while hit < kills and not (folder / RESULT).is_file():
        begun = (folder / RECIPE).is_file()
        process = limbeck("resume", folder) if begun else limbeck(*words, "--out", folder)
        while process.poll() is None and not (folder / RECIPE).is_file():
            time.sleep(0.01)
        # A resumed run is some seconds at its imports, which a kill may hit too.
        wait = draw.uniform(0, at_work / kills + (3.0 if begun else 0.0))
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            hit += 1
    finished(limbeck("resume", folder))
    return hit


def check(slug: str, tmp_path: Path, kills: int, seed: int) -> None:
    words: list[object] = ["run", slug, "--preset", "smoke", *OFTEN]
    process, folder = limbeck(*words, "--out", tmp_path / "whole"), tmp_path / "whole"
    while process.poll() is None and not (folder / RECIPE).is_file():
        time.sleep(0.01)
    begun = time.monotonic()
    finished(process)
    hit = survive(tmp_path / "killed", words, kills, time.monotonic() - begun, seed)
    found = compare(Run.open(tmp_path / "whole"), Run.open(tmp_path / "killed"))
    print(f"{slug}: {hit} kills, {found.networks} networks, {found.lines} lines of metrics")
    assert hit, "the run was over before it could be killed"
    assert found.networks, "there was nothing to compare"
    assert found.differences == (), f"LIMBECK_KILL_SEED={seed}"


@pytest.mark.soak
@pytest.mark.parametrize("slug", list(systems()))
def test_every_system_survives(slug, tmp_path):
    check(slug, tmp_path, KILLS, SEED)


@pytest.mark.parametrize("slug", ["kd", "lwf", "gan-mc"])
def test_some_survive_a_few(slug, tmp_path):
    check(slug, tmp_path, 4, seed=0)
