import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from limbeck.errors import UserError
from limbeck.training.run import Run


def test_a_fresh_folder_holds_recipe_and_environment(tmp_path):
    recipe = {"system": "kd", "data": {"source": "folder:Äpfel"}, "seeds": [1, 2]}
    run = Run.create(tmp_path / "a" / "run", recipe)
    assert yaml.safe_load((run.path / "recipe.yaml").read_text(encoding="utf-8")) == recipe
    assert Run.open(run.path).recipe() == recipe
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0] or (
        environment["packages"]["torch"] == torch.__version__
    )
    assert environment["command"] == sys.argv


def test_only_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    Run.create(tmp_path / "empty", {})
    with pytest.raises(UserError, match=r"already exists; continue it with: limbeck resume"):
        Run.create(tmp_path / "empty", {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(UserError, match="already exists; choose another name with --out"):
            Run.create(tmp_path / name, {})
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "file").read_text() == "mine"


def test_what_is_no_run_is_not_opened(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match=r"is no run folder: it has no recipe\.yaml"):
            Run.open(path)


def test_a_result_is_there_only_when_the_run_is_finished(tmp_path):
    run = Run.create(tmp_path / "run", {})
    with pytest.raises(UserError, match="is not finished; continue it with: limbeck resume"):
        run.result()
    run.write_json("result.json", {"student": 0.5})
    assert run.result() == {"student": 0.5}


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"{", b"\xff\xfe", b"a: [", b"!!python/name:a", b"[" * 100_000],
    ids=["empty", "list", "cut", "bytes", "yaml", "code", "deep"],
)
def test_altered_files_are_named(tmp_path, content):
    run = Run.create(tmp_path / "run", {})
    for name, read in (("recipe.yaml", run.recipe), ("result.json", run.result)):
        (run.path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} cannot be read: it is not what Limbeck wrote"):
            read()


def test_metrics_are_cut_back_to_a_length_and_go_on_from_there(tmp_path):
    run = Run.create(tmp_path / "run", {})
    assert run.metrics() == []
    run.log({"step": 1})
    length = run.logged()
    assert length == (run.path / "metrics.jsonl").stat().st_size
    run.log({"step": 2})
    run.log({"step": 3})
    run.cut_log(length)
    run.log({"step": 2, "again": True})
    assert run.metrics() == [{"step": 1}, {"step": 2, "again": True}]
    assert Run.open(run.path).logged() == (run.path / "metrics.jsonl").stat().st_size


def test_a_half_written_line_is_cut_off(tmp_path):
    run = Run.create(tmp_path / "run", {})
    run.log({"step": 1})
    length = run.logged()
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"ste')
    again = Run.open(run.path)
    again.cut_log(length)
    again.log({"step": 2})
    assert again.metrics() == [{"step": 1}, {"step": 2}]


def test_one_process_holds_a_folder_and_a_dead_one_holds_nothing(tmp_path):
    run = Run.create(tmp_path / "run", {})
    with run.held(), pytest.raises(UserError, match="another process is training"):  # noqa: SIM117
        with Run.open(run.path).held():
            pass
    code = (
        "import os, sys; from pathlib import Path; from limbeck.training.run import Run\n"
        "held = Run.open(Path(sys.argv[1])).held(); held.__enter__()\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process is training"), run.held():
            pass
        other.kill()
    with run.held():
        pass


def test_a_forked_process_holds_nothing_when_its_parent_is_dead(tmp_path):
    run = Run.create(tmp_path / "run", {})
    code = (
        "import os, sys, time; from pathlib import Path; from limbeck.training.run import Run\n"
        "held = Run.open(Path(sys.argv[1])).held(); held.__enter__(); child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE
    ) as owner:
        child = int(owner.stdout.readline())
        # Once it has let go; the owner holds the folder still.
        while os.path.realpath(run.path / ".lock") in map(
            os.path.realpath, Path(f"/proc/{child}/fd").iterdir()
        ):
            time.sleep(0.01)
        with pytest.raises(UserError, match="another process is training"), run.held():
            pass
        owner.kill()
        owner.wait()
        try:
            with run.held():
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_folder_whose_run_was_killed_before_it_began_is_free(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.yaml.12345.part").write_text("system: k")
    with Run.create(tmp_path / "run", {"system": "kd"}).held():
        pass
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"recipe.yaml", "environment.json", ".lock"}


