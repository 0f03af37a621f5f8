import copy
import json
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from limbeck import distillation, recipes
from limbeck.catalogue import system
from limbeck.errors import UserError
from limbeck.models import Input, build, profile
from limbeck.models.zoo import make, names
from limbeck.systems.networks import batchnorm
from limbeck.systems.networks.batchnorm import (
    BatchNorm,
    BatchNormalization,
    Binary,
    Curve,
    SigmoidMLP,
    at_inference,
    batch_norm,
    moments,
    population_statistics,
)
from limbeck.tasks.classification import Classification
from limbeck.training.folding import fold_batch_norm
from limbeck.training.method import Supervised
from limbeck.training.network import Network
from limbeck.training.progress import Voice

SHAPES = {
    "units": ((6, 3), nn.BatchNorm1d),
    "sequences": ((4, 3, 5), nn.BatchNorm1d),
    "maps": ((4, 3, 2, 5), nn.BatchNorm2d),
}
every_shape = pytest.mark.parametrize(("shape", "theirs"), SHAPES.values(), ids=SHAPES)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1)


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.ndim - 2))


# Algorithm 1


def test_two_values_of_a_channel_become_minus_one_and_one():
    layer = BatchNorm(1)
    assert layer(column(1, 3)).flatten().tolist() == pytest.approx([-0.999995, 0.999995], abs=1e-7)
    assert layer.running_mean.item() == pytest.approx(0.9 * 0 + 0.1 * 2)
    assert layer.running_var.item() == pytest.approx(0.9 * 1 + 0.1 * 2)
    assert layer.num_batches_tracked.item() == 1
    assert torch.equal(batch_norm(column(1, 3)), batch_norm(column(1, 3), eps=1e-5))


@every_shape
def test_value_and_gradients_are_those_of_an_independent_formula_in_python(shape, theirs):
    x, g = numbers(*shape), numbers(*shape, seed=1)
    gamma, beta, eps = numbers(3, seed=2), numbers(3, seed=3), 0.3
    inputs = [t.clone().requires_grad_() for t in (x, gamma, beta)]
    y = batch_norm(*inputs, eps)
    y.backward(g)
    for c in range(3):
        xs, gs = x[:, c].flatten().tolist(), g[:, c].flatten().tolist()
        m, scale = len(xs), gamma[c].item()
        mu = sum(xs) / m
        var = sum((v - mu) ** 2 for v in xs) / m
        root = math.sqrt(var + eps)
        hat = [(v - mu) / root for v in xs]
        # The six derivatives of section 3, in the order in which the paper derives them.
        d_hat = [v * scale for v in gs]
        d_var = sum(d * (v - mu) for d, v in zip(d_hat, xs, strict=True)) * -0.5 * root**-3
        d_mu = sum(-d / root for d in d_hat) + d_var * sum(-2 * (v - mu) for v in xs) / m
        d_x = [
            d / root + d_var * 2 * (v - mu) / m + d_mu / m for d, v in zip(d_hat, xs, strict=True)
        ]
        wanted = [scale * h + beta[c].item() for h in hat]
        assert y[:, c].flatten().tolist() == pytest.approx(wanted, rel=1e-12)
        assert inputs[0].grad[:, c].flatten().tolist() == pytest.approx(d_x, rel=1e-9, abs=1e-13)
        gamma_gradient = sum(a * h for a, h in zip(gs, hat, strict=True))
        assert inputs[1].grad[c].item() == pytest.approx(gamma_gradient, rel=1e-11)
        assert inputs[2].grad[c].item() == pytest.approx(sum(gs), rel=1e-11)


@every_shape
@pytest.mark.parametrize("affine", [True, False])
def test_first_and_second_derivatives_are_those_of_differences(shape, theirs, affine):
    inputs = [numbers(*shape).requires_grad_()]
    if affine:
        inputs += [numbers(3, seed=n).requires_grad_() for n in (1, 2)]
    assert torch.autograd.gradcheck(partial(batch_norm, eps=0.1), inputs)
    assert torch.autograd.gradgradcheck(partial(batch_norm, eps=0.1), inputs)


