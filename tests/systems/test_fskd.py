import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import limbeck
from carrying import carry_out, noise, same
from limbeck import KD, recipes
from limbeck.catalogue import system
from limbeck.data.augment import Augment
from limbeck.data.data import Data, ResidentImages, Split
from limbeck.errors import UserError
from limbeck.models import Input, build, load, save
from limbeck.models.plain import CNN
from limbeck.models.resnet_cifar import SmallResNet
from limbeck.models.wide_resnet import WideResNet
from limbeck.systems.compression import fskd
from limbeck.systems.compression.fskd import (
    FSKD,
    Moments,
    Plain,
    Recombined,
    Sight,
    add_pointwise,
    blocks,
    fit_block,
    layers,
    least_squares,
    merge_pointwise,
    prune,
    surviving,
    surviving_together,
)
from limbeck.systems.compression.fskd.networks import folded
from limbeck.tasks.attributes import Attributes
from limbeck.tasks.classification import Classification
from limbeck.training.bench import Bench, Candidate, Rival
from limbeck.training.engine import Engine
from limbeck.training.folding import fold_batch_norm
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Solve, Training

CPU = Engine(device="cpu")
CAREFUL = Engine(device="cpu", checkpoint_seconds=0.0)
GREY = Input(1, (8, 8), (0.5,), (0.25,))
CLASSES = tuple("abc")
TASK = Classification(CLASSES)


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with statistics and scales as training leaves them, none of them 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            n = module.num_features
            module.weight.data = 0.5 + torch.rand(n, generator=generator)
            module.bias.data = torch.randn(n, generator=generator) / 3
            module.running_mean = torch.randn(n, generator=generator) / 3
            module.running_var = 0.5 + torch.rand(n, generator=generator)
    return model.eval()


def net(plan=(8, "M", 12, 10), norm: bool = True, seed: int = 0) -> Plain:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return lively(Plain(plan, 3, 1, norm=norm), seed)


def split(number: int = 60, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 3
    centres = torch.randint(40, 216, (3, 1, 8, 8), generator=torch.Generator().manual_seed(9))
    pixels = centres[labels] + torch.randint(-39, 40, (number, 1, 8, 8), generator=generator)
    return Split("train", ResidentImages(pixels.to(torch.uint8)), labels)


def sight_of(student: nn.Module, teacher: nn.Module, kept=None, sums: bool = False) -> Sight:
    """Two models that are folded already, with 1x1 convolutions added to the student."""
    over = blocks(student)
    grown = add_pointwise(student, [b.path for b in over]).eval()
    known = {path: torch.tensor(numbers) for path, numbers in (kept or {}).items()}
    return Sight(Network(grown, GREY), Network(teacher.eval(), GREY), known, over, sums)


@torch.no_grad()
def solved(sight: Sight, images: Split) -> list[dict]:
    found = []
    for block in sight.blocks:
        found.append(fit_block(sight, block, TASK, images))
        module = sight.student.model.get_submodule(block.path)
        module.pointwise.weight.copy_(found[-1]["q"].view_as(module.pointwise.weight))
    return found


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Least squares.


def test_q_and_its_residual_are_those_worked_out_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    y = torch.tensor([[2.0, 1.0], [4.0, 6.0], [9.0, 9.0]])
    q = least_squares(x.T @ x, x.T @ y)
    assert q.tolist() == [[2, 2], [1, 3]]
    maps = x.T.view(1, 2, 3, 1), y.T.view(1, 2, 3, 1)
    moments = Moments.of(*maps)
    assert moments.fit().tolist() == [[2, 2], [1, 3]]
    assert moments.residual(q) == pytest.approx(162)
    assert moments.residual(torch.eye(2)) == pytest.approx(1 + 1 + 16 + 16 + 162)


@pytest.mark.parametrize("wanted", [5, 3])
def test_q_and_residual_follow_an_independent_solution(wanted):
    own, target = noise(4, 5, 3, 6), noise(4, wanted, 3, 6, seed=1)
    x = own.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    y = target.permute(0, 2, 3, 1).reshape(-1, wanted).numpy()
    expected, residuals, *_ = np.linalg.lstsq(x, y, rcond=None)
    moments = Moments.of(own, target)
    assert np.allclose(moments.fit().numpy(), expected.T, atol=1e-12)
    assert moments.residual(moments.fit()) == pytest.approx(residuals.sum(), rel=1e-10)
    assert moments.rows == 4 * 3 * 6


def test_moments_add_up_over_batches():
    own, target = noise(6, 4, 3, 3), noise(6, 4, 3, 3, seed=1)
    whole = Moments.of(own, target)
    parts = Moments.of(own[:2], target[:2]) + Moments.of(own[2:], target[2:])
    assert torch.allclose(parts.fit(), whole.fit(), atol=1e-13)
    assert parts.residual(parts.fit()) == pytest.approx(whole.residual(whole.fit()))
    assert parts.rows == whole.rows


def test_channels_that_depend_on_each_other_get_the_shortest_q():
    own, target = noise(1, 7, 2, 2), noise(1, 7, 2, 2, seed=1)
    x, y = (m.permute(0, 2, 3, 1).reshape(-1, 7).numpy() for m in (own, target))
    moments = Moments.of(own, target)
    q = moments.fit()
    assert torch.isfinite(q).all()
    assert moments.residual(q) < 1e-12 * moments.square
    assert np.allclose(q.numpy(), (np.linalg.pinv(x) @ y).T, atol=1e-7)


def test_a_channel_that_is_always_zero_gets_no_weight():
    own, target = noise(5, 3, 4, 4), noise(5, 3, 4, 4, seed=1)
    own[:, 1] = 0
    q = Moments.of(own, target).fit()
    assert q[:, 1].tolist() == [0, 0, 0]
    assert q[:, [0, 2]].abs().min() > 0


def test_rows_of_float32_are_summed_in_float64():
    own = (1000 + noise(8, 2, 16, 16, dtype=torch.float32) / 100).contiguous()
    moments = Moments.of(own, own)
    assert moments.gram.dtype == torch.float64
    assert torch.allclose(moments.fit(), torch.eye(2, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: least_squares(torch.zeros(2, 3), torch.zeros(2, 3)), r"\(c, c\) and \(c, k\)"),
        (lambda: Moments.of(noise(2, 3, 4, 4), noise(2, 3, 4, 5)), "height and width must agree"),
        (lambda: Moments.of(noise(2, 3), noise(2, 3)), "height and width must agree"),
    ],
)
def test_shapes_that_do_not_fit_are_one_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


