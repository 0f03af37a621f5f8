import itertools
import math

import pytest
import torch
from torch import nn

from limbeck import distillation, recipes
from limbeck.catalogue import system
from limbeck.errors import UserError
from limbeck.models import Input, build, load, profile
from limbeck.systems.networks import cifar
from limbeck.systems.networks.cifar import (
    DBN,
    ZCA,
    BernoulliRBM,
    FeatureNet,
    GaussianBernoulliRBM,
    Layout,
    PatchRBM,
    Remembered,
    TinyImages,
    contrastive_divergence,
    filter_grid,
    merge_patch_rbms,
    moments,
    network,
    reconstruction_error,
)
from limbeck.tasks.classification import Classification
from limbeck.training.checkpoint import read_state
from limbeck.training.progress import Voice

F64 = torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Whitening

CROSS = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])


def correlated(number: int = 50, d: int = 6) -> torch.Tensor:
    return draw(number, d) @ draw(d, d, seed=1) + 3


def test_whitening_of_a_cross_is_that_worked_out_by_hand():
    zca = ZCA(2).fit(CROSS)
    assert torch.allclose(zca.whitening, torch.diag(torch.tensor([0.6123724, 1.2247449])))
    assert torch.allclose(zca(CROSS[:1]), torch.tensor([[1.2247449, 0.0]]))
    assert torch.allclose(zca(CROSS[2:3]), torch.tensor([[0.0, 1.2247449]]))
    assert torch.allclose(zca.variances, torch.tensor([8 / 3, 2 / 3]))


def test_it_is_the_reports_formula_of_the_centred_data():
    x = correlated()
    zca = ZCA(6).double().fit(x)
    centred = (x - x.mean(0)).mT
    values, p = torch.linalg.eigh(centred @ centred.mT)
    wanted = math.sqrt(len(x) - 1) * p @ torch.diag(values**-0.5) @ p.mT
    assert torch.allclose(zca.whitening, wanted, atol=1e-6)
    y = zca(x)
    assert torch.allclose(y.mT @ y, (len(x) - 1) * torch.eye(6, dtype=F64), atol=1e-6)
    assert torch.allclose(torch.cov(y.mT), torch.eye(6, dtype=F64), atol=1e-6)
    assert torch.allclose(zca.whitening, zca.whitening.mT)
    assert torch.allclose(zca.inverse(y), x)
    product = zca.whitening @ zca.dewhitening
    assert torch.allclose(product, torch.eye(6, dtype=F64), atol=1e-6)


def test_dropped_components_are_those_of_least_variance_and_come_back_as_the_mean():
    x = correlated()
    zca = ZCA(6).double().fit(x, dropped=2)
    assert zca.kept == 4
    y = zca(x)
    assert torch.linalg.matrix_rank(torch.cov(y.mT), tol=1e-6) == 4
    values, p = torch.linalg.eigh(torch.cov(x.mT))
    assert zca.lost == pytest.approx(float(values[:2].sum() / values.sum()), rel=1e-6)
    on_kept = (x - x.mean(0)) @ p[:, 2:] @ p[:, 2:].mT + x.mean(0)
    assert torch.allclose(zca.inverse(y), on_kept)
    root = zca.remaining()
    assert torch.allclose(root @ root.mT, torch.cov(y.mT), atol=1e-6)


def test_eps_is_added_to_the_variance_within_the_root():
    x = correlated()
    zca = ZCA(6).double().fit(x, eps=0.5)
    values, p = torch.linalg.eigh(torch.cov(x.mT))
    wanted = p @ torch.diag((values + 0.5) ** -0.5) @ p.mT
    assert torch.allclose(zca(x), (x - x.mean(0)) @ wanted)
    assert torch.allclose(zca.inverse(zca(x)), x)
    root = zca.remaining()
    assert torch.allclose(root @ root.mT, torch.cov(zca(x).mT), atol=1e-6)


