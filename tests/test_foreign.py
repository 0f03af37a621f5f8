"""A method in a file of the user's own, as the page on adding a system has it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from limbeck import foreign
from limbeck.training.run import Run

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "adding-a-system.md").read_text(encoding="utf-8")
NAMES = ("similarity.py", "similarity.yaml", "test_similarity.py")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The page's three files in a folder of their own, which is where the user is."""
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", PAGE, re.DOTALL)
    for name, block in zip(NAMES, blocks, strict=True):
        (tmp_path / name).write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(foreign.PERMISSION, raising=False)
    yield tmp_path
    os.environ.pop(foreign.PERMISSION, None)
    foreign._module.cache_clear()


def test_a_method_with_recipe_and_test_takes_fewer_than_sixty_lines(folder):
    lines = sum(len((folder / name).read_text().splitlines()) for name in NAMES)
    assert lines < 60
    assert f"{lines} lines in all" in PAGE


def test_the_pages_test_passes(folder):
    words = [sys.executable, "-m", "pytest", "-q", "test_similarity.py"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_the_pages_recipe_runs_and_resumes_with_the_flag_alone(folder, command):
    assert foreign.PERMISSION not in os.environ
    status, _, err = command("run", "similarity.yaml", "--out", "refused")
    assert (status, err.count("\n")) == (2, 1)
    assert "run only if you say so: --run-code" in err
    assert not Path("refused").exists()
    words = ("--set", "data.limit=64", "--set", "student.training.epochs=1", "--seeds", "1")
    status, _, err = command("run", "similarity.yaml", "--run-code", "--out", "done", *words)
    assert (status, err) == (0, "")
    result = Run.open(Path("done")).result()
    assert result["system"] == "similarity"
    assert any("similarity" in line.get("terms", {}) for line in Run.open(Path("done")).metrics())
    status, out, _ = command("resume", "done", "--run-code")
    assert status == 0
    assert "finished" in out


def test_it_is_compared_with_a_system_of_the_catalogue(folder, command):
    words = ("--preset", "smoke", "--teacher", "resnet8", "--student", "resnet8", "--seeds", "1")
    given = ("--set", "student.training.epochs=1", "--set", "data.limit=64", "--out", "both")
    name = "similarity.py:Similarity"
    status, _, err = command("compare", "kd", name, "--run-code", *words, *given)
    assert status == 0, err
    assert {p.name for p in Path("both").iterdir() if p.is_dir()} >= {"kd", "similarity", "plain"}
    status, _, err = command("compare", name, "kd", "--run-code", *words)
    assert (status, err.count("\n")) == (2, 1)
    assert "name a system of the catalogue before it" in err


@pytest.mark.parametrize(
    ("content", "name", "sentence"),
    [
        (None, "mine.py:Mine", "mine.py does not exist"),
        ("x = 1", "mine.py:Mine", "mine.py has no method 'Mine'"),
        ("def f(:", "mine.py:Mine", r"cannot be imported: SyntaxError: .* \(line 1\)"),
        ("\nimport nothing_such", "mine.py:Mine", r"ModuleNotFoundError: .* \(line 2\)"),
        ("import limbeck\nclass Mine: ...", "mine.py:Mine", "a class that inherits from"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(folder, command, content, name, sentence):
    if content is not None:
        Path("mine.py").write_text(content)
    words = ("--teacher", "run:none", "--student", "mlp-4", "--data", "digits", "--run-code")
    status, _, err = command("distill", "--method", name, *words)
    assert (status, err.count("\n")) == (2, 1)
    assert re.search(sentence, err), err