def test_an_output_has_mean_beta_and_variance_gamma_squared():
    x, gamma, beta, eps = 3 * numbers(8, 3, 4) + 1, numbers(3, seed=1), numbers(3, seed=2), 0.5
    mean, variance = moments(batch_norm(x, gamma, beta, eps))
    before = moments(x)[1]
    torch.testing.assert_close(mean, beta)
    torch.testing.assert_close(variance, gamma.square() * before / (before + eps))


def test_the_gradient_of_a_channel_sums_to_zero_and_is_orthogonal_to_what_it_normalises():
    for eps, most in ((1.0, math.inf), (0.0, 1e-12)):
        x = numbers(8, 3, 4).requires_grad_()
        y = batch_norm(x, eps=eps)
        (g,) = torch.autograd.grad(y, x, numbers(8, 3, 4, seed=1))
        assert g.sum((0, 2)).abs().max() < 1e-12
        along = (g * y.detach()).sum((0, 2)).abs().max()
        assert along <= most
        assert eps == 0 or along > 1e-3


def test_a_shift_changes_nothing_and_the_scale_of_the_weights_only_their_gradient():
    x, w, g = numbers(7, 5), numbers(5, 3, seed=1), numbers(7, 3, seed=2)
    torch.testing.assert_close(batch_norm(x + numbers(5, seed=3)), batch_norm(x))
    found = []
    for a in (1.0, 4.0):
        u, weight = x.clone().requires_grad_(), (a * w).requires_grad_()
        y = batch_norm(u @ weight, eps=0.0)
        found.append([y.detach(), *torch.autograd.grad(y, (u, weight), g)])
    (y, of_u, of_w), (y4, of_u4, of_w4) = found
    torch.testing.assert_close(y4, y)
    torch.testing.assert_close(of_u4, of_u)
    torch.testing.assert_close(of_w4, of_w / 4)


