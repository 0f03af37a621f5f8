import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import alexnet as torchvision_alexnet
from torchvision.transforms.v2 import functional as tv

from carrying import noise
from limbeck import recipes
from limbeck.catalogue import system
from limbeck.data.augment import Augment
from limbeck.data.data import ResidentImages, Split
from limbeck.distillation import start
from limbeck.errors import UserError
from limbeck.models import Input, build
from limbeck.models.profile import profile
from limbeck.models.zoo import make
from limbeck.systems.classification.nst import NST
from limbeck.systems.networks.alexnet import (
    PAPER,
    SMALL,
    AlexNet,
    LocalResponseNorm,
    TenCrop,
    TenCropEvaluation,
    centre_crop,
    in_ten_crops,
    local_response_norm,
    network,
    ten_crop_predict,
    ten_crops,
)
from limbeck.tasks.classification import Classification
from limbeck.training.bench import Bench, Rival
from limbeck.training.distiller import Distiller
from limbeck.training.engine import Engine
from limbeck.training.network import Network
from limbeck.training.phases import Training
from limbeck.training.progress import Voice
from limbeck.training.run import Run
from limbeck.training.task import Answer
from limbeck.training.trainer import Trainer

LAYERS = ["stage1.conv", "stage2.conv", "stage3.conv", "stage4.conv", "stage5.conv"]
LAYERS += ["head.fc6", "head.fc7", "head.fc8"]


def weightless(name: str, size: tuple[int, int] = (227, 227), classes: int = 1000) -> nn.Module:
    """A network of full size that takes no memory."""
    with torch.device("meta"):
        return make(name, classes, 3, size)


def shapes(model: nn.Module, side: int, *parts: str) -> dict[str, tuple[int, ...]]:
    """What parts of a network put out for one image."""
    found = {}

    def keep(name):
        return lambda module, inputs, output: found.update({name: tuple(output.shape[1:])})

    for part in parts:
        model.get_submodule(part).register_forward_hook(keep(part))
    model(torch.zeros(1, 3, side, side, device="meta"))
    return found


def normalised(activity, n=5, k=2.0, alpha=1e-4, beta=0.75):
    """The definition, one channel after the other."""
    channels = activity.shape[1]
    columns = []
    for i in range(channels):
        window = range(max(0, i - n // 2), min(channels - 1, i + n // 2) + 1)
        total = sum(activity[:, j] ** 2 for j in window)
        columns.append(activity[:, i] / (k + alpha * total) ** beta)
    return torch.stack(columns, 1)


# The networks at the size of the paper.


@pytest.mark.parametrize(
    ("layer", "parameters", "multiply_adds"),
    [
        ("stage1.conv", 34_944, 105_415_200),
        ("stage2.conv", 307_456, 223_948_800),
        ("stage3.conv", 885_120, 149_520_384),
        ("stage4.conv", 663_936, 112_140_288),
        ("stage5.conv", 442_624, 74_760_192),
        ("head.fc6", 37_752_832, 37_748_736),
        ("head.fc7", 16_781_312, 16_777_216),
        ("head.fc8", 4_097_000, 4_096_000),
    ],
)
def test_each_layer_costs_what_its_sizes_say(layer, parameters, multiply_adds):
    model = weightless("alexnet")
    part = model.get_submodule(layer)
    assert sum(p.numel() for p in part.parameters()) == parameters
    positions = math.prod(shapes(model, 227, layer)[layer][1:])
    assert positions * part.weight.numel() == multiply_adds


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("alexnet", 60_965_224, 724_406_816),
        ("alexnet-nolrn", 60_965_224, 724_406_816),
        ("alexnet-nodrop-nooverlap", 60_965_224, 724_406_816),
        ("alexnet-one", 62_378_344, None),
        ("alexnet-torchvision", 61_100_840, 714_188_480),
    ],
)
def test_a_network_has_the_published_parameters_and_multiply_adds(name, parameters, multiply_adds):
    found = profile(Network(weightless(name, (256, 256))), (3, 256, 256), latency=False)
    assert found.parameters == parameters
    if multiply_adds is not None:
        assert found.multiply_adds == multiply_adds


