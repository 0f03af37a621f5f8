"""Limbeck's own networks: their size, their stages, what they need of an image."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.models.plain import CNN, MLP, Quarters
from limbeck.models.shufflenet import shuffle
from limbeck.models.zoo import NAMES, make
from limbeck.training.taps import Taps

PUBLISHED = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "resnet50-cifar": 23_705_252,
    "wrn-16-1": 180_916,
    "wrn-16-2": 703_284,
    "wrn-40-1": 569_780,
    "wrn-40-2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg11": 9_277_284,
    "vgg13": 9_462_180,
    "vgg16": 14_774_436,
    "vgg19": 20_086_692,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
}
RESOLUTIONS = {
    "resnet": (32, 16, 8),
    "resnet50-cifar": (32, 16, 8, 4),
    "wrn": (32, 16, 8),
    "vgg": (16, 8, 4, 4),
    "mobilenetv2": (16, 8, 4, 2),
    "shufflenetv1": (16, 8, 4),
    "shufflenetv2": (16, 8, 4),
    "cnn": (32, 16),
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_a_network_has_the_published_number_of_parameters(name: str, count: int) -> None:
    with torch.device("meta"):
        assert parameters(make(name, 100, 3, (32, 32))) == count


def test_a_perceptron_has_the_parameters_counted_by_hand() -> None:
    by_hand = (784 + 1) * 1200 + (1200 + 1) * 1200 + (1200 + 1) * 10
    assert parameters(make("mlp-1200-1200", 10, 1, (28, 28))) == by_hand


def test_every_published_network_has_a_name_in_the_zoo() -> None:
    assert set(PUBLISHED) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_stages_fire_once_are_not_overwritten_and_fall_in_resolution(name: str) -> None:
    model = make(name, 5, 3, (32, 32)).eval()
    with torch.no_grad(), Taps(model, model.stages) as taps:  # type: ignore[arg-type]
        passes = []
        assert taps.overwritten(lambda: passes.append(taps(torch.randn(1, 3, 32, 32)))) == []
    output, features = passes[0]
    assert output.shape == (1, 5)
    assert output.isfinite().all()
    if name.startswith("mlp"):
        widths = name.removesuffix("-drop").split("-")[1:]
        assert [f.shape[1] for f in features.values()] == [int(n) for n in widths]
        return
    family = max((f for f in RESOLUTIONS if name.startswith(f)), key=len)
    assert tuple(f.shape[-1] for f in features.values()) == RESOLUTIONS[family]


@pytest.mark.parametrize("name", ["resnet20", "resnet8x4", "wrn-16-2", "vgg8", "shufflenetv1"])
def test_the_pooled_last_stage_is_what_the_classifier_reads(name: str) -> None:
    model = make(name, 5, 3, (32, 32)).eval()
    last = f"stage{len(model.stages)}"  # type: ignore[arg-type]
    before = "bn" if name.startswith("wrn") else last
    with torch.no_grad(), Taps(model, [before, "fc:input"]) as taps:
        _, features = taps(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(features["fc:input"], features[before].relu().mean((2, 3)))


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2", "cnn-16-32", "mlp-800-800", "vgg8"])
@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (1, (28, 28)), (3, (64, 48))])
def test_a_network_takes_grey_and_coloured_images_of_many_sizes(
    name: str, channels: int, size: tuple[int, int]
) -> None:
    model = make(name, 7, channels, size).eval()
    assert model(torch.zeros(1, channels, *size)).shape == (1, 7)


def test_images_of_64_pixels_are_pooled_once_more_by_vgg() -> None:
    model = make("vgg8", 7, 3, (64, 64)).eval()
    with torch.no_grad(), Taps(model, model.stages) as taps:  # type: ignore[arg-type]
        _, features = taps(torch.zeros(1, 3, 64, 64))
    assert [f.shape[-1] for f in features.values()] == [32, 16, 8, 4]


def test_convolutions_start_with_a_variance_of_two_over_fan_out() -> None:
    torch.manual_seed(0)
    conv = make("resnet32x4", 10, 3, (32, 32)).get_submodule("stage3.1.conv1")
    assert isinstance(conv.weight, torch.Tensor)
    assert conv.weight.var().item() == pytest.approx(2 / (9 * 256), rel=0.02)


def test_dropout_of_a_perceptron_acts_on_inputs_and_hidden_units_while_training() -> None:
    model = MLP(50, (400,), 10, dropout=0.5, input_dropout=0.2)
    x = torch.ones(100, 50)
    torch.manual_seed(0)
    with Taps(model, ["stage1.0", "fc:input"]) as taps:
        _, features = taps(x)
        dropped = (features["stage1.0"] == 0).float().mean().item()
        assert dropped == pytest.approx(0.2, abs=0.03)
        _, first = taps(x)
        _, second = taps(x)
    assert not torch.equal(first["fc:input"], second["fc:input"])
    model.eval()
    torch.testing.assert_close(model(x)[0], model(x)[1])


def test_the_ending_drop_gives_a_perceptron_hintons_dropout() -> None:
    model = make("mlp-30-20-drop", 10, 1, (4, 4))
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.2, 0.5, 0.5]


def test_pooling_to_quarters_equals_adaptive_pooling() -> None:
    for shape in ((2, 2), (3, 5), (7, 7), (8, 6)):
        x = torch.randn(2, 3, *shape)
        torch.testing.assert_close(Quarters()(x), nn.functional.adaptive_avg_pool2d(x, 2))


def test_shuffling_back_with_the_other_number_of_groups_undoes_a_shuffle() -> None:
    x = torch.randn(2, 12, 3, 3)
    assert torch.equal(shuffle(shuffle(x, 3), 4), x)


def test_a_cnn_uses_no_batch_statistics() -> None:
    model = CNN((4, 8), 10, channels=1).train()
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


@pytest.mark.parametrize(
    ("name", "size", "sentence"),
    [
        ("wrn-17-2", (32, 32), "in sixes; did you mean wrn-16-2"),
        ("wrn-4-1", (32, 32), "depth of 10, 16, 22"),
        ("wrn-16", (32, 32), "wrn-DEPTH-WIDTH"),
        ("wrn-16-0", (32, 32), "width of 0"),
        ("mlp-0", (32, 32), "width of 0"),
        ("mlp-0-drop", (32, 32), "width of 0"),
        ("mlp-drop", (32, 32), "no network named 'mlp-drop'"),
        ("cnn-8-drop", (32, 32), "no network named 'cnn-8-drop'"),
        ("mlp", (32, 32), "no network named 'mlp'"),
        ("cnn-x", (32, 32), "no network named 'cnn-x'; known: cnn-16-32"),
        ("resnet2O", (32, 32), "did you mean .*resnet20"),
        ("vgg8", (7, 32), "vgg8 needs images of at least 8 x 8 pixels, not 7 x 32"),
        ("cnn-4-4-4", (4, 4), "at least 8 x 8 pixels"),
    ],
)
def test_an_impossible_network_is_refused_in_one_sentence(
    name: str, size: tuple[int, int], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as refusal:
        make(name, 10, 3, size)
    assert "\n" not in str(refusal.value)
