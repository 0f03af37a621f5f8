import json
import shutil

import pytest
import torch

from limbeck import recipes
from limbeck.catalogue import system
from limbeck.distillation import start
from limbeck.errors import UserError
from limbeck.reproduction import compare, reproduce
from limbeck.training.progress import Voice
from limbeck.training.run import Run

QUIET = Voice(quiet=True)


def small(**given):
    values = recipes.merged(recipes.preset(system("kd"), "smoke", "digits"), given)
    for part in (values["teacher"], values["student"]):
        part["training"] = {"epochs": 1}
    values["data"] = {**values["data"], "limit": 200}
    return recipes.validate(values)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return start(small(), tmp_path_factory.mktemp("runs") / "one", QUIET)


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "copy")
    return Run.open(tmp_path / "copy")


def test_a_run_made_again_has_the_same_bits(command, run, tmp_path):
    status, out, err = command("reproduce", run.path, "--out", tmp_path / "again")
    assert (status, err) == (0, "")
    assert "the same bits: 3 networks" in out
    assert (tmp_path / "again" / "report.html").is_file()


def test_another_seed_differs_in_everything_but_the_teacher(run, tmp_path):
    other = start(small(seed=1, teacher={"model": f"run:{run.path}"}), tmp_path / "other", QUIET)
    found = compare(run, other)
    assert "metrics differ from step 0 of phase 'teacher' on" in found.differences
    assert "the weights of student differ" in found.differences
    assert any(d.startswith("seeds in the result was [{") for d in found.differences)


def test_what_differs_is_told_and_the_status_is_one(command, run, copied, tmp_path):
    card = json.loads((copied.path / "student.json").read_text())
    (copied.path / "student.json").write_text(json.dumps({**card, "sha256": "0"}))
    result = copied.result()
    copied.write_json("result.json", {**result, "student": 2.0, "seconds": {"total": 1.0}})
    copied.write_json("findings.json", {"findings": [{"title": "another"}]})
    lines = (copied.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied.path / "metrics.jsonl").write_text("".join(lines[:-1]))
    again = tmp_path / "again"
    shutil.copytree(run.path, again)  # finished, so it is compared as it is
    status, out, err = command("reproduce", copied.path, "--out", again)
    assert status == 1
    assert err == f"limbeck: {again} is not what {copied.path} was\n"
    said = out.splitlines()[-4:]
    assert said[0].startswith("metrics differ from step")
    assert said[1] == "the weights of student differ"
    assert said[2] == "the findings differ"
    assert said[3] == f"student in the result was 2.0 and is {result['student']}"


def test_an_interrupted_reproduction_goes_on(run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run.path, again)
    (again / "result.json").unlink()
    torch.manual_seed(7)  # nothing hangs on what the process drew before
    assert reproduce(run.path, again, QUIET).differences == ()


def test_a_run_killed_just_before_its_report_gets_it_when_it_is_resumed(command, copied):
    (copied.path / "report.html").unlink()
    assert command("resume", copied.path)[0] == 0
    assert (copied.path / "report.html").is_file()


def test_another_machine_is_said_before_anything_is_trained(command, run, copied, tmp_path):
    facts = copied.environment()
    facts["packages"]["torch"], facts["processor"] = "1.0", "abacus"
    copied.write_json("environment.json", facts)
    shutil.copytree(run.path, tmp_path / "again")
    status, out, _ = command("reproduce", copied.path, "--out", tmp_path / "again")
    assert status == 0
    assert f"torch was 1.0 and is {torch.__version__.partition('+')[0]}" in out
    assert "processor was abacus and is" in out


def test_what_cannot_be_made_again_is_one_sentence(copied, tmp_path):
    def refused(sentence: str, out=None) -> None:
        with pytest.raises(UserError, match=sentence):
            reproduce(copied.path, out or tmp_path / "new", QUIET)
        assert not (tmp_path / "new").exists()

    other = tmp_path / "other"
    other.mkdir()
    (other / "recipe.yaml").write_text("system: nst")
    refused("holds another run; choose another name with --out", other)
    copied.write_json("result.json", {**copied.result(), "fingerprint": "otherwise"})
    refused("their fingerprint was otherwise and is")
    (copied.path / "result.json").unlink()
    refused("is not finished; continue it with: limbeck resume")
    copied.write_json("result.json", {})
    (copied.path / "recipe.yaml").write_text("system: kd")
    refused("was made from objects in Python")