def test_the_paper_s_network_has_its_activations():
    model = weightless("alexnet")
    found = shapes(model, 227, *LAYERS)
    assert [math.prod(s) for s in found.values()] == [
        290_400,
        186_624,
        64_896,
        64_896,
        43_264,
        4_096,
        4_096,
        1_000,
    ]
    assert sum(math.prod(s) for s in found.values()) == 659_272
    stages = shapes(model, 227, *model.stages)
    assert list(stages.values()) == [
        (96, 27, 27),
        (256, 13, 13),
        (384, 13, 13),
        (384, 13, 13),
        (256, 6, 6),
    ]


def test_normalisation_lies_between_relu_and_pool_of_the_first_two_convolutions():
    model = weightless("alexnet")
    parts = [[name for name, _ in model.get_submodule(s).named_children()] for s in model.stages]
    assert parts == [
        ["conv", "relu", "lrn", "pool"],
        ["conv", "relu", "lrn", "pool"],
        ["conv", "relu"],
        ["conv", "relu"],
        ["conv", "relu", "pool"],
    ]
    assert [name for name, _ in model.head.named_children()] == [
        *("fc6", "relu6", "drop6"),
        *("fc7", "relu7", "drop7"),
        "fc8",
    ]
    pool = model.get_submodule("stage1.pool")
    assert (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode) == (3, 2, 0, False)


def test_two_towers_meet_in_the_third_convolution_only():
    narrow = [replace(conv, filters=4, kernel=3, stride=1, padding=1) for conv in PAPER]
    model = AlexNet(narrow, (4,), classes=2, channels=4, crop=33).double()
    x = noise(1, 4, 16, 16).requires_grad_()
    for number, both in ((2, False), (3, True), (4, False), (5, False)):
        conv = model.get_submodule(f"stage{number}.conv")
        (gradient,) = torch.autograd.grad(conv(x)[:, :2].sum(), x)
        assert (gradient[:, :2].abs().max() > 0, gradient[:, 2:].abs().max() > 0) == (True, both)