# Which filters are kept.


@pytest.mark.parametrize(
    ("scores", "ratio", "expected"),
    [
        ([4.0, 1.0, 3.0, 2.0], 0.5, [0, 2]),
        ([4.0, 1.0, 3.0, 2.0], 0.75, [0]),
        ([4.0, 1.0, 3.0, 2.0], 0.2, [0, 1, 2, 3]),
        ([1.0, 1.0, 1.0, 2.0], 0.5, [3]),
        ([1.0, 1.0, 1.0, 1.0], 0.5, [0, 1]),
        ([1.0, 1.0], 0.9, [0]),
    ],
)
def test_a_filter_survives_that_is_above_the_last_one_to_go(scores, ratio, expected):
    assert surviving(torch.tensor(scores), ratio).tolist() == expected


def test_one_threshold_for_all_layers_leaves_each_its_best_filter():
    scores = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([3.0, 0.3, 4.0, 5.0])}
    found = {p: k.tolist() for p, k in surviving_together(scores, 0.5).items()}
    assert found == {"a": [1], "b": [0, 2, 3]}


# Which networks can be pruned, and that they then are what they were without these filters.


class Viewed(nn.Module):
    """Flattened by hand, as many networks are."""

    def __init__(self, shape: bool) -> None:
        super().__init__()
        self.shape = shape
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 3)
        self.fc = nn.Linear(4 * 16, 3)

    def forward(self, x):
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc(x.reshape(x.shape[0], -1) if self.shape else x.view(x.size(0), -1))


OWN = {
    "plain": (lambda: Plain((8, "M", 12, 10), 3, 1, norm=True), 3),
    "cnn": (lambda: CNN((6, 8), 3, 1), 2),
    "resnet": (lambda: SmallResNet(14, (8, 8, 12, 16), 3, 1), 6),
    "wide": (lambda: WideResNet(10, 1, 3, 1), 3),
    "viewed": (lambda: Viewed(False), 2),
    "shaped": (lambda: Viewed(True), 2),
}
NAMED = {"vgg8": 5, "densenet-bc-22-12": 9, "torchvision:resnet18": 8}


@pytest.mark.parametrize("name", [*OWN, *NAMED])
@torch.no_grad()
def test_a_pruned_network_is_the_whole_one_whose_readers_are_blind_to_the_rest(name):
    coloured, side = (3, 16) if name in NAMED else (1, 8)
    if name in NAMED:
        input = Input(3, (side, side), (0.5,) * 3, (0.5,) * 3)
        model, count = build(name, CLASSES, input, seed=1).model, NAMED[name]
    else:
        model, count = OWN[name][0](), OWN[name][1]
    lively(model)
    able = [layer for layer in layers(model) if not layer.obstacle]
    assert len(able) == count
    generator = torch.Generator().manual_seed(4)
    kept, blind = {}, copy.deepcopy(model)
    for layer in able:
        width = model.get_submodule(layer.path).out_channels
        chosen = torch.randperm(width, generator=generator)[: (width + 1) // 2]
        kept[layer.path] = chosen
        gone = [c for c in range(width) if c not in chosen.tolist()]
        for path in layer.readers:
            weight = blind.get_submodule(path).weight
            pixels = weight.shape[1] // width
            for c in gone:
                weight[:, c * pixels : (c + 1) * pixels] = 0
    small = prune(model, kept)
    images = noise(2, coloured, side, side, dtype=torch.float32)
    assert torch.allclose(small(images), blind(images), atol=1e-4)
    assert parameters(small) < parameters(model)
    for layer in able:
        assert small.get_submodule(layer.path).out_channels == len(kept[layer.path])


def test_what_stands_in_the_way_of_pruning_is_said():
    reasons = {layer.path: layer.obstacle for layer in layers(SmallResNet(8, (4, 4, 6, 8), 3, 1))}
    assert reasons["stage1.0.conv1"] == ""
    assert reasons["stage1.0.conv2"] == reasons["stem.0"] == "it is added to other maps"
    parted = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Softmax(1))
    assert [layer.obstacle for layer in layers(parted)] == [
        "1 reads it in groups",
        "its filters see groups of channels",
    ]
    crossed = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Softmax(1), nn.Conv2d(4, 4, 3))
    assert layers(crossed)[0].obstacle == "1 (Softmax) reads it"
    assert layers(crossed)[1].obstacle == "it is what the network puts out"
    once = nn.Conv2d(3, 3, 3)
    assert layers(nn.Sequential(once, once))[0].obstacle == "it is used more than once"
    by_column = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(6, 6), nn.Flatten())
    assert layers(by_column)[0].obstacle == "1 reads other than its channels"


