import math

import pytest
import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.losses import ensemble_targets, kd, match_logits
from limbeck.systems.classification.kd import KD, missing_class_bias
from limbeck.tasks.classification import Classification
from limbeck.training.distiller import Distiller

Z, V = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[2.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("temperature", "loss"),
    [(1.0, 0.0615542193), (2.0, 0.0914167116), (4.0, 0.1031065636), (1000.0, 0.1110864)],
)
def test_the_loss_has_the_values_worked_out_by_hand(temperature, loss):
    assert kd(Z.double(), V.double(), temperature).item() == pytest.approx(loss, rel=1e-6)
    # float32 knows log-probabilities to about 1e-7, which the factor T^2 magnifies
    assert kd(Z, V, temperature).item() == pytest.approx(loss, abs=2e-7 * temperature**2)


@pytest.mark.parametrize(
    ("temperature", "gradient"),
    [
        (1.0, (-0.1217450864, 0.1382214921, -0.0164764057)),
        (2.0, (-0.1392729874, 0.1905086563, -0.0512356688)),
    ],
)
def test_the_gradient_has_the_values_worked_out_by_hand(temperature, gradient):
    z = Z.double().requires_grad_()
    kd(z, V.double(), temperature).backward()
    assert z.grad[0].tolist() == pytest.approx(gradient, abs=1e-9)


def test_value_and_gradient_follow_an_independent_formula():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    v = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    t = 3.0
    kd(z, v, t).backward()
    p, q = ((x.detach() / t).exp() for x in (v, z))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    assert kd(z, v, t).item() == pytest.approx((t * t / 7 * (p * (p / q).log()).sum()).item())
    assert torch.allclose(z.grad, t / 7 * (q - p), atol=1e-14)
    assert torch.allclose(z.grad.sum(1), torch.zeros(7, dtype=torch.float64), atol=1e-15)


def test_high_temperature_matches_logits():
    z = Z.double().requires_grad_()
    kd(z, V.double(), 1000.0).backward()
    assert z.grad[0].tolist() == pytest.approx((-1 / 9, 2 / 9, -1 / 9), abs=3e-4)
    assert match_logits(Z, V).item() == pytest.approx(1 / 9)


def test_a_student_equal_to_its_teacher_up_to_a_constant_has_no_loss():
    z = (V + 7.5).double().requires_grad_()
    loss = kd(z, V.double(), 4.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert z.grad.abs().max() < 1e-12


def test_repeating_the_batch_changes_nothing():
    assert kd(Z.repeat(4, 1), V.repeat(4, 1), 2.0).item() == pytest.approx(kd(Z, V, 2.0).item())


def test_no_gradient_reaches_the_teacher():
    v = V.clone().requires_grad_()
    kd(Z.clone().requires_grad_(), v, 2.0).backward()
    assert v.grad is None


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_worked_off_in_rows_the_loss_is_the_same_in_value_and_gradient(rows):
    generator = torch.Generator().manual_seed(0)
    z, v = (torch.randn(7, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    whole, parts = z.clone().requires_grad_(), z.clone().requires_grad_()
    (3 * kd(whole, v, 3.0)).backward()
    (3 * kd(parts, v, 3.0, rows=rows)).backward()
    assert kd(z, v, 3.0, rows=rows).item() == pytest.approx(kd(z, v, 3.0).item(), rel=1e-12)
    assert torch.allclose(whole.grad, parts.grad, atol=1e-14)


def test_half_precision_logits_are_softened_in_float32():
    assert kd(Z.half(), V.half(), 2.0).dtype == torch.float32


def test_ensembles_are_averaged_in_the_two_named_ways():
    one, two = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    arithmetic = ensemble_targets([one, two], 2.0)
    geometric = ensemble_targets([one, two], 2.0, "geometric")
    assert arithmetic[0, 0].item() == pytest.approx((s(1.0) + s(-0.5)) / 2)
    assert geometric[0, 0].item() == pytest.approx(s((2.0 - 1.0) / 2 / 2))
    assert geometric.sum().item() == pytest.approx(1.0)


def test_an_ensemble_teaches_with_its_mean_at_the_temperature():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(3)]
    batch = {"image": torch.randn(5, 1, 2, 2), "label": torch.tensor([0, 1, 2, 0, 1])}
    task = Classification(["a", "b", "c"])
    distiller = Distiller(nets[0], nets[1:], KD(temperature=5.0, weight=1.0), task, batch)
    x = batch["image"].flatten(1)
    p = sum((n[1](x).double() / 5).softmax(1) for n in nets[1:]) / 2
    q = (nets[0][1](x).double() / 5).softmax(1)
    expected = 25 * (p * (p / q).log()).sum() / 5
    assert distiller(batch)["kd"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_soft_weight_a_step_is_a_plain_cross_entropy_step():
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(2))
    batch = {"image": torch.randn(5, 1, 2, 2), "label": torch.tensor([0, 1, 2, 0, 1])}
    task = Classification(["a", "b", "c"])
    distiller = Distiller(student, teacher, KD(weight=0.0, label_weight=1.0), task, batch)
    terms = distiller(batch)
    assert list(terms) == ["labels"]
    plain = nn.functional.cross_entropy(student(batch["image"]), batch["label"])
    assert torch.equal(terms["labels"], plain)


def test_the_bias_of_a_missing_class_is_where_errors_are_fewest():
    torch.manual_seed(0)
    logits = torch.randn(300, 4)
    labels = (logits + torch.randn(300, 4)).argmax(1)
    logits[:, 2] -= 3.0
    offset = missing_class_bias(logits, labels, [2])

    def errors(b: float) -> int:
        moved = logits.clone()
        moved[:, 2] += b
        return int((moved.argmax(1) != labels).sum())

    best = min(errors(b) for b in torch.arange(-10, 10, 0.01).tolist())
    assert errors(offset) == best
    assert errors(offset) < errors(0.0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"temperature": -1.0}, r"KD\(temperature=-1.0\): input should be greater than 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temprature": 2.0}, "no parameter 'temprature'; did you mean temperature"),
        ({"weight": "much"}, r"KD\(weight='much'\)"),
    ],
)
def test_wrong_hyper_parameters_are_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        KD(**arguments)


def test_logits_of_different_classes_are_one_sentence():
    with pytest.raises(UserError, match="same classes"):
        kd(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(UserError, match="above 0, not -2"):
        kd(Z, V, -2)