def test_torchvision_s_network_with_the_same_weights_has_the_same_outputs():
    torch.manual_seed(0)
    theirs = torchvision_alexnet(num_classes=7).eval()
    ours = network("alexnet-torchvision", 7, 3, (224, 224)).eval()
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    for own, their in pairs:
        assert own.shape == their.shape
        own.copy_(their)
    x = noise(2, 3, 224, 224, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
        # Dropout comes before the hidden layers, so the same draws leave the same units out.
        torch.manual_seed(1)
        expected = theirs.train()(x)
        torch.manual_seed(1)
        assert torch.equal(ours.train()(x), expected)


def test_weights_start_small_and_biases_at_1_where_the_paper_has_them():
    torch.manual_seed(0)
    narrow = [replace(conv, filters=conv.filters // 8) for conv in PAPER]
    model = AlexNet(narrow, (64, 64), classes=10, crop=227).start_as_published()
    biases = {name.removesuffix(".bias"): p for name, p in model.named_parameters() if p.ndim == 1}
    assert list(biases) == LAYERS
    ones = {name for name, p in biases.items() if bool((p == 1).all())}
    zeros = {name for name, p in biases.items() if bool((p == 0).all())}
    assert ones == {"stage2.conv", "stage4.conv", "stage5.conv", "head.fc6", "head.fc7"}
    assert zeros == set(LAYERS) - ones
    for name in LAYERS:
        weight = model.get_submodule(name).weight
        error = 5 * 0.01 / weight.numel() ** 0.5
        assert abs(float(weight.mean())) < error
        assert abs(float(weight.std()) - 0.01) < error


def test_the_catalogue_s_networks_can_be_made_and_put_out_classes():
    for name in system("alexnet").networks:
        size = (32, 40) if "small" in name else (256, 230)
        model = weightless(name, size, classes=7)
        assert model(torch.zeros(2, 3, *size, device="meta")).shape == (2, 7)
        assert model.stages == tuple(f"stage{n}" for n in range(1, len(model.convs) + 1))


@pytest.mark.parametrize("size", [(10, 10), (16, 16), (28, 33), (32, 32), (64, 64)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_small_network_looks_at_three_quarters_of_small_images(size, channels):
    name = "alexnet-small-nolrn" if channels == 1 else "alexnet-small-nooverlap"
    model = make(name, 5, channels, size)
    assert model.crop == 3 * min(size) // 4
    x = noise(2, channels, *size, dtype=torch.float32)
    model.eval()
    expected = model(centre_crop(x, model.crop))
    assert expected.shape == (2, 5)
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_part_that_is_left_out_is_left_out():
    def kinds(name):
        return {type(m) for m in make(name, 10, 3, (32, 32)).modules()}

    assert {nn.Dropout, LocalResponseNorm} <= kinds("alexnet-small")
    assert kinds("alexnet-small") - kinds("alexnet-small-nodrop") == {nn.Dropout}
    assert kinds("alexnet-small") - kinds("alexnet-small-nolrn") == {LocalResponseNorm}
    plain = make("alexnet-small-nooverlap-nodrop-nolrn", 10, 3, (32, 32))
    assert {m.kernel_size for m in plain.modules() if isinstance(m, nn.MaxPool2d)} == {2}
    assert not {nn.Dropout, LocalResponseNorm} & {type(m) for m in plain.modules()}


def test_dropout_makes_half_of_the_hidden_units_silent_and_doubles_the_others():
    torch.manual_seed(0)
    model = make("alexnet-small", 10, 3, (32, 32))
    seen = {}
    model.head.relu4.register_forward_hook(lambda m, i, o: seen.update(before=o))
    model.head.drop4.register_forward_hook(lambda m, i, o: seen.update(after=o))
    x = noise(64, 3, 32, 32, dtype=torch.float32)
    model(x)
    on = seen["before"] > 0
    kept = seen["after"][on] > 0
    assert abs(float(kept.float().mean()) - 0.5) < 4 * 0.5 / len(kept) ** 0.5
    assert torch.equal(seen["after"][on][kept], 2 * seen["before"][on][kept])
    model.eval()(x)
    assert torch.equal(seen["after"], seen["before"])


@pytest.mark.parametrize(
    ("name", "size", "sentence"),
    [
        ("alexnet", (224, 256), "alexnet needs images of at least 227 x 227 pixels, not 224 x 256"),
        ("alexnet", (32, 32), "give larger ones with data.size, or take alexnet-small"),
        ("alexnet-torchvision", (223, 224), "at least 224 x 224 pixels"),
        ("alexnet-small-nodrop", (9, 32), "alexnet-small-nodrop needs .* at least 10 x 10 pixels"),
        ("alexnet-smal", (256, 256), "no network named 'alexnet-smal'; did you mean alexnet-small"),
        ("alexnet-small-nodrop-x", (32, 32), "no network named 'alexnet-small-nodrop-x'"),
        ("alexnet-torchvision-nolrn", (256, 256), "no network named 'alexnet-torchvision-nolrn'"),
        ("alexnet-", (256, 256), "no network named 'alexnet-'"),
    ],
)
def test_a_wrong_name_or_size_is_one_sentence(name, size, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        make(name, 10, 3, size)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=sentence):
        build(name, ["a", "b"], Input(3, size, (0.5,) * 3, (0.5,) * 3))


def test_a_crop_too_small_for_the_pools_is_one_sentence():
    with pytest.raises(UserError, match="crop of 6 pixels is too small"):
        AlexNet(SMALL, (8,), 10, crop=6)


# Local response normalisation.


def test_normalised_channels_have_the_values_worked_out_by_hand():
    found = local_response_norm(torch.full((1, 8, 1, 1), 10.0, dtype=torch.float64)).flatten()
    edge, next_to_it, inside = 5.8800087, 5.8583778, 5.8369316
    expected = [edge, next_to_it, inside, inside, inside, inside, next_to_it, edge]
    assert found.tolist() == pytest.approx(expected, abs=5e-8)
    assert found[3].item() == pytest.approx(10 / 2.05**0.75, rel=1e-12)


@pytest.mark.parametrize("shape", [(2, 8, 3, 4), (3, 2, 2, 2), (1, 1, 5, 5), (4, 7), (2, 9, 6)])
@pytest.mark.parametrize(
    "constants", [{}, {"n": 3, "k": 1.0, "alpha": 0.5, "beta": 0.6}, {"n": 1}, {"n": 9}], ids=str
)
def test_normalisation_follows_the_definition_in_value_and_gradient(shape, constants):
    x = (20 * noise(*shape)).requires_grad_()
    other = x.detach().clone().requires_grad_()
    weight = noise(*shape, seed=1)
    (weight * local_response_norm(x, **constants)).sum().backward()
    (weight * normalised(other, **constants)).sum().backward()
    found, expected = local_response_norm(x, **constants), normalised(other, **constants)
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)
    assert torch.allclose(x.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_the_derivative():
    x = (20 * noise(2, 7, 2, 2)).requires_grad_()
    assert torch.autograd.gradcheck(local_response_norm, (x,))
    assert torch.autograd.gradgradcheck(local_response_norm, (x,))


def test_normalisation_is_torch_s_with_alpha_times_n():
    x = 30 * noise(2, 12, 5, 5)
    theirs = F.local_response_norm(x, 5, alpha=5e-4, beta=0.75, k=2.0)
    assert torch.allclose(local_response_norm(x), theirs, rtol=1e-12, atol=0)
    assert torch.equal(LocalResponseNorm()(x), local_response_norm(x))
    divided = F.local_response_norm(x, 5, alpha=1e-4, beta=0.75, k=2.0)
    assert not torch.allclose(local_response_norm(x), divided, rtol=1e-3)


def test_without_alpha_a_response_is_divided_by_a_constant_and_none_stays_none():
    x = noise(2, 6, 3, 3)
    assert torch.allclose(local_response_norm(x, alpha=0.0), x / 2**0.75, rtol=1e-14, atol=0)
    zero = torch.zeros(2, 6, 3, 3)
    assert torch.equal(local_response_norm(zero), zero)


def test_a_response_grows_less_than_its_input():
    x = noise(1, 8, 2, 2).abs() + 0.1
    once, tenfold = local_response_norm(x), local_response_norm(10 * x)
    assert bool((tenfold > once).all())
    assert bool((tenfold < 10 * once).all())


def test_normalisation_keeps_the_memory_format_and_the_type():
    x = noise(2, 8, 4, 4, dtype=torch.float32).to(memory_format=torch.channels_last)
    assert local_response_norm(x).is_contiguous(memory_format=torch.channels_last)
    for dtype in (torch.bfloat16, torch.float16):
        found = local_response_norm((1000 * x).to(dtype))
        assert found.dtype == dtype
        assert torch.equal(found, local_response_norm((1000 * x).to(dtype).float()).to(dtype))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"n": 4}, "n is odd, not 4"),
        ({"n": 0}, "n is odd, not 0"),
        ({"k": -1.0}, "k, alpha and beta are at least 0, not -1.0"),
        ({"alpha": math.nan}, "at least 0, not 2.0, nan and 0.75"),
    ],
)
def test_wrong_constants_are_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        local_response_norm(torch.ones(1, 4, 1, 1), **arguments)
    with pytest.raises(UserError, match=r"not in the shape \(4,\)"):
        local_response_norm(torch.ones(4))


def test_overlapping_pools_share_rows_and_columns():
    x = torch.arange(1.0, 50.0).view(1, 1, 7, 7)
    pool = make("alexnet-small", 10, 3, (32, 32)).get_submodule("stage1.pool")
    assert pool(x)[0, 0].tolist() == [[17, 19, 21], [31, 33, 35], [45, 47, 49]]


# Ten crops.


def test_ten_crops_are_those_of_torchvision():
    for height, width, size in ((8, 8, 4), (9, 12, 5), (7, 7, 7)):
        images = noise(3, 2, height, width)
        expected = torch.stack(tv.ten_crop(images, [size, size]), 1)
        if (height - size) % 2 == (width - size) % 2 == 0:
            assert torch.equal(ten_crops(images, size), expected)
        corners = [0, 1, 2, 3, 5, 6, 7, 8]
        assert torch.equal(ten_crops(images, size)[:, corners], expected[:, corners])
        assert ten_crops(images, size).shape == (3, 10, 2, size, size)


@pytest.mark.parametrize("width", [9, 10])
def test_a_mirror_image_of_itself_has_five_pairs_of_equal_crops(width):
    half = noise(1, 3, 9, width)
    crops = ten_crops(half + half.flip(-1), 6)[0]
    assert torch.equal(crops[:5], crops[5:])
    assert len({tuple(c.flatten().tolist()) for c in crops[:5]}) == 5


def test_crops_of_the_mirror_image_are_the_mirror_images_of_the_crops():
    crops = ten_crops(noise(2, 3, 10, 8), 6)
    mirrored = crops.flip(-1)
    order = [1, 0, 3, 2, 4]
    assert torch.equal(crops[:, 5:], mirrored[:, order])


def test_ten_crop_probabilities_are_the_mean_of_single_ones_and_sum_to_1():
    torch.manual_seed(0)
    model = make("alexnet-small", 6, 3, (16, 16)).eval()
    images = noise(4, 3, 16, 16, dtype=torch.float32)
    with torch.no_grad():
        found = ten_crop_predict(model, images, model.crop)
        single = [model(crop).softmax(1) for crop in ten_crops(images, 12).unbind(1)]
        assert torch.allclose(found, sum(single) / 10, atol=1e-6)
        assert torch.allclose(found.sum(1), torch.ones(4), atol=1e-6)
        assert torch.allclose(TenCrop(model, 12)(images).exp(), found, atol=1e-6)
    assert model.crop == 12
    assert not torch.allclose(found, model(images).softmax(1), atol=1e-4)


def test_a_network_in_ten_crops_prepares_the_whole_image_once():
    torch.manual_seed(0)
    input = Input(3, (16, 16), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    plain = build("alexnet-small", ["a", "b"], input, seed=0).eval()
    plain.lay_out(torch.channels_last)
    images = noise(2, 3, 16, 16, dtype=torch.float32)
    with torch.no_grad():
        expected = ten_crop_predict(plain.model, input(images), 12)
        assert torch.allclose(in_ten_crops(plain)(images).exp(), expected, atol=1e-6)
    assert in_ten_crops(plain).memory_format == torch.channels_last


def test_images_smaller_than_a_crop_are_one_sentence():
    for cut in (centre_crop, ten_crops):
        with pytest.raises(
            UserError, match="crop of 5 x 5 pixels cannot be cut out of images of 4"
        ):
            cut(torch.zeros(1, 1, 4, 6), 5)


def test_a_shift_before_the_centre_crop_is_a_random_crop():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    number = 4000
    shifted = Augment(crop=2)(pixels.expand(number, -1, -1, -1), torch.arange(number), 0, 0)
    corners = centre_crop(shifted, 12)[:, 0, 0, 0].long()
    cuts = centre_crop(shifted, 12)
    for cut, corner in zip(cuts[:50], corners[:50].tolist(), strict=True):
        top, left = divmod(corner, 16)
        assert torch.equal(cut, pixels[0, :, top : top + 12, left : left + 12])
    counts = torch.bincount(corners, minlength=256).view(16, 16)[:5, :5]
    assert counts.sum() == number
    # 99.99 % of a chi squared variable with 24 degrees of freedom lie below 58.6.
    assert float(((counts - number / 25) ** 2 / (number / 25)).sum()) < 58.6


# The update rule.


def published_step(w, v, gradient, rate):
    """Section 5: the rate lies within the velocity."""
    v = 0.9 * v - 0.0005 * rate * w - rate * gradient
    return w + v, v


def torch_weights(gradients, rates):
    parameter = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimiser = Training(lr=0.01, momentum=0.9, weight_decay=5e-4).build([parameter])
    weights = []
    for gradient, rate in zip(gradients, rates, strict=True):
        optimiser.param_groups[0]["lr"] = rate
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimiser.step()
        weights.append(parameter.item())
    return weights


def test_an_optimiser_step_is_the_paper_s_while_the_rate_is_constant():
    w, v = published_step(1.0, 0.0, 2.0, 0.01)
    assert (v, w) == (pytest.approx(-0.020005, rel=1e-12), pytest.approx(0.979995, rel=1e-12))
    w, v = published_step(w, v, 0.0, 0.01)
    assert v == pytest.approx(-0.0180094, rel=1e-6)
    assert torch_weights([2.0, 0.0], [0.01, 0.01]) == pytest.approx([0.979995, w], rel=1e-12)


def test_after_a_change_of_rate_the_paper_keeps_its_velocity_and_torch_scales_it():
    gradients, rates = [2.0, 0.0, 0.0], [0.01, 0.01, 0.001]
    w, v, weights = 1.0, 0.0, []
    for gradient, rate in zip(gradients, rates, strict=True):
        w, v = published_step(w, v, gradient, rate)
        weights.append(w)
    found = torch_weights(gradients, rates)
    assert found[:2] == pytest.approx(weights[:2], rel=1e-12)
    kept, scaled = weights[2] - weights[1], found[2] - found[1]
    assert kept == pytest.approx(10 * scaled, rel=1e-2)


# The runs.


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"samples": 0}, r"TenCropEvaluation\(samples=0\): .* greater than or equal to 1"),
        ({"crops": "many"}, r"TenCropEvaluation\(crops='many'\)"),
        ({"crop": True}, "no parameter 'crop'; did you mean crops"),
    ],
)
def test_wrong_hyper_parameters_are_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        TenCropEvaluation(**arguments)