def test_batches_have_the_moments_of_the_whole():
    x = correlated(100) + 1000
    mean, covariance = moments(x.split(7))
    assert torch.allclose(mean, x.mean(0))
    assert torch.allclose(covariance, torch.cov(x.mT))
    whole, parts = ZCA(6).fit(x.float()), ZCA(6).fit(x.float().split(9))
    assert torch.allclose(whole.whitening, parts.whitening, rtol=1e-3)


def test_before_it_is_fitted_whitening_changes_nothing():
    x = draw(3, 4, dtype=torch.float32)
    assert torch.equal(ZCA(4)(x), x)


@pytest.mark.parametrize(
    ("x", "options", "sentence"),
    [
        (CROSS, {"dropped": 2}, "ZCA of 2 numbers drops 0 to 1 components .* not 2 and 0.0"),
        (CROSS, {"eps": -1.0}, "at least 0, not 0 and -1.0"),
        (CROSS[:1], {}, "takes two samples or more, not 1"),
        (CROSS[:0], {}, "takes two samples or more, not 0"),
        (CROSS[:2], {}, "1 of the 2 components to be kept have no variance; drop 1 of 2"),
        (torch.zeros(4, 3), {}, "ZCA of 2 numbers cannot read samples of 3"),
    ],
)
def test_what_cannot_be_whitened_is_one_sentence(x, options, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        ZCA(2).fit(x, **options)
    assert "\n" not in str(caught.value)
    ZCA(2).fit(CROSS[:2], eps=0.1)


# Machines


def binary(visible: int = 3, hidden: int = 2, seed: int = 0) -> BernoulliRBM:
    return filled(BernoulliRBM(visible, hidden), seed)


def gaussian(visible: int = 3, hidden: int = 2, seed: int = 0, **options) -> GaussianBernoulliRBM:
    return filled(GaussianBernoulliRBM(visible, hidden, **options), seed)


def filled(rbm, seed):
    rbm.double()
    for number, parameter in enumerate(rbm.parameters()):
        parameter.data = 0.7 * draw(*parameter.shape, seed=10 * seed + number)
    return rbm


def states(units: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=units)), dtype=F64)


def energy(rbm: BernoulliRBM, v: torch.Tensor, h: torch.Tensor) -> float:
    """The definition, one pair of units after the other."""
    w, b, c = rbm.weight, rbm.visible_bias, rbm.hidden_bias
    total = -sum(h[j] * c[j] for j in range(len(h)))
    for i in range(len(v)):
        sigma = rbm.sigma[i] if isinstance(rbm, GaussianBernoulliRBM) else 1.0
        if isinstance(rbm, GaussianBernoulliRBM):
            total = total + (v[i] - b[i]) ** 2 / (2 * sigma**2)
        else:
            total = total - v[i] * b[i]
        total = total - sum(v[i] / sigma * h[j] * w[i, j] for j in range(len(h)))
    return float(total)


SIGMA = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
either = pytest.mark.parametrize(
    "make", [binary, lambda: gaussian(sigma=SIGMA)], ids=["binary", "gaussian"]
)


def test_a_gaussian_machine_of_two_units_is_that_worked_out_by_hand():
    rbm = GaussianBernoulliRBM(1, 1)
    nn.init.constant_(rbm.weight, 0.5)
    nn.init.constant_(rbm.visible_bias, 1.0)
    v = torch.tensor([[2.0]])
    assert rbm(v).item() == pytest.approx(0.7310586, rel=1e-6)
    assert rbm.visible(torch.ones(1, 1)).item() == 1.5
    assert rbm.free_energy(v).item() == pytest.approx(0.5 - math.log(1 + math.e), rel=1e-6)
    assert rbm.free_energy(v).item() == pytest.approx(-0.8132617, rel=1e-6)


@either
def test_free_energy_and_hidden_probabilities_are_sums_over_all_hidden_states(make):
    rbm = make()
    for v in draw(4, 3) if isinstance(rbm, GaussianBernoulliRBM) else states(3)[:5]:
        weights = [math.exp(-energy(rbm, v, h)) for h in states(2)]
        assert rbm.free_energy(v[None]).item() == pytest.approx(-math.log(sum(weights)))
        wanted = sum(w * h for w, h in zip(weights, states(2), strict=True)) / sum(weights)
        assert torch.allclose(rbm(v[None])[0], wanted)


