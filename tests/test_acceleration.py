"""Whole runs with and without what makes them fast."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from limbeck import recipes
from limbeck.catalogue import system
from limbeck.distillation import resume, start
from limbeck.training.progress import Voice

SMALL = [
    "engine.device=cpu",
    "teacher.model=cnn-8-16",
    "teacher.training.epochs=2",
    "student.model=cnn-4-8",
    "student.training.epochs=5",
    "data.limit=300",
    "data.augment.flip=true",
    "data.augment.views=2",
    "baseline=false",
]


class Killed(BaseException):
    """Stands for a process that dies."""


class Deadly(Voice):
    """Kills the run at a step of the student's phase."""

    def __init__(self, step: int) -> None:
        super().__init__(quiet=True)
        self.fatal, self.title = step, ""

    def begin(self, title: str, total: int, done: int = 0) -> None:
        self.title = title

    def step(self, done, terms=None, samples=0):
        if self.title == "student" and done == self.fatal:
            raise Killed


def recipe(*words: str, method: str = "kd"):
    values = recipes.preset(system(method), "smoke", "digits")
    return recipes.validate(recipes.assigned(values, [*SMALL, *words]))


def student(path: Path, *words: str, method: str = "kd") -> bytes:
    start(recipe(*words, method=method), path, Voice(quiet=True))
    return (path / "student.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["kd", "nst"])
def test_a_run_with_a_full_cache_ends_with_the_bits_of_one_without(tmp_path, method):
    # networks of three stages, which the method taps
    three = "teacher.model=cnn-8-16-16", "student.model=cnn-4-8-8", "method.weight=2.0"
    plain = student(tmp_path / "plain", *three, method=method)
    assert not (tmp_path / "teacher-cache").exists()
    cached = student(tmp_path / "cached", *three, "engine.cache=full", method=method)
    again = student(tmp_path / "again", *three, "engine.cache=full", method=method)
    assert plain == cached == again
    assert len(list((tmp_path / "teacher-cache").iterdir())) == 1


@pytest.mark.parametrize("storage", ["full", "fp16", "top-3"])
@pytest.mark.parametrize("forget", [False, True])
def test_a_killed_run_ends_with_the_same_bits_whatever_became_of_its_cache(
    tmp_path, storage, forget
):
    words = f"engine.cache={storage}", "engine.checkpoint_seconds=0"
    whole = student(tmp_path / "a" / "whole", *words)
    for number, step in enumerate((2, 7, 17)):
        path = tmp_path / "b" / f"killed-{number}"
        with pytest.raises(Killed):
            start(recipe(*words), path, Deadly(step))
        if forget:
            shutil.rmtree(path.parent / "teacher-cache")
        resume(path, Voice(quiet=True))
        assert (path / "student.safetensors").read_bytes() == whole


def test_several_seeds_share_their_views_and_what_the_teacher_said_of_them(tmp_path):
    student(tmp_path / "run", "engine.cache=fp16", "seeds=3")
    (folder,) = (tmp_path / "teacher-cache").iterdir()
    assert len(list(folder.glob("view-*.records"))) == 2


def test_two_processes_with_one_cache_learn_what_one_does(tmp_path):
    assert student(tmp_path / "one", "engine.cache=full")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "limbeck", "run", "kd", "--preset", "smoke"]
    # batch norm has statistics of its own in each process, so this student has none
    words = ["engine.cache=full", "student.model=mlp-16", "teacher.model=mlp-32"]
    alone = student(tmp_path / "alone", *words)
    assert alone
    command += [part for word in [*SMALL, *words] for part in ("--set", word)]
    folder = ["--set", f"engine.cache_folder={tmp_path / 'shared'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = ["--out", str(tmp_path / "two")]
    subprocess.run(command + folder + out, check=True, timeout=180, env=environment)
    one, two = (load_file(tmp_path / n / "student.safetensors") for n in ("alone", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


@pytest.mark.parametrize(
    "words",
    [
        ("engine.channels_last=false", "engine.fold=false"),
        ("engine.fused=true",),
        ("engine.teacher_precision=fp32",),
        ("student.training.accumulate=2", "teacher.training.accumulate=2"),
    ],
    ids=" ".join,
)
def test_what_makes_a_run_fast_changes_its_student_by_rounding_alone(tmp_path, words):
    steps = "student.training.epochs=1", "teacher.training.epochs=1", "student.model=mlp-16"
    plain, other = tmp_path / "plain", tmp_path / "other"
    student(plain, *steps, "teacher.model=cnn-4-8")
    student(other, *steps, "teacher.model=cnn-4-8", *words)
    one, two = (load_file(p / "student.safetensors") for p in (plain, other))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_a_student_in_half_precision_learns_too(tmp_path):
    run = start(recipe("engine.precision=bf16"), tmp_path / "run", Voice(quiet=True))
    terms = [line["terms"] for line in run.metrics() if "terms" in line]
    losses = [line["kd"] for line in terms if "kd" in line]
    assert losses[-1] < losses[0]
    weights = load_file(tmp_path / "run" / "student.safetensors")
    assert all(w.dtype == torch.float32 for n, w in weights.items() if "num" not in n)


def test_in_half_precision_too_everything_is_remembered_in_one_place(tmp_path):
    student(tmp_path / "run", "engine.precision=bf16", "engine.cache=full")
    assert len(list((tmp_path / "teacher-cache").iterdir())) == 1
