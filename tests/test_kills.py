"""Runs that are killed at any moment, again and again, go on to the same bits."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from limbeck.catalogue import systems
from limbeck.reproduction import compare
from limbeck.training.run import RECIPE, RESULT, Run
from mortal import Life, live

# The soak draws its moments anew each time unless this says otherwise.
SEED = int(os.environ.get("LIMBECK_KILL_SEED") or time.time())
KILLS = int(os.environ.get("LIMBECK_KILLS") or 10)
MOMENTS = int(os.environ.get("LIMBECK_MOMENTS") or 2)


def smoke(slug: str, *settings: str, data: object = None) -> list[Any]:
    """The command line of a run that saves after every step unless the settings say otherwise."""
    given = ("engine.device=cpu", "engine.checkpoint_seconds=0", *settings)
    words = [word for setting in given for word in ("--set", setting)]
    return ["run", slug, "--preset", "smoke", *words, *(["--data", data] if data else [])]


SHORT = ("teacher.training.epochs=1", "student.training.epochs=1", "data.limit=300")
CACHED = (*SHORT, "data.augment.views=1", "engine.cache=full")
JOURNAL = ("teacher.training.epochs=1", "student.training.epochs=1")

# Before these a death is awaited: at the beginning of a run, at a checkpoint, at the end of a phase
# before its checkpoints are cleared, at a cache, at the end.
TELLING = (
    r"open .*/\.recipe",
    r"rename .*/recipe",
    r"rename .*/environment",
    r"rename .*/\d+\.ckpt",
    r"remove .*\.ckpt",
    r"remember ",
    r"rename .*-student\.state",
    r"rename .*/student\.safetensors",
    r"rename .*/result",
    r"fsync .*/\.report",
)


class Trial:
    """A command line that is carried out undisturbed and is killed, and how the two compare."""

    def __init__(
        self, root: Path, words: list[Any], streams: bool = False, processes: int = 1
    ) -> None:
        self.root, self.words, self.streams, self.processes = (
            root / "runs",
            words,
            streams,
            processes,
        )
        self.root.mkdir()
        self.whole, self.kills = self.root / "whole", 0
        begun = time.monotonic()
        lives = self.begin(self.whole)
        for life in lives:
            assert life.end() == 0, life.said()
        self.seconds = time.monotonic() - begun
        self.moments = [life.moments() for life in lives]

    def begin(self, folder: Path, die_at: int = 0, rank: int = 0) -> list[Life]:
        """Start it, or go on with it; one process dies at a moment."""
        begun = (folder / RECIPE).is_file()
        words = ["resume", folder] if begun else [*self.words, "--out", folder]
        group = {}
        if self.processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
                group["WORLD_SIZE"] = str(self.processes)
        ranks = [{**group, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(self.processes)]
        return [
            live(self.root, words, die_at * (n == rank), self.streams, group and ranks[n])
            for n in range(self.processes)
        ]

    def die(self, folder: Path, moment: int, rank: int = 0) -> bool:
        """Let it die at a moment; whether it did."""
        lives = self.begin(folder, moment, rank)
        died = lives[rank].end() == -signal.SIGKILL
        self.bury(lives)
        self.kills += died
        return died

    def bury(self, lives: Sequence[Life]) -> None:
        """End what is left after a death, as torchrun does, and see to it that it ends."""
        for life in lives:
            if life.process.is_alive():
                life.process.terminate()
            life.end(60)

    def kill(self, folder: Path, after: float) -> bool:
        """Kill it after so many seconds, unless it is finished by then; whether it was killed."""
        lives = self.begin(folder)
        time.sleep(after)
        killed = all(life.process.is_alive() for life in lives)
        for life in lives:
            life.kill()
        self.kills += killed
        return killed

    def forget(self) -> None:
        """Empty the cache that the runs share, if there is one."""
        shutil.rmtree(self.root / "teacher-cache", ignore_errors=True)

    def compare(self, folder: Path) -> None:
        """Let a run come to its end, and compare it with the undisturbed one."""
        lives = self.begin(folder)
        for life in lives:
            assert life.end() == 0, life.said()
        found = compare(Run.open(self.whole), Run.open(folder))
        assert found.networks, "there was nothing to compare"
        assert found.differences == ()
        files, expected = (
            {str(f.relative_to(r)) for f in r.rglob("*") if f.is_file()}
            for r in (folder, self.whole)
        )
        assert files == expected
        self.networks = found.networks

    def each(self, folder: Path, moments: Sequence[int], rank: int = 0) -> None:
        """Die once at each of these moments, and compare each time.

        Of several processes one may not come to a moment that it came to before.
        """
        for moment in moments:
            what = self.moments[rank][moment - 1]
            self.forget()
            try:
                died = self.die(folder, moment, rank)
                assert died or self.processes > 1, "it lived on"
                self.compare(folder)
            except AssertionError as wrong:
                wrong.add_note(f"after a death at moment {moment}, before: {what}")
                raise
            shutil.rmtree(folder)


def drawn(moments: Sequence[str], each: int, seed: int) -> list[int]:
    """So many moments of each kind, counted from 1: numbers in names aside."""
    kinds: dict[str, list[int]] = {}
    for number, moment in enumerate(moments, 1):
        kinds.setdefault(re.sub(r"\d+", "0", moment), []).append(number)
    draw = random.Random(seed)
    return sorted(n for ns in kinds.values() for n in draw.sample(ns, min(each, len(ns))))


def images(root: Path) -> Path:
    """A folder of small images, three classes of them."""
    for number in range(90):
        file = root / f"class-{number % 3}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (40 * (number % 3), number, 255 - number)).save(file)
    return root


def at_random(trial: Trial, kills: int, seed: int) -> None:
    """Kill a run so many times in a row, and compare it at the end."""
    draw, folder = random.Random(seed), trial.root / "killed"
    while trial.kills < kills and not (folder / RESULT).is_file():
        trial.kill(folder, draw.uniform(0, trial.seconds / kills + 0.5))
    assert trial.kills, "the run was over before it could be killed"
    trial.compare(folder)


def deaths(trial: Trial, folder: Path, between: tuple[int, int], seed: int) -> None:
    """Die at a moment after each start until none is left, and compare."""
    draw = random.Random(seed)
    while trial.die(folder, draw.randint(*between)):
        pass
    assert trial.kills, "the run was over before it could die"
    trial.compare(folder)


def torchrun(words: list[Any]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "limbeck", *map(str, words)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def report(name: str, trial: Trial) -> None:
    print(f"{name}: {trial.kills} kills, {trial.networks} networks, seed {SEED}")


def test_a_run_goes_on_from_a_death_at_any_telling_moment(tmp_path):
    trial, draw = Trial(tmp_path, smoke("kd", *CACHED)), random.Random(0)
    told = list(enumerate(trial.moments[0], 1))
    found = {what: [n for n, moment in told if re.match(what, moment)] for what in TELLING}
    assert all(found.values()), found
    trial.each(tmp_path / "runs" / "killed", [draw.choice(found[what]) for what in TELLING])


def test_a_solve_goes_on_from_a_death_inside_its_journal(tmp_path):
    trial = Trial(tmp_path, smoke("fskd", *JOURNAL))
    inside = [n for n, moment in enumerate(trial.moments[0], 1) if "student.journal" in moment]
    trial.each(tmp_path / "runs" / "killed", [random.Random(0).choice(inside[1:])])


def test_processes_that_read_images_die_with_their_run_and_do_not_hold_it(tmp_path):
    data = f"folder:{images(tmp_path / 'images')}"
    words = smoke("kd", *SHORT, "engine.workers=2", data=data)
    trial = Trial(tmp_path, words, streams=True)
    folder = tmp_path / "runs" / "killed"
    (first,) = trial.begin(folder, 30)
    assert first.end() == -signal.SIGKILL
    deaths(trial, folder, (20, 60), seed=0)
    assert first.offspring(within=10) == []


def test_two_processes_survive_the_death_of_one_and_of_both(tmp_path):
    trial = Trial(tmp_path, smoke("kd", *CACHED), processes=2)
    folder = tmp_path / "runs" / "killed"
    trial.forget()
    assert trial.die(folder, 60, rank=0)
    assert trial.die(folder, 3, rank=1)
    trial.kill(folder, 0.5)
    trial.compare(folder)


def test_the_command_itself_survives(tmp_path):
    words = smoke("kd", *SHORT)
    trial, folder = Trial(tmp_path, words), tmp_path / "runs" / "killed"
    command = [sys.executable, "-m", "limbeck", *map(str, words), "--out", str(folder)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not list(folder.glob("checkpoints/*.ckpt")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    trial.compare(folder)


@pytest.mark.soak
@pytest.mark.parametrize("slug", list(systems()))
def test_every_system_survives_random_kills(slug, tmp_path):
    trial = Trial(tmp_path, smoke(slug, "engine.checkpoint_seconds=0.1"))
    at_random(trial, KILLS, SEED)
    report(slug, trial)


@pytest.mark.soak
@pytest.mark.parametrize("slug", list(systems()))
def test_every_system_survives_five_kills_as_soon_as_it_starts(slug, tmp_path):
    trial, draw = Trial(tmp_path, smoke(slug)), random.Random(SEED)
    for _ in range(5):
        trial.kill(tmp_path / "runs" / "killed", draw.uniform(0, 1.5))
    trial.compare(tmp_path / "runs" / "killed")
    report(f"{slug} as it starts", trial)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("words", "each"),
    [
        (("kd", *SHORT), 1000),
        (("kd", *CACHED), MOMENTS),
        (("kd", *SHORT, "data.augment.views=2", "engine.cache=fp16"), MOMENTS),
        (("fskd", *JOURNAL), MOMENTS),
        (("lwf", "student.training.epochs=1"), MOMENTS),
    ],
    ids=["kd", "cache in full", "cache in half precision", "journals", "phases"],
)
def test_a_run_survives_a_death_at_each_moment(words, each, tmp_path):
    trial = Trial(tmp_path, smoke(*words))
    trial.each(tmp_path / "runs" / "killed", drawn(trial.moments[0], each, SEED))
    report(f"{' '.join(words)}, aimed", trial)


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_survive_a_death_of_one_at_each_moment(rank, tmp_path):
    trial = Trial(tmp_path, smoke("kd", *CACHED), processes=2)
    trial.each(tmp_path / "runs" / "killed", drawn(trial.moments[rank], 1, SEED), rank)
    report(f"two processes, number {rank} dies", trial)


@pytest.mark.soak
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_ends_when_one_of_two_dies_and_goes_on(victim, tmp_path):
    words = smoke("kd", *CACHED)
    trial, folder = Trial(tmp_path, words, processes=2), tmp_path / "runs" / "killed"
    agent = torchrun([*words, "--out", folder])
    while agent.poll() is None and not list(folder.glob("checkpoints/*.ckpt")):
        time.sleep(0.01)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(children[victim]), signal.SIGKILL)
    assert agent.wait(60) == 1
    assert torchrun(["resume", folder]).wait(300) == 0
    trial.compare(folder)


@pytest.mark.soak
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_images_from_disk_and_processes_survive_random_kills(workers, processes, tmp_path):
    data = f"folder:{images(tmp_path / 'images')}"
    words = smoke(
        "kd", "data.augment.views=2", "engine.cache=full", f"engine.workers={workers}", data=data
    )
    trial = Trial(tmp_path, words, streams=True, processes=processes)
    at_random(trial, KILLS, SEED)
    report(f"{workers} workers, {processes} processes", trial)


@pytest.mark.soak
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("storage", ["full", "fp16", "top-3"])
def test_a_cache_survives_random_kills(storage, shared, tmp_path):
    """With a folder of the killed run's own, or the one that the undisturbed run has filled."""
    words = smoke("kd", "data.augment.views=2", f"engine.cache={storage}")
    trial = Trial(tmp_path, words)
    if not shared:
        trial.forget()
    at_random(trial, KILLS, SEED)
    report(f"cache {storage}, {'shared' if shared else 'its own'}", trial)