def test_visible_means_of_a_binary_machine_are_sums_over_all_visible_states():
    rbm = binary()
    for h in states(2):
        weights = [math.exp(-energy(rbm, v, h)) for v in states(3)]
        wanted = sum(w * v for w, v in zip(weights, states(3), strict=True)) / sum(weights)
        assert torch.allclose(rbm.visible(h[None])[0], wanted)


def test_the_visible_mean_of_a_gaussian_machine_is_where_its_energy_is_least():
    rbm = gaussian(sigma=SIGMA)
    for h in states(2):
        mean = rbm.visible(h[None])[0].detach()
        curve = [energy(rbm, mean + d, h) for d in (-1e-3, 0.0, 1e-3)]
        assert curve[1] < min(curve[0], curve[2])
        one = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
        rise = energy(rbm, mean + one, h) - energy(rbm, mean, h)
        assert rise == pytest.approx(1 / (2 * 0.5**2))


@either
def test_samples_have_the_probabilities_they_are_drawn_by_and_are_independent(make):
    rbm = make()
    torch.manual_seed(0)
    v, h = draw(1, 3).expand(20_000, 3), torch.tensor([[1.0, 0.0]], dtype=F64).expand(20_000, 2)
    drawn = rbm.sample_hidden(v)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(drawn.mean(0), rbm(v[:1])[0], atol=0.02)
    assert len({tuple(row) for row in drawn[:50].tolist()}) > 1
    assert torch.corrcoef(drawn.mT)[0, 1].abs() < 0.05
    seen = rbm.sample_visible(h)
    assert torch.allclose(seen.mean(0), rbm.visible(h[:1])[0], atol=0.05)
    if isinstance(rbm, GaussianBernoulliRBM):
        assert torch.allclose(seen.std(0), SIGMA, rtol=0.03)


def test_gibbs_sampling_ends_in_the_machines_own_distribution():
    rbm = binary()
    torch.manual_seed(1)
    v = rbm.gibbs(torch.zeros(20_000, 3, dtype=F64), steps=20)
    weights = torch.exp(-rbm.free_energy(states(3)))
    found = torch.stack([(v == state).all(1).double().mean() for state in states(3)])
    assert torch.allclose(found, weights / weights.sum(), atol=0.015)


def test_without_noise_visible_units_are_means_of_sampled_hidden_ones():
    rbm = gaussian()
    v = draw(40, 3)
    torch.manual_seed(2)
    away = rbm.gibbs(v, noise=False)
    means = torch.stack([rbm.visible(h[None])[0] for h in states(2)])
    assert torch.cdist(away, means).min(1).values.max() < 1e-9
    assert not away.requires_grad


@either
def test_the_gradient_of_contrastive_divergence_is_the_update_with_probabilities(make):
    rbm = make()
    data, away = draw(5, 3).round(), draw(5, 3, seed=1).round()
    contrastive_divergence(rbm, data, reconstruction=away).backward()
    sigma = rbm.sigma if isinstance(rbm, GaussianBernoulliRBM) else torch.ones(3, dtype=F64)

    def statistics(v):
        h = torch.sigmoid(rbm.hidden_bias + (v / sigma) @ rbm.weight)
        pairs = [[(v[:, i] / sigma[i] * h[:, j]).mean() for j in range(2)] for i in range(3)]
        pairs = torch.stack([torch.stack(row) for row in pairs])
        if isinstance(rbm, GaussianBernoulliRBM):
            return pairs, (v / sigma**2).mean(0), h.mean(0)
        return pairs, v.mean(0), h.mean(0)

    with torch.no_grad():
        wanted = [p - n for p, n in zip(statistics(data), statistics(away), strict=True)]
    found = (rbm.weight.grad, rbm.visible_bias.grad, rbm.hidden_bias.grad)
    for step, gradient in zip(wanted, found, strict=True):
        assert torch.allclose(-gradient, step)