def test_what_cannot_be_traced_or_lose_filters_is_one_sentence():
    class Choosing(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match=r"Choosing cannot be pruned.*no fixed sequence"):
        layers(Choosing())
    model = SmallResNet(8, (4, 4, 6, 8), 3, 1)
    with pytest.raises(UserError, match=r"stem\.0 cannot lose filters: it is added"):
        prune(model, {"stem.0": torch.tensor([0])})
    with pytest.raises(UserError, match=r"there is no convolution 'stem\.9'"):
        prune(model, {"stem.9": torch.tensor([0])})
    with pytest.raises(UserError, match="without a filter"):
        prune(model, {"stage1.0.conv1": torch.tensor([], dtype=torch.int64)})


def test_pruning_leaves_the_whole_network_as_it_was():
    model = net()
    before = copy.deepcopy(model.state_dict())
    small = prune(model, {"features.0": torch.tensor([5, 2])})
    assert torch.equal(small.features[0].weight, before["features.0.weight"][[5, 2]])
    assert torch.equal(small.features[1].running_var, before["features.1.running_var"][[5, 2]])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_vgg_16_has_the_published_parameters_before_and_after_pruning():
    input = Input(3, (32, 32), (0.5,) * 3, (0.5,) * 3)
    classes = [str(c) for c in range(10)]
    whole = build("fskd-plain16", classes, input, seed=0).model
    assert parameters(whole) == 14_715_594
    paths = [layer.path for layer in layers(whole)]
    assert len(paths) == 13
    halved = [paths[n - 1] for n in (1, 8, 9, 10, 11, 12, 13)]
    scores = {p: whole.get_submodule(p).weight.detach().abs().sum((1, 2, 3)) for p in halved}
    small = prune(whole, {p: surviving(s, 0.5) for p, s in scores.items()})
    assert parameters(small) == 5_256_554
    name = fskd.name_of("fskd-plain16", [small.get_submodule(p).out_channels for p in paths])
    assert parameters(build(name, classes, input).model) == 5_256_554


# The added convolutions.


def test_identity_convolutions_change_nothing_and_draw_no_numbers():
    model = fold_batch_norm(net())
    state = torch.get_rng_state()
    grown = add_pointwise(model, [b.path for b in blocks(model)])
    assert torch.equal(torch.get_rng_state(), state)
    images = noise(3, 1, 8, 8, dtype=torch.float32)
    assert torch.equal(grown(images), model(images))
    assert parameters(grown) - parameters(model) == 8**2 + 12**2 + 10**2


def test_a_student_equal_to_its_teacher_keeps_the_identity():
    model = fold_batch_norm(net())
    sight = sight_of(model, copy.deepcopy(model))
    for found in solved(sight, split()):
        assert torch.allclose(found["q"], torch.eye(len(found["q"])), atol=1e-4)
        assert found["after"] < 1e-10
    images = noise(3, 1, 8, 8, dtype=torch.float32)
    assert torch.allclose(sight.student.model(images), model(images), atol=1e-4)


def test_filters_kept_of_the_first_convolution_need_no_repair():
    whole = fold_batch_norm(net())
    kept = {"features.0": [1, 4, 6]}
    small = prune(whole, {"features.0": torch.tensor(kept["features.0"])})
    first, second, *_ = solved(sight_of(small, whole, kept), split())
    assert torch.allclose(first["q"], torch.eye(3), atol=1e-5)
    assert first["before"] < 1e-12
    assert second["before"] > 2 * second["after"] > 0


@torch.no_grad()
def test_filters_that_were_mixed_are_sorted_out():
    whole = fold_batch_norm(net())
    mixing = torch.eye(12) + noise(12, 12, dtype=torch.float32) / 8
    mixed = copy.deepcopy(whole)
    conv = mixed.features[4]
    conv.weight.copy_(torch.einsum("oc,cikl->oikl", mixing, conv.weight))
    conv.bias.copy_(mixing @ conv.bias)
    sight = sight_of(mixed, whole)
    found = solved(sight, split())[1]
    assert torch.allclose(found["q"], mixing.inverse(), atol=1e-3)
    assert found["before"] > 1e-2
    assert found["after"] < 1e-9
    images = noise(3, 1, 8, 8, dtype=torch.float32)
    repaired = merge_pointwise(sight.student.model)
    assert torch.allclose(repaired(images), whole(images), rtol=1e-3, atol=1e-4)