def test_only_what_is_asked_for_is_differentiated_and_the_rest_may_be_missing():
    x, gamma = numbers(4, 3), numbers(3).requires_grad_()
    batch_norm(x, gamma).sum().backward()
    assert x.grad is None
    assert gamma.grad.shape == (3,)
    only_shift = batch_norm(x, None, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(only_shift, batch_norm(x) + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_left_before_anything_is_summed(dtype):
    # A mean of 1000 and a deviation of 1 are told apart by neither sum in 16 bits.
    x = (1000 + 8 * numbers(512, 2)).to(dtype).requires_grad_()
    gamma = torch.ones(2, requires_grad=True)
    y = batch_norm(x, gamma)
    assert y.dtype == dtype
    assert torch.equal(y, batch_norm(x.detach().float()).to(dtype))
    y.sum().backward()
    assert (x.grad.dtype, gamma.grad.dtype) == (dtype, torch.float32)


# The layer beside torch's


def pair(theirs: type[nn.Module], **given) -> tuple[BatchNorm, nn.Module]:
    own, torchs = BatchNorm(3, **given).double(), theirs(3, **given).double()
    for n, tensor in enumerate([*own.parameters(), own.running_mean]):
        tensor.data.copy_(numbers(3, seed=n + 5))
    torchs.load_state_dict(own.state_dict())
    return own, torchs


@every_shape
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("affine", [True, False])
def test_the_layer_computes_and_remembers_what_torchs_does(shape, theirs, momentum, affine):
    own, torchs = pair(theirs, eps=0.01, momentum=momentum, affine=affine)
    for step in range(3):
        x = (2 * numbers(*shape, seed=step) + step).requires_grad_()
        other = x.detach().clone().requires_grad_()
        y, wanted = own(x), torchs(other)
        torch.testing.assert_close(y, wanted)
        for out in (y, wanted):
            out.backward(numbers(*shape, seed=step + 9))
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-9, atol=1e-12)
    for (name, mine), (same, its) in zip(
        own.state_dict().items(), torchs.state_dict().items(), strict=True
    ):
        assert name == same
        assert mine.dtype == its.dtype
        torch.testing.assert_close(mine, its)
    for mine, its in zip(own.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-9, atol=1e-12)
    own.eval(), torchs.eval()
    before = {k: v.clone() for k, v in own.state_dict().items()}
    x = numbers(*shape, seed=20).requires_grad_()
    torch.testing.assert_close(own(x), torchs(x))
    (mine,), (its,) = (torch.autograd.grad(layer(x).sum(), x) for layer in (own, torchs))
    torch.testing.assert_close(mine, its)
    assert all(torch.equal(v, before[k]) for k, v in own.state_dict().items())


def test_a_cumulative_average_weighs_all_batches_alike():
    layer = BatchNorm(1, momentum=None)
    for batch in (column(1, 3), column(2, 6), column(0, 4)):
        layer(batch)
    assert layer.running_mean.item() == pytest.approx((2 + 4 + 2) / 3)
    assert layer.running_var.item() == pytest.approx((2 + 8 + 8) / 3)


def test_weights_go_from_torchs_layer_to_this_one_and_back():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    model(numbers(4, 2, 5, 5).float())
    own = nn.Sequential(nn.Conv2d(2, 3, 3), BatchNorm(3))
    own.load_state_dict(model.state_dict())
    x = numbers(4, 2, 5, 5, seed=1).float()
    torch.testing.assert_close(own.eval()(x), model.eval()(x))
    model.load_state_dict(own.state_dict())


def test_maps_that_lie_channels_last_stay_so():
    x = numbers(4, 3, 5, 5).float().to(memory_format=torch.channels_last)
    own, torchs = BatchNorm(3), nn.BatchNorm2d(3)
    y = own(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, torchs(x))


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (lambda: BatchNorm(0), "at least 1 feature.* not 0"),
        (lambda: BatchNorm(2, eps=-1), "an eps of at least 0"),
        (lambda: BatchNorm(2, momentum=1.5), r"a momentum in \[0, 1\] or None"),
        (lambda: BatchNorm(2)(torch.zeros(4, 3)), r"with C = 2, not \(4, 3\)"),
        (lambda: BatchNorm(2)(torch.zeros(2)), r"not \(2,\)"),
        (lambda: BatchNorm(2)(torch.zeros(1, 2)), r"more than one value a channel.*\(1, 2\)"),
        (lambda: BatchNorm(2)(torch.zeros(1, 2, 1, 1)), "more than one value a channel"),
    ],
)
def test_wrong_settings_and_inputs_of_the_layer_are_one_sentence(run, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        run()
    assert "\n" not in str(caught.value)


def test_a_single_sample_is_answered_at_inference():
    layer = BatchNorm(2).eval()
    torch.testing.assert_close(layer(torch.ones(1, 2)), torch.ones(1, 2), rtol=0, atol=1e-5)


# Algorithm 2 and folding


def test_population_statistics_of_the_worked_example():
    for layer in (BatchNorm(1), nn.BatchNorm1d(1)):
        assert population_statistics(layer, [column(1, 3), column(2, 6)]) == 2
        assert layer.running_mean.item() == pytest.approx((2 + 4) / 2)
        assert layer.running_var.item() == pytest.approx(2 / (2 - 1) * (1 + 4) / 2)
        assert layer.num_batches_tracked.item() == 2


def deep(norm=BatchNorm) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), norm(3), nn.Sigmoid(), nn.Dropout(0.5), nn.Conv2d(3, 2, 3), norm(2)
    ).double()


@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm2d])
def test_each_layer_is_fed_by_layers_that_normalise_with_the_batch(norm):
    model = deep(norm)
    batches = [numbers(size, 1, 7, 7, seed=size) for size in (4, 4, 4)]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    model[3].eval()
    population_statistics(model, batches)
    assert [m.training for m in model] == [True, True, True, False, True, True]
    first = [model[0](x) for x in batches]
    second = [model[4](torch.sigmoid(batch_norm(u, model[1].weight, model[1].bias))) for u in first]
    for layer, fed in ((model[1], first), (model[5], second)):
        m = fed[0].numel() // fed[0].shape[1]
        means = torch.stack([u.mean((0, 2, 3)) for u in fed])
        variances = torch.stack([u.var((0, 2, 3), unbiased=False) for u in fed])
        torch.testing.assert_close(layer.running_mean, means.mean(0))
        torch.testing.assert_close(layer.running_var, m / (m - 1) * variances.mean(0))
        assert layer.track_running_stats
        assert not layer._forward_pre_hooks
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[k], state[k]) for k in parameters)


