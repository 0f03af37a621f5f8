import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import limbeck
from carrying import noise
from limbeck import recipes
from limbeck.catalogue import system
from limbeck.errors import UserError
from limbeck.losses import factor_transfer
from limbeck.models.plain import CNN
from limbeck.systems.classification.factor_transfer import (
    FactorTransfer,
    Paraphraser,
    Translator,
)
from limbeck.systems.classification.kd import KD
from limbeck.tasks.classification import Classification
from limbeck.training.distiller import Distiller
from limbeck.training.engine import Engine
from limbeck.training.phases import Training
from limbeck.training.task import Answer


def net(widths=(4, 6), seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CNN(widths, 3, 1)


def batch() -> dict[str, torch.Tensor]:
    return {
        "image": noise(5, 1, 8, 8, dtype=torch.float32),
        "label": torch.tensor([0, 1, 2, 0, 1]),
    }


# The loss.


def test_the_loss_has_the_values_worked_out_by_hand():
    student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    assert factor_transfer(student, teacher).item() == pytest.approx(0.6)
    assert factor_transfer(student, teacher, norm=2).item() == pytest.approx((0.16 + 0.64) / 2)


@pytest.mark.parametrize("norm", [1, 2])
def test_value_and_gradient_follow_an_independent_formula(norm):
    student, teacher = noise(3, 2, 4, 5).requires_grad_(), noise(3, 2, 4, 5, seed=1)
    total, gradient = 0.0, torch.zeros_like(student)
    for b in range(3):
        s, t = student[b].detach().flatten(), teacher[b].flatten()
        length = math.sqrt(sum(float(x) ** 2 for x in s))
        difference = s / length - t / math.sqrt(sum(float(x) ** 2 for x in t))
        total += float((difference.abs() ** norm).sum()) / (3 * 40)
        outer = (difference.sign() if norm == 1 else 2 * difference) / (3 * 40)
        # The derivative of s / |s| is (1 - u u') / |s| with u = s / |s|.
        u = s / length
        gradient[b] = ((outer - u * (u @ outer)) / length).view(2, 4, 5)
    loss = factor_transfer(student, teacher, norm)
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert torch.allclose(student.grad, gradient, atol=1e-15)


def test_the_length_of_a_factor_changes_nothing():
    student, teacher = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    loss = factor_transfer(student, teacher)
    assert torch.allclose(factor_transfer(7 * student, teacher), loss)
    assert torch.allclose(factor_transfer(student, 0.1 * teacher), loss)


def test_factors_alike_have_no_loss_and_opposite_ones_twice_their_mean():
    teacher = noise(1, 2, 3, 3)
    assert factor_transfer(teacher, teacher) == 0
    unit = teacher / teacher.square().sum().sqrt()
    assert torch.allclose(factor_transfer(-teacher, teacher), 2 * unit.abs().sum() / 18)


def test_a_factor_of_zeros_is_no_accident():
    teacher = noise(1, 2, 3, 3)
    unit = teacher / teacher.square().sum().sqrt()
    student = torch.zeros_like(teacher).requires_grad_()
    loss = factor_transfer(student, teacher)
    loss.backward()
    assert torch.allclose(loss, unit.abs().sum() / 18)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_stays_within_its_bound(seed):
    loss = factor_transfer(noise(4, 8, 3, 3, seed=seed), noise(4, 8, 3, 3, seed=seed + 50))
    assert 0 < loss <= 2 / math.sqrt(72)


def test_no_gradient_flows_into_the_teachers_factor():
    teacher = noise(1, 2, 3, 3, seed=1).requires_grad_()
    factor_transfer(noise(1, 2, 3, 3).requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_factors_of_two_shapes_are_one_sentence():
    with pytest.raises(UserError, match=r"must be .* equal"):
        factor_transfer(noise(2, 3, 4, 4), noise(2, 3, 4, 5))


# The parts.


def test_parts_have_the_published_sizes():
    paraphraser, translator = Paraphraser(64, 0.5), Translator(64, 32)
    assert sum(p.numel() for p in paraphraser.parameters()) == 129_312
    assert sum(p.numel() for p in translator.parameters()) == 64_640
    features = noise(2, 64, 8, 8, dtype=torch.float32)
    assert paraphraser.encode(features).shape == (2, 32, 8, 8)
    assert paraphraser(features).shape == features.shape
    assert translator(features).shape == (2, 32, 8, 8)


def test_every_convolution_is_followed_by_a_leaky_relu():
    for part in (Paraphraser(4, 0.5).encoder, Paraphraser(4, 0.5).decoder, Translator(4, 2)):
        kinds = [type(m) for m in part]
        assert len(kinds) == 6
        assert all(kind is nn.LeakyReLU for kind in kinds[1::2])
        assert all(m.negative_slope == 0.1 and not m.inplace for m in list(part)[1::2])


# The method.

LAYERS = {"student_layers": ["stage1", "stage2"], "teacher_layers": ["stage2", "stage2"]}
TASK = Classification("abc")


def test_the_term_is_the_weighted_sum_of_distances_that_meet_at_the_smaller_size():
    student, teacher = net(), net((5, 8), seed=1)
    method = FactorTransfer(weight=3.0, **LAYERS)
    distiller = Distiller(student, teacher, method, TASK, batch())
    found = distiller(batch())["factor"]
    features = {}
    for model in (student, teacher):
        x = batch()["image"]
        for name, module in model.eval().named_children():
            if name.startswith("stage") or name == "0":
                x = module(x)
                features[model, name] = x
    expected = 0.0
    for translator, paraphraser, (one, other) in zip(
        method.translators, method.paraphrasers, method.pairs, strict=True
    ):
        wanted = paraphraser.encode(features[teacher, other])
        made = translator(features[student, one])
        size = wanted.shape[2:]
        made = nn.functional.adaptive_avg_pool2d(made, size)
        expected += factor_transfer(made, wanted).item()
    assert found.item() == pytest.approx(3 * expected, rel=1e-5)


def test_the_paraphraser_stays_while_student_and_translator_learn():
    student, teacher = net(), net((5, 8), seed=1)
    method = FactorTransfer(student_layers=["stage2"])
    distiller = Distiller(student, teacher, method, TASK, batch())
    kept = {k: v.clone() for k, v in method.paraphrasers.state_dict().items()}
    moved = {k: v.clone() for k, v in method.translators.state_dict().items()}
    first = next(student.parameters()).clone()
    optimiser = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.1)
    distiller.train()
    sum(distiller(batch()).values()).backward()
    optimiser.step()
    assert all(torch.equal(v, kept[k]) for k, v in method.paraphrasers.state_dict().items())
    assert not all(torch.equal(v, moved[k]) for k, v in method.translators.state_dict().items())
    assert not torch.equal(next(student.parameters()), first)


def test_without_weight_a_step_is_a_plain_cross_entropy_step():
    method = FactorTransfer(weight=0.0, student_layers=["stage1"])
    assert list(Distiller(net(), net(seed=1), method, TASK, batch())(batch())) == ["labels"]


def test_features_are_all_that_is_read_of_the_teacher():
    method = FactorTransfer(student_layers=["a"])
    one = Answer({}, {"a": noise(2, 3, 4, 4, dtype=torch.float32)})
    other = Answer({}, {"a": noise(2, 4, 4, 4, dtype=torch.float32)})
    method.build(one, other, {})
    assert list(method.terms(one, other, {})) == ["factor"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"student_layers": ["a", "b"], "teacher_layers": ["a"]}, "name as many of each"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"norm": 3}, "norm=3"),
        ({"reconstruction": "huber"}, "reconstruction"),
        ({"paraphraser": {"epoch": 3}}, "paraphraser.epoch"),
        ({"student_layers": []}, "student_layers"),
    ],
)
def test_wrong_hyper_parameters_are_one_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        FactorTransfer(**given)


