import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models import Input, build
from limbeck.training.folding import fold_batch_norm
from limbeck.training.taps import Taps

CLASSES = [str(n) for n in range(10)]


def own(name: str) -> Callable[[], nn.Module]:
    data = Input(3, (32, 32), (0.5,) * 3, (0.5,) * 3)
    return lambda: build(name, CLASSES, data, seed=0).model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    # Name -> how to make it, batch norms, those folded, pixels; counts by hand from the papers.
    # Stem, 9 blocks of 2, 2 projections.
    "resnet20": (own("resnet20"), 1 + 9 * 2 + 2, 21, 32),
    # The stem is as wide as no stage, so every stage begins with a projection.
    "resnet8x4": (own("resnet8x4"), 1 + 3 * 2 + 3, 10, 32),
    "vgg8": (own("vgg8"), 5, 5, 32),
    # Folded are the second ones of the 6 blocks, and the very first, which alone reads the stem.
    "wrn-16-2": (own("wrn-16-2"), 6 * 2 + 1, 6 + 1, 32),
    "mobilenetv2": (own("mobilenetv2"), 1 + 17 * 3 + 1, 53, 32),
    "shufflenetv1": (own("shufflenetv1"), 1 + 16 * 3, 49, 32),
    # 3 blocks that halve the resolution, 13 that keep it.
    "shufflenetv2": (own("shufflenetv2"), 1 + 3 * 5 + 13 * 3 + 1, 56, 32),
    "resnet50-cifar": (own("resnet50-cifar"), 1 + 16 * 3 + 4, 53, 16),
    "torchvision resnet18": (torchvision.models.resnet18, 1 + 8 * 2 + 3, 20, 64),
    # The first of the 11 blocks does not expand.
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, 1 + 2 + 10 * 3 + 1, 34, 64),
}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine parameters as far from those of a new batch norm as a trained one's."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model


def batch_norms(model: nn.Module) -> list[str]:
    kinds = nn.BatchNorm1d | nn.BatchNorm2d
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def images(pixels: int = 8, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, pixels, pixels, generator=torch.Generator().manual_seed(1))