def test_no_fit_leaves_more_than_the_identity_did():
    whole = fold_batch_norm(net())
    kept = {"features.0": [0, 2, 5], "features.4": [1, 3, 4, 9], "features.7": [0, 1, 2]}
    small = prune(whole, {p: torch.tensor(k) for p, k in kept.items()})
    for found in solved(sight_of(small, whole, kept), split(7)):
        assert found["after"] <= found["before"] + 1e-12


@torch.no_grad()
def test_each_fit_sees_the_corrections_before_it_and_the_kept_channels_before_the_activation():
    whole = fold_batch_norm(net(seed=2))
    kept = {"features.0": [6, 1, 3], "features.4": [9, 2, 7, 4, 0]}
    small = prune(whole, {p: torch.tensor(k) for p, k in kept.items()})
    images = split(20)
    fed = ((images.images.pixels.double() / 255 - 0.5) / 0.25).double()
    teacher, student = copy.deepcopy(whole).double(), copy.deepcopy(small).double()
    found = solved(sight_of(small, whole, kept), images)
    t, s = fed, fed
    places = {0: kept["features.0"], 4: kept["features.4"], 7: list(range(10))}
    fits = iter(found)
    for number, layer in enumerate(teacher.features):
        t, s = layer(t), student.features[number](s)
        if number in places:
            width = len(places[number])
            x = s.permute(0, 2, 3, 1).reshape(-1, width).numpy()
            y = t[:, places[number]].permute(0, 2, 3, 1).reshape(-1, width).numpy()
            q = np.linalg.lstsq(x, y, rcond=None)[0].T
            assert np.allclose(next(fits)["q"].double().numpy(), q, rtol=1e-3, atol=1e-3)
            s = torch.einsum("oc,bchw->bohw", torch.tensor(q), s)


