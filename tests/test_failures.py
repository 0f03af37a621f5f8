"""Runs whose world fails them: signals, a full disk, processes that die or answer no more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import limbeck
from limbeck.data import batches as reading
from limbeck.data.batches import ImageBatches
from limbeck.data.data import Split
from limbeck.errors import UserError
from limbeck.reproduction import compare
from limbeck.training.engine import Engine
from limbeck.training.phases import Training
from limbeck.training.run import RECIPE, Run

SMOKE = ["run", "kd", "--preset", "smoke", "--set", "engine.device=cpu"]
OFTEN = ["--set", "engine.checkpoint_seconds=0"]
SHORT = ["--set", "teacher.training.epochs=1", "--set", "student.training.epochs=1"]


def begin(*words: object, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "limbeck", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def until(process: subprocess.Popen[str], there: Path, pattern: str) -> None:
    while process.poll() is None and not any(there.glob(pattern)):
        time.sleep(0.02)


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """The exit status, and the lines on standard error."""
    _, wrong = process.communicate(timeout=300)
    return process.returncode, wrong.splitlines()


def test_a_second_signal_stops_at_once(tmp_path):
    process = begin(*SMOKE, "--set", "teacher.training.epochs=1000", "--out", tmp_path / "run")
    until(process, tmp_path / "run", "metrics.jsonl")
    # Both arrive before the step that is under way has ended.
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        process.send_signal(number)
    status, wrong = ended(process)
    assert status in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert wrong == ["limbeck: stopped"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_there_is_a_run_ends_it_in_a_word(tmp_path, number):
    process = begin(*SMOKE, "--out", tmp_path / "run")
    time.sleep(1.5)  # at its imports
    process.send_signal(number)
    status, wrong = ended(process)
    assert (status, wrong) == (128 + number, ["limbeck: stopped"])
    assert not (tmp_path / "run" / RECIPE).exists()


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("only an administrator may mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_a_run_with_a_sentence_and_it_goes_on_when_there_is_room(
    small_disk, tmp_path
):
    words, full = [*SMOKE, *SHORT, *OFTEN, "--out"], small_disk / "run"
    assert ended(begin(*words, tmp_path / "whole"))[0] == 0
    ballast = small_disk / "ballast"
    stops = 0
    for taken in (1_900_000, 1_400_000):
        ballast.write_bytes(bytes(taken))
        status, wrong = ended(begin(*(["resume"] if (full / RECIPE).is_file() else words), full))
        stops += status == 2
        assert (status, len(wrong)) in ((2, 1), (0, 0)), wrong
        assert status == 0 or "no space left on device" in wrong[0]
        assert status == 0 or str(full) in wrong[0]
        ballast.unlink()
    assert stops
    assert ended(begin("resume", full))[0] == 0
    assert compare(Run.open(tmp_path / "whole"), Run.open(full)).differences == ()


def test_of_processes_that_want_one_folder_one_gets_it(tmp_path):
    def create(number: int, path: Path) -> int | None:
        try:
            return Run.create(path, {"number": number}) and number
        except UserError as error:
            refused.append(str(error))
            return None

    refused: list[str] = []

    with ThreadPoolExecutor(8) as pool:
        for turn in range(20):
            path = tmp_path / str(turn)
            made = [n for n in pool.map(lambda n, p=path: create(n, p), range(1, 9)) if n]
            assert len(made) == 1
            assert Run.open(path).recipe() == {"number": made[0]}
    assert all("already exists" in said or "another process" in said for said in refused)


class Numbers(Dataset):
    """Samples of noise, one of which has something done to the process that reads it."""

    def __init__(self, what=None):
        self.what = what

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 25 and self.what is not None and torch.utils.data.get_worker_info():
            self.what()
        generator = torch.Generator().manual_seed(index)
        return torch.randn(1, 4, 4, generator=generator), index % 3


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def asleep() -> None:
    time.sleep(60)


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def distilled(path: Path, what=None, resume: bool = False) -> torch.Tensor:
    train, test = (DataLoader(Numbers(w), 8, num_workers=1) for w in (what, None))
    done = limbeck.distill(
        net(1),
        net(2),
        (train, test),
        out=path,
        training=Training(epochs=2),
        resume=resume,
        engine=Engine(device="cpu", checkpoint_seconds=0.0),
        quiet=True,
    )
    return done.student[1].weight


@pytest.mark.parametrize(
    ("what", "sentence"),
    [(killed, "a process that reads samples died"), (asleep, "gave none for 1 seconds")],
)
def test_a_reader_that_dies_or_hangs_ends_the_run_and_its_checkpoint_stands(
    tmp_path, monkeypatch, what, sentence
):
    whole = distilled(tmp_path / "whole")
    monkeypatch.setattr(reading, "PATIENCE", 1)
    with pytest.raises(UserError, match=sentence):
        distilled(tmp_path / "cut", what)
    assert any((tmp_path / "cut" / "checkpoints").glob("*.ckpt"))
    monkeypatch.undo()
    assert torch.equal(distilled(tmp_path / "cut", resume=True), whole)


class Stuck:
    """Images of which one cannot be had."""

    channels, size = 1, (2, 2)

    def __init__(self, what):
        self.what = what

    def __len__(self):
        return 4

    def read(self, index):
        if index == 3:
            self.what()
        return torch.zeros(1, 2, 2, dtype=torch.uint8)

    def fingerprint(self):
        return ""


@pytest.mark.parametrize(("what", "sentence"), [(killed, "died"), (asleep, "gave none for 1 sec")])
def test_images_from_disk_are_read_by_processes_that_may_fail(monkeypatch, what, sentence):
    monkeypatch.setattr(reading, "PATIENCE", 1)
    split = Split("train", Stuck(what), None)
    with pytest.raises(UserError, match=sentence):
        list(ImageBatches(split, 2, workers=1).epoch(0))


@pytest.mark.soak
def test_two_processes_of_which_one_is_killed_go_on_to_the_same_bits(tmp_path):
    words = [*SMOKE, *OFTEN, "--set", "student.training.epochs=10", "--out"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    whole = begin(*words, tmp_path / "whole", launcher=launcher)
    assert ended(whole)[0] == 0
    restarting = begin(*words, tmp_path / "cut", launcher=(*launcher, "--max-restarts", "1"))
    until(restarting, tmp_path / "cut", "phases/000-*.state")
    children = Path(f"/proc/{restarting.pid}/task/{restarting.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    status, wrong = ended(restarting)
    assert status == 0, wrong
    assert not any("Traceback" in line for line in wrong)
    found = compare(Run.open(tmp_path / "whole"), Run.open(tmp_path / "cut"))
    assert found.networks
    assert found.differences == ()
