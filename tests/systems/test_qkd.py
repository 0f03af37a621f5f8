import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load as read
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from carrying import noise, struck
from limbeck import distillation, recipes
from limbeck.catalogue import system
from limbeck.errors import UserError
from limbeck.losses import kd, quantise_inputs, quantise_weights
from limbeck.models import Input, build, load, save
from limbeck.models.plain import CNN
from limbeck.models.weights import fit, to_bytes
from limbeck.systems.compression.qkd import (
    QKD,
    QuantisedConv2d,
    QuantisedLinear,
    calibrate,
    layers,
    quantised,
    size_in_bits,
)
from limbeck.tasks.classification import Classification
from limbeck.training.bench import Bench, Candidate, Rival
from limbeck.training.engine import Engine
from limbeck.training.network import Network
from limbeck.training.phases import Training
from limbeck.training.progress import Voice
from limbeck.training.run import Run
from limbeck.training.task import Answer
from limbeck.training.trainer import Trainer

CPU = Engine(device="cpu", checkpoint_seconds=0.0)
QUICK = Training(epochs=1, lr=0.05)


def net(widths=(4, 6, 6), seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CNN(widths, 3, 1)


# The quantisers.


def test_weights_have_the_values_and_gradients_worked_out_by_hand():
    w = torch.tensor([-2, -0.9, -0.4, 0.2, 0.6, 3], dtype=torch.float64, requires_grad=True)
    i = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    found = quantise_weights(w, i, 3)
    expected = torch.tensor([-1, -1, -1 / 3, 1 / 3, 2 / 3, 1], dtype=torch.float64)
    assert torch.allclose(found, expected, atol=1e-12)
    found.sum().backward()
    assert w.grad.tolist() == pytest.approx([0, 1, 1, 1, 1, 0], abs=1e-12)
    assert i.grad.item() == pytest.approx(1 / 6, abs=1e-9)


def test_inputs_have_the_values_worked_out_by_hand():
    x = torch.tensor([-0.3, 0.1, 0.55, 0.9, 2.0])
    found = quantise_inputs(x, torch.tensor(1.0), 2)
    assert found.tolist() == pytest.approx([0, 0, 2 / 3, 1, 1])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_value_and_gradient_follow_an_independent_formula(bits, signed):
    quantise = quantise_weights if signed else quantise_inputs
    n = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    x, out = noise(50).requires_grad_(), noise(50, seed=1)
    i = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    values, by_x, by_i = [], [], 0.0
    for v, g in zip(x.tolist(), out.tolist(), strict=True):
        low = -0.8 if signed else 0.0
        if low <= v <= 0.8:
            r = round(n * v / 0.8)
            values.append(0.8 * r / n)
            by_x.append(g)
            by_i += g * (r / n - v / 0.8)
        else:
            edge = 1.0 if v > 0.8 else low / 0.8
            values.append(0.8 * edge)
            by_x.append(0.0)
            by_i += g * edge
    found = quantise(x, i, bits)
    found.backward(out)
    assert found.tolist() == pytest.approx(values, abs=1e-12)
    assert x.grad.tolist() == pytest.approx(by_x, abs=1e-12)
    assert i.grad.item() == pytest.approx(by_i, rel=1e-9)


@pytest.mark.parametrize(("quantise", "most"), [(quantise_weights, 7), (quantise_inputs, 8)])
def test_quantising_scales_along_repeats_itself_and_has_few_values(quantise, most):
    x, i = noise(500), torch.tensor(1.3, dtype=torch.float64)
    once = quantise(x, i, 3)
    assert torch.allclose(quantise(4 * x, 4 * i, 3), 4 * once)
    assert torch.allclose(quantise(once, i, 3), once)
    assert len({round(v, 9) for v in once.tolist()}) == most


def test_many_bits_err_by_half_a_step_at_most():
    x, i = noise(500).clamp(-1, 1), torch.tensor(1.0, dtype=torch.float64)
    assert (quantise_weights(x, i, 16) - x).abs().max() <= 1 / (2 * (2**15 - 1)) + 1e-12


# Networks.


def test_every_layer_is_quantised_the_first_and_the_last_by_bits_of_their_own():
    found = layers(quantised(net(), 2, 3))
    assert [(m.weight_bits, m.input_bits) for m in found.values()] == [
        (8, 8), (2, 3), (2, 3), (8, 8)
    ]  # fmt: skip
    assert isinstance(next(iter(found.values())), QuantisedConv2d)
    assert isinstance(list(found.values())[-1], QuantisedLinear)
    assert len(layers(quantised(net(), 2, 2, edges=32))) == 2


def test_the_original_stays_and_its_weights_are_kept_in_full_precision():
    model = net()
    copied = quantised(model, 2, 2)
    assert not layers(model)
    state = copied.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    copied(noise(2, 1, 8, 8, dtype=torch.float32))
    assert all(torch.equal(v, copied.state_dict()[k]) for k, v in model.named_parameters())


def test_a_layer_answers_as_its_quantised_parts_do():
    model = quantised(net(), 3, 3)
    layer = list(layers(model).values())[1]
    with torch.no_grad():
        layer.input_interval.fill_(2.0)
    x = noise(2, 4, 5, 5, dtype=torch.float32).abs()
    weights = quantise_weights(layer.weight, layer.weight.abs().max(), 3)
    inputs = quantise_inputs(x, torch.tensor(2.0), 3)
    expected = F.conv2d(inputs, weights, layer.bias, layer.stride, layer.padding)
    assert torch.allclose(layer(x), expected)


def test_all_weights_and_intervals_get_gradients():
    model = quantised(net(), 2, 2)
    x = noise(8, 1, 8, 8, dtype=torch.float32)
    calibrate(model, lambda: model(x), least_error=True)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_intervals_begin_at_the_maximum_and_negative_inputs_get_the_signed_form():
    model = quantised(net(), 4, 4)
    x = noise(8, 1, 8, 8, dtype=torch.float32)
    calibrate(model, lambda: model(x))
    first, second, *_ = layers(model).values()
    assert bool(first.signed)
    assert not bool(second.signed)
    assert first.input_interval.item() == pytest.approx(x.abs().max().item())
    assert first.weight_interval.item() == pytest.approx(first.weight.abs().max().item())


def test_the_interval_of_least_error_errs_no_more_than_the_maximum():
    errors = []
    for least in (False, True):
        model = quantised(net(), 2, 2)
        x = noise(8, 1, 8, 8, dtype=torch.float32)
        calibrate(model, lambda model=model, x=x: model(x), least_error=least)
        errors.append(
            [float((m.weights() - m.weight).square().mean()) for m in layers(model).values()]
        )
    assert all(b <= a for a, b in zip(*errors, strict=True))
    assert sum(errors[1]) < sum(errors[0])


def test_an_interval_below_zero_is_used_as_the_least_and_can_come_back():
    layer = quantised(nn.Sequential(nn.Linear(3, 2)), 4, 4)[0]
    with torch.no_grad():
        layer.weight_interval.fill_(-0.5)
    out = layer.weights()
    assert torch.allclose(out.abs().max(), torch.tensor(1e-5))
    out.sum().backward()
    assert layer.weight_interval.grad.item() == pytest.approx(layer.weight.sign().sum().item())


def test_copies_and_channels_last_answer_the_same():
    model = quantised(net(), 4, 4)
    x = noise(4, 1, 8, 8, dtype=torch.float32)
    calibrate(model, lambda: model(x))
    model.eval()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    last = copied.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert torch.allclose(last, model(x), atol=1e-4)


def test_the_size_is_the_sum_of_all_bits():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 3, 1)
    )
    # Weights of 8, 2 and 8 bits; 7 biases, 8 numbers of the norm and 6 intervals of 32.
    assert size_in_bits(quantised(model, 2, 2)) == 18 * 8 + 36 * 2 + 6 * 8 + (7 + 8 + 6) * 32