class Written(nn.Module):
    """Layers ``conv`` and ``bn`` and a forward to be given."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **more: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        for name, module in more.items():
            self.add_module(name, module)
        self.run = run
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_answers_as_before_and_the_original_is_untouched(name: str):
    make, before, folds, pixels = NETWORKS[name]
    torch.manual_seed(0)
    model = randomise(make())
    model.train()
    assert len(batch_norms(model)) == before
    stages = list(getattr(model, "stages", []))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    paths = [path for path, _ in model.named_modules()]

    for dtype, most in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        same = copy.deepcopy(model).to(dtype).eval()
        x = images(pixels).to(dtype)
        folded = fold_batch_norm(same.train())
        assert not any(module.training for module in folded.modules())
        assert all(module.training for module in same.modules())
        assert before - len(batch_norms(folded)) == folds
        assert [path for path, _ in folded.named_modules()] == paths
        assert {p.dtype for p in folded.parameters()} == {dtype}
        with torch.no_grad(), Taps(same.eval(), stages) as one, Taps(folded, stages) as other:
            (wanted, ends), (answer, folded_ends) = one(x), other(x)
        assert far(answer, wanted) <= most
        for stage in stages:
            assert far(folded_ends[stage], ends[stage]) <= most

    fold_batch_norm(model)
    assert all(module.training for module in model.modules())
    assert all(parameters[key] is value for key, value in model.named_parameters())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Declared(nn.modules.batchnorm._BatchNorm):
    """A batch norm of one's own, for any number of dimensions."""

    folds = True

    def _check_input_dim(self, input: Tensor) -> None:
        pass


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("make", "norm"),
    [
        (lambda bias: nn.Conv2d(4, 6, 3, bias=bias), nn.BatchNorm2d),
        (lambda bias: nn.Conv2d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm2d),
        (lambda bias: nn.Conv2d(6, 6, (1, 3), groups=6, bias=bias), nn.BatchNorm2d),
        (lambda bias: nn.Conv1d(4, 6, 3, bias=bias), nn.BatchNorm1d),
        (lambda bias: nn.Linear(4, 6, bias=bias), nn.BatchNorm1d),
        (lambda bias: nn.Conv2d(4, 6, 3, bias=bias), Declared),
        (lambda bias: nn.Conv1d(4, 6, 3, bias=bias), Declared),
        (lambda bias: nn.Linear(4, 6, bias=bias), Declared),
    ],
)
def test_folding_scales_each_output_channel_and_shifts_its_bias(make, norm, bias, affine):
    torch.manual_seed(2)
    model = randomise(nn.Sequential(make(bias), norm(6, eps=0.1, affine=affine))).double()
    layer, bn = model
    folded = fold_batch_norm(model)
    assert type(folded[1]) is nn.Identity
    for c in range(6):
        gamma, beta = (float(bn.weight[c]), float(bn.bias[c])) if affine else (1.0, 0.0)
        spread = (float(bn.running_var[c]) + 0.1) ** 0.5
        start = float(layer.bias[c]) if bias else 0.0
        weight = layer.weight[c] * gamma / spread
        shift = gamma * (start - float(bn.running_mean[c])) / spread + beta
        torch.testing.assert_close(folded[0].weight[c], weight, rtol=1e-14, atol=0)
        assert float(folded[0].bias[c]) == pytest.approx(shift, rel=1e-13, abs=1e-15)
    width = layer.weight.shape[1] * getattr(layer, "groups", 1)
    x = torch.randn(5, width, *[7] * (layer.weight.dim() - 2), dtype=torch.float64)
    assert far(folded(x), model.eval()(x)) <= 1e-14


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        (nn.ConvTranspose1d, nn.BatchNorm1d),
        (nn.ConvTranspose2d, nn.BatchNorm2d),
        (nn.ConvTranspose2d, Declared),
    ],
)
def test_a_transposed_convolution_is_scaled_by_the_outputs_of_its_groups(
    kind, norm, groups, bias, affine
):
    torch.manual_seed(5)
    up = kind(8, 12, 3, stride=2, padding=1, output_padding=1, groups=groups, bias=bias)
    model = randomise(nn.Sequential(up, norm(12, eps=0.1, affine=affine))).double().eval()
    layer, bn = model
    folded = fold_batch_norm(model)
    assert type(folded[1]) is nn.Identity
    ins, outs = 8 // groups, 12 // groups
    for i in range(8):
        for o in range(outs):
            c = i // ins * outs + o
            gamma = float(bn.weight[c]) if affine else 1.0
            wanted = layer.weight[i, o] * gamma / (float(bn.running_var[c]) + 0.1) ** 0.5
            torch.testing.assert_close(folded[0].weight[i, o], wanted, rtol=1e-14, atol=0)
    x = torch.randn(3, 8, *[5] * (layer.weight.dim() - 2), dtype=torch.float64)
    assert far(folded(x), model(x)) <= 1e-14


def test_a_batch_norm_of_ones_own_is_folded_by_its_own_word_alone():
    class Further(Declared):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).abs()

    for norm, left in ((Declared, []), (Further, ["1"])):
        model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)))
        folded = fold_batch_norm(model)
        named = folded.named_modules()
        assert [n for n, m in named if isinstance(m, nn.modules.batchnorm._BatchNorm)] == left
        assert far(folded(images()), model.eval()(images())) <= 1e-6


def test_a_convolution_fed_one_image_without_a_batch_is_refused_where_the_norm_reads_another_axis():
    folded = fold_batch_norm(randomise(nn.Sequential(nn.Conv2d(3, 4, 3), Declared(4))))
    with pytest.raises(UserError, match="takes 4 dimensions, not 3"):
        folded(images()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_worked_out_in_float64_and_rounded_once(dtype: torch.dtype):
    model = randomise(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))).to(dtype)
    exact = fold_batch_norm(copy.deepcopy(model).double())
    folded = fold_batch_norm(model)
    assert torch.equal(folded[0].weight, exact[0].weight.to(dtype))
    assert torch.equal(folded[0].bias, exact[0].bias.to(dtype))