def test_a_reconstruction_that_equals_the_data_gives_no_update():
    for rbm in (binary(), gaussian(), gaussian(learn_sigma=True)):
        v = draw(6, 3)
        contrastive_divergence(rbm, v, reconstruction=v).backward()
        assert all(p.grad.abs().max() == 0 for p in rbm.parameters())


def test_deviations_are_learnt_by_the_derivative_of_the_energy():
    rbm = gaussian(learn_sigma=True)
    assert "log_sigma" in dict(rbm.named_parameters())
    assert "log_sigma" in dict(gaussian().named_buffers())
    data, away = draw(4, 3), draw(4, 3, seed=1)
    contrastive_divergence(rbm, data, reconstruction=away).backward()

    def derivative(v):  # of the energy by sigma, hidden units by their probabilities
        s, b, pull = rbm.sigma, rbm.visible_bias, rbm(v) @ rbm.weight.mT
        return (-((v - b) ** 2) / s**3 + v / s**2 * pull).mean(0)

    wanted = (derivative(data) - derivative(away)) * rbm.sigma  # by its logarithm
    assert torch.allclose(rbm.log_sigma.grad, wanted)


def test_machines_side_by_side_are_machines_by_themselves():
    bank = gaussian(3, 2, copies=4)
    v, away = draw(4, 5, 3), draw(4, 5, 3, seed=1)
    total = contrastive_divergence(bank, v, reconstruction=away)
    total.backward()
    parts = 0.0
    for k in range(4):
        one = GaussianBernoulliRBM(3, 2).double()
        one.load_state_dict({name: value[k] for name, value in bank.state_dict().items()})
        assert torch.allclose(bank(v)[k], one(v[k]))
        assert torch.allclose(bank.free_energy(v)[k], one.free_energy(v[k]))
        loss = contrastive_divergence(one, v[k], reconstruction=away[k])
        loss.backward()
        parts += loss.item()
        assert torch.allclose(one.weight.grad, bank.weight.grad[k])
    assert total.item() == pytest.approx(parts)


def test_training_makes_the_data_likely():
    torch.manual_seed(0)
    rbm = BernoulliRBM(4, 4)
    data = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    optimiser = torch.optim.SGD(rbm.parameters(), lr=0.5)
    for _ in range(400):
        optimiser.zero_grad()
        contrastive_divergence(rbm, data.repeat(8, 1)).backward()
        optimiser.step()
    every = states(4).float()
    chance = torch.softmax(-rbm.free_energy(every), 0)
    own = [float(chance[(every == row).all(1)]) for row in data]
    assert min(own) > 0.15
    assert sum(own) > 0.8
    assert reconstruction_error(rbm, data) < 0.1


def test_a_wrong_deviation_is_one_sentence():
    with pytest.raises(UserError, match="a deviation above 0"):
        GaussianBernoulliRBM(2, 2, sigma=0.0)


def test_a_stack_trains_each_machine_on_the_probabilities_below():
    dbn = DBN(gaussian(5, 4), binary(4, 3, seed=1), binary(3, 2, seed=2))
    v = draw(6, 5)
    first, second, third = dbn.machines()
    assert torch.allclose(dbn.up(v, 2), second(first(v)))
    assert torch.allclose(dbn(v), third(second(first(v))))
    down = first.visible(second.visible(third.visible(dbn(v))))
    assert torch.allclose(dbn.reconstruct(v), down)
    torch.manual_seed(3)
    found = dbn.divergence(v, 1)
    torch.manual_seed(3)
    assert found.item() == contrastive_divergence(second, first(v)).item()
    found.backward()
    assert first.weight.grad is None
    assert second.weight.grad.abs().max() > 0
    with pytest.raises(UserError, match=r"machine 2 of the stack has 3 visible units, .* 4 hidden"):
        DBN(gaussian(5, 4), binary(3, 2))