def test_batches_of_several_sizes_give_unbiased_variances():
    layer = BatchNorm(1)
    population_statistics(layer, [column(1, 3), column(0, 3, 6)])
    assert layer.running_mean.item() == pytest.approx((2 + 3) / 2)
    assert layer.running_var.item() == pytest.approx((2 + 9) / 2)


def test_a_model_may_be_run_in_its_own_way_and_its_layers_twice():
    layer = BatchNorm(1)
    halves = {"first": column(1, 3), "second": column(2, 6)}
    found = population_statistics(layer, [halves], lambda batch: [layer(x) for x in batch.values()])
    assert found == 1
    assert layer.num_batches_tracked.item() == 2
    assert (layer.running_mean.item(), layer.running_var.item()) == (3, 5)


def test_population_statistics_that_fail_leave_the_model_as_it_was():
    model = deep().eval()
    state = copy.deepcopy(model.state_dict())

    def broken():
        yield numbers(2, 1, 7, 7)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        population_statistics(model, broken())
    cases = [
        (model, [], "2 of 2 batch norms were not reached by 0 batches"),
        (model, [numbers(1, 1, 5, 5)], "a single value a channel"),
        (nn.Linear(2, 2), [], "Linear has no batch norm with running statistics"),
        (
            nn.Sequential(nn.BatchNorm1d(1, track_running_stats=False)),
            [column(1, 3)],
            "no batch norm with running statistics",
        ),
    ]
    for chosen, batches, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            population_statistics(chosen, batches)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model[1].track_running_stats


def test_the_affine_map_of_inference_and_its_folded_form_agree_on_the_worked_example():
    layer = BatchNorm(1, eps=1.0)
    for tensor, value in (
        (layer.weight, 3.0),
        (layer.bias, 1.0),
        (layer.running_mean, 4.0),
        (layer.running_var, 1.25),
    ):
        tensor.data.fill_(value)
    conv = nn.Conv2d(1, 1, 1, bias=False)
    conv.weight.data.fill_(2.0)
    model = nn.Sequential(conv, layer).eval()
    folded = fold_batch_norm(model)
    assert (folded[0].weight.item(), folded[0].bias.item()) == (4, -7)
    five = torch.full((1, 1, 1, 1), 5.0)
    assert model(five).item() == folded(five).item() == 13
    statistics = torch.tensor([4.0]), torch.tensor([1.25])
    direct = at_inference(column(10), *statistics, torch.tensor([3.0]), torch.tensor([1.0]), 1.0)
    assert direct.item() == 13


@pytest.mark.parametrize(
    "before",
    [
        lambda: nn.Linear(4, 6),
        lambda: nn.Conv1d(4, 6, 3, groups=2),
        lambda: nn.Conv2d(6, 6, 3, groups=6),
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
    ],
)
def test_the_layer_folds_into_what_torchs_folds_into(before):
    torch.manual_seed(1)
    layer = before()
    model = nn.Sequential(layer, BatchNorm(6), nn.Sigmoid())
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    x = torch.randn(8, inputs, *[5] * (layer.weight.ndim - 2))
    for _ in range(3):
        model(x + torch.randn_like(x))
    folded = fold_batch_norm(model)
    assert isinstance(folded[1], nn.Identity)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=0, atol=1e-5)


# The networks of section 4.1


def test_the_published_networks_have_the_published_size():
    grey = Input(1, (28, 28), (0.5,), (0.5,))
    classes = [str(n) for n in range(10)]
    hidden, out = 784 * 100 + 100 * 100 + 100 * 100, 100 * 10
    for name, more in (
        ("batchnorm-100-100-100", 3 * 2 * 100),
        ("batchnorm-100-100-100-without", 3 * 100),
    ):
        assert name in names()
        found = profile(build(name, classes, grey), (1, 28, 28), latency=False)
        assert found.parameters == hidden + out + 10 + more
        assert found.multiply_adds == hidden + out