@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_merging_changes_no_answer_and_leaves_the_pruned_size(norm):
    small = fold_batch_norm(net(norm=norm))
    grown = add_pointwise(small, [b.path for b in blocks(small)]).eval()
    for number, module in enumerate(m for m in grown.modules() if isinstance(m, Recombined)):
        module.pointwise.weight.add_(
            noise(*module.pointwise.weight.shape, seed=number, dtype=torch.float32) / 3
        )
    merged = merge_pointwise(grown)
    images = noise(5, 1, 8, 8, dtype=torch.float32)
    assert torch.allclose(merged(images), grown(images), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(merged(images), small(images), rtol=1e-2)
    assert [v.shape for v in merged.state_dict().values()] == [
        v.shape for v in small.state_dict().values()
    ]
    assert parameters(merged) <= parameters(net(norm=norm))


def test_the_merged_weight_is_the_product_at_each_place_of_the_kernel():
    conv = nn.Conv2d(2, 2, 3)
    block = Recombined(conv)
    q = torch.tensor([[2.0, 2.0], [1.0, 3.0]])
    block.pointwise.weight.data = q.view(2, 2, 1, 1)
    merged = block.merged()
    for a in range(3):
        for b in range(3):
            assert torch.allclose(merged.weight[:, :, a, b], q @ conv.weight[:, :, a, b])
    assert torch.allclose(merged.bias, q @ conv.bias)


@pytest.mark.parametrize("sums", [False, True])
@torch.no_grad()
def test_a_branch_is_fitted_to_itself_or_so_that_the_sum_comes_out_right(sums):
    whole = fold_batch_norm(lively(SmallResNet(8, (6, 6, 8, 10), 3, 1)))
    kept = {"stage1.0.conv1": [0, 3, 4]}
    small = prune(whole, {p: torch.tensor(k) for p, k in kept.items()})
    # The stem as well, so that the shortcut carries an error.
    small.stem[0].weight[:3] *= 0.7
    sight = sight_of(small, whole, kept, sums)
    block = next(b for b in sight.blocks if b.path == "stage1.0.conv2")
    images = noise(4, 1, 8, 8, dtype=torch.float32)
    ((own, target),) = sight.pairs([block])(images)

    def parts(model):
        x = model.stem(Network(model, GREY).input(images))
        unit = model.stage1[0]
        return unit.conv2(unit.relu1(unit.conv1(x))), x

    (branch, rest), (branch_t, rest_t) = parts(small), parts(whole)
    assert torch.allclose(own, branch, atol=1e-5)
    wanted = branch_t + rest_t - rest if sums else branch_t
    assert torch.allclose(target, wanted, atol=1e-5)


def test_the_loss_by_gradient_has_the_gradient_of_its_formula():
    whole = fold_batch_norm(net((6, 5), norm=False))
    kept = {"features.0": [0, 2, 5]}
    small = prune(whole, {"features.0": torch.tensor(kept["features.0"])})
    sight = sight_of(small, whole, kept)
    sight.student.model.requires_grad_(False)
    sight.added.requires_grad_(True)
    images = noise(4, 1, 8, 8, dtype=torch.float32)
    last = sight.blocks[1]
    ((own, target),) = sight.pairs([last])(images)
    assert target.grad_fn is None
    loss = nn.functional.mse_loss(own, target)
    loss.backward()
    x, y = (m.detach().double().permute(0, 2, 3, 1).reshape(-1, 5) for m in (own, target))
    assert loss.item() == pytest.approx(float((x - y).square().sum()) / x.numel(), rel=1e-5)
    # d/dQ |X Q' - Y|^2 / n at the identity.
    expected = 2 * (x - y).T @ x / x.numel()
    first, second = (m.weight.grad for m in sight.added.values())
    assert torch.allclose(second.flatten(1).double(), expected, rtol=1e-4, atol=1e-6)
    assert first.abs().max() > 0


# Networks by name.


@pytest.mark.parametrize(
    ("base", "widths"),
    [
        ("cnn-6-8", (3, 4)),
        ("fskd-plain6-bn", (8, 16, 32, 16, 32, 32)),
        ("resnet8", (8, 9, 10)),
        ("wrn-10-1", (8, 16, 32)),
        ("torchvision:resnet18", (32, 64, 64, 64, 128, 128, 256, 256)),
    ],
)
def test_a_pruned_network_is_saved_and_read_back_by_its_name(tmp_path, base, widths):
    input = Input(3, (32, 32), (0.5,) * 3, (0.5,) * 3)
    whole = build(base, CLASSES, input, seed=5)
    lively(whole.model)
    able = [layer.path for layer in layers(whole.model) if not layer.obstacle]
    small = prune(whole.model, {p: torch.arange(w) for p, w in zip(able, widths, strict=True)})
    pruned = Network(small, whole.input, fskd.name_of(base, widths), CLASSES)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for number, network in enumerate((pruned, folded(pruned))):
        save(network, tmp_path / str(number), {})
        again = load(tmp_path / str(number))
        assert again.name == network.name
        assert torch.equal(again.eval()(images), network.eval()(images))
    assert parameters(again) <= parameters(pruned)
    assert again.name.endswith("-folded") == (base != "cnn-6-8")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fskd-plain7", "there is no network named 'fskd-plain7'"),
        ("fskd-plain6-keep-8", "has 6 convolutions that can lose filters"),
        ("fskd-cnn-4-8-keep-4-9", "of at most 4-8"),
        ("fskd-cnn-4-8-keep-0-8", "at least 1"),
        ("fskd-nothing-keep-4", "no network named 'nothing'"),
        ("fskd-mlp-8-keep-4", "has 0 convolutions"),
    ],
)
def test_a_wrong_name_is_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence):
        build(name, CLASSES, GREY)


def test_an_image_too_small_for_all_its_poolings_is_one_sentence():
    with pytest.raises(UserError, match="at least 16 x 16"):
        build("fskd-plain16", CLASSES, GREY)


# The run.


def teacher(name: str = "fskd-plain6-bn") -> Network:
    return build(name, CLASSES, GREY, seed=1)


def bench(**given) -> Bench:
    train = split(90, 1)
    given = {
        "task": Classification(CLASSES, Augment(crop=1)),
        "train": train,
        "transfer": train,
        "validation": split(30, 2),
        "test": split(60, 3),
        "candidates": [Candidate(teacher(), Training(epochs=3, batch_size=30))],
        "make_student": lambda seed: teacher(),
        "training": Training(epochs=4, batch_size=10, lr=0.003),
        "engine": CPU,
        **given,
    }
    return Bench(**given)


def run(path, method, laid=None, look=None, engine=None):
    laid = laid or bench()
    return laid, carry_out(path, method, laid, look, engine)


FEW = {"samples": 20, "others": (40,), "layers": (1, 4, 5, 6)}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    method, names = FSKD(**FEW), []
    path = tmp_path_factory.mktemp("fskd") / "run"
    laid, folder = run(path, method, look=lambda phase: names.append((phase.name, type(phase))))
    return method, laid, folder, names


def test_phases_are_solves_but_for_the_teacher_and_the_rivals(done):
    *_, names = done
    assert names[:8] == [
        ("teacher", Fit),
        ("prune", Solve),
        ("baseline", Fit),
        ("brief", Fit),
        ("sgd", Fit),
        ("merge-sgd", Solve),
        ("student", Solve),
        ("merge", Solve),
    ]
    assert [name for name, _ in names[8:]] == [
        f"{name}-40" for name in ("baseline", "brief", "sgd", "merge-sgd", "student", "merge")
    ]