@pytest.mark.parametrize("bits", [2, 3, 4, 16])
def test_packed_weights_reproduce_the_logits(bits):
    model = quantised(net(), bits, 4)
    x = noise(8, 1, 8, 8, dtype=torch.float32)
    calibrate(model, lambda: model(x), least_error=True)
    model.eval()
    state = read(to_bytes(model, packed=True))
    inner = list(layers(model))[1]
    number = layers(model)[inner].weight.numel()
    assert state[f"{inner}.weight"].dtype == torch.uint8
    assert len(state[f"{inner}.weight"]) == -(-number * bits // 8)
    other = quantised(net(seed=5), bits, 4).eval()
    fit(other, state, "student.safetensors")
    assert torch.equal(other(x), model(x))


def test_two_bits_lie_in_a_byte_from_its_highest_on():
    model = quantised(nn.Sequential(nn.Linear(5, 1, bias=False)), 2, 2, edges=2)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0, 0.0, 0.9, -0.1]]))
        model[0].weight_interval.fill_(1.0)
    # Levels 1, -1, 0, 1, 0 as 10 00 01 10, 01 and three empty pairs.
    assert read(to_bytes(model, packed=True))["0.weight"].tolist() == [0b10000110, 0b01000000]


def test_packed_weights_of_another_model_are_one_sentence():
    state = read(to_bytes(quantised(net(), 4, 2), packed=True))
    with pytest.raises(UserError, match="is not stored as"):
        fit(quantised(net(), 2, 2), state, "student.safetensors")