def test_the_norm_stands_before_each_sigmoid_and_takes_the_place_of_the_bias():
    model = make("batchnorm-20-30", 10, 1, (8, 8))
    assert model.stages == ("stage1", "stage2")
    for stage, width in zip(model.stages, (20, 30), strict=True):
        kinds = [type(m) for m in getattr(model, stage)]
        assert kinds == [nn.Linear, BatchNorm, nn.Sigmoid]
        assert getattr(model, stage).linear.bias is None
        assert getattr(model, stage).linear.out_features == width
    assert model.fc.bias is not None
    without = make("batchnorm-20-30-without", 10, 1, (8, 8))
    assert [type(m) for m in without.stage1] == [nn.Linear, nn.Sigmoid]
    assert without.stage1.linear.bias is not None


def test_networks_with_and_without_the_norm_start_from_the_same_small_gaussian_weights():
    colour = Input(3, (8, 8), (0.5,) * 3, (0.5,) * 3)
    one, other = (
        build(name, "ab", colour, seed=4).model
        for name in ("batchnorm-200-200", "batchnorm-200-200-without")
    )
    assert one.stage1.linear.in_features == 3 * 8 * 8
    for path in ("stage1.linear", "stage2.linear", "fc"):
        weight = one.get_submodule(path).weight
        assert torch.equal(weight, other.get_submodule(path).weight)
        if path != "fc":
            assert weight.std().item() == pytest.approx(0.1, rel=0.02)
            assert abs(weight.mean().item()) < 0.002
    biases = [p for n, p in other.named_parameters() if n.endswith("bias")]
    assert len(biases) == 3
    assert all(b.abs().max() == 0 for b in biases)


def test_the_image_is_binary_wherever_it_is_brighter_than_the_mean_grey():
    view = torch.tensor([[0.0, 0.2], [0.4, 1.0]]).view(1, 1, 2, 2)
    seen = Input(1, (2, 2), (0.3,), (0.2,))(view)
    assert Binary()(seen).flatten().tolist() == [0, 0, 1, 1]
    model = SigmoidMLP(4, (5,), 3).eval()
    assert torch.equal(model(seen), model(3 * seen))


@pytest.mark.parametrize("name", ["batchnorm", "batchnorm-", "batchnorm-0", "batchnorm-10-with"])
def test_a_name_of_no_network_is_one_sentence(name):
    with pytest.raises(UserError, match=f"^{name} is no network of this paper: .*-100-without"):
        make(name, 10, 1, (8, 8))


# The method


def recipe(*words: str, preset: str = "smoke"):
    values = recipes.preset(system("batchnorm"), preset, "digits")
    small = [
        "student.model=batchnorm-12-10",
        "baseline.model=batchnorm-12-10-without",
        "data.limit=300",
        "method.unit=3",
        *(f"{role}.training.epochs=2" for role in ("student", "baseline")),
    ]
    return recipes.validate(recipes.assigned(values, [*small, *words]))


