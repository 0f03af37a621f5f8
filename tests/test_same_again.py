"""The same recipe and seed give the same bits, whatever they were started by and read with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limbeck import recipes
from limbeck.catalogue import system
from limbeck.data import folder as folders
from limbeck.distillation import start
from limbeck.training.progress import Voice

SHORT = (
    "engine.device=cpu",
    "teacher.model=cnn-8-16",
    "teacher.training.epochs=1",
    "student.model=cnn-4-8",
    "student.training.epochs=2",
    "baseline=false",
)


def made(path: Path, source: str, *words: str) -> dict[str, bytes]:
    """The weights of teacher and student, of a recipe carried out in Python."""
    values = recipes.preset(system("kd"), "smoke", "digits")
    values = recipes.merged(values, {"data": {"source": source}})
    recipe = recipes.validate(recipes.assigned(values, [*SHORT, *words]))
    start(recipe, path, Voice(quiet=True))
    return weights(path)


def weights(path: Path) -> dict[str, bytes]:
    names = "teacher", "student"
    return {name: (path / f"{name}.safetensors").read_bytes() for name in names}


def test_command_line_and_python_come_to_the_same_bits(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    words = [word for setting in SHORT for word in ("--set", setting)]
    asked = ("run", "kd", "--preset", "smoke", "--data", "digits", *words)
    assert command(*asked, "--out", tmp_path / "cli")[0] == 0
    ours = weights(tmp_path / "cli")
    assert made(tmp_path / "python", "digits") == ours
    assert made(tmp_path / "other", "digits", "seed=1")["student"] != ours["student"]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of images that are read from disk as they are needed."""
    noise = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(20):
            pixels = noise.integers(0, 120, (12, 10, 3)) + (120 if label == "light" else 0)
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(tmp_path / "photos" / label / f"{number}.png")
    monkeypatch.setattr(folders, "_RESIDENT", 0)
    return f"folder:{tmp_path / 'photos'}"


def test_readers_and_memory_of_the_teacher_change_no_bit(photos: str, tmp_path: Path) -> None:
    views = ("data.augment.flip=true", "data.augment.views=2", "student.training.batch_size=16")
    plain = made(tmp_path / "0" / "run", photos, *views, "engine.workers=0")
    two = made(tmp_path / "2" / "run", photos, *views, "engine.workers=2")
    assert plain == two
    for cache in ("empty", "full"):
        assert made(tmp_path / "cache" / cache, photos, *views, "engine.cache=full") == plain