# Patches

CIFAR = Layout(3, (32, 32), 8, 5)


def test_the_grid_of_five_by_five_has_stride_six_and_reaches_all_borders():
    assert CIFAR.machines == 26
    assert CIFAR.visible == 192
    assert CIFAR.corners == [(6 * i, 6 * j) for i in range(5) for j in range(5)]
    assert CIFAR.shrink == (4, 4)


@pytest.mark.parametrize(("patch", "size"), [(5, (32, 32)), (8, (32, 30)), (64, (32, 32))])
def test_patches_that_do_not_divide_the_image_are_one_sentence(patch, size):
    with pytest.raises(UserError, match="must be multiples of the patch's"):
        Layout(3, size, patch, 5)


@pytest.mark.parametrize("sigma", [1.0, torch.linspace(0.5, 2.0, 26, dtype=F64)[:, None]])
@pytest.mark.parametrize("merged_sigma", [1.0, 0.6])
def test_merged_hidden_units_have_the_inputs_they_had_on_their_patches(sigma, merged_sigma):
    bank = PatchRBM(CIFAR, hidden=3, sigma=sigma)
    filled(bank.rbm, 4)
    merged = merge_patch_rbms(bank, merged_sigma).double()
    assert merged.weight.shape == (3072, 78)
    images = draw(2, 3, 32, 32)
    found = merged.hidden_input(images.flatten(1)).view(2, 26, 3)
    deviations = bank.rbm.sigma.mean(1)
    for k, (top, left) in enumerate(CIFAR.corners):
        patch = images[:, :, top : top + 8, left : left + 8].flatten(1)
        wanted = patch / deviations[k] @ bank.rbm.weight[k] + bank.rbm.hidden_bias[k]
        assert torch.allclose(found[:, k], wanted, atol=1e-4)
        outside = torch.ones(3, 32, 32, dtype=torch.bool)
        outside[:, top : top + 8, left : left + 8] = False
        assert merged.weight[outside.flatten(), 3 * k : 3 * k + 3].abs().max() == 0
    small = images.view(2, 3, 8, 4, 8, 4).mean((3, 5)).flatten(1)
    wanted = small / deviations[25] @ bank.rbm.weight[25] + bank.rbm.hidden_bias[25]
    assert torch.allclose(found[:, 25], wanted, atol=1e-4)
    assert torch.allclose(torch.sigmoid(found), bank(images).transpose(0, 1), atol=1e-4)


def test_with_unit_deviations_a_weight_of_the_small_image_is_divided_by_sixteen():
    bank = PatchRBM(CIFAR, hidden=1)
    merged = merge_patch_rbms(bank)
    weight = merged.weight[:, 25].view(3, 32, 32)
    small = bank.rbm.weight[25, :, 0].view(3, 8, 8)
    assert torch.allclose(weight[1, 12:16, 20:24], (small[1, 3, 5] / 16).expand(4, 4))
    corner = merged.weight[:, 0].view(3, 32, 32)[:, :8, :8]
    assert torch.allclose(corner, bank.rbm.weight[0, :, 0].view(3, 8, 8))


def test_visible_biases_are_means_over_the_patches_at_a_pixel():
    layout = Layout(1, (4, 4), 2, 1)
    bank = PatchRBM(layout, hidden=1)
    nn.init.constant_(bank.rbm.visible_bias[0], 3.0)
    nn.init.constant_(bank.rbm.visible_bias[1], 7.0)
    bias = merge_patch_rbms(bank).visible_bias.view(4, 4)
    assert bias[1:3, 1:3].eq(3).all()
    assert int(bias.eq(7).sum()) == 12
    overlapping = PatchRBM(Layout(1, (4, 4), 2, 3), hidden=1)
    for k in range(9):
        nn.init.constant_(overlapping.rbm.visible_bias[k], float(k))
    bias = merge_patch_rbms(overlapping).visible_bias.view(4, 4)
    assert bias[0, 0] == 0
    assert bias[1, 1] == (0 + 1 + 3 + 4) / 4