def test_who_holds_a_folder_sweeps_it_and_writes_down_where_it_is(tmp_path):
    run = Run.create(tmp_path / "run", {})
    (run.path / "environment.json").unlink()
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints" / ".000003.ckpt.12345.part").write_bytes(b"half of it")
    with run.held():
        pass
    assert run.environment()["packages"]["torch"]
    assert list((run.path / "checkpoints").iterdir()) == []


def test_a_failure_inside_lets_go_of_the_folder(tmp_path):
    run = Run.create(tmp_path / "run", {})
    with pytest.raises(ZeroDivisionError), run.held():
        raise ZeroDivisionError
    with run.held():
        pass


def test_a_finished_phase_is_kept_and_its_checkpoints_are_not(tmp_path):
    run = Run.create(tmp_path / "run", {})
    run.checkpoints.write({"n": 1})
    run.log({"step": 1})
    assert run.finished_phase(3, "fit@1/../x") is None
    run.finish_phase(3, "fit@1/../x", {"modules": {"w": torch.ones(2)}})
    assert run.checkpoints.paths() == []
    found = Run.open(run.path).finished_phase(3, "fit@1/../x")
    assert found["phase"] == "fit@1/../x"
    assert found["log"] == (run.path / "metrics.jsonl").stat().st_size
    assert torch.equal(found["modules"]["w"], torch.ones(2))
    assert run.finished_phase(4, "fit@1/../x") is None
    assert [p.parent for p in run.path.rglob("*.state")] == [run.path / "phases"]


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[1]", b"3", b"", b"[" * 100_000])
def test_a_damaged_line_of_the_metrics_is_named_before_anything_is_trained(tmp_path, line):
    run = Run.create(tmp_path / "run", {})
    (run.path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    for read in (run.metrics, lambda: run.cut_log(10**6)):
        with pytest.raises(UserError, match=r"line 2 of .*metrics.jsonl is not what Limbeck wrote"):
            read()


def test_metrics_that_were_shortened_are_not_filled_up(tmp_path):
    run = Run.create(tmp_path / "run", {})
    run.log({"step": 1})
    length = run.logged()
    Run.open(run.path).cut_log(10**9)
    assert (run.path / "metrics.jsonl").stat().st_size == length


def test_a_phase_is_taken_in_its_own_place_and_under_its_own_recipe_alone(tmp_path):
    runs = {n: Run.create(tmp_path / str(n), {"seed": n, "engine": {"workers": n}}) for n in (0, 1)}
    for run in runs.values():
        run.finish_phase(0, "fit", {"modules": {}})
    path = runs[0].phase_path(0, "fit")
    ours, theirs = path.read_bytes(), runs[1].phase_path(0, "fit").read_bytes()
    path.with_name("001-fit.state").write_bytes(ours)
    with pytest.raises(
        UserError, match=r"001-fit.state was written .* in another place; remove it"
    ):
        runs[0].finished_phase(1, "fit")
    path.write_bytes(theirs)
    with pytest.raises(UserError, match=r"000-fit.state was written under another recipe than"):
        runs[0].finished_phase(0, "fit")
    path.write_bytes(ours[:-1])
    with pytest.raises(
        UserError, match=r"000-fit.state is damaged: .*; remove it to have the phas"
    ):
        runs[0].finished_phase(0, "fit")


def test_a_folder_may_move_and_settings_that_change_no_bit_may_be_edited(tmp_path):
    run = Run.create(tmp_path / "run", {"seed": 0, "engine": {"workers": 0, "precision": "fp32"}})
    run.finish_phase(0, "fit", {"modules": {}})
    moved = Run.open(run.path.rename(tmp_path / "moved"))
    recipe = moved.path / "recipe.yaml"
    recipe.write_text("engine: {precision: fp32, workers: 2}  # faster\nseed: 0\n")
    assert moved.finished_phase(0, "fit") is not None
    recipe.write_text("engine: {precision: bf16, workers: 2}\nseed: 0\n")
    with pytest.raises(UserError, match="under another recipe"):
        Run.open(moved.path).finished_phase(0, "fit")


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
def test_what_cannot_be_written_in_a_folder_is_named(tmp_path, name):
    run = Run.create(tmp_path / "run", {})
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} cannot be written: is a directory"), run.held():
        run.log({"step": 1})
