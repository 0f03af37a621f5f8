"""The README's commands run word for word, in a folder with a few small photographs."""

import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from limbeck import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    inline = re.findall(r"`(torchrun [^`]+)`", README)
    return [line for block in blocks for line in block.splitlines() if line] + inline


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("readme")
    generator = torch.Generator().manual_seed(0)
    for name, tint in (("cat", 60), ("dog", 160)):
        (root / "photos" / name).mkdir(parents=True)
        for number in range(12):
            noise = torch.randint(0, 80, (32, 32, 3), generator=generator) + tint
            image = Image.fromarray(noise.to(torch.uint8).numpy())
            image.save(root / "photos" / name / f"{number}.png")
    return root


def test_every_command_of_the_readme_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    ran = 0
    for command in commands():
        words = shlex.split(command, comments=True)
        if words[0] == "limbeck":
            monkeypatch.setattr(sys, "argv", words)
            with contextlib.suppress(SystemExit):
                cli.main()
            assert "limbeck: " not in capsys.readouterr().err, command
        elif words[0] == "torchrun":
            words[:1] = [sys.executable, "-m", "torch.distributed.run"]
            before = len(list((folder / "runs").iterdir()))
            subprocess.run(words, check=True, capture_output=True, timeout=180)
            assert len(list((folder / "runs").iterdir())) == before + 1
        else:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert words[0] == "make"
            assert f"\n{words[1]}:" in makefile
        ran += 1
    assert ran >= 12


def test_the_five_lines_of_python_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    samples = TensorDataset(torch.rand(60, 1, 4, 4), torch.arange(60) % 3)
    names = {
        "student": nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
        "teacher": nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)),
        "train_loader": DataLoader(samples, batch_size=20, shuffle=True),
        "test_loader": DataLoader(samples, batch_size=30),
    }
    exec(code, names)
    assert (folder / "runs" / "mine" / "report.html").is_file()
    assert capsys.readouterr().out.strip().endswith(str(names["done"].result["student"]))


def test_what_is_generated_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generate

    assert generate.readme() == README
    assert generate.results() == (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
