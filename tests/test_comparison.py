"""Comparisons: what they are made of, that they can be stopped, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from limbeck import comparison
from limbeck.comparison import plan
from limbeck.errors import UserError
from limbeck.recipes import validate

QUICK = {
    "seeds": 2,
    "student": {"model": "mlp-8", "training": {"epochs": 1}},
}
SMALL = ("teacher.model=mlp-16", "teacher.training.epochs=1")


def test_all_runs_share_ground_and_differ_by_their_methods():
    laid = plan(["kd", "nst", "kd+nst"], "smoke", "digits", {"seeds": 4})
    assert list(laid.recipes) == ["teacher", "plain", "kd", "nst", "kd+nst"]
    assert laid.systems == ["kd", "nst", "kd+nst"]
    alike = ("data", "student", "seed", "seeds", "select", "engine")
    for name in ("plain", "nst", "kd+nst"):
        assert {k: laid.recipes[name][k] for k in alike} == {
            k: laid.recipes["kd"][k] for k in alike
        }
    assert all(not r["baseline"] for r in laid.recipes.values())
    assert laid.recipes["plain"]["methods"] == {} == laid.recipes["teacher"]["methods"]
    assert laid.recipes["kd+nst"]["methods"] == {
        "kd": {"temperature": 4.0},
        "nst": {"weight": 5.0},
    }
    assert [t["model"] for t in laid.recipes["nst"]["teachers"]] == ["run:./teacher"]
    for recipe in laid.recipes.values():
        validate(recipe)


def test_the_teacher_is_trained_once_as_the_preset_says_on_all_that_has_labels():
    laid = plan(["kd"], "smoke", "digits", {"data": {"source": "digits", "labelled": 0.25}})
    teacher = laid.recipes["teacher"]
    assert teacher["student"]["model"] == "mlp-256-256"
    assert teacher["student"]["training"]["epochs"] == 8
    assert (teacher["data"]["labelled"], teacher["data"]["transfer"]["fraction"]) == (1.0, 0.25)
    assert teacher["seeds"] == 1


def test_several_teachers_are_trained_one_by_one_and_a_finished_one_is_not():
    laid = plan(["kd"], "smoke", "digits", {}, teachers=["mlp-16", "run:elsewhere"])
    assert laid.teachers == ["teacher-1"]
    models = [t["model"] for t in laid.recipes["kd"]["teachers"]]
    assert models == ["run:./teacher-1", "run:elsewhere"]


def test_a_methods_own_settings_reach_every_entry_that_has_it():
    laid = plan(["kd", "nst+kd"], "smoke", "digits", {}, assign=["methods.kd.temperature=9"])
    assert laid.recipes["kd"]["methods"]["kd"]["temperature"] == 9
    assert laid.recipes["nst+kd"]["methods"]["kd"]["temperature"] == 9


@pytest.mark.parametrize(
    ("systems", "assign", "sentence"),
    [
        (["kd", "kd"], [], "named twice"),
        (["kd", "hd"], [], "no system 'hd'"),
        (["kd", "alexnet"], [], "alexnet takes no teacher"),
        (["ffl", "kd"], [], "ffl takes no teacher"),
        (["kd", "feddf"], [], "feddf takes no teacher"),
        (["kd", "lwf"], [], "lwf takes no teacher"),
        (["densenet"], [], "is a network and no method"),
        (["kd"], ["method.weight=1"], "say whose"),
        (["kd"], ["methods.nst.weight=1"], "not among those compared"),
        (["kd"], ["student.modell=x"], "did you mean model"),
        (["kd"], ["methods.kd.wait=1"], "no parameter 'wait'"),
    ],
)
def test_what_cannot_be_compared_is_said_at_once(systems, assign, sentence):
    with pytest.raises(UserError, match=sentence):
        plan(systems, "smoke", "digits", {}, assign=assign)


def test_what_does_not_fit_is_found_before_anything_is_trained(command, tmp_path):
    status, _, said = command(
        "compare", "kd", "nst", "--preset", "smoke", "--out", tmp_path / "out"
    )
    assert status == 2
    assert "no module 'stage2' to tap" in said
    assert not (tmp_path / "out").exists()


def test_a_method_that_needs_the_teachers_route_is_refused_before_the_teacher_is_trained(tmp_path):
    laid = plan(["kd", "rco"], "smoke", "digits", {})
    with pytest.raises(UserError, match="a finished teacher has no route"):
        comparison.begin(laid, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_comparison_that_is_killed_goes_on_where_it_was(tmp_path, command):
    out = tmp_path / "out"
    words = ["compare", "kd", "--preset", "smoke", "--out", str(out), "--student", "mlp-8"]
    words += ["--seeds", "2", "--set", "student.training.epochs=1", "--set", "engine.threads=1"]
    for word in SMALL:
        words += ["--set", word]
    begun = subprocess.Popen([sys.executable, "-m", "limbeck", *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (out / "teacher" / "result.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    begun.send_signal(signal.SIGTERM)
    assert begun.wait(60) == 128 + signal.SIGTERM
    assert not (out / "kd").exists()
    trained = (out / "teacher" / "student.safetensors").stat().st_mtime_ns

    status, _, _ = command("resume", out)
    assert status == 0
    assert (out / "teacher" / "student.safetensors").stat().st_mtime_ns == trained
    found = json.loads((out / "leaderboard.json").read_text())
    assert {e["name"] for e in found["entries"]} == {"kd", "plain student"}
    assert all(len(e["values"]) == 2 for e in found["entries"])
    recipe = yaml.safe_load((out / "kd" / "recipe.yaml").read_text())
    assert recipe["teachers"][0]["model"] == f"run:{out}/teacher"
    # Pairs share their initial weights: the same seed, the same recipe but for the method.
    plain = yaml.safe_load((out / "plain" / "recipe.yaml").read_text())
    assert (plain["seed"], plain["student"]) == (recipe["seed"], recipe["student"])

    status, _, said = command(*words)
    assert status == 2
    assert "already exists" in said


def test_a_run_that_fails_is_named_with_the_way_on(tmp_path, monkeypatch):
    laid = plan(["kd"], "smoke", "digits", QUICK, assign=SMALL)
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(UserError, match=f"teacher could not be .* limbeck resume {tmp_path}"):
        comparison.begin(laid, tmp_path / "out")


def test_no_more_processes_are_begun_than_memory_holds(tmp_path, monkeypatch):
    heard = []
    voice = SimpleNamespace(warn=heard.append)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "recipe.yaml").write_text("{}")
    (tmp_path / "plain" / "result.json").write_text('{"memory": 1000}')
    monkeypatch.setattr(comparison.memory, "available", lambda: 6100)
    laid = comparison.Plan({}, jobs=8)
    assert comparison._affordable(laid, tmp_path, voice) == 3
    assert heard == ["memory allows 3 processes at once, not 8"]
    assert comparison._affordable(comparison.Plan({}, jobs=2), tmp_path, voice) == 2


def test_a_folder_without_a_comparison_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no comparison"):
        comparison.go_on(tmp_path)


def test_a_folder_that_is_taken_is_left_alone(tmp_path):
    Path(tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="already exists"):
        comparison.begin(plan(["kd"], "smoke", "digits", {}), tmp_path)
