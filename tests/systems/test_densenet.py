import re
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck import distillation, recipes
from limbeck.catalogue import system
from limbeck.errors import UserError
from limbeck.models import Network, build, profile, zoo
from limbeck.models.input import Input
from limbeck.systems.classification.kd import KD
from limbeck.systems.networks.densenet import (
    IMAGENET,
    DenseBlock,
    DenseLayer,
    DenseNet,
    PlainStack,
    Transition,
    network,
    stack_parameters,
    stack_widths,
)
from limbeck.tasks.classification import Classification
from limbeck.training.distiller import Distiller
from limbeck.training.folding import fold_batch_norm
from limbeck.training.progress import Voice
from limbeck.training.taps import Taps

NAMES = list(system("densenet").networks)
lean_or_not = pytest.mark.parametrize("lean", [False, True], ids=["normal", "lean"])


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tiny(seed: int = 0, **given) -> DenseNet:
    given = {"blocks": (2, 3, 2), "growth": 4, "stem": 6, "classes": 5, **given}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomised(DenseNet(**given))


def randomised(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters as far from those of a new batch norm as a trained one's."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return model


def on_paper(name: str, classes: int, size: int = 32) -> nn.Module:
    """A network without memory for its weights."""
    with torch.device("meta"):
        return network(name, classes, 3, (size, size))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def multiply_adds(name: str, size: int = 32) -> int:
    model = Network(on_paper(name, 1000 if size > 32 else 10, size))
    return profile(model, (3, size, size), latency=False).multiply_adds


def counted(blocks, growth, stem, classes, *, bottleneck, theta, imagenet=False) -> int:
    """The parameters by the paper's tables, layer by layer."""
    total = 49 * 3 * stem + 2 * stem if imagenet else 9 * 3 * stem
    m = stem
    for number, layers in enumerate(blocks):
        for _ in range(layers):
            total += 2 * m
            if bottleneck:
                total += m * 4 * growth + 2 * 4 * growth + 9 * 4 * growth * growth
            else:
                total += 9 * m * growth
            m += growth
        if number < len(blocks) - 1:
            total += 2 * m + m * int(theta * m)
            m = int(theta * m)
    return total + 2 * m + (m + 1) * classes


# Networks of the paper


@pytest.mark.parametrize(
    ("name", "ten", "hundred"),  # classes
    [
        ("densenet-40-12", 1_019_722, 1_060_132),
        ("densenet-100-12", 6_979_642, 7_084_852),
        ("densenet-100-24", 27_249_082, 27_457_972),
        ("densenet-40-12-2k", 1_059_298, 1_100_428),
        ("densenet-100-12-2k", 7_083_538, 7_189_468),
        ("densenet-bc-100-12", 769_162, 800_032),
        ("densenet-bc-250-24", 15_324_406, 15_480_556),
        ("densenet-bc-190-40", 25_624_430, 25_821_620),
        ("densenet-bc-40-36", 1_542_682, None),
        ("densenet-bc-40-48", 2_733_130, None),
    ],
)
def test_a_network_for_small_images_has_the_published_number_of_parameters(name, ten, hundred):
    model = on_paper(name, 10)
    assert parameters(model) == ten
    if hundred is not None:
        assert ten + 90 * (model.fc.in_features + 1) == hundred


@pytest.mark.parametrize(
    ("name", "count"), [("densenet-40-12-2k", 282_917_328), ("densenet-bc-100-12", 287_929_692)]
)
def test_a_network_for_small_images_has_the_multiply_adds_counted_for_it(name, count):
    assert multiply_adds(name) == count


@pytest.mark.parametrize(
    ("name", "count", "work", "ends"),
    [
        ("121", 7_978_856, 2_834_161_664, (256, 512, 1024, 1024)),
        ("169", 14_149_480, 3_359_843_328, (256, 512, 1280, 1664)),
        ("201", 20_013_928, 4_291_365_888, (256, 512, 1792, 1920)),
        ("161", 28_681_000, 7_727_907_072, (384, 768, 2112, 2208)),
        ("264", 33_337_704, 5_751_653_376, (256, 512, 2304, 2688)),
    ],
)
def test_a_network_for_imagenet_has_the_published_size(name, count, work, ends):
    model = on_paper(f"densenet-{name}", 1000, 224)
    growth, blocks = IMAGENET[name]
    by_hand = counted(blocks, growth, 2 * growth, 1000, bottleneck=True, theta=0.5, imagenet=True)
    assert parameters(model) == by_hand == count
    costed = Network(model)
    with Taps(model, model.stages) as taps:
        costs, features = taps.watch(profile, costed, (3, 224, 224), latency=False)
    assert costs.multiply_adds == work
    assert tuple(f.shape[1] for f in features.values()) == ends
    assert tuple(f.shape[2] for f in features.values()) == (56, 28, 14, 7)


@pytest.mark.parametrize("name", ["densenet-bc-22-5", "densenet-bc-16-7", "densenet-13-5"])
def test_odd_numbers_of_maps_are_rounded_down_by_a_transition(name):
    *_, depth, growth = name.split("-")
    bc = "bc" in name
    layers, growth = (int(depth) - 4) // (6 if bc else 3), int(growth)
    stem, theta = (2 * growth, 0.5) if bc else (16, 1.0)
    expected = counted((layers,) * 3, growth, stem, 10, bottleneck=bc, theta=theta)
    assert parameters(on_paper(name, 10)) == expected


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("densenet-40-12", 40),
        ("densenet-bc-100-12", 100),
        ("densenet-stack-bc-40-12", 40),
        ("densenet-stack-40-12", 40),
        ("densenet-121", 121),
        ("densenet-161", 161),
        # As published: the blocks of Table 1 make it one deeper than its name.
        ("densenet-264", 265),
    ],
)
def test_the_depth_in_a_name_counts_convolutions_and_the_classifier(name, count):
    layers = [m for m in on_paper(name, 10).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == count


def published_names(name: str) -> str:
    """What torchvision calls a tensor."""
    name = name.replace("stem.0", "features.conv0").replace("stem.1", "features.norm0")
    name = re.sub(
        r"stage(\d)\.(\d+)",
        lambda m: f"features.denseblock{m[1]}.denselayer{int(m[2]) + 1}",
        name,
    )
    name = re.sub(r"^norm\.", "features.norm5.", name).replace("fc.", "classifier.")
    return re.sub(r"^transition", "features.transition", name)


@pytest.mark.parametrize("name", ["121", "161", "169", "201"])
def test_with_the_same_weights_the_networks_of_torchvision_say_the_same(name):
    torch.manual_seed(0)
    ours = randomised(network(f"densenet-{name}", 10, 3, (32, 32))).eval()
    with torch.device("meta"):
        theirs = torchvision.models.get_model(f"densenet{name}", num_classes=10).eval()
    state = OrderedDict((published_names(k), v) for k, v in ours.state_dict().items())
    theirs.load_state_dict(state, strict=True, assign=True)
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        answer, wanted = ours(x), theirs(x)
    assert (answer - wanted).abs().max() <= 1e-5 * wanted.abs().max()


# Equation 2


def by_hand(model: DenseNet, x: Tensor, training: bool) -> Tensor:
    """The whole network from its tensors alone, every layer reading what all before it made."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())

    def active(x: Tensor, path: str) -> Tensor:
        names = ("running_mean", "running_var", "weight", "bias")
        mean, var, gamma, beta = (tensors[f"{path}.{n}"][:, None, None] for n in names)
        if training:
            mean = x.mean((0, 2, 3), keepdim=True)
            var = (x - mean).square().mean((0, 2, 3), keepdim=True)
        return ((x - mean) / (var + 1e-5).sqrt() * gamma + beta).clamp(min=0)

    x = F.conv2d(x, tensors["stem.weight"], padding=1)
    for number in (1, 2, 3):
        layer = 0
        while (path := f"stage{number}.{layer}.conv1") + ".weight" in tensors:
            path = f"stage{number}.{layer}"
            new = active(x, f"{path}.norm1")
            if f"{path}.conv2.weight" in tensors:
                new = torch.einsum("bihw,oi->bohw", new, tensors[f"{path}.conv1.weight"][..., 0, 0])
                new = F.conv2d(
                    active(new, f"{path}.norm2"), tensors[f"{path}.conv2.weight"], None, 1, 1
                )
            else:
                new = F.conv2d(new, tensors[f"{path}.conv1.weight"], None, 1, 1)
            x = torch.cat([x, new], 1)
            layer += 1
        if number < 3:
            path = f"transition{number}"
            x = torch.einsum(
                "bihw,oi->bohw",
                active(x, f"{path}.norm"),
                tensors[f"{path}.conv.weight"][..., 0, 0],
            )
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    return active(x, "norm").mean((2, 3)) @ tensors["fc.weight"].T + tensors["fc.bias"]


@lean_or_not
@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients_follow_an_independent_formula(bottleneck, training, lean):
    model = tiny(bottleneck=bottleneck, lean=lean).double().train(training)
    x = images(4, 3, 8, 8, dtype=torch.float64).requires_grad_()
    expected = by_hand(model, x, training)
    answer = model(x)
    torch.testing.assert_close(answer, expected, rtol=1e-10, atol=1e-12)
    weights = images(*answer.shape, seed=1, dtype=torch.float64)
    wanted = [x, *model.parameters()]
    one = torch.autograd.grad((expected * weights).sum(), wanted)
    other = torch.autograd.grad((answer * weights).sum(), wanted)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


@lean_or_not
def test_a_block_hands_on_its_input_untouched_and_then_the_new_maps_layer_by_layer(lean):
    block = randomised(DenseBlock(3, 6, 4, lean=lean))
    x = images(2, 6, 5, 5)
    with Taps(block, ["0", "1", "2"]) as taps:
        whole, made = taps(x)
    assert whole.shape == (2, 6 + 3 * 4, 5, 5)
    assert torch.equal(whole[:, :6], x)
    for number, new in enumerate(made.values()):
        assert torch.equal(whole[:, 6 + 4 * number :][:, :4], new)


@pytest.mark.parametrize("bottleneck", [True, False])
def test_a_layer_whose_convolutions_are_zero_adds_zeros(bottleneck):
    layer = randomised(DenseLayer(6, 4, bottleneck))
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    assert torch.equal(layer(images(2, 6, 5, 5)), torch.zeros(2, 4, 5, 5))


def test_a_layer_is_normalised_activated_and_convolved_in_this_order():
    layer = DenseLayer(1, 1, bottleneck=False).eval()
    # Norm: 2 (x - 3) / sqrt(4) + 1 = x - 2; the kernel passes the centre on.
    layer.norm1.running_mean.fill_(3.0)
    layer.norm1.running_var.fill_(4.0 - layer.norm1.eps)
    nn.init.constant_(layer.norm1.weight, 2.0)
    nn.init.constant_(layer.norm1.bias, 1.0)
    nn.init.dirac_(layer.conv1.weight)
    x = torch.tensor([-1.0, 1.0, 2.0, 5.0]).view(1, 1, 2, 2)
    torch.testing.assert_close(layer(x).flatten(), torch.tensor([0.0, 0.0, 0.0, 3.0]))


@pytest.mark.parametrize(("side", "half"), [(6, 3), (7, 3)])
def test_a_transition_averages_squares_of_four(side, half):
    transition = Transition(2, 1).eval()
    nn.init.ones_(transition.conv.weight)
    x = images(1, 2, side, side).abs()
    expected = x.sum(1)[0, : 2 * half, : 2 * half].view(half, 2, half, 2).mean((1, 3))
    torch.testing.assert_close(transition(x)[0, 0], expected, rtol=1e-4, atol=1e-4)


def test_convolutions_start_with_a_variance_of_two_over_fan_out_and_the_bias_at_zero():
    torch.manual_seed(0)
    model = network("densenet-bc-40-36", 10, 3, (32, 32))
    last = model.get_submodule("stage3.5")
    assert last.conv1.weight.std().item() == pytest.approx((2 / (4 * 36)) ** 0.5, rel=0.02)
    assert last.conv2.weight.std().item() == pytest.approx((2 / (9 * 36)) ** 0.5, rel=0.02)
    assert model.fc.bias.eq(0).all()
    assert last.norm1.weight.eq(1).all()
    assert last.norm1.bias.eq(0).all()


# Lean: made again instead of kept


def step(model: DenseNet, x: Tensor, **context) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, **context):
        answer = model(x)
        loss = answer.float().square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return answer, list(grads), dict(model.named_buffers())


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_lean_changes_neither_answers_nor_gradients_nor_statistics(bottleneck, half, momentum):
    models = [tiny(bottleneck=bottleneck, lean=lean).train() for lean in (False, True)]
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
    for seed in (0, 1):
        one, other = (step(m, images(4, 3, 8, 8, seed=seed), enabled=half) for m in models)
        torch.testing.assert_close(other[0], one[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(other[1], one[1], rtol=0, atol=1e-6)
        assert other[2].keys() == one[2].keys()
        assert all(torch.equal(other[2][k], one[2][k]) for k in one[2])
    assert other[2]["stage3.1.norm1.num_batches_tracked"] == 2
    assert models[1].state_dict().keys() == models[0].state_dict().keys()


def test_lean_goes_backward_twice_through_one_pass_with_the_same_gradient():
    model = tiny(lean=True).train()
    loss = model(images(4, 3, 8, 8)).square().mean()
    before = {k: v.clone() for k, v in model.named_buffers()}
    wanted = list(model.parameters())
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    assert all(map(torch.equal, first, second))
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    assert all(b is model.get_buffer(k) for k, b in model.named_buffers())


def test_lean_drops_the_same_units_as_normal():
    answers = []
    for lean in (False, True):
        model = tiny(lean=lean, dropout=0.3).train()
        torch.manual_seed(3)
        answers.append(step(model, images(4, 3, 8, 8), enabled=False))
    assert torch.equal(answers[0][0], answers[1][0])
    torch.testing.assert_close(answers[0][1], answers[1][1], rtol=0, atol=1e-6)


def test_lean_makes_maps_again_in_the_mode_of_the_pass_they_belong_to():
    grads = []
    for lean in (False, True):
        model = tiny(lean=lean).train()
        model.stage2[1].norm1.eval()  # a frozen norm within a training network
        loss = model(images(4, 3, 8, 8)).square().mean()
        model.eval()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
        assert not any(m.training for m in model.modules())
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-6)


def test_statistics_survive_an_error_in_the_backward_pass():
    layer = DenseLayer(4, 2, lean=True)
    loss = layer(images(2, 4, 4, 4).requires_grad_()).sum()
    buffers = dict(layer.norm1.named_buffers())

    def fail(*_: object) -> None:
        raise RuntimeError("as if the memory had run out")

    handle = layer.relu1.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="run out"):
        loss.backward()
    handle.remove()
    assert all(layer.norm1.get_buffer(k) is v for k, v in buffers.items())


def test_lean_keeps_a_fraction_of_what_a_deep_block_keeps():
    def kept(lean: bool) -> int:
        block, seen = DenseBlock(12, 8, 4, lean=lean), {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = block(images(8, 8, 8, 8).requires_grad_())
        del out
        return sum(seen.values())

    assert kept(True) < 0.6 * kept(False)


def test_lean_runs_no_convolution_again():
    calls = []

    class Convolutions(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    found = []
    for lean in (False, True):
        model = tiny(lean=lean).train()
        calls.clear()
        with Convolutions():
            model(images(4, 3, 8, 8)).sum().backward()
        names = ("aten.convolution.default", "aten.mkldnn_convolution.default")
        found.append(sum(c in names for c in calls))
    assert found[0] == found[1] == 1 + 2 * 7 + 2


# Dropout


def test_dropout_follows_every_convolution_but_the_first():
    rates = []

    class Dropouts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "bernoulli" in str(function) or "native_dropout" in str(function):
                rates.append(args)
            return function(*args, **(kwargs or {}))

    for name, convolutions in (("densenet-bc-16-4-drop", 15), ("densenet-stack-16-4-drop", 15)):
        rates.clear()
        model = network(name, 5, 3, (8, 8))
        with Dropouts():
            model(images(2, 3, 8, 8))
            assert len(rates) == convolutions - 1
            model.eval()(images(2, 3, 8, 8))
            assert len(rates) == convolutions - 1


def test_dropout_leaves_out_a_fifth_of_what_a_layer_makes_and_nothing_in_eval_mode():
    layer = DenseLayer(
        4, 8, bottleneck=False, dropout=network("densenet-7-4-drop", 2, 1, (4, 4)).stage1[0].dropout
    )
    torch.manual_seed(0)
    out = layer(images(8, 4, 16, 16))
    assert out.eq(0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    layer.eval()
    x = images(1, 4, 8, 8)
    assert torch.equal(layer(x), layer(x))


# The plain stack


@pytest.mark.parametrize(
    "name", ["bc-16-4", "bc-22-12", "bc-40-12", "bc-100-12", "40-12", "40-12-2k", "100-24"]
)
def test_a_stack_has_depth_and_parameters_of_the_network_it_is_named_after(name):
    dense, stack = on_paper(f"densenet-{name}", 10), on_paper(f"densenet-stack-{name}", 10)
    assert isinstance(stack, PlainStack)
    assert parameters(stack) == pytest.approx(parameters(dense), rel=0.025)
    convolutions = [
        [m for m in model.modules() if isinstance(m, nn.Conv2d)] for model in (dense, stack)
    ]
    assert len(convolutions[0]) == len(convolutions[1])
    # No other widths that differ by a map at most are nearer.
    layers, row = (m.out_channels for m in convolutions[1]), (len(convolutions[1]) - 3) // 3
    found = sorted(set(layers))
    assert found[-1] - found[0] <= 1
    miss = abs(parameters(stack) - parameters(dense))
    for w in (found[0] - 1, *found, found[-1] + 1):
        assert miss <= abs(stack_parameters(row, (w,) * 3, 10, 3) - parameters(dense))


@pytest.mark.parametrize("name", ["bc-22-12", "bc-40-12"])
def test_a_stack_works_no_less_than_the_network_it_is_named_after(name):
    ratio = multiply_adds(f"densenet-stack-{name}") / multiply_adds(f"densenet-{name}")
    assert 1 <= ratio < 1.25


def test_the_parameters_of_a_stack_are_those_counted_by_formula():
    for widths, layers, classes, channels in (((3, 4, 5), 2, 7, 1), ((8, 8, 9), 1, 10, 3)):
        stack = PlainStack(layers, widths, classes, channels)
        assert parameters(stack) == stack_parameters(layers, widths, classes, channels)
        assert stack_widths(parameters(stack), layers, classes, channels)[0] in (3, 4, 8, 9)
    wanted = stack_parameters(6, (20, 21, 20), 10, 3)
    assert stack_parameters(6, stack_widths(wanted, 6, 10), 10, 3) == wanted


def test_a_stack_has_one_way_through_it():
    stack = randomised(PlainStack(2, (4, 4, 5), classes=3)).eval()
    nn.init.zeros_(stack.stage2[0].conv.weight)
    assert torch.equal(stack(images(1, 3, 8, 8)), stack(images(1, 3, 8, 8, seed=1)))


# In the house


def test_every_network_has_a_name_in_the_zoo():
    assert set(NAMES) <= set(zoo.names())
    assert {f"densenet-{name}" for name in IMAGENET} <= set(NAMES)
    assert type(zoo.make("densenet-bc-10-4", 10, 3, (32, 32))) is DenseNet


@pytest.mark.parametrize("name", ["40-12-drop", "bc-22-12", "bc-40-12-lean", "stack-bc-22-12"])
def test_stages_fire_once_and_fall_in_resolution(name):
    with torch.device("meta"):
        model = network(f"densenet-{name}", 10, 3, (32, 32)).eval()
        with Taps(model, model.stages) as taps:
            output, features = taps(torch.zeros(1, 3, 32, 32))
    assert output.shape == (1, 10)
    assert [f.shape[2] for f in features.values()] == [32, 16, 8]


def test_the_ends_of_blocks_and_transitions_are_seen_before_activation():
    model = tiny().eval()
    places = ["stage1", "transition1", "stage2", "transition2", "stage3"]
    passes = []
    with Taps(model, places) as taps:
        assert taps.overwritten(lambda: passes.append(taps(images(2, 3, 8, 8)))) == []
    for path, feature in passes[0][1].items():
        assert feature.min() < 0, path


@pytest.mark.parametrize(
    ("name", "folds"),
    [
        # In a dense block only the second norms read a convolution that nothing else reads.
        ("densenet-bc-22-4", 9),
        ("densenet-bc-22-4-lean", 9),
        ("densenet-bc-22-4-drop", 9),
        ("densenet-13-4", 0),
        # Not those that read a pooling (2) or the end of a stage, which is seen (3).
        ("densenet-stack-13-4-drop", 3 * 3 + 2 + 1 - 5),
        ("densenet-121", 1 + 58),
    ],
)
def test_a_network_is_traced_and_folded_and_answers_as_before(name, folds):
    torch.manual_seed(0)
    model = randomised(network(name, 10, 3, (32, 32))).eval()
    taps = [*model.stages, "transition1", "norm:input"]
    folded = fold_batch_norm(model, keep=taps)
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in n.modules()) for n in (model, folded)]
    assert norms[0] - norms[1] == folds
    x = images(2, 3, 32, 32)
    with torch.no_grad(), Taps(model, taps) as one, Taps(folded, taps) as other:
        (wanted, places), (answer, same) = one(x), other(x)
    assert (answer - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    for path in taps:
        assert (same[path] - places[path]).abs().max() <= 1e-5 * places[path].abs().max()


@lean_or_not
def test_channels_last_goes_through_and_changes_nothing(lean):
    model, other = tiny(lean=lean).train(), tiny(lean=lean).train()
    other.to(memory_format=torch.channels_last)
    x = images(4, 3, 8, 8)
    with Taps(other, ["stage2"]) as taps:
        answer, features = taps(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(answer, model(x), rtol=1e-4, atol=1e-5)
    assert features["stage2"].is_contiguous(memory_format=torch.channels_last)
    answer.sum().backward()
    assert other.stem.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("channels", "size"), [(1, (4, 4)), (1, (8, 8)), (3, (33, 20))])
@pytest.mark.parametrize("name", ["densenet-7-4", "densenet-bc-10-4", "densenet-stack-bc-10-4"])
def test_small_and_odd_images_in_grey_and_colour_are_taken(name, channels, size):
    model = network(name, 7, channels, size).eval()
    assert model(torch.zeros(1, channels, *size)).shape == (1, 7)


def test_the_form_for_imagenet_takes_images_of_29_pixels():
    model = network("densenet-121", 3, 1, (29, 29)).eval()
    assert model(torch.zeros(1, 1, 29, 29)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "size", "sentence"),
    [
        ("densenet", 32, "no network named 'densenet'; did you mean densenet-"),
        ("densenet-122", 32, "no network named 'densenet-122'; did you mean densenet-121"),
        ("densenet-bc-40", 32, "did you mean densenet-bc-40-12"),
        ("densenet-bc-40-12-dorp", 32, "no network named 'densenet-bc-40-12-dorp'; did you mean"),
        ("densenet-bc-40-999999", 32, "no network named"),
        ("densenet-41-12", 32, r"DenseNet has 3n \+ 4 layers.* a depth of 40 would do"),
        ("densenet-bc-43-12", 32, r"DenseNet-BC has 6n \+ 4 layers.* a depth of (40|46) would do"),
        ("densenet-bc-4-12", 32, "a depth of 10 would do"),
        ("densenet-stack-0-12", 32, "a depth of 7 would do"),
        ("densenet-40-0", 32, "growth rate of 0 no layer adds anything; 12 is usual"),
        ("densenet-bc-40-12-2k", 32, "twice the growth rate as it is; leave -2k out"),
        ("densenet-121-2k", 32, "leave -2k out"),
        ("densenet-stack-40-12-lean", 32, "a plain stack concatenates nothing.*leave -lean out"),
        ("densenet-stack-121", 32, "stacks are made for small images; name one as"),
        ("densenet-40-12-drop-drop", 32, "an ending is given twice"),
        ("densenet-40-12", 3, "densenet-40-12 needs images of at least 4 x 4 pixels, not 3 x 3"),
        ("densenet-121", 28, "densenet-121 needs images of at least 29 x 29 pixels, not 28 x 28"),
    ],
)
def test_a_network_that_cannot_be_made_is_one_sentence(name, size, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        network(name, 10, 3, (size, size))
    assert "\n" not in str(caught.value)


def test_it_is_no_method():
    with pytest.raises(UserError, match="densenet is a network and no method; name it as"):
        system("densenet").method_class()


def test_a_lean_student_learns_from_a_frozen_teacher_of_its_kind():
    data = Input(1, (8, 8), (0.5,), (0.5,))
    student, teacher = (
        build(name, "abc", data, seed=0).model
        for name in ("densenet-bc-10-4-lean", "densenet-bc-16-6")
    )
    batch = {"image": images(6, 1, 8, 8), "label": torch.tensor([0, 1, 2, 0, 1, 2])}
    distiller = Distiller(student, teacher, KD(), Classification("abc"), batch).train()
    count = student.stage1[0].norm1.num_batches_tracked.item()
    sum(distiller(batch).values()).backward()
    assert student.stem.weight.grad.abs().max() > 0
    assert student.stage1[0].norm1.num_batches_tracked == count + 1
    assert all(p.grad is None for p in teacher.parameters())


# Recipes


def preset(name: str, kind: str = "digits", *words: str) -> recipes.Recipe:
    values = recipes.preset(system("densenet"), name, kind)
    return recipes.validate(recipes.assigned(values, words))


def test_the_paper_is_trained_as_published():
    recipe = preset("paper", "cifar10")
    assert recipe.student.model == "densenet-bc-100-12"
    assert recipe.baseline.model == "densenet-stack-bc-100-12"
    assert recipe.teachers == ()
    training = recipe.student.training
    assert training == recipe.baseline.training
    assert (training.epochs, training.batch_size, training.lr) == (300, 64, 0.1)
    assert (training.momentum, training.nesterov, training.weight_decay) == (0.9, True, 1e-4)
    factors = [training.factor(epoch) for epoch in (149, 150, 224, 225)]
    assert factors == pytest.approx([1, 0.1, 0.1, 0.01])
    assert (recipe.data.augment.crop, recipe.data.augment.flip) == (4, True)
    assert recipe.data.validation == 0


@pytest.mark.parametrize("kind", ["digits", "cifar10"])
@pytest.mark.parametrize("name", ["smoke", "small"])
def test_the_small_comparison_is_of_equal_depth_and_nearly_equal_parameters(name, kind):
    recipe = preset(name, kind)
    assert recipe.student.training == recipe.baseline.training
    assert recipe.baseline.model == recipe.student.model.replace("densenet", "densenet-stack")
    assert recipe.names() == {"student": "DenseNet", "baseline": "plain stack"}
    assert recipe.methods == {}


@pytest.mark.parametrize("kind", ["digits", "cifar10"])
def test_a_dense_teacher_is_larger_than_the_student_that_it_teaches(kind):
    recipe = preset("teacher", kind)
    size, channels = ((8, 8), 1) if kind == "digits" else (recipe.data.size, 3)
    teacher, student = (
        zoo.make(name, 10, channels, size)
        for name in (recipe.teachers[0].model, recipe.student.model)
    )
    assert isinstance(teacher, DenseNet)
    assert parameters(student) < parameters(teacher)
    assert isinstance(recipe.method(), KD)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A recipe, and the folder of a run of it that nothing stopped."""
    words = (
        "data.limit=150",
        "student.model=densenet-bc-10-4-lean-drop",
        "baseline.model=densenet-stack-bc-10-4-drop",
        "student.training.epochs=2",
        "baseline.training.epochs=2",
        "engine.checkpoint_seconds=0",
        "engine.device=cpu",
    )
    recipe = preset("smoke", "digits", *words)
    path = tmp_path_factory.mktemp("densenet") / "run"
    distillation.start(recipe, path, Voice(quiet=True))
    return recipe, path


@pytest.mark.parametrize("phase", ["baseline", "student"])
def test_a_run_goes_on_where_it_stopped_with_the_same_bits(whole, tmp_path, monkeypatch, phase):
    recipe, unbroken = whole
    # A rehearsal of each network; then, in each phase, an audit and 3 steps an epoch.
    stop = 2 + (1 + 4) + (1 + 6) * (phase == "student")
    loss, done = Classification.loss, {"n": 0}

    def failing(task, answer, batch):
        done["n"] += 1
        if done["n"] == stop + 1:
            raise RuntimeError("as if the power had gone")
        return loss(task, answer, batch)

    path, quiet = tmp_path / "run", Voice(quiet=True)
    monkeypatch.setattr(Classification, "loss", failing)
    with pytest.raises(RuntimeError, match="power"):
        distillation.start(recipe, path, quiet)
    monkeypatch.undo()
    assert any((path / "phases").glob("*baseline.state")) == (phase == "student")
    distillation.resume(path, quiet)
    for role in ("student", "baseline"):
        file = f"{role}.safetensors"
        assert (path / file).read_bytes() == (unbroken / file).read_bytes()