def start(path, *words: str):
    return distillation.start(recipe(*words), path, Voice(quiet=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped; batches of 60 of 299 images, so five steps an epoch."""
    return start(tmp_path_factory.mktemp("whole") / "run")


def lines(run) -> list[dict]:
    return [m for m in run.metrics() if "validation" in m]


def test_after_each_epoch_both_networks_are_measured_with_percentiles_of_one_unit(whole):
    found = lines(whole)
    assert [m["phase"] for m in found] == ["baseline"] * 2 + ["student"] * 2
    for line in found:
        measured = line["validation"]
        assert next(iter(measured)) == "accuracy"
        low, middle, high = (measured[f"percentile {p}"] for p in (15, 50, 85))
        assert low < middle < high
    # The plain network as it was delivered is the one of the last measurement.
    job = distillation._from_recipe(recipe(), Voice(quiet=True))
    network = distillation.load(whole.path / "baseline")
    batches = job.bench.task.batches(job.bench.validation, batch_size=64)
    images = torch.cat([batch["image"] for batch in batches.epoch(0)])
    seen = network.input(images).flatten(1) > 0
    state = {name: tensor.double() for name, tensor in network.model.state_dict().items()}
    first = seen.double() @ state["stage1.linear.weight"].T + state["stage1.linear.bias"]
    second = first.sigmoid() @ state["stage2.linear.weight"].T + state["stage2.linear.bias"]
    fed = second[:, 3]
    wanted = fed.quantile(torch.tensor([0.15, 0.5, 0.85], dtype=torch.float64)).tolist()
    measured = [found[1]["validation"][f"percentile {p}"] for p in (15, 50, 85)]
    assert measured == pytest.approx(wanted, abs=1e-5)


def test_the_report_shows_figure_1_and_what_it_comes_to(tmp_path):
    run = start(tmp_path / "run", "seeds=2")
    curves, table = run.findings()
    accuracy, without, with_norm = curves["charts"]
    assert set(accuracy["lines"]) == {"baseline", "student"}
    steps = [m["step"] for m in lines(run) if m["phase"] == "student@0"]
    assert [x for x, _ in accuracy["lines"]["student"]] == steps == [5, 10]
    assert list(without["lines"]) == [f"baseline {p} %" for p in (15, 50, 85)]
    assert list(with_norm["lines"]) == [f"student {p} %" for p in (15, 50, 85)]
    assert "without batch norm" in without["title"]
    rows = table["table"]
    assert [row[:2] for row in rows[1:]] == [
        [seed, kind]
        for seed in ("0", "1", "mean")
        for kind in ("without batch norm", "with batch norm")
    ]
    assert "with the population's statistics" in table["caption"]
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "Steps and drift" in page


def test_steps_and_drifts_are_read_off_the_metrics():
    def line(step, accuracy, low, middle, high, phase="student"):
        measured = {"accuracy": accuracy, "a": low, "b": middle, "c": high}
        return {"phase": phase, "step": step, "validation": measured}

    metrics = [
        {"phase": "student", "step": 5, "terms": {"labels": 1.0}},
        line(10, 0.5, -1.0, 0.0, 1.0),
        line(20, 0.9, -3.0, 0.5, 1.0),
        line(20, 0.1, 0.0, 0.0, 0.0, phase="baseline"),
        line(30, 0.8, -1.0, -0.25, 2.0),
    ]
    curve = Curve.read(metrics, "student", ["a", "b", "c"])
    assert curve.steps == [10, 20, 30]
    assert curve.reach(0.8) == 20
    assert curve.reach(0.95) is None
    assert curve.drifts() == (0.75, 2.0)


def test_at_the_end_the_population_takes_the_place_of_the_running_averages(tmp_path, whole):
    kept = start(tmp_path / "run", "method.population=false", "baseline=false")
    one, other = (distillation.load(run.path / "student").model for run in (kept, whole))
    parameters = dict(one.named_parameters())
    assert all(torch.equal(p, parameters[n]) for n, p in other.named_parameters())
    job = distillation._from_recipe(recipe(), Voice(quiet=True))
    network = distillation.load(kept.path / "student")
    batches = [b["image"] for b in job.bench.batches(60, 0).epoch(0)]
    assert population_statistics(network, batches) == 5
    wanted, found = network.model.state_dict(), other.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert not torch.equal(found["stage1.norm.running_mean"], one.stage1.norm.running_mean)


@pytest.mark.parametrize("phase", ["baseline", "student", "population"])
def test_a_run_stopped_in_any_phase_goes_on_to_the_same_bits(tmp_path, monkeypatch, whole, phase):
    loss, calls = Classification.loss, {"n": 0}

    def failing(*args):
        calls["n"] += 1
        # Two of rehearsal, then each network has one audit and ten steps.
        if calls["n"] == {"baseline": 2 + 9, "student": 2 + 11 + 8}.get(phase):
            raise RuntimeError("as if the power had gone")
        return loss(*args)

    def gone(*args):
        raise RuntimeError("as if the power had gone")

    with monkeypatch.context() as patch:
        if phase == "population":
            patch.setattr(batchnorm, "population_statistics", gone)
        else:
            patch.setattr(Classification, "loss", failing)
        with pytest.raises(RuntimeError):
            start(tmp_path / "run", "engine.checkpoint_seconds=0")
    again = distillation.resume(tmp_path / "run", Voice(quiet=True))
    for role in ("baseline", "student"):
        one, other = (
            distillation.load(run.path / role).model.state_dict() for run in (whole, again)
        )
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert [m["validation"] for m in lines(again)] == [m["validation"] for m in lines(whole)]
    assert json.dumps(again.findings()) == json.dumps(whole.findings())


def test_a_student_without_batch_norm_or_without_a_rival_is_watched_all_the_same(tmp_path):
    run = start(tmp_path / "run", "student.model=batchnorm-8-without", "baseline=false")
    assert {m["phase"] for m in lines(run)} == {"student"}
    curves, table = run.findings()
    assert len(curves["charts"]) == 2
    assert [row[1] for row in table["table"][1:]] == ["without batch norm"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.validation=0"], "none are held out; set data.validation"),
        (["student.model=mlp-20"], "mlp-20 has no torch.nn.Sigmoid; take batchnorm"),
        (["baseline.model=mlp-20"], "mlp-20 has no torch.nn.Sigmoid"),
        (
            ["student.training.batch_size=149"],
            r"needs more than one value a channel, which \(1, 12\) has not",
        ),
        (["method.unit=10"], r"unit=10\): the last sigmoid of batchnorm-12-10 has 10 units"),
    ],
)
def test_what_cannot_be_watched_is_said_before_anything_is_written(tmp_path, words, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        start(tmp_path / "run", *words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"percentiles": (50, 15)}, "rising order"),
        ({"percentiles": ()}, r"BatchNormalization\(percentiles=\(\)\)"),
        ({"percentiles": (101,)}, r"less than or equal to 100"),
        ({"unit": -1}, r"BatchNormalization\(unit=-1\)"),
        ({"units": 1}, "no parameter 'units'; did you mean unit"),
    ],
)
def test_wrong_hyper_parameters_are_one_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        BatchNormalization(**given)
    assert "\n" not in str(caught.value)


def test_of_feature_maps_a_channel_is_watched_at_all_positions_and_no_hook_stays():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.Conv2d(3, 2, 3), nn.Sigmoid())
    network, images = Network(model), numbers(4, 1, 6, 6).float()
    values, output = BatchNormalization(unit=1)._fed(network, lambda: network(images))
    assert torch.equal(values, model[:3](images)[:, 1].flatten().detach())
    assert torch.equal(output, model(images))
    assert not any(m._forward_pre_hooks for m in model)


def test_a_finding_about_a_single_percentile_has_no_spread():
    assert Curve([1, 2], [0.1, 0.2], [[0.0, 2.0]]).drifts() == (2.0, 0.0)


@pytest.mark.parametrize("preset", ["smoke", "small", "rate", "paper"])
def test_both_networks_of_a_preset_are_trained_alike(preset):
    for kind in ("digits", "mnist"):
        chosen = recipes.validate(recipes.preset(system("batchnorm"), preset, kind))
        assert chosen.student.training == chosen.baseline.training
        assert chosen.student.model + "-without" == chosen.baseline.model
        assert isinstance(chosen.method(), BatchNormalization)
        assert isinstance(chosen.method(), Supervised)
        training = chosen.student.training
        assert (training.optimiser, training.momentum, training.batch_size) == ("sgd", 0, 60)
    if preset == "paper":
        assert chosen.data.source == "mnist"
        assert chosen.student.model == "batchnorm-100-100-100"
        images = round(60_000 * (1 - chosen.data.validation))
        assert training.epochs * images / 60 == pytest.approx(50_000, rel=1e-3)


def test_on_mnist_a_few_steps_show_who_learns_first(real_data, tmp_path):
    values = recipes.preset(system("batchnorm"), "small", "mnist")
    source = f"mnist:{real_data('mnist')}"
    words = [f"data.source={source}", "data.limit=4780", "seeds=1"]
    words += [f"{role}.training.epochs=2" for role in ("student", "baseline")]
    chosen = recipes.validate(recipes.assigned(values, words))
    result = distillation.start(chosen, tmp_path / "run", Voice(quiet=True)).result()
    assert result["student"] > 0.7 > 0.5 > result["baseline"]
