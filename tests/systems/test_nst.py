import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck import recipes
from limbeck.catalogue import system
from limbeck.errors import UserError
from limbeck.losses import nst
from limbeck.models.plain import CNN
from limbeck.models.resnet_cifar import SmallResNet
from limbeck.systems.classification.kd import KD
from limbeck.systems.classification.nst import NST, selectivity
from limbeck.tasks.classification import Classification
from limbeck.training.distiller import Distiller
from limbeck.training.task import Answer

KERNELS = ("poly", "linear", "gaussian")
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def channel(*values: float) -> torch.Tensor:
    """One image of one channel: a row of positions."""
    return torch.tensor(values).view(1, 1, 1, -1)


def pooled(features: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Means over equal windows."""
    b, c, h, w = features.shape
    return features.view(b, c, height, h // height, width, w // width).mean((3, 5))


def by_pairs(student, teacher, kernel, degree=2, offset=0.0, teacher_term=True):
    """The definition, one pair of channels of one image after the other."""
    size = [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    images = []
    for s_maps, t_maps in zip(pooled(student, *size), pooled(teacher, *size), strict=True):
        s, t = ([m.flatten() / m.square().sum().sqrt() for m in f] for f in (s_maps, t_maps))
        distances = [((x - y) ** 2).sum().item() for x, y in product(t, s)]
        variance = sum(distances) / len(distances)

        def k(x, y, variance=variance):
            if kernel == "gaussian":
                return torch.exp(-((x - y) ** 2).sum() / (2 * variance))
            return (x * y).sum() if kernel == "linear" else ((x * y).sum() + offset) ** degree

        value = sum(k(x, y) for x, y in product(s, s)) / len(s) ** 2
        value = value - 2 * sum(k(x, y) for x, y in product(t, s)) / (len(s) * len(t))
        if teacher_term:
            value = value + sum(k(x, y) for x, y in product(t, t)) / len(t) ** 2
        images.append(value)
    return sum(images) / len(images)


@every_kernel
def test_two_equal_sets_have_no_loss_whatever_the_order_and_the_copies(kernel):
    signed = maps(3, 6, 4, 4, dtype=torch.float32)
    for teacher in (signed, signed.relu()):
        shuffled = teacher[:, [3, 0, 5, 1, 4, 2]]
        for student in (teacher, shuffled, teacher.repeat(1, 2, 1, 1)):
            assert abs(nst(student, teacher, kernel).item()) < 1e-6


@pytest.mark.parametrize(
    ("student", "kernel", "loss"),
    [
        ((0.0, 1.0), "poly", 2.0),
        ((0.0, 1.0), "linear", 2.0),
        # the distance is the scale itself: 2 - 2 exp(-1/2)
        ((0.0, 1.0), "gaussian", 2 - 2 * math.exp(-0.5)),
        ((1.0, 1.0), "poly", 1.0),
        ((1.0, 1.0), "linear", 0.58578644),
        ((-1.0, 0.0), "poly", 0.0),
        ((-1.0, 0.0), "linear", 4.0),
    ],
)
def test_the_loss_has_the_values_worked_out_by_hand(student, kernel, loss):
    assert nst(channel(*student), channel(1.0, 0.0), kernel).item() == pytest.approx(loss, abs=1e-6)


def test_an_offset_and_a_degree_have_the_values_worked_out_by_hand():
    # (1 + 1/2)^3 twice, less 2 (0 + 1/2)^3
    value = nst(channel(0.0, 1.0), channel(1.0, 0.0), "poly", degree=3, offset=0.5)
    assert value.item() == pytest.approx(6.5)


@every_kernel
def test_the_length_of_a_channel_changes_nothing(kernel):
    student, teacher = maps(2, 3, 4, 4), maps(2, 5, 4, 4, seed=1)
    longer = student * torch.tensor([0.1, 3.0, 70.0], dtype=torch.float64).view(-1, 1, 1)
    expected = nst(student, teacher, kernel).item()
    assert nst(longer, teacher, kernel).item() == pytest.approx(expected, rel=1e-12)
    assert nst(student, 9 * teacher, kernel).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("channels", [(3, 4), (24, 40)])
def test_by_default_normalised_gram_matrices_over_positions_are_matched(channels):
    student, teacher = maps(4, channels[0], 4, 5), maps(4, channels[1], 4, 5, seed=1)
    images = []
    for s, t in zip(student.flatten(2), teacher.flatten(2), strict=True):
        grams = []
        for f in (s, t):
            unit = f / f.norm(dim=1, keepdim=True)
            grams.append(sum(torch.outer(v, v) for v in unit) / len(unit))
        images.append((grams[0] - grams[1]).square().sum().item())
    assert nst(student, teacher).item() == pytest.approx(sum(images) / 4, rel=1e-12)
    single = nst(student.float(), teacher.float()).item()
    assert single == pytest.approx(sum(images) / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("kernel", "degree", "offset"),
    [
        ("poly", 2, 0.0),
        ("poly", 2, 0.5),
        ("poly", 3, 0.0),
        ("linear", 2, 0.0),
        ("gaussian", 2, 0.0),
    ],
)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((2, 3, 4, 6), (2, 5, 4, 6)),
        ((2, 6, 4, 2), (2, 4, 2, 1)),
        ((2, 4, 2, 1), (2, 7, 4, 3)),
        ((2, 3, 2, 4), (2, 5, 4, 2)),
    ],
    ids=["equal sizes", "larger student", "larger teacher", "crossed"],
)
def test_value_and_gradient_follow_an_independent_formula(student, teacher, kernel, degree, offset):
    s, t = maps(*student).requires_grad_(), maps(*teacher, seed=1).requires_grad_()
    other = s.detach().clone().requires_grad_()
    value = nst(s, t, kernel, degree, offset)
    expected = by_pairs(other, t.detach(), kernel, degree, offset)
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    assert torch.allclose(s.grad, other.grad, rtol=1e-9, atol=1e-14)
    assert t.grad is None


@every_kernel
def test_the_term_of_the_teacher_alone_moves_nothing(kernel):
    s, t = maps(2, 3, 4, 4).requires_grad_(), maps(2, 5, 4, 4, seed=1).requires_grad_()
    other = s.detach().clone().requires_grad_()
    nst(s, t, kernel).backward()
    by_pairs(other, t, kernel, teacher_term=False).backward(inputs=[other])
    assert torch.allclose(s.grad, other.grad, rtol=1e-9, atol=1e-14)
    assert t.grad is None


@pytest.mark.parametrize("channels", [3, 12])
@pytest.mark.parametrize("kernel", ["poly", "linear"])
def test_the_gradient_is_the_derivative(kernel, channels):
    # not that of the Gaussian kernel, whose scale is taken as a constant
    s, t = maps(2, channels, 3, 3).requires_grad_(), maps(2, 5, 2, 3, seed=1)
    assert torch.autograd.gradcheck(lambda x: nst(x, t, kernel), (s,))


@pytest.mark.parametrize(("kernel", "most"), [("poly", 2), ("linear", 4), ("gaussian", 2)])
def test_the_loss_stays_within_its_bounds(kernel, most):
    for seed in range(20):
        s, t = (maps(2, 1 + seed, 2, 2, seed=n, dtype=torch.float32) for n in (seed, seed + 100))
        for one, other in ((s, t), (s.relu(), t.relu()), (s, -s), (s, 1.001 * s)):
            assert -1e-6 < nst(one, other, kernel).item() <= most + 1e-6


@pytest.mark.parametrize("shape", [(2, 16, 16, 16), (2, 64, 2, 2), (2, 12, 4, 4)])
def test_no_more_is_built_than_the_features_themselves(shape):
    built = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            outputs = out if isinstance(out, tuple) else (out,)
            built.extend(o.numel() for o in outputs if isinstance(o, torch.Tensor))
            return out

    s, t = maps(*shape).requires_grad_(), maps(*shape, seed=1)
    with Sizes():
        nst(s, t).backward()
    assert max(built) == s.numel()


@every_kernel
def test_dead_channels_are_zeros_and_get_no_gradient(kernel):
    s, t = maps(2, 3, 4, 4), maps(2, 5, 4, 4, seed=1)
    s[:, 1], t[0, :] = 0, 0
    s.requires_grad_()
    assert torch.equal(selectivity(s)[:, 1], torch.zeros(2, 16, dtype=torch.float64))
    value = nst(s, t, kernel)
    value.backward()
    assert value.item() > 0
    assert torch.equal(s.grad[:, 1], torch.zeros(2, 4, 4, dtype=torch.float64))
    assert s.grad[:, [0, 2]].isfinite().all()
    assert s.grad[:, [0, 2]].abs().max() > 0
    nothing = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = nst(nothing, torch.zeros(2, 3, 4, 4), kernel)
    loss.backward()
    assert loss.item() == 0
    assert nothing.grad.abs().max() == 0


@every_kernel
def test_a_single_equal_channel_has_no_loss(kernel):
    one = maps(2, 1, 3, 3, dtype=torch.float32)
    assert abs(nst(one, 2 * one, kernel).item()) < 1e-6


def test_half_precision_is_left_before_anything_is_summed():
    s, t = maps(2, 3, 4, 4), maps(2, 5, 8, 8, seed=1)
    for dtype in (torch.bfloat16, torch.float16):
        value = nst(s.to(dtype), t.to(dtype))
        assert value.dtype == torch.float32
        assert value.item() == nst(s.to(dtype).float(), t.to(dtype).float()).item()
    assert nst(s, t).dtype == torch.float64
    assert nst(s, t.half()).dtype == torch.float64
    s, t = s.float(), t.float()
    for kernel in KERNELS:
        plain = nst(s, t, kernel).item()
        with torch.autocast("cpu", torch.bfloat16):
            assert nst(s, t, kernel).item() == plain


def test_repeating_the_batch_changes_nothing():
    s, t = maps(3, 4, 2, 2), maps(3, 6, 4, 4, seed=1)
    for kernel in KERNELS:
        twice = nst(s.repeat(2, 1, 1, 1), t.repeat(2, 1, 1, 1), kernel).item()
        assert twice == pytest.approx(nst(s, t, kernel).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((maps(2, 3), maps(2, 3, 4, 4)), r"student features have the shape \(2, 3\).*feature maps"),
        ((maps(2, 3, 4, 4), maps(2, 3, 4)), r"teacher features have the shape \(2, 3, 4\)"),
        ((maps(2, 3, 4, 4), maps(3, 3, 4, 4)), "of 2 samples, the teacher's of 3; .*same batch"),
        ((maps(2, 3, 4, 4), maps(2, 3, 4, 4), "pol"), "no kernel 'pol'; did you mean poly"),
        ((maps(2, 3, 4, 4), maps(2, 3, 4, 4), "poly", 0), "at least 1 .* not 0 and 0.0"),
        ((maps(2, 3, 4, 4), maps(2, 3, 4, 4), "poly", 2, -1.0), "at least 0, not 2 and -1.0"),
    ],
)
def test_wrong_arguments_of_the_loss_are_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        nst(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kernel": "cubic"}, r"NST\(kernel='cubic'\): input should be 'poly', 'linear' or"),
        ({"weight": -1.0}, r"NST\(weight=-1.0\)"),
        ({"degree": 0}, r"NST\(degree=0\): input should be greater than or equal to 1"),
        ({"offset": math.nan}, r"NST\(offset=nan\)"),
        ({"student_layers": ()}, r"NST\(student_layers=\(\)\)"),
        ({"half": "perhaps"}, r"NST\(half='perhaps'\)"),
        ({"layers": ["a"]}, "no parameter 'layers'; did you mean"),
        (
            {"teacher_layers": ["stage3"]},
            "student_layers has 3 and teacher_layers has 1; name as many of each",
        ),
    ],
)
def test_wrong_hyper_parameters_are_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        NST(**arguments)
    assert "\n" not in str(caught.value)


def net(widths: tuple[int, ...] = (2, 3), seed: int = 0) -> CNN:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CNN(widths, classes=3, channels=1)


TASK = Classification(["a", "b", "c"])
BATCH = {"image": maps(5, 1, 8, 8, dtype=torch.float32), "label": torch.tensor([0, 1, 2, 0, 1])}


def features(model: CNN, path: str) -> torch.Tensor:
    """What the stages up to this one put out."""
    x = BATCH["image"]
    for name, layer in model.named_children():
        x = layer(x)
        if name == path:
            return x
    raise KeyError(path)


def test_the_term_is_the_weighted_sum_over_the_pairs_beside_the_labels():
    student, teacher = net(), net((4, 5), seed=1)
    pairs = [("stage1", "stage2"), ("stage2", "stage1")]
    losses = [nst(features(student, s), features(teacher, t)).item() for s, t in pairs]
    assert min(losses) > 0
    layers = {"student_layers": ["stage1", "stage2"], "teacher_layers": ["stage2", "stage1"]}
    for half, factor in ((False, 50), (True, 25)):
        method = NST(half=half, **layers)
        assert method.pairs == pairs
        terms = Distiller(student, teacher, method, TASK, BATCH)(BATCH)
        assert list(terms) == ["labels", "nst"]
        assert terms["nst"].item() == pytest.approx(factor * sum(losses), rel=1e-5)
    plain = nn.functional.cross_entropy(student(BATCH["image"]), BATCH["label"])
    assert terms["labels"].item() == pytest.approx(plain.item())


def test_kernel_degree_and_offset_reach_the_loss():
    student, teacher = net(), net((4, 5), seed=1)
    s, t = features(student, "stage2"), features(teacher, "stage2")
    for given in ({"kernel": "gaussian"}, {"kernel": "linear"}, {"degree": 3, "offset": 0.5}):
        method = NST(weight=2.0, student_layers=["stage2"], **given)
        terms = Distiller(student, teacher, method, TASK, BATCH)(BATCH)
        assert terms["nst"].item() == pytest.approx(2 * nst(s, t, **given).item(), rel=1e-5)


def test_without_weight_a_step_is_a_plain_cross_entropy_step():
    student = net()
    method = NST(weight=0.0, student_layers=["stage1"])
    terms = Distiller(student, net(seed=1), method, TASK, BATCH)(BATCH)
    assert list(terms) == ["labels"]


def test_by_default_the_stages_of_the_residual_networks_are_matched():
    torch.manual_seed(0)
    student, teacher = (SmallResNet(8, w, 3, 1) for w in ((4, 4, 8, 8), (4, 6, 10, 12)))
    assert NST().student_taps == NST().teacher_taps == SmallResNet.stages
    distiller = Distiller(student, teacher, NST(), TASK, BATCH)
    distiller(BATCH)["nst"].backward()
    assert student.stem[0].weight.grad.abs().max() > 0
    assert student.fc.weight.grad is None
    assert all(p.grad is None for p in teacher.parameters())
    before = NST(student_layers=["stage3.0.relu2:input"])
    assert torch.isfinite(Distiller(student, teacher, before, TASK, BATCH)(BATCH)["nst"])


def test_features_are_all_that_is_read_of_the_teacher():
    method = NST(student_layers=["stage1"])
    assert method.teacher_outputs is False
    one, other = Answer({}, {"stage1": maps(2, 3, 4, 4)}), Answer({}, {"stage1": maps(2, 5, 4, 4)})
    method.build(one, other, {})
    assert list(method.terms(one, other, {})) == ["nst"]


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ({"student_layers": ["stag1"]}, "CNN has no module 'stag1' to tap; did you mean stage1"),
        ({"student_layers": ["flatten"]}, r"student's 'flatten' features have the shape \(5, 12\)"),
        (
            {"student_layers": ["stage1"], "teacher_layers": ["fc"]},
            r"teacher's 'fc' features have the shape \(5, 3\); .* feature maps",
        ),
    ],
)
def test_layers_that_do_not_fit_are_one_sentence(layers, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        Distiller(net(), net(seed=1), NST(**layers), TASK, BATCH)
    assert "\n" not in str(caught.value)


def test_maps_of_a_single_position_are_one_sentence():
    pool = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1))
    student = nn.Sequential(pool, nn.Flatten(), nn.Linear(2, 3))
    method = NST(student_layers=["0"], teacher_layers=["stage2"])
    with pytest.raises(UserError, match="'0' and the teacher's 'stage2' meet at a single position"):
        Distiller(student, net(), method, TASK, BATCH)


def test_soft_targets_add_up_with_it():
    student, teacher = net(), net((4, 5), seed=1)
    layers = ["stage1", "stage2"]
    method = NST(student_layers=layers) + KD(temperature=4.0, weight=1.0)
    terms = Distiller(student, teacher, method, TASK, BATCH)(BATCH)
    assert list(terms) == ["labels", "nst", "kd"]
    before = student[0][1].weight.clone()
    optimiser = torch.optim.SGD(student.parameters(), lr=0.01)
    sum(terms.values()).backward()
    optimiser.step()
    assert not torch.equal(student[0][1].weight, before)
    recipe = recipes.preset(system("nst"), "smoke", "digits")
    recipe = recipes.validate(recipes.assigned(recipe, ["methods.kd.weight=1"]))
    parts = recipe.method().parts
    assert [type(p) for p in parts] == [NST, KD]
    assert recipe.method().label_weight == 1


def test_the_published_pair_is_trained_with_the_published_weights():
    recipe = recipes.validate(recipes.preset(system("nst"), "paper", "cifar100"))
    assert (recipe.teachers[0].model, recipe.student.model) == ("resnet56", "resnet20")
    method = recipe.method()
    assert isinstance(method, NST)
    assert (method.kernel, method.weight, method.label_weight) == ("poly", 50, 1)
    assert method.pairs == [(s, s) for s in SmallResNet.stages]
    training = recipe.student.training
    assert training == recipe.teachers[0].training
    assert (training.epochs, training.batch_size, training.lr) == (240, 64, 0.05)