def split(number: int = 40, size: int = 16) -> Split:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (number, 3, size, size), generator=generator, dtype=torch.uint8)
    return Split("train", ResidentImages(pixels), torch.arange(number) % 3)


INPUT = Input(3, (16, 16), (0.5,) * 3, (0.25,) * 3)


def bench(seeds: tuple[int, ...] = (0,), poison: int | None = None, **given) -> Bench:
    """The comparison on noise; from its ``poison``-th loss on, the power fails."""
    calls = {"n": 0}

    class Failing(Classification):
        def loss(self, answer: Answer, batch) -> torch.Tensor:
            calls["n"] += 1
            if calls["n"] == poison:
                raise RuntimeError("as if the power had gone")
            return super().loss(answer, batch)

    def maker(name):
        return lambda seed: build(name, ["a", "b", "c"], INPUT, seed=seed)

    training, images = Training(epochs=2, batch_size=16), split()
    varied = Augment(crop=2, flip=True, colour=0.5, colour_scale="sqrt")
    given = {"validation": [], "test": split(24), **given}
    return Bench(
        task=Failing(["a", "b", "c"], varied),
        train=images,
        transfer=images,
        candidates=[],
        make_student=maker("alexnet-small"),
        training=training,
        seeds=seeds,
        rival=Rival(maker("alexnet-small-nodrop"), training, Failing(["a", "b", "c"])),
        **given,
    )