def test_deviations_are_those_of_whitened_patches():
    layout = Layout(1, (4, 4), 2, 3)
    x = draw(400, 16) @ draw(16, 16, seed=1)
    zca = ZCA(16).double().fit(x, dropped=4, eps=0.2)
    cut = layout.cut(zca(x))
    found = layout.deviations(zca)
    assert found.shape == (10, 1)
    assert len(found[:9].unique()) == 1
    wanted = torch.stack([c.var(0).mean() for c in cut])
    assert found[0].item() == pytest.approx(wanted[:9].mean().sqrt().item(), rel=1e-5)
    assert found[9].item() == pytest.approx(wanted[9].sqrt().item(), rel=1e-5)


# Networks


def test_the_published_networks_have_the_published_sizes():
    input = Input(3, (32, 32), (0.5,) * 3, (0.25,) * 3)
    classes = [str(n) for n in range(10)]
    features = build("cifar-rbm-9984", classes, input)
    found = profile(features, (3, 32, 32), latency=False)
    assert found.parameters == 3072 * 9984 + 3072 + 9984 + 9984 * 10 + 10
    assert found.multiply_adds == 2 * 3072**2 + 3072 * 9984 + 9984 * 10
    features.model.zca.dropped.fill_(1000)
    found = profile(features, (3, 32, 32), latency=False)
    assert found.multiply_adds == 2 * 3072 * 2072 + 3072 * 9984 + 9984 * 10
    pixels = profile(build("cifar-softmax", classes, input), (3, 32, 32), latency=False)
    assert (pixels.parameters, pixels.multiply_adds) == (30_730, 30_720)


def test_logits_are_those_of_the_hidden_probabilities_of_whitened_images():
    model = network("cifar-rbm-12", 4, 1, (4, 4))
    assert isinstance(model, FeatureNet)
    x = draw(30, 1, 4, 4, dtype=torch.float32)
    model.zca.fit(x.flatten(1), eps=0.1)
    h = torch.sigmoid(model.zca(x.flatten(1)) @ model.rbm.weight)
    assert torch.allclose(model(x), h @ model.fc.weight.mT + model.fc.bias, atol=1e-6)
    assert model.stages == ("rbm",)


def test_labels_train_the_last_layer_of_features_and_all_of_a_network():
    x = draw(3, 1, 4, 4, dtype=torch.float32)
    trained = {}
    for kind in ("rbm", "net"):
        model = network(f"cifar-{kind}-12", 4, 1, (4, 4))
        model(x).square().sum().backward()
        trained[kind] = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained["rbm"] == {"fc.weight", "fc.bias"}
    assert trained["net"] == trained["rbm"] | {"rbm.weight", "rbm.hidden_bias"}