def test_the_student_is_the_teacher_with_half_of_the_filters_of_some_layers(done):
    method, laid, *_ = done
    kept = [(left, whole) for _, left, whole, _ in method.plan]
    assert kept == [(8, 16), (16, 16), (32, 32), (16, 32), (32, 64), (32, 64)]
    student, pruned = laid.students[0], method.ways["pruned", 20, 0]
    assert student.name == "fskd-plain6-bn-keep-8-16-32-16-32-32-folded"
    assert pruned.name == laid.baselines[0].name == "fskd-plain6-bn-keep-8-16-32-16-32-32"
    assert parameters(student) <= parameters(pruned) == parameters(laid.baselines[0])
    assert method.moved[0] < 1e-5


def test_the_filters_that_stay_have_the_largest_sums_of_absolute_weights(done):
    method, laid, *_ = done
    whole = laid.teacher.networks[0].model.features[0].weight
    sums = [float(w.abs().sum()) for w in whole]
    expected = sorted(sorted(range(16), key=lambda n: -sums[n])[:8])
    small = method.ways["pruned", 20, 0].model.features[0].weight
    assert torch.equal(small, whole[expected])


def test_the_repair_follows_the_teacher_more_closely_than_the_pruned_network(done):
    method, laid, *_ = done
    images = laid.test.images.pixels.float() / 255
    with torch.no_grad():
        wanted = laid.teacher.networks[0].eval()(images)
        errors = {
            way: float((method.ways[way, 20, 0].eval()(images) - wanted).square().mean())
            for way in ("pruned", "student")
        }
    assert errors["student"] < 0.5 * errors["pruned"]


def test_the_teacher_is_left_as_it_was_taught(done):
    _, laid, folder, _ = done
    taught = folder.finished_phase(0, "teacher")["modules"]["student"]
    network = laid.teacher.networks[0]
    assert all(torch.equal(taught[key], value) for key, value in network.state_dict().items())
    assert not any(p.requires_grad for p in network.parameters())


def test_neither_labels_nor_augmentation_reach_the_repair(tmp_path, done):
    _, laid, *_ = done
    quick = FSKD(**{**FEW, "others": (), "rivals": ()})
    ready = [Candidate(copy.deepcopy(laid.teacher.networks[0]))]
    plain = Classification(CLASSES, Augment(flip=True, erase=1.0))
    bare = Split("train", laid.transfer.images, None)
    other = bench(candidates=ready, task=plain, transfer=bare)
    run(tmp_path / "run", quick, other)
    assert same(other.students[0], laid.students[0])
    assert not other.baselines, "there was nothing to fine-tune on"


def test_a_seed_chooses_the_images_and_few_are_among_more():
    whole = split(90, 1)
    twenty, forty, other = (fskd._few(whole, n, s) for n, s in ((20, 0), (40, 0), (20, 1)))
    assert set(twenty.rows.tolist()) < set(forty.rows.tolist())
    assert set(twenty.rows.tolist()) != set(other.rows.tolist())
    assert len(set(forty.rows.tolist())) == 40
    assert torch.equal(twenty.labels, whole.labels[twenty.rows])


def test_fine_tuning_has_as_many_steps_whatever_the_images():
    method = FSKD(samples=20)
    laid = bench(training=Training(epochs=6, batch_size=10))
    assert [method._budget(laid, n).epochs for n in (5, 20, 40, 90)] == [12, 6, 3, 1]