def train(path, laid_out: Bench) -> Bench:
    run = Run.open(path) if (path / "recipe.yaml").exists() else Run.create(path, {"test": True})
    engine = Engine(device="cpu", checkpoint_seconds=0.0)
    Trainer(run, engine, Voice(quiet=True)).work(TenCropEvaluation().phases(laid_out))
    return laid_out


def test_a_run_stopped_while_either_network_is_trained_ends_with_the_same_bits(tmp_path):
    whole = train(tmp_path / "whole", bench())
    # Three steps an epoch, two epochs, the rival first.
    for poison in (5, 11):
        path = tmp_path / f"stopped-{poison}"
        with pytest.raises(RuntimeError):
            train(path, bench(poison=poison))
        again = train(path, bench())
        for one, other in (
            (whole.students[0], again.students[0]),
            (whole.baselines[0], again.baselines[0]),
        ):
            states = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
            assert all(torch.equal(a, b) for a, b in states)
        assert TenCropEvaluation().findings(again, []) == TenCropEvaluation().findings(whole, [])


def test_the_table_has_means_over_seeds_of_accuracies_by_the_centre_and_by_ten_crops(tmp_path):
    done = train(tmp_path / "run", bench(seeds=(0, 1, 2)))
    (found,) = TenCropEvaluation().findings(done, [])
    heads, *rows = found.table
    assert list(heads) == ["", "training", "test", "gap", "test, ten crops"]
    assert [r[0] for r in rows] == ["rival alexnet-small-nodrop", "student alexnet-small"]
    for networks, row in zip((done.baselines, done.students), rows, strict=True):
        columns = []
        for network_ in networks.values():
            model = network_.model.eval()

            def share(images: Split, in_ten: bool = False, model=model) -> float:
                fed = INPUT(images.images.pixels.float() / 255)
                with torch.no_grad():
                    said = ten_crop_predict(model, fed, 12) if in_ten else model(fed)
                return float((said.argmax(1) == images.labels).double().mean())

            training, test = share(split()), share(split(24))
            columns.append([training, test, training - test, share(split(24), in_ten=True)])
        expected = 100 * torch.tensor(columns, dtype=torch.float64)
        values = [[float(v) for v in cell.split(" +- ")] for cell in row[1:]]
        assert [v[0] for v in values] == pytest.approx(expected.mean(0).tolist(), abs=0.0051)
        assert [v[1] for v in values] == pytest.approx(expected.std(0).tolist(), abs=0.0051)