DIGITS = Input(1, (8, 8), (0.3,), (0.4,))


def test_a_quantised_network_comes_back_by_its_name(tmp_path):
    network = build("qkd-w2a3-resnet8", ["a", "b"], DIGITS, seed=1)
    x = noise(4, 1, 8, 8, dtype=torch.float32)
    calibrate(network, lambda: network(x))
    save(network, tmp_path / "student", {})
    again = load(tmp_path / "student")
    assert [(m.weight_bits, m.input_bits) for m in layers(again.model).values()][1] == (2, 3)
    assert torch.equal(again.eval()(x), network.eval()(x))


@pytest.mark.parametrize("name", ["qkd-w1a4-resnet8", "qkd-resnet8", "qkd-w4a4-qkd-w4a4-resnet8"])
def test_names_of_no_quantised_network_are_one_sentence(name):
    with pytest.raises(UserError, match="names no quantised network"):
        build(name, ["a", "b"], DIGITS)


def test_a_model_without_layers_is_one_sentence():
    with pytest.raises(UserError, match="no plain convolution or linear layer"):
        quantised(nn.Sequential(nn.ReLU()), 4, 4)


# The method.

TASK = Classification("abc")


def loader(n: int = 60, seed: int = 0) -> DataLoader:
    images = noise(n, 1, 8, 8, seed=seed, dtype=torch.float32)
    return DataLoader(TensorDataset(images, images.flatten(1)[:, :3].argmax(1)), 20, shuffle=True)


def bench(**given) -> Bench:
    train, held = loader(), loader(40, 1)
    return Bench(
        **{
            "task": TASK,
            "train": train,
            "transfer": train,
            "validation": held,
            "test": held,
            "candidates": [Candidate(Network(net((6, 8), seed=9)), QUICK)],
            "make_student": lambda seed: Network(net(seed=seed)),
            "training": Training(epochs=6, lr=0.05),
            "engine": CPU,
            **given,
        }
    )


def method(kind=QKD, **given):
    return kind(**{"weights": 2, "inputs": 2, "shares": (1, 1, 1), "pretraining": QUICK, **given})


def run(path, qkd, laid=None):
    laid = laid or bench()
    states = []

    def watched(phases):
        found = None
        while True:
            try:
                phase = phases.send(found)
            except StopIteration:
                return
            found = yield phase
            states.append(
                (phase, copy.deepcopy([m.state_dict() for m in phase.modules().values()]))
            )

    folder = Run.open(path) if path.exists() else Run.create(path, {"test": True})
    Trainer(folder, CPU, Voice(quiet=True)).work(watched(qkd.phases(laid)))
    return laid, states, folder


def same(one, other) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_soft_answers_have_the_value_worked_out_by_hand_in_both_directions():
    s, t = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for one, other in ((s, t), (t, s)):
        found = QKD().terms(Answer({"logits": one}, {}), Answer({"logits": other}, {}), {})
        assert found["soft answers"].item() == pytest.approx(0.4898373, abs=1e-6)
    assert F.cross_entropy(s, torch.tensor([0])).item() == pytest.approx(0.3132617, abs=1e-6)