def test_layers_without_maps_are_one_sentence():
    with pytest.raises(UserError, match=r"student's 'fc' features .* factors are made of feature"):
        Distiller(net(), net(seed=1), FactorTransfer(student_layers=["fc"]), TASK, batch())


# The run.


def loader() -> list[DataLoader]:
    images = noise(60, 1, 8, 8, dtype=torch.float32)
    labels = images.flatten(1)[:, :3].argmax(1)
    return [DataLoader(TensorDataset(images, labels), 20, shuffle=s) for s in (True, False)]


def run(path, method: limbeck.Method, **given):
    return limbeck.distill(
        net(),
        net((8, 12), seed=1),
        loader(),
        out=path,
        method=method,
        training=Training(epochs=2, lr=0.05),
        quiet=True,
        engine=Engine(device="cpu", checkpoint_seconds=0.0),
        **given,
    )


OWN = {"student_layers": ["stage2"], "weight": 5.0}
QUICK = Training(epochs=3, lr=0.05, batch_size=20)


def test_a_paraphraser_learns_to_put_the_teachers_features_together_again(tmp_path):
    method = FactorTransfer(paraphraser=Training(epochs=30, lr=0.2, batch_size=20), **OWN)
    done = run(tmp_path / "run", method, baseline=False)
    errors = [
        line["terms"]["reconstruction of stage2"]
        for line in done.run.metrics()
        if line["phase"] == "paraphraser" and "terms" in line
    ]
    teacher = net((8, 12), seed=1).eval()
    with torch.no_grad():
        x = torch.cat([image for image, _ in loader()[1]])
        maps = {}
        teacher.stage2.register_forward_hook(lambda m, i, o: maps.update(x=o))
        teacher(x)
    naive = (maps["x"] - maps["x"].mean(0)).abs().mean()
    assert errors[-1] < errors[0]
    assert errors[-1] < naive
    assert not len(method.paraphrasers), "a method is not changed by a run"


