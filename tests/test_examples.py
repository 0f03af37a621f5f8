"""The examples run, and the teacher keeps out of other people's optimisers and checkpoints."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import limbeck
from limbeck.errors import UserError

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str):
        for other in ("digits", name):
            sys.modules.pop(other, None)
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize("name", ["plain_loop", "lightning_module", "hugging_face_trainer"])
def test_an_example_trains_a_student_in_somebody_elses_loop(example, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Chance is 0.1, the teacher is right nine times in ten.
    assert example(name).main() > 0.75


def test_every_example_is_run():
    names = {p.stem for p in EXAMPLES.glob("*.py")} - {"digits"}
    assert names == {"plain_loop", "lightning_module", "hugging_face_trainer"}


def test_a_lightning_checkpoint_holds_the_student_and_not_the_teacher(example):
    module = example("lightning_module")
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    found = module.Distillation(limbeck.Distiller(student, teacher, limbeck.KD()))
    assert set(found.state_dict()) == {
        "distiller.student.model.weight",
        "distiller.student.model.bias",
    }
    (group,) = found.configure_optimizers().param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in student.parameters()}
    found.train()
    assert not teacher.training


def test_an_adapter_is_among_the_parameters_once_a_sample_has_shaped_it():
    class Regress(limbeck.Method):
        student_taps = ("0",)
        teacher_taps = ("0",)

        def build(self, student, teacher, batch):
            widths = student.features["0"].shape[1], teacher.features["0"].shape[1]
            self.adapter = nn.Linear(*widths)

        def terms(self, student, teacher, batch):
            wanted = teacher.features["0"]
            return {"regress": (self.adapter(student.features["0"]) - wanted).square().mean()}

    def net(width):
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

    batch = {"image": torch.rand(5, 4), "label": torch.tensor([0, 1, 2, 0, 1])}
    distiller = limbeck.Distiller(net(6), net(9), Regress(), sample=batch)
    sum(distiller(batch).values()).backward()
    assert distiller.method.adapter.weight.shape == (9, 6)
    assert distiller.method.adapter.weight.grad.abs().sum() > 0
    assert len(list(distiller.parameters())) == 6


def test_classes_that_differ_are_met_at_the_first_batch_with_a_sentence():
    distiller = limbeck.Distiller(nn.Linear(4, 3), nn.Linear(4, 5), limbeck.KD())
    with pytest.raises(UserError, match="same classes"):
        distiller({"image": torch.rand(2, 4), "label": torch.tensor([0, 1])})