def test_equal_answers_have_no_loss_and_no_gradient():
    z = noise(4, 3).requires_grad_()
    answers = Answer({"logits": z}, {}), Answer({"logits": z.detach().clone()}, {})
    loss = QKD().terms(*answers, {})["soft answers"]
    loss.backward()
    assert abs(loss.item()) < 1e-7
    assert z.grad.abs().max() < 1e-7


def test_in_co_study_each_loss_reaches_its_own_network_alone():
    laid, qkd = bench(), method(weight=2.0, temperature=3.0)
    student = qkd._quantised(laid, Network(net()))
    teacher = Network(net((6, 8), seed=9)).train()
    terms = qkd._together(laid, student, teacher)(batch := laid.sample())
    nets = (student, teacher)
    for name, own, other in (
        ("labels", *nets),
        ("soft answers", *nets),
        ("teacher's labels", *nets[::-1]),
        ("teacher's soft answers", *nets[::-1]),
    ):
        for network, wanted in ((own, True), (other, False)):
            gradients = torch.autograd.grad(
                terms[name], list(network.parameters()), retain_graph=True, allow_unused=True
            )
            assert any(g is not None and g.abs().sum() > 0 for g in gradients) == wanted, name
    assert terms["teacher's soft answers"].item() == pytest.approx(
        2 * _backward_kl(student(batch["image"]), teacher(batch["image"]), 3.0), rel=1e-3
    )


def _backward_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    """tau^2 KL(student || teacher), written out."""
    p = (student.double() / temperature).softmax(1)
    q = (teacher.double() / temperature).softmax(1)
    return float(temperature**2 * (p * (p / q).log()).sum(1).mean())


def test_the_teacher_learns_in_co_study_alone(tmp_path):
    teacher = build("resnet8", "abc", DIGITS, seed=9)
    laid, states, _ = run(tmp_path / "run", method(), bench(candidates=[Candidate(teacher, QUICK)]))
    names = [phase.name for phase, _ in states]
    assert names == [
        "teacher", "pretrained", "baseline", "direct", "self-study", "fixed", "co-study", "student"
    ]  # fmt: skip
    for phase, _ in states[2:]:
        assert ("teacher" in phase.modules()) == (phase.name == "co-study")
    before = laid.candidates[0].network.state_dict()
    assert same(before, states[0][1][0])
    studied = states[6][0].modules()["teacher"].state_dict()
    assert same(studied, states[6][1][-1])
    kinds = {
        key.rpartition(".")[2] for key in studied if not torch.equal(studied[key], before[key])
    }
    assert {"weight", "running_mean"} <= kinds


def test_weights_and_both_sorts_of_intervals_have_rates_of_their_own(tmp_path):
    _, states, _ = run(
        tmp_path / "run", method(weight_rate=3e-4, input_rate=2e-2, teacher_rate=0.5)
    )
    (update,) = next(p for p, _ in states if p.name == "co-study").updates
    rates = {name: update.settings_for.get(name, update.settings) for name in update.train}
    assert [rates[name].lr for name in rates] == [0.05, 3e-4, 2e-2, 0.5]
    assert [rates[name].weight_decay for name in rates] == [5e-4, 0, 0, 5e-4]
    owned = [id(p) for module in update.train.values() for p in module.parameters()]
    assert len(owned) == len(set(owned))
    student = update.train["weights"].network
    assert {id(p) for p in student.parameters()} < set(owned)


def test_intervals_move_in_training_and_every_way_has_the_same_epochs(tmp_path):
    laid, states, _ = run(tmp_path / "run", method())
    epochs = {phase.name: phase.epochs for phase, _ in states}
    assert epochs["baseline"] == epochs["direct"] == 6
    assert epochs["self-study"] + epochs["fixed"] == 6
    assert epochs["self-study"] + epochs["co-study"] + epochs["student"] == 6
    start = method()._quantised(bench(), Network(net()))
    for a, b in zip(layers(start).values(), layers(laid.students[0]).values(), strict=True):
        assert not torch.equal(a.input_interval, b.input_interval)
        assert not torch.equal(a.weight_interval, b.weight_interval)


def test_a_part_without_epochs_is_left_as_it_is(tmp_path):
    laid, _, _ = run(tmp_path / "run", method(shares=(0, 0, 1), rivals=("direct",)))
    direct = run(tmp_path / "other", kept := method(shares=(0, 0, 1), rivals=("direct",)))
    assert direct[0].students
    assert same(laid.students[0].state_dict(), kept.ways["direct", 0].state_dict())