def test_brief_fine_tuning_costs_as_many_multiply_adds_as_least_squares():
    whole, method, laid = teacher(), FSKD(), bench()
    kept = method._kept(laid, whole)
    pruned = fskd._pruned(whole, kept)
    # Convolutions of 8 x 8 to 2 x 2 pixels, 9 places each, and the classifier.
    widths = [(1, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    pixels = [64, 64, 16, 16, 4, 4]
    cost = sum(9 * a * b * p for (a, b), p in zip(widths, pixels, strict=True)) + 64 * 3
    halves = [(1, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)]
    small = sum(9 * a * b * p for (a, b), p in zip(halves, pixels, strict=True)) + 32 * 3
    expected = round(3.5 * (cost + small) / (3 * small))
    assert method._brief(laid, whole, pruned, Training(epochs=50)).epochs == expected


@pytest.mark.parametrize(
    ("phase", "piece"),
    [
        ("prune", 0),
        ("baseline", 3),
        ("sgd", 3),
        ("student", 4),
        ("merge", 0),
    ],
)
def test_a_run_goes_on_in_any_phase_where_it_failed(tmp_path, done, phase, piece):
    _, whole, *_ = done

    def break_off(found):
        if found.name != phase:
            return
        calls = {"n": 0}

        def failing(inner):
            def call(*given):
                calls["n"] += 1
                if calls["n"] > piece:
                    raise RuntimeError("as if the power had gone")
                return inner(*given)

            return call

        if isinstance(found, Fit):
            found.updates[0].terms = failing(found.updates[0].terms)
            return
        inner = found.run

        def run_some(journal):
            if not piece:
                raise RuntimeError("as if the power had gone")
            journal.remember = failing(journal.remember)
            return inner(journal)

        found.run = run_some

    given = {**FEW, "others": (), "rivals": ("sgd",)}
    ready = [Candidate(whole.teacher.networks[0])]
    with pytest.raises(RuntimeError):
        run(tmp_path / "run", FSKD(**given), bench(candidates=ready), break_off, CAREFUL)
    method = FSKD(**given)
    again, _ = run(tmp_path / "run", method, bench(candidates=ready))
    assert same(again.students[0], whole.students[0])
    assert same(again.baselines[0], whole.baselines[0])
    assert same(method.ways["sgd", 20, 0], done[0].ways["sgd", 20, 0])
    assert method.fitted == done[0].fitted


def test_blocks_that_are_done_are_not_fitted_again(tmp_path, done, monkeypatch):
    calls = []
    real = fskd.fit_block

    def counted(sight, block, task, images):
        calls.append(block.path)
        if len(calls) == 3:
            raise RuntimeError("as if the power had gone")
        return real(sight, block, task, images)

    monkeypatch.setattr(fskd, "fit_block", counted)
    quick = {**FEW, "others": (), "rivals": ()}
    ready = [Candidate(copy.deepcopy(done[1].teacher.networks[0]))]
    with pytest.raises(RuntimeError):
        run(tmp_path / "run", FSKD(**quick), bench(candidates=ready, baseline=False))
    laid, _ = run(tmp_path / "run", FSKD(**quick), bench(candidates=ready, baseline=False))
    assert len(calls) == 3 + 4
    assert same(laid.students[0], done[1].students[0])


def test_all_blocks_by_gradient_come_near_least_squares_and_are_the_student_if_wanted(
    tmp_path, done
):
    ready = [Candidate(copy.deepcopy(done[1].teacher.networks[0]))]
    rivals = ("closed", "sgd", "pruned")
    method = FSKD(samples=20, layers=(1, 4, 5, 6), solver="sgd", rivals=rivals)
    assert method.rivals == ("closed", "pruned")
    laid = bench(candidates=ready, training=Training(epochs=60, batch_size=10, lr=0.003))
    run(tmp_path / "run", method, laid)
    assert same(method.ways["closed", 20, 0], done[1].students[0])
    images = laid.test.images.pixels.float() / 255
    with torch.no_grad():
        wanted = laid.teacher.networks[0].eval()(images)
        error = {
            way: float((method.ways[way, 20, 0].eval()(images) - wanted).square().mean())
            for way in ("pruned", "student")
        }
    assert error["student"] < 0.7 * error["pruned"]
    assert method.moved[0] < 1e-5


@pytest.mark.parametrize("name", ["resnet8", "wrn-10-1", "cnn-6-8"])
def test_other_networks_are_repaired_too(tmp_path, name):
    laid = bench(
        candidates=[Candidate(teacher(name), Training(epochs=3, batch_size=30))],
        make_student=lambda seed: teacher(name),
        seeds=(0, 1),
    )
    method = FSKD(samples=30, rivals=(), sums=True)
    method.rehearse(laid)
    run(tmp_path / "run", method, laid)
    assert len(method.ways) == 4
    assert max(method.moved.values()) < 1e-5
    for seed in (0, 1):
        save(laid.students[seed], tmp_path / f"student-{seed}", {})
        assert same(load(tmp_path / f"student-{seed}"), laid.students[seed])
    assert not same(laid.students[0], laid.students[1])


def test_slimming_keeps_the_filters_with_the_largest_scales_of_all_layers_together():
    whole, laid = teacher(), bench()
    generator = torch.Generator().manual_seed(0)
    scales = {}
    for path, module in whole.model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.randn(module.num_features, generator=generator)
            scales[path] = module.weight.abs()
    kept = FSKD(criterion="scale", ratio=0.4)._kept(laid, whole)
    everything = sorted(float(s) for scale in scales.values() for s in scale)
    threshold = everything[int(0.4 * len(everything)) - 1]
    for (path, numbers), scale in zip(kept.items(), scales.values(), strict=True):
        assert path.startswith("features.")
        assert numbers == [n for n, s in enumerate(scale.tolist()) if s > threshold]


def test_widths_given_by_hand_are_those_that_stay():
    small = build("fskd-plain6-bn-keep-4-16-32-8-60-64", CLASSES, GREY)
    whole = teacher()
    kept = FSKD()._kept(bench(make_student=lambda seed: small), whole)
    assert {p: len(n) for p, n in kept.items()} == {
        "features.0": 4,
        "features.10": 8,
        "features.14": 60,
    }
    sums = whole.model.features[0].weight.detach().abs().sum((1, 2, 3))
    assert kept["features.0"] == sorted(sums.topk(4).indices.tolist())


def test_a_pruned_network_can_be_pruned_again(tmp_path):
    name = "fskd-plain6-bn-keep-4-16-32-8-60-64-folded"
    whole = build(name, CLASSES, GREY, seed=1)
    pruned = fskd._pruned(whole, FSKD()._kept(bench(make_student=lambda seed: whole), whole))
    assert pruned.name == "fskd-plain6-bn-keep-2-8-16-4-30-32-folded"
    save(folded(pruned), tmp_path / "again", {})
    assert same(load(tmp_path / "again"), pruned)


def test_findings_have_each_way_by_the_number_of_images_and_each_block(done):
    method, laid, *_ = done
    table, errors = method.findings(laid, [])
    assert table.table[0] == ["way", "labels", "20 images", "40 images"]
    ways = {row[0]: row[1:] for row in table.table[1:]}
    assert ways["few-sample distillation"][0] == "no"
    assert ways["fine-tuning with labels"][0] == "yes"
    assert len(ways) == 6
    student = laid.task.measure(laid.students[0], laid.test)["accuracy"]
    assert ways["few-sample distillation"][1].startswith(f"{100 * student:.2f} %, ")
    assert ways["few-sample distillation"][1].endswith(" s")
    assert [row[1] for row in errors.table[1:]] == [
        "8 of 16",
        "16",
        "32",
        "16 of 32",
        "32 of 64",
        "32 of 64",
    ]
    drawn = errors.charts[0].lines
    assert all(b <= a + 1e-9 for (_, a), (_, b) in zip(*drawn.values(), strict=True))
    json.dumps([found.as_json() for found in (table, errors)])


@pytest.mark.parametrize(
    ("method", "laid", "sentence"),
    [
        (FSKD(), {"candidates": []}, "0 teachers were given"),
        (FSKD(samples=500), {}, "500 images are wanted, but the transfer set has 90"),
        (FSKD(samples=5, others=(91,)), {}, "91 images are wanted"),
        (FSKD(samples=5, layers=(7,)), {}, "there is no convolution 7"),
        (FSKD(samples=5), {"transfer": [1]}, "in memory or by name"),
        (FSKD(samples=5), {"make_student": lambda _: teacher("cnn-4-8")}, "is not the teacher"),
        (
            FSKD(samples=5),
            {"make_student": lambda _: teacher("fskd-plain6x2-bn")},
            "has 32 filters and the teacher's 16",
        ),
        (
            FSKD(samples=5),
            {"candidates": [Candidate(teacher("mlp-8"))]},
            "no convolution that can lose filters",
        ),
        (
            FSKD(samples=5, layers=(1,)),
            {
                "candidates": [Candidate(teacher("resnet8"))],
                "make_student": lambda _: teacher("resnet8"),
            },
            r"convolution 1 of resnet8, stem\.0, cannot lose filters: it is added",
        ),
        (
            FSKD(samples=5, criterion="scale"),
            {
                "candidates": [Candidate(teacher("cnn-4-8"))],
                "make_student": lambda _: teacher("cnn-4-8"),
            },
            "choose criterion: l1",
        ),
        (
            FSKD(samples=5),
            {"rival": Rival(lambda _: teacher(), Training())},
            "leave baseline out",
        ),
        (
            FSKD(samples=5),
            {"task": Attributes(CLASSES, attributes={"x": (0,), "y": (1, 2)})},
            "works on classification, not on attributes",
        ),
    ],
)
def test_what_does_not_fit_is_found_before_training(method, laid, sentence):
    with pytest.raises(UserError, match=sentence):
        method.rehearse(bench(**laid))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"samples": 0}, "samples"),
        ({"ratio": 1.0}, "ratio"),
        ({"criterion": "l2"}, "criterion"),
        ({"layers": (0,)}, "layers"),
        ({"solver": "lbfgs"}, "solver"),
        ({"rivals": ("decoupled",)}, "rivals"),
    ],
)
def test_wrong_hyper_parameters_are_one_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        FSKD(**given)