def test_training_accuracy_is_that_of_labelled_images(tmp_path):
    done = bench()
    student = done.student(0)
    method = TenCropEvaluation(crops=False, samples=20)
    found = method.accuracies(done, student)
    assert len(found) == 3
    done.transfer = replace(done.transfer, labels=None)
    assert method.accuracies(done, student) == found


def test_a_run_shows_its_table(tmp_path):
    values = recipes.preset(system("alexnet"), "smoke", "digits")
    short = ["data.limit=64", "student.training.epochs=1", "baseline.training.epochs=1"]
    run = start(recipes.validate(recipes.assigned(values, short)), tmp_path / "run")
    assert [len(row) for row in run.findings()[0]["table"]] == [5, 5, 5]
    assert "test, ten crops" in (tmp_path / "run" / "report.html").read_text()


def test_a_network_without_a_crop_is_one_sentence_before_anything_is_trained(tmp_path):
    values = recipes.preset(system("alexnet"), "smoke", "digits")
    for part in ("student", "baseline"):
        recipe = recipes.validate(recipes.assigned(values, [f"{part}.model=cnn-4-8"]))
        with pytest.raises(UserError, match=r"cnn-4-8 has no crop of its own.*method\.crops=false"):
            start(recipe, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_it_teaches_and_learns_like_any_network():
    task = Classification(["a", "b", "c"])
    batch = next(iter(task.batches(split(), batch_size=8).epoch(0)))
    student, teacher = (
        build(name, task.classes, INPUT, seed=0) for name in ("alexnet-small", "alexnet-small")
    )
    method = NST(student_layers=["stage1", "stage2"])
    terms = Distiller(student, teacher, method, task, batch)(batch)
    sum(terms.values()).backward()
    assert list(terms) == ["labels", "nst"]
    assert student.model.stage1.conv.weight.grad.abs().max() > 0


def test_the_presets_compare_all_that_the_paper_adds_with_none_of_it():
    for kind in ("digits", "cifar10", "cifar100"):
        recipe = recipes.validate(recipes.preset(system("alexnet"), "small", kind))
        assert recipe.student.model == "alexnet-small"
        assert recipe.baseline.model == "alexnet-small-nodrop"
        assert recipe.student.training == recipe.baseline.training
        assert recipe.baseline.augment == Augment()
        assert recipe.data.augment.colour > 0
        assert recipe.seeds == 3
    assert recipe.data.augment.flip
    assert recipe.data.augment.crop == 4


def test_the_published_setting_is_a_preset():
    recipe = recipes.validate(recipes.preset(system("alexnet"), "paper", "folder"))
    assert recipe.student.model == "alexnet"
    assert recipe.data.size == (256, 256)
    assert recipe.data.augment == Augment(crop=14, flip=True, colour=0.1)
    training = recipe.student.training
    assert (training.epochs, training.batch_size, training.lr) == (90, 128, 0.01)
    assert (training.momentum, training.weight_decay) == (0.9, 5e-4)
    assert [round(training.factor(e), 6) for e in (0, 89)] == [1.0, 0.001]
    assert isinstance(recipe.method(), TenCropEvaluation)