PHASES = ("pretrained", "baseline", "direct", "self-study", "fixed", "co-study", "student")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "run", method())[0].students[0].state_dict()


@pytest.mark.parametrize("poisoned", PHASES)
def test_a_run_goes_on_in_any_phase_where_it_failed(tmp_path, poisoned, whole):
    class Failing(QKD):
        def phases(self, bench):
            phases, found = super().phases(bench), None
            while True:
                try:
                    phase = phases.send(found)
                except StopIteration:
                    return
                if phase.name == poisoned:
                    (update,) = phase.updates
                    # The audit's call and two steps before it.
                    update.terms = struck(update.terms, 4)
                found = yield phase

    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "run", method(Failing))
    again, _, _ = run(tmp_path / "run", method())
    assert same(again.students[0].state_dict(), whole)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"weights": 1}, "weights"),
        ({"inputs": 32}, "inputs"),
        ({"shares": (0, 0, 0)}, "parts of the epochs"),
        ({"shares": (-1, 1, 1)}, "parts of the epochs"),
        ({"start": "zero"}, "start"),
        ({"rivals": ("other",)}, "rivals"),
    ],
)
def test_wrong_hyper_parameters_are_one_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        QKD(**given)


@pytest.mark.parametrize(
    ("laid", "sentence"),
    [
        ({"candidates": []}, "one teacher, not 0"),
        ({"candidates": [Candidate(Network(net(seed=n))) for n in (1, 2)]}, "one teacher, not 2"),
        ({"rival": Rival(lambda seed: Network(net()), QUICK)}, "leave the baseline out"),
        ({"make_student": lambda seed: Network(quantised(net(), 4, 4))}, "no plain convolution"),
    ],
)
def test_what_does_not_fit_is_found_in_the_rehearsal(laid, sentence):
    with pytest.raises(UserError, match=sentence):
        method().rehearse(bench(**laid))


def test_the_smoke_run_delivers_a_quantised_student_and_says_how_large_it_is(tmp_path):
    content = recipes.preset(system("qkd"), "smoke", "digits")
    recipe = recipes.validate({**content, "engine": {"threads": 1, "device": "cpu"}})
    distillation.start(recipe, tmp_path / "run", Voice(quiet=True))
    student = load(tmp_path / "run" / "student")
    assert student.name == "qkd-w2a2-cnn-8-16"
    assert [m.weight_bits for m in layers(student.model).values()] == [8, 2, 8]
    ways, teacher = json.loads((tmp_path / "run" / "findings.json").read_text())["findings"]
    sizes = {row[0]: row[3] for row in ways["table"][1:]}
    assert sizes["QKD"] == f"{size_in_bits(student.model):,}"
    assert set(sizes) == {
        "student in full precision", "quantisation only", "fixed teacher from the start",
        "self-study, then fixed teacher", "QKD",
    }  # fmt: skip
    assert [row[0] for row in teacher["table"][1:]] == ["before co-study", "after co-study"]


def test_the_papers_setting_is_stated():
    recipe = recipes.validate(recipes.preset(system("qkd"), "paper", "cifar100"))
    assert (recipe.teachers[0].model, recipe.student.model) == ("resnet56", "resnet20")
    qkd = recipe.method()
    assert (qkd.weights, qkd.inputs, qkd.edges, qkd.shares) == (4, 4, 8, (30, 100, 70))
    assert qkd.epochs(recipe.student.training.epochs) == (30, 100, 70)
    network = build(
        "qkd-w4a4-resnet20", [str(n) for n in range(10)], Input(3, (32, 32), (0.5,) * 3, (0.5,) * 3)
    )
    intervals = 2 * len(layers(network.model))
    # ResNet-20 of He et al. has 0.27 M parameters: 272,474 with its projections.
    assert abs(sum(p.numel() for p in network.parameters()) - intervals - 270_000) < 5_000


def test_the_answers_of_the_other_direction_are_another_loss():
    s, t = noise(4, 3), 3 * noise(4, 3, seed=1)
    assert kd(s, t, 2.0).item() != pytest.approx(kd(t, s, 2.0).item(), rel=1e-2)