@pytest.mark.parametrize(
    ("name", "size", "sentence"),
    [
        ("cifar-rbn-12", (32, 32), "no network named 'cifar-rbn-12'; did you mean cifar-rbm-1040"),
        ("cifar-rbm-0", (32, 32), "no network named 'cifar-rbm-0'"),
        ("cifar-net", (32, 32), "no network named 'cifar-net'"),
        ("cifar-rbm-12", (224, 224), "all 150,528 numbers .* up to 12,288; give a smaller"),
    ],
)
def test_a_network_that_cannot_be_is_one_sentence(name, size, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        network(name, 10, 3, size)
    assert "\n" not in str(caught.value)


# Runs


def recipe(*words: str, preset: str = "smoke"):
    quick = [
        "data.limit=300",
        "student.training.epochs=2",
        "baseline.training.epochs=1",
        "student.model=cifar-rbm-20",
        "method.patch_epochs=2",
        "method.merged_epochs=2",
        "engine.checkpoint_seconds=0",
        "engine.device=cpu",
        *words,
    ]
    return recipes.validate(
        recipes.assigned(recipes.preset(system("cifar"), preset, "digits"), quick)
    )


def start(path, *words: str):
    return distillation.start(recipe(*words), path, Voice(quiet=True))


def start_bare(path, monkeypatch, *words: str):
    """A run that ends with its last phase: nothing is measured, drawn or timed."""
    monkeypatch.setattr(distillation, "_finish", lambda job, run, seconds: None)
    return start(path, *words)


def states_of(run) -> dict[str, torch.Tensor]:
    """All tensors that the phases left behind."""
    found = {}
    for path in sorted((run.path / "phases").glob("*.state")):
        for module, state in read_state(path)["modules"].items():
            found |= {f"{path.stem}/{module}/{name}": value for name, value in state.items()}
    return found


def last(run, name: str) -> dict[str, torch.Tensor]:
    """The network that a phase ended with, by the model's own names."""
    (path,) = (run.path / "phases").glob(f"*-{name}.state")
    state = read_state(path)["modules"]["student"]
    return {key.removeprefix("model."): value for key, value in state.items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(a, other[n]) for n, a in one.items())


class Killed(BaseException):
    """Stands for a process that dies."""


def failing(function, call: int):
    calls = {"n": 0}

    def work(*arguments, **options):
        calls["n"] += 1
        if calls["n"] == call:
            raise Killed
        return function(*arguments, **options)

    return work


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return start(tmp_path_factory.mktemp("cifar") / "whole")


@pytest.mark.parametrize(
    ("place", "name", "call"),
    [
        (ZCA, "fit", 1),
        (cifar, "contrastive_divergence", 14),
        (cifar, "merge_patch_rbms", 1),
        (cifar, "contrastive_divergence", 33),
        (Classification, "loss", 14),
    ],
    ids=["whiten", "patches", "merge", "merged", "student"],
)
def test_a_run_killed_in_any_phase_ends_with_the_same_bits(
    tmp_path, monkeypatch, whole, place, name, call
):
    with monkeypatch.context() as patched:
        patched.setattr(place, name, failing(getattr(place, name), call))
        with pytest.raises(Killed):
            start(tmp_path / "run")
    if name != "loss":
        monkeypatch.setattr(distillation, "_finish", lambda job, run, seconds: None)
    run = distillation.resume(tmp_path / "run", Voice(quiet=True))
    assert same(states_of(run), states_of(whole))
    assert run.metrics() == whole.metrics()
    if name == "loss":
        assert run.findings() == whole.findings()


def test_a_run_has_its_phases_and_delivers_a_student_that_can_be_loaded(whole):
    phases = list(dict.fromkeys(line["phase"] for line in whole.metrics()))
    assert phases == ["baseline", "patches", "merged", "student"]
    student = load(whole.path / "student")
    assert isinstance(student.model, FeatureNet)
    assert student.model.zca.kept == 54
    assert student.model.rbm.weight.abs().max() > 0
    titles = [found["title"] for found in whole.findings()]
    assert titles == ["Whitening", "Filters", "Reconstruction"]
    whitening, filters, errors = whole.findings()
    assert whitening["table"][1][:3] == ["64", "54", "10"]
    assert len(whitening["pictures"]) == 2
    assert len(filters["pictures"]) == 3
    assert {k: len(v) for k, v in errors["charts"][0]["lines"].items()} == {
        "patches": 2,
        "merged": 2,
    }


def test_seeds_share_the_whitening_and_differ_in_their_machines(tmp_path, monkeypatch):
    run = start_bare(tmp_path / "run", monkeypatch, "seeds=2", "baseline=false")
    names = [path.stem for path in (run.path / "phases").glob("*.state")]
    assert sum("whiten" in name for name in names) == 1
    one, other = last(run, "student@0"), last(run, "student@1")
    assert torch.equal(one["zca.basis"], other["zca.basis"])
    assert not torch.equal(one["rbm.weight"], other["rbm.weight"])


def test_remembered_features_give_the_student_that_fresh_ones_give(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(cifar, "REMEMBERED", 0)
    fresh = last(start_bare(tmp_path / "run", monkeypatch), "student")
    for name, value in last(whole, "student").items():
        assert torch.allclose(value.double(), fresh[name].double(), atol=1e-3), name


def test_augmented_images_are_never_remembered():
    asked = []

    def answer(batch):
        asked.append(len(batch["row"]))
        return batch["row"][:, None].float()

    rows = torch.tensor([7, 3, 5])

    def view(of):
        return type("View", (), {"of": of, "samples": 3, "rows": 9})()

    remembered = Remembered(answer, lambda: [{"row": rows[:2]}, {"row": rows[2:]}], 1)
    for chosen in ([0, 2], [1], [2, 1, 0]):
        batch = {"row": rows[chosen]}
        assert remembered(batch | {"view": view(1)}).flatten().tolist() == rows[chosen].tolist()
    assert asked == [2, 1]
    remembered({"row": rows, "view": view(4)})
    remembered({"row": rows})
    assert asked == [2, 1, 3, 3]


def test_fine_tuning_moves_the_machine_and_features_alone_do_not(tmp_path, monkeypatch, whole):
    tuned = start_bare(tmp_path / "tuned", monkeypatch, "method.fine_tune=true")
    net = start_bare(tmp_path / "net", monkeypatch, "student.model=cifar-net-20")
    frozen, one, other = (last(run, "student") for run in (whole, tuned, net))
    assert torch.equal(one["rbm.weight"], other["rbm.weight"])
    assert not torch.equal(one["rbm.weight"], frozen["rbm.weight"])
    assert torch.equal(one["zca.basis"], frozen["zca.basis"])
    merged = states_of(whole)["004-merged/rbm/weight"]
    assert torch.equal(frozen["rbm.weight"], merged)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["student.model=cnn-4-8"], "features of cifar-rbm-N or cifar-net-N and cannot fill cnn"),
        (
            ["student.model=cifar-rbm-25"],
            "10 machines cannot have 25 hidden units in equal parts; take cifar-rbm-20 or "
            "cifar-rbm-30",
        ),
        (["student.model=cifar-net-7"], "take cifar-net-10, or another grid"),
        (["method.dropped=64"], r"TinyImages\(dropped=64\): an image has 64 components"),
        (["method.patch=5"], "does not fit images of 8 x 8"),
        (["method.eps=-1"], r"TinyImages\(eps=-1"),
        (["method.sigma=two"], r"TinyImages\(sigma='two'\)"),
        (["method.patch_lr=0"], r"TinyImages\(patch_lr=0"),
        (["teacher.model=cnn-4-8"], "takes no teacher"),
    ],
)
def test_what_does_not_fit_is_one_sentence_before_anything_is_trained(tmp_path, words, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        start(tmp_path / "run", *words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_published_setting_is_that_of_the_paper_preset():
    paper = recipes.validate(recipes.preset(system("cifar"), "paper", "cifar10"))
    method = paper.method()
    assert isinstance(method, TinyImages)
    assert (method.patch, method.grid, method.dropped, method.eps) == (8, 5, 1000, 0)
    assert paper.student.model == "cifar-rbm-9984"
    assert 9984 % Layout(3, (32, 32), method.patch, method.grid).machines == 0


def test_a_grid_of_filters_has_grey_for_nothing_and_lines_between():
    filters = torch.zeros(3, 3, 2, 2)
    filters[0, 0, 0, 0], filters[1, :, 1, 1] = 5.0, -0.1
    picture = filter_grid(filters, columns=2, zoom=2)
    assert picture.shape == (9, 9, 3)
    assert picture.dtype == torch.uint8
    assert picture[0, 0].tolist() == picture[1, 1].tolist() == [255, 128, 128]
    assert picture[3, 8].tolist() == [1, 1, 1]
    assert picture[4, 2].tolist() == picture[2, 4].tolist() == [255, 255, 255]
    assert picture[5, 0].tolist() == [128, 128, 128]
    assert picture[6, 6].tolist() == [255, 255, 255]
    assert filter_grid(torch.zeros(1, 1, 4, 4)).shape == (4, 4)