def test_a_batch_norm_without_running_statistics_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    folded = fold_batch_norm(model)
    assert batch_norms(folded) == ["1"]
    assert torch.equal(folded(images()), model.eval()(images()))


class Subclassed(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


def aliased() -> nn.Module:
    model = Written(lambda self, x: self.other(self.conv(x)))
    model.other = model.bn
    return model


def listed() -> nn.Module:
    model = Written(lambda self, x: self.listed[1](self.listed[0](x)))
    model.listed = [model.conv, model.bn]
    return model


def tied() -> nn.Module:
    model = Written(lambda self, x: self.bn(self.conv(x)) + self.last(x), last=nn.Conv2d(3, 3, 3))
    model.last.padding = (1, 1)
    model.last.weight = model.conv.weight
    return model


def patched() -> nn.Module:
    model = Written(lambda self, x: self.bn(self.conv(x)))
    run = model.conv.forward
    model.conv.forward = lambda x: run(x).abs()
    return model


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Written(lambda m, x: m.conv(m.bn(x))), id="norm first"),
        pytest.param(lambda: Written(lambda m, x: m.bn(m.conv(x).relu())), id="relu between"),
        pytest.param(
            lambda: Written(lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x))), id="read twice"
        ),
        pytest.param(
            lambda: Written(lambda m, x: (lambda y: m.bn(y) + y.add_(1))(m.conv(x))),
            id="changed in place",
        ),
        pytest.param(
            lambda: Written(lambda m, x: m.bn(m.conv(m.conv(x)))), id="convolution runs twice"
        ),
        pytest.param(
            lambda: Written(lambda m, x: m.bn(m.bn(m.conv(x)))), id="batch norm runs twice"
        ),
        pytest.param(
            lambda: Written(lambda m, x: m.bn(m.conv(x)) * m.conv.weight.sum()), id="weight read"
        ),
        pytest.param(
            lambda: Written(lambda m, x: m.bn(m.conv(x)) * m.bn.running_var.sum()),
            id="statistics read",
        ),
        pytest.param(
            lambda: Written(
                lambda m, x: m.bn(m.up(x, output_size=m.up(x).shape[2:])),
                up=nn.ConvTranspose2d(3, 3, 3),
            ),
            id="transposed runs twice",
        ),
        pytest.param(
            lambda: Written(lambda m, x: m.bn(m.sub(x)), sub=Subclassed(3, 3, 3)), id="subclass"
        ),
        pytest.param(
            lambda: Written(
                lambda m, x: m.bn(m.wn(x)),
                wn=nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)),
            ),
            id="parametrized",
        ),
        pytest.param(
            lambda: Written(lambda m, x: m.bn(m.conv(x)) if x.sum() > 0 else m.bn(m.conv(x) * 2)),
            id="control flow by values",
        ),
        pytest.param(aliased, id="two names"),
        pytest.param(listed, id="plain list"),
        pytest.param(tied, id="weights shared"),
        pytest.param(patched, id="forward replaced"),
    ],
)
def test_what_would_change_the_answer_is_not_folded(make: Callable[[], nn.Module]):
    torch.manual_seed(3)
    model = make()
    folded = fold_batch_norm(model)
    assert batch_norms(folded) == batch_norms(model)
    assert torch.equal(folded(images()), model.eval()(images()))


def test_a_linear_layer_whose_batch_norm_reads_another_axis_is_refused():
    torch.manual_seed(4)
    # (B, 5, 3) is normalised along the 5, which shows in the sizes.
    other = randomise(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(5)))
    x = torch.randn(2, 5, 4)
    assert torch.equal(fold_batch_norm(other)(x), other.eval()(x))
    # (B, 3, 3) does not show before it is there.
    folded = fold_batch_norm(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    with pytest.raises(UserError, match="takes 2 dimensions, not 3"):
        folded(torch.randn(2, 3, 4))


def test_a_layer_whose_output_is_to_be_kept_is_not_folded():
    model = own("wrn-16-2")()
    assert "stage1.0.bn1" not in batch_norms(fold_batch_norm(model))
    for place in ("stem", "stage1:input", "stage1.0.bn1:input"):
        left = set(batch_norms(fold_batch_norm(model, [place])))
        assert left - set(batch_norms(fold_batch_norm(model))) == {"stage1.0.bn1"}


def test_outputs_of_batch_norms_may_be_kept_and_folded():
    model = randomise(own("resnet20")())
    places = batch_norms(model)
    folded = fold_batch_norm(model, places)
    assert not batch_norms(folded)
    with torch.no_grad(), Taps(model.eval(), places) as one, Taps(folded, places) as other:
        wanted, got = one(images(32))[1], other(images(32))[1]
    assert all(far(got[place], wanted[place]) <= 1e-5 for place in places)


def test_a_block_that_ends_in_the_layer_shows_its_output_too():
    model = randomise(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)))
    assert not batch_norms(fold_batch_norm(model))
    assert batch_norms(fold_batch_norm(model, ["0"])) == ["1"]