def test_a_rehearsal_changes_nothing_that_a_run_sees():
    laid = bench()
    before = copy.deepcopy(laid.candidates[0].network)
    state = torch.get_rng_state()
    FSKD(samples=20).rehearse(laid)
    assert same(laid.candidates[0].network, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_adds_up_with_no_other_method():
    with pytest.raises(UserError, match="phases of its own"):
        FSKD() + KD()


def test_modules_of_your_own_are_pruned_and_come_back(tmp_path):
    whole = net((8, 12, 10), seed=4)
    pool, held = split(90, 1), split(30, 2)
    data = Data("mine", "mine", CLASSES, pool, held, held, (8, 8), (0.5,), (0.25,))
    found = limbeck.distill(
        copy.deepcopy(whole),
        whole,
        data,
        method=FSKD(samples=30, rivals=()),
        training=Training(epochs=2, batch_size=10),
        out=tmp_path / "run",
        engine=CPU,
        quiet=True,
    )
    assert found.student.features[0].out_channels == 4
    assert found.student.fc.in_features == 5
    assert found.result["parameters"]["student"] < found.result["parameters"]["teacher"]


def test_the_papers_setting_is_stated():
    recipe = recipes.validate(recipes.preset(system("fskd"), "paper", "cifar10"))
    method = recipe.method()
    assert recipe.teachers[0].model == recipe.student.model == "fskd-plain16"
    training = recipe.teachers[0].training
    assert (training.lr, training.epochs, training.milestones) == (0.01, 160, (80, 120))
    assert (method.samples, method.ratio, method.criterion) == (500, 0.5, "l1")
    assert method.layers == (1, 8, 9, 10, 11, 12, 13)