@pytest.mark.parametrize("poison", [5, 8])
def test_a_run_goes_on_in_either_stage_where_it_failed(tmp_path, poison, monkeypatch):
    whole = run(tmp_path / "whole", FactorTransfer(paraphraser=QUICK, **OWN))
    calls = {"n": 0}

    class Failing(FactorTransfer):
        def terms(self, student, teacher, batch):
            calls["n"] += poison == 8
            if calls["n"] == 8:
                raise RuntimeError("as if the power had gone")
            return super().terms(student, teacher, batch)

        def _error(self, found, wanted):
            calls["n"] += poison == 5
            if calls["n"] == 5:
                raise RuntimeError("as if the power had gone")
            return super()._error(found, wanted)

    with pytest.raises(RuntimeError):
        run(tmp_path / "run", Failing(paraphraser=QUICK, **OWN))
    again = run(tmp_path / "run", FactorTransfer(paraphraser=QUICK, **OWN), resume=True)
    for one, other in zip(again.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_soft_targets_add_up_with_it_and_its_first_stage_stays(tmp_path):
    method = KD(weight=1.0, label_weight=1.0) + FactorTransfer(paraphraser=QUICK, **OWN)
    done = run(tmp_path / "run", method)
    phases = {line["phase"] for line in done.run.metrics()}
    assert {"paraphraser", "baseline", "student"} <= phases
    terms = [
        line["terms"]
        for line in done.run.metrics()
        if line["phase"] == "student" and "terms" in line
    ]
    assert set(terms[0]) == {"labels", "kd", "factor"}


def test_the_published_pair_is_trained_as_published():
    recipe = recipes.validate(recipes.preset(system("factor-transfer"), "paper", "cifar10"))
    assert (recipe.teachers[0].model, recipe.student.model) == ("resnet56", "resnet20")
    method = recipe.method()
    assert isinstance(method, FactorTransfer)
    assert (method.weight, method.rate, method.norm) == (500, 0.5, 1)
    training = recipe.student.training
    assert (training.epochs, training.milestones, training.batch_size) == (164, (82, 123), 128)
    stage1 = method.training_of_paraphraser
    assert (stage1.epochs, stage1.lr, stage1.momentum) == (6, 0.1, 0.9)