def test_an_unknown_place_to_keep_is_answered_with_the_near_names():
    with pytest.raises(UserError, match=r"no module 'stm' to keep; did you mean stem"):
        fold_batch_norm(own("resnet8")(), ["stm"])


def test_hooks_on_a_batch_norm_fire_on_the_identity_with_the_same_output():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)))
    caught: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, output: caught.append(output.clone()))
    folded = fold_batch_norm(model)
    assert not caught
    assert not batch_norms(folded)
    assert far(folded(images()), model.eval()(images())) <= 1e-6
    assert len(caught) == 2
    assert far(caught[0], caught[1]) <= 1e-6
    assert len(model[1]._forward_hooks) == 1


@pytest.mark.parametrize(
    "hook",
    [
        lambda m: m[0].register_forward_hook(lambda module, args, output: output * 2),
        lambda m: m[0][0].register_forward_hook(lambda module, args, output: output * 2),
        lambda m: m[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        lambda m: m[1][0].register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        lambda m: m[0][0].register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    ],
)
def test_a_layer_whose_output_a_hook_may_see_or_change_is_not_folded(hook):
    parts = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.BatchNorm2d(4))
    model = randomise(nn.Sequential(*parts))
    hook(model)
    folded = fold_batch_norm(model)
    assert batch_norms(folded) == ["1.0"]
    assert torch.equal(folded(images()), model.eval()(images()))


def test_hooks_of_the_original_see_nothing_of_the_trace():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    caught: list[Any] = []
    model[0].register_forward_hook(lambda module, args, output: caught.append(output))
    model[0].register_forward_pre_hook(lambda module, args: caught.append(args))
    assert not batch_norms(fold_batch_norm(model))
    assert not caught


def test_one_pair_that_cannot_be_folded_does_not_hold_up_another():
    model = nn.Sequential(aliased(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert batch_norms(fold_batch_norm(model)) == ["0.bn"]


def test_a_forward_that_stores_what_it_sees_stores_nothing_of_the_trace():
    def run(self: Any, x: Tensor) -> Tensor:
        self.last = self.bn(self.conv(x))
        return self.last

    model = Written(run)
    folded = fold_batch_norm(model)
    assert not batch_norms(folded)
    assert not hasattr(model, "last")
    assert not hasattr(folded, "last")


def test_optional_arguments_have_their_default_values_in_the_trace():
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor, mask: Tensor | None = None, *, squash: bool = False) -> Tensor:
            x = self.bn(self.conv(x))
            if mask is not None:
                x = x * mask
            return x.tanh() if squash else x

    model = randomise(Optional())
    folded = fold_batch_norm(model)
    assert not batch_norms(folded)
    assert far(folded(images(), squash=True), model.eval()(images(), squash=True)) <= 1e-6


def test_folding_keeps_what_is_frozen_frozen_and_the_memory_format():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).requires_grad_(False)
    folded = fold_batch_norm(model.to(memory_format=torch.channels_last))
    assert not any(p.requires_grad for p in folded.parameters())
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_folded_network_folds_and_copies_again():
    model = randomise(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()))
    once = fold_batch_norm(model)
    twice = fold_batch_norm(copy.deepcopy(once))
    x = torch.randn(5, 4)
    assert torch.equal(twice(x), once(x))
