import copy
import json
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from carrying import carry_out, noise, same
from limbeck import KD, recipes
from limbeck.catalogue import system
from limbeck.data.augment import Augment
from limbeck.data.data import ResidentImages, Split
from limbeck.errors import UserError
from limbeck.losses import kd, mutual_distillation, ramp_up, shifted_kl
from limbeck.models import Input, build, load, save, zoo
from limbeck.models.plain import CNN
from limbeck.models.resnet_cifar import SmallResNet
from limbeck.systems.classification.ffl import (
    FFL,
    Ensemble,
    FusedNetwork,
    Fusion,
    Together,
    called,
    find_cut,
    network,
)
from limbeck.tasks.classification import Classification
from limbeck.tasks.sequence import SequentialClassification
from limbeck.training.bench import Bench, Candidate
from limbeck.training.engine import Engine
from limbeck.training.network import Network
from limbeck.training.phases import Training
from limbeck.training.progress import Voice

CPU = Engine(device="cpu", checkpoint_seconds=0.0)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# The loss.


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, 0.0067379470),
        (20, 0.0600546679),
        (40, 0.2865047969),
        (60, 0.7316156289),
        (80, 1.0),
        (200, 1.0),
    ],
)
def test_the_ramp_has_the_values_worked_out_by_hand(epoch, expected):
    assert ramp_up(epoch) == pytest.approx(expected, abs=5e-11)
    assert ramp_up(epoch / 8, length=10) == pytest.approx(expected, abs=5e-11)
    assert ramp_up(epoch, length=0) == 1


def test_the_divergence_has_the_value_worked_out_by_hand():
    # From (3/4, 1/4) to (1/2, 1/2): 3/4 log 3/2 + 1/4 log 1/2.
    learner, target = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert shifted_kl(learner, target, 1.0, 0.0).item() == pytest.approx(expected, rel=1e-6)
    hotter = shifted_kl(3 * learner, 3 * target, 3.0, 0.0)
    assert hotter.item() == pytest.approx(9 * expected, rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1e-7, 1e-3])
def test_value_and_gradient_of_the_divergence_follow_an_independent_formula(shift):
    a, b, temperature = noise(4, 5).requires_grad_(), noise(4, 5, seed=1), 3.0
    total, gradient = 0.0, torch.zeros(4, 5, dtype=torch.float64)
    for row in range(4):
        e = [math.exp(v / temperature) for v in b[row].tolist()]
        p = [v / sum(e) + shift for v in e]
        e = [math.exp(v / temperature) for v in a[row].tolist()]
        q = [v / sum(e) for v in e]
        total += sum(t * (math.log(t) - math.log(s)) for t, s in zip(p, q, strict=True)) * 9 / 4
        for i in range(5):
            gradient[row, i] = temperature / 4 * (q[i] * sum(p) - p[i])
    loss = shifted_kl(a, b, temperature, shift)
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert torch.allclose(a.grad, gradient, atol=1e-14)
    assert a.grad.sum(1).abs().max() < 1e-14


def test_without_a_shift_it_is_the_loss_of_soft_targets():
    a, b = noise(4, 5), noise(4, 5, seed=1)
    assert shifted_kl(a, b, 3.0, 0.0).item() == pytest.approx(kd(a, b, 3.0).item(), rel=1e-12)


def test_the_shift_is_not_normalised_away():
    # Of equal logits, with C = 10 classes: T^2 sum (p + s) log((p + s) / p), about T^2 C s.
    z = torch.zeros(3, 10, dtype=torch.float64)
    expected = 9 * 10 * 0.101 * math.log(1.01)
    assert shifted_kl(z, z, 3.0, 1e-3).item() == pytest.approx(expected, rel=1e-9)
    assert 0 < shifted_kl(z, z).item() < 1e-5


def test_a_target_gets_no_gradient():
    a, b = noise(2, 3).requires_grad_(), noise(2, 3, seed=1).requires_grad_()
    shifted_kl(a, b).backward()
    assert b.grad is None
    branches = [noise(2, 3, seed=s).requires_grad_() for s in (2, 3)]
    fused = noise(2, 3, seed=4).requires_grad_()
    to_branches, to_fused = mutual_distillation(branches, fused)
    to_fused.backward()
    assert all(z.grad is None for z in branches), "the ensemble would train them a second time"
    fused.grad = None
    to_branches.backward()
    assert fused.grad is None


@pytest.mark.parametrize("n", [2, 3])
def test_branches_are_summed_and_the_ensemble_is_the_mean_of_logits(n):
    branches, fused = [noise(4, 5, seed=s) for s in range(n)], noise(4, 5, seed=9)
    to_branches, to_fused = mutual_distillation(branches, fused, 2.0)
    one_by_one = [shifted_kl(z, fused, 2.0).item() for z in branches]
    assert to_branches.item() == pytest.approx(sum(one_by_one), rel=1e-12)
    assert to_fused.item() == pytest.approx(shifted_kl(fused, sum(branches) / n, 2.0).item())
    of_probabilities = sum(z.softmax(1) for z in branches).div(n).log()
    assert to_fused.item() != pytest.approx(shifted_kl(fused, of_probabilities, 2.0).item())


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((noise(2, 3), noise(2, 4)), r"must be \(B, C\) and equal"),
        ((noise(2, 3, 1), noise(2, 3, 1)), r"must be \(B, C\) and equal"),
        ((noise(2, 3), noise(2, 3), 0.0), "above 0"),
    ],
)
def test_what_the_divergence_cannot_eat_is_one_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        shifted_kl(*given)


# The networks.

IMAGES = noise(3, 3, 32, 32, dtype=torch.float32)


def pair(names=("resnet8", "resnet8"), share=True, width=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [zoo.make(name, 10, 3, (32, 32)) for name in names]
        return models, FusedNetwork(models, IMAGES, share, width)


def test_the_published_networks_have_the_published_sizes():
    recipe = recipes.validate(recipes.preset(system("ffl"), "paper", "cifar100"))
    method = recipe.method()
    assert isinstance(method, FFL)
    name = called([recipe.student.model] * method.branches, method.share, method.width)
    made = network(name, 100, 3, (32, 32))

    def block(inputs, outputs):
        shortcut = inputs * outputs + 2 * outputs if inputs != outputs else 0
        return 9 * (inputs + outputs) * outputs + 4 * outputs + shortcut

    fusion = 64 * 2 * 9 + 2 * 128 + 128 * 64 + 2 * 64 + 64 * 100 + 100
    assert count(made.fusion) == fusion == 16_228
    common = 27 * 16 + 32 + 5 * block(16, 16) + block(16, 32) + 4 * block(32, 32)
    own = block(32, 64) + 4 * block(64, 64) + 64 * 100 + 100
    assert count(made.shared) == common
    assert [count(branch) for branch in made.branches] == [own, own]
    assert count(made) == common + 2 * own + fusion
    assert common + own == count(zoo.make("resnet32", 100, 3, (32, 32)))


def test_the_papers_setting_is_stated():
    recipe = recipes.validate(recipes.preset(system("ffl"), "paper", "cifar100"))
    method, training = recipe.method(), recipe.student.training
    assert (method.temperature, method.ramp, method.shift, method.weight) == (3, 80, 1e-7, 1)
    assert (method.taught, method.fusion_decay) == ("both", 1e-5)
    assert (training.epochs, training.milestones, training.batch_size) == (300, (150, 225), 128)
    assert (training.lr, training.momentum, training.nesterov) == (0.1, 0.9, True)
    assert training.weight_decay == 1e-4


def test_the_fusion_module_starts_from_the_published_deviations():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fusion = Fusion((64, 64), ((8, 8), (8, 8)), classes=100)
    depthwise, pointwise = fusion.depthwise[0].weight, fusion.pointwise[0].weight
    assert depthwise.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.1)
    assert pointwise.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    for norm in (fusion.depthwise[1], fusion.pointwise[1]):
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()


def test_the_fusion_module_is_what_its_equations_say():
    fusion = Fusion((3, 2), ((4, 4), (4, 4)), classes=5).double().eval()
    maps = [noise(2, 3, 4, 4), noise(2, 2, 4, 4, seed=1)]
    x = torch.cat(maps, 1)
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    kernel, scale = fusion.depthwise[0].weight, math.sqrt(1 + 1e-5)
    deep = torch.zeros_like(x)
    for c in range(5):
        for i in range(3):
            for j in range(3):
                deep[:, c] += kernel[c, 0, i, j] * padded[:, c, i : i + 4, j : j + 4]
    deep = (deep / scale).relu()
    mixed = torch.einsum("oc,bchw->bohw", fusion.pointwise[0].weight[:, :, 0, 0], deep)
    pooled = (mixed / scale).relu().mean((2, 3))
    expected = pooled @ fusion.fc.weight.T + fusion.fc.bias
    assert torch.allclose(fusion(maps), expected, atol=1e-12)


def test_swapping_branches_and_their_halves_of_the_fusion_module_changes_nothing():
    fusion = Fusion((4, 4), ((6, 6), (6, 6)), classes=3).double()
    for norm in (fusion.depthwise[1], fusion.pointwise[1]):
        for seed, tensor in enumerate((norm.weight, norm.bias, norm.running_mean)):
            tensor.data.copy_(noise(len(tensor), seed=seed))
    swapped, order = copy.deepcopy(fusion), [4, 5, 6, 7, 0, 1, 2, 3]
    for module in (swapped.depthwise[0], swapped.depthwise[1]):
        for key, value in module.state_dict().items():
            if value.ndim:
                module.state_dict()[key].copy_(value[order])
    weight = swapped.pointwise[0].weight.data
    weight.copy_(weight[:, order].clone())
    one, two = noise(2, 4, 6, 6), noise(2, 4, 6, 6, seed=1)
    assert torch.allclose(fusion.eval()([one, two]), swapped.eval()([two, one]), atol=1e-12)
    assert not torch.allclose(fusion([one, two]), fusion([two, one]))


@pytest.mark.parametrize(
    ("sizes", "kernel", "stride"),
    [(((8, 8), (4, 4)), (3, 3), (2, 2)), (((8, 6), (2, 6)), (7, 1), (4, 1))],
)
def test_larger_maps_are_brought_to_the_smaller_ones_by_a_strided_convolution(
    sizes, kernel, stride
):
    fusion = Fusion((3, 5), sizes, classes=2)
    conv = fusion.regressors[0][0]
    assert (conv.kernel_size, conv.stride) == (kernel, stride)
    assert isinstance(fusion.regressors[1], nn.Identity)
    maps = [noise(2, c, *size, dtype=torch.float32) for c, size in zip((3, 5), sizes, strict=True)]
    assert fusion.regressors[0](maps[0]).shape[2:] == maps[1].shape[2:]
    assert fusion(maps).shape == (2, 2)


def test_maps_that_no_stride_brings_together_meet_all_the_same():
    fusion = Fusion((3, 5), ((5, 5), (4, 4)), classes=2)
    maps = [noise(2, 3, 5, 5, dtype=torch.float32), noise(2, 5, 4, 4, dtype=torch.float32)]
    assert fusion(maps).shape == (2, 2)


def test_branches_share_everything_below_the_last_stage_and_nothing_above():
    (one, two), _ = pair()
    for name in ("stem", "stage1", "stage2"):
        assert getattr(one, name) is getattr(two, name)
    own = [{id(p) for m in (x.stage3, x.fc) for p in m.parameters()} for x in (one, two)]
    assert not own[0] & own[1]
    assert not torch.equal(one.fc.weight, two.fc.weight)


@pytest.mark.parametrize(
    "names",
    [
        ("resnet8", "resnet8"),
        ("wrn-10-1", "wrn-10-1"),
        ("vgg8", "vgg8"),
        ("mobilenetv2", "shufflenetv1"),
        ("shufflenetv2", "cnn-4-8"),
        ("resnet8", "wrn-10-2", "cnn-4-8-16"),
    ],
)
def test_sub_networks_answer_alone_what_they_answer_together(names):
    share = len(set(names)) == 1
    models, fused = pair(names, share)
    fused.eval()
    for model in models:
        model.eval()
    with torch.no_grad():
        *branches, z_f = Together(fused)(IMAGES)
        for model, z in zip(models, branches, strict=True):
            assert torch.allclose(model(IMAGES), z, atol=1e-6)
        assert torch.allclose(fused(IMAGES), z_f, atol=1e-6)
        assert torch.allclose(Ensemble(fused)(IMAGES), sum(branches) / len(names), atol=1e-6)


def test_what_is_fused_is_what_the_networks_pool():
    (resnet, wide, plain), fused = pair(("resnet8", "wrn-10-2", "cnn-4-8"), share=False)
    found = [find_cut(model, IMAGES) for model in (resnet, wide, plain)]
    assert [cut.names[-1] for cut in found] == ["stage3", "relu", "stage2"]
    assert [(cut.channels, cut.size) for cut in found] == [
        (64, (8, 8)),
        (128, (8, 8)),
        (8, (16, 16)),
    ]
    assert fused.fusion.depthwise[0].in_channels == 64 + 128 + 8
    assert fused.fusion.fc.in_features == 64


def test_running_a_network_to_take_it_apart_leaves_it_as_it_was():
    model = zoo.make("resnet8", 10, 3, (32, 32))
    before = copy.deepcopy(model.state_dict())
    find_cut(model, IMAGES)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_fusion_losses_train_the_branches_and_what_they_share():
    _, fused = pair()
    fused(IMAGES).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in fused.shared.parameters())
    for branch in fused.branches:
        assert all(p.grad is not None for p in branch.body.parameters())
        assert all(p.grad is None for p in branch.head.parameters())


class Skips(nn.Module):
    """Adds its first maps to its last, so it is no chain of its children."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        x = self.one(x)
        return self.fc((x + self.two(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "share", "sentence"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), True, "no feature maps"),
        (Skips(), True, "cannot be taken apart"),
        (CNN((4,), 10, 3), True, "nothing below its last stage .* share to false"),
    ],
)
def test_a_network_that_cannot_be_taken_apart_is_one_sentence(model, share, sentence):
    with pytest.raises(UserError, match=sentence):
        FusedNetwork([model, copy.deepcopy(model)], IMAGES, share)


@pytest.mark.parametrize(
    "name", ["ffl-2x-resnet8", "ffl-3x-cnn-4-8-w5", "ffl-resnet8+wrn-10-1", "ffl-vgg8+cnn-4-w6"]
)
def test_a_fused_network_is_made_stored_and_found_again_by_its_name(name, tmp_path):
    input = Input(3, (32, 32), (0.5,) * 3, (0.5,) * 3)
    made = build(name, [str(n) for n in range(10)], input, seed=3).eval()
    assert made.name == name
    save(made, tmp_path / "fused", {})
    again = load(tmp_path / "fused").eval()
    assert torch.equal(made(IMAGES), again(IMAGES))
    if "-w" in name.rpartition("+")[2].replace("wrn", ""):
        assert made.model.fusion.fc.in_features == int(name.rpartition("-w")[2])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("ffl", "no network named 'ffl'"),
        ("ffl-resnet8", "no network named 'ffl-resnet8'; did you mean ffl-"),
        ("ffl-1x-resnet8", "no network named"),
        ("ffl-2x-resnet8+vgg8", "no network named"),
        ("ffl-2x-ffl-2x-resnet8", "no network named"),
        ("ffl-2x-resnet8-w0", "no network named"),
        ("ffl-2x-resnet9", "no network named 'resnet9'"),
        ("ffl-2x-mlp-8", "no feature maps"),
    ],
)
def test_a_name_of_no_fused_network_is_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence):
        build(name, ["a", "b"], Input(3, (32, 32), (0.5,) * 3, (0.5,) * 3))


# The run.


def split(number: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 3
    centres = torch.randint(60, 196, (3, 3, 64), generator=torch.Generator().manual_seed(9))
    pixels = centres[labels] + torch.randint(-59, 60, (number, 3, 64), generator=generator)
    return Split("train", ResidentImages(pixels.view(-1, 3, 8, 8).to(torch.uint8)), labels)


INPUT = Input(3, (8, 8), (0.5,) * 3, (0.3,) * 3)


def bench(**given) -> Bench:
    train = split(90, 1)
    given = {
        "task": Classification("abc", Augment(crop=1)),
        "train": train,
        "transfer": train,
        "validation": split(30, 2),
        "test": split(60, 3),
        "candidates": [],
        "make_student": lambda seed: build("cnn-4-8", ["a", "b", "c"], INPUT, seed),
        "training": Training(epochs=4, lr=0.1, batch_size=16, weight_decay=1e-4),
        "engine": CPU,
        "voice": Voice(quiet=True),
        **given,
    }
    return Bench(**given)


def run(path, method, laid=None, look=None):
    laid = laid or bench()
    return laid, carry_out(path, method, laid, look)


OWN = {"ramp": 2.0, "rivals": ("nobody",)}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    method = FFL(**OWN)
    laid, folder = run(tmp_path_factory.mktemp("ffl") / "run", method, bench(seeds=(0, 1)))
    return method, laid, folder


def test_one_phase_a_seed_delivers_a_sub_network_and_the_fused_classifier(done):
    _, laid, folder = done
    names = list(dict.fromkeys(line["phase"] for line in folder.metrics()))
    roles = ("baseline", "student", "taught-nobody")
    assert names == [f"{role}@{seed}" for seed in (0, 1) for role in roles]
    delivered = laid.delivered(1)
    assert list(delivered) == ["baseline", "student", "fused"]
    assert (delivered["student"].name, delivered["fused"].name) == ("cnn-4-8", "ffl-2x-cnn-4-8")
    assert type(delivered["student"].model) is CNN
    assert count(delivered["student"]) == count(delivered["baseline"])


def test_the_delivered_networks_answer_the_same_when_they_are_loaded_by_name(done, tmp_path):
    method, laid, _ = done
    images = noise(5, 3, 8, 8, dtype=torch.float32)
    for role in ("student", "fused"):
        trained = laid.delivered(0)[role].eval()
        save(trained, tmp_path / role, {})
        with torch.no_grad():
            assert torch.allclose(load(tmp_path / role).eval()(images), trained(images), atol=1e-6)
    *alone, fused = method.teams["both", 0].view(Together).eval()(images)
    assert torch.allclose(laid.students[0](images), alone[0], atol=1e-6)
    assert torch.allclose(laid.further["fused"][0](images), fused, atol=1e-6)


def test_the_student_starts_from_the_weights_of_the_plain_network(tmp_path):
    starts = {}

    def look(phase):
        trained = phase.updates[0].train["student"]
        starts[phase.name] = copy.deepcopy(
            {k.rpartition("stage1")[2]: v for k, v in trained.state_dict().items() if "stage1" in k}
        )

    run(tmp_path / "run", FFL(**OWN), look=look)
    assert set(starts) == {"baseline", "student", "taught-nobody"}
    for other in ("student", "taught-nobody"):
        assert starts[other].keys() == starts["baseline"].keys()
        assert all(torch.equal(v, starts[other][k]) for k, v in starts["baseline"].items())


def test_without_gradient_steps_nothing_is_fused_but_all_is_there(tmp_path):
    laid = bench(training=Training(epochs=0))
    run(tmp_path / "run", FFL(ramp=0.0), laid)
    fresh = laid.make_student(0)
    assert same(laid.students[0], fresh)
    assert set(laid.delivered(0)) == {"baseline", "student", "fused"}


def terms_of(method: FFL, epoch: int = 0, **given):
    laid = bench(**given)
    team = method._team(laid, 0)
    batch = {**laid.sample(), "epoch": epoch}
    together = team.view(Together)
    terms = method.terms_of(together, laid, method.taught, batch)
    return team, together(batch["image"]), batch["label"], terms


@pytest.mark.parametrize("branches", [2, 3])
def test_the_loss_is_the_papers_sum(branches):
    method = FFL(branches=branches, weight=1.5, ramp=8.0)
    _, answers, labels, terms = terms_of(method, epoch=4)
    *z, f = answers.double().detach()

    def ce(logits):
        rows = zip(logits.softmax(1), labels, strict=True)
        return -sum(math.log(float(p[y])) for p, y in rows) / len(labels)

    def divergence(learner, target):
        p, q = (target / 3).softmax(1) + 1e-7, (learner / 3).softmax(1)
        return float(9 * (p * (p / q).log()).sum() / len(labels))

    r = 1.5 * math.exp(-5 * 0.25)
    expected = {
        "labels": sum(ce(logits) for logits in z),
        "fused labels": ce(f),
        "from fused": r * sum(divergence(logits, f) for logits in z),
        "from ensemble": r * divergence(f, sum(z) / branches),
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_sub_networks_that_agree_teach_nothing():
    method = FFL(ramp=0.0)
    laid = bench()
    team = method._team(laid, 0)
    for linear in team.model.modules():
        if isinstance(linear, nn.Linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    terms = method.terms_of(team.view(Together), laid, "both", laid.sample())
    total = sum(term.item() for term in terms.values())
    assert abs(terms["from fused"].item()) < 1e-5
    assert abs(terms["from ensemble"].item()) < 1e-5
    assert total == pytest.approx(3 * math.log(3), abs=2e-5)


@pytest.mark.parametrize(
    ("taught", "expected"),
    [
        ("both", {"from fused", "from ensemble"}),
        ("branches", {"from fused"}),
        ("fused", {"from ensemble"}),
        ("nobody", set()),
    ],
)
def test_each_direction_can_be_left_out(taught, expected):
    *_, terms = terms_of(FFL(taught=taught))
    assert set(terms) - {"labels", "fused labels"} == expected


def test_what_the_branches_learn_moves_no_fusion_weight_and_the_fused_loss_moves_all():
    team, _, _, terms = terms_of(FFL(ramp=0.0))
    fusion, branches = list(team.model.fusion.parameters()), team.model.branches
    heads = [p for branch in branches for p in branch.head.parameters()]
    shared = list(team.model.shared.parameters())

    def moved(name, parameters):
        found = torch.autograd.grad(terms[name], parameters, retain_graph=True, allow_unused=True)
        return [g is not None and bool(g.abs().sum() > 0) for g in found]

    assert not any(moved("from fused", fusion))
    assert all(moved("from fused", heads))
    assert not any(moved("from ensemble", heads))
    assert all(moved("from ensemble", [team.model.fusion.fc.weight]))
    assert any(moved("from ensemble", shared)), "feature maps are not detached"
    assert any(moved("fused labels", shared))


def test_without_weight_what_is_taught_has_no_part_in_any_gradient(tmp_path):
    ways = {"unweighted": FFL(weight=0.0, ramp=0.0), "nobody": FFL(taught="nobody", ramp=0.0)}
    ends = {name: run(tmp_path / name, method)[0] for name, method in ways.items()}
    assert same(ends["unweighted"].further["fused"][0], ends["nobody"].further["fused"][0])
    taught, _ = run(tmp_path / "taught", FFL(ramp=0.0))
    assert not same(taught.further["fused"][0], ends["nobody"].further["fused"][0])


def test_the_ramp_goes_by_epochs_also_where_a_run_goes_on_within_one(tmp_path):
    seen = []

    def look(phase):
        if phase.name == "student":
            seen.append([batch["epoch"] for batch in phase.batches.epoch(2)])
            seen.append([batch["epoch"] for batch in phase.batches.epoch(3, start=4)])
            seen.append(len(phase.batches))

    run(tmp_path / "run", FFL(ramp=2.0), look=look)
    assert seen == [[2] * 6, [3] * 2, 6]


def test_the_fusion_module_has_a_weight_decay_of_its_own(tmp_path):
    def look(phase):
        update = phase.updates[0]
        if phase.name == "student":
            assert update.settings.weight_decay == 1e-4
            own = update.settings_for["fusion"]
            assert own.weight_decay == 1e-5
            assert own.model_copy(update={"weight_decay": 1e-4}) == update.settings
            owned = Counter(id(p) for m in update.train.values() for p in m.parameters())
            assert set(owned.values()) == {1}
            looked.append(len(owned))

    looked: list[int] = []
    laid, _ = run(tmp_path / "run", FFL(ramp=2.0), look=look)
    assert looked == [len(list(laid.further["fused"][0].parameters()))]


def test_all_parts_train_and_are_at_rest_when_they_are_measured(tmp_path):
    modes = []
    method = FFL(ramp=2.0)

    def look(phase):
        if phase.name != "student":
            return
        model = method.teams["both", 0].model
        inner, measured = phase.updates[0].terms, phase.evaluate

        def terms(batch):
            modes.append({m.training for m in model.fusion.modules()})
            modes.append({m.training for m in model.shared.modules()})
            return inner(batch)

        def evaluate():
            found = measured()
            assert set(found) >= {"accuracy", "fused"}
            assert next(iter(found)) == "accuracy"
            return found

        phase.updates[0].terms, phase.evaluate = terms, evaluate

    laid, _ = run(tmp_path / "run", method, look=look)
    assert {frozenset(m) for m in modes} == {frozenset({True})}
    assert not any(m.training for m in method.teams["both", 0].model.fusion.modules())
    norm = laid.further["fused"][0].model.fusion.depthwise[1]
    assert norm.num_batches_tracked == 4 * 6, "running statistics follow training alone"


@pytest.mark.parametrize("phase", ["student@0", "taught-nobody@1"])
def test_a_run_goes_on_where_it_failed_to_the_same_bits(tmp_path, done, phase):
    method, whole, _ = done

    def break_off(found):
        if found.name == phase:
            inner, calls = found.updates[0].terms, {"n": 0}

            def failing(batch):
                calls["n"] += 1
                if calls["n"] == 10:
                    raise RuntimeError("as if the power had gone")
                return inner(batch)

            found.updates[0].terms = failing

    with pytest.raises(RuntimeError):
        run(tmp_path / "run", FFL(**OWN), bench(seeds=(0, 1)), look=break_off)
    again = FFL(**OWN)
    laid, _ = run(tmp_path / "run", again, bench(seeds=(0, 1)))
    for seed in (0, 1):
        assert same(laid.students[seed], whole.students[seed])
        assert same(laid.further["fused"][seed], whole.further["fused"][seed])
        rival = again.teams["nobody", seed], method.teams["nobody", seed]
        assert same(rival[0].fused, rival[1].fused)


def test_networks_of_different_make_and_resolution_learn_together(tmp_path):
    method = FFL(peers=("wrn-10-1", "cnn-4"), ramp=0.0, width=6)
    laid = bench(training=Training(epochs=2, lr=0.05, batch_size=32))
    method.rehearse(laid)
    before = {}

    def look(phase):
        if phase.name == "student":
            fused = method.teams["both", 0].model.state_dict()
            before.update({k: v.clone() for k, v in fused.items()})

    run(tmp_path / "run", method, laid, look=look)
    fused = laid.further["fused"][0]
    assert fused.name == "ffl-cnn-4-8+wrn-10-1+cnn-4-w6"
    assert [n.name for n in method.teams["both", 0].subnetworks] == ["cnn-4-8", "wrn-10-1", "cnn-4"]
    kinds = [type(regressor) for regressor in fused.model.fusion.regressors]
    assert kinds == [nn.Sequential, nn.Identity, nn.Sequential]
    after = fused.model.state_dict()
    weights = [k for k in before if k.endswith("weight")]
    assert all(not torch.equal(before[k], after[k]) for k in weights)
    save(fused, tmp_path / "fused", {})
    images = noise(5, 3, 8, 8, dtype=torch.float32)
    assert torch.allclose(load(tmp_path / "fused").eval()(images), fused(images), atol=1e-6)
    (found,) = method.findings(laid, [])
    assert [row[1] for row in found.table[2:5]] == [
        "sub-network 1 (cnn-4-8)",
        "sub-network 2 (wrn-10-1)",
        "sub-network 3 (cnn-4)",
    ]


def test_whole_networks_of_one_make_share_nothing(tmp_path):
    laid = bench()
    team = FFL(share=False, branches=3)._team(laid, 0)
    assert team.fused.name == "ffl-cnn-4-8+cnn-4-8+cnn-4-8"
    assert not list(team.model.shared.parameters())
    owned = [{id(p) for p in network.parameters()} for network in team.subnetworks]
    assert sum(map(len, owned)) == len(set.union(*owned))


def test_a_module_of_ones_own_is_fused_though_under_no_name(tmp_path):
    said = []
    voice = Voice(quiet=True)
    voice.warn = said.append
    own = Network(SmallResNet(8, (4, 4, 8, 8), 3))
    images = torch.stack([split(60, 1).images.read(n) for n in range(60)]).float() / 255
    loader = DataLoader(TensorDataset(images, torch.arange(60) % 3), 20)
    laid = bench(
        make_student=lambda _: copy.deepcopy(own),
        voice=voice,
        **dict.fromkeys(("train", "transfer", "validation", "test"), loader),
    )
    method = FFL(ramp=0.0)
    method.rehearse(laid)
    assert any("start from the same weights" in sentence for sentence in said)
    run(tmp_path / "run", method, laid)
    assert laid.further["fused"][0].name == ""
    assert type(laid.students[0].model) is SmallResNet


def test_a_ramp_that_outlasts_the_training_is_warned_of():
    said = []
    voice = Voice(quiet=True)
    voice.warn = said.append
    FFL().rehearse(bench(voice=voice))
    assert len(said) == 1
    assert "longer than the training of 4" in said[0]


def test_the_table_has_every_network_and_says_what_teaching_was_worth(done):
    method, laid, folder = done
    (found,) = method.findings(laid, folder.metrics())
    assert [row[:2] for row in found.table] == [
        ["taught", "network"],
        ["", "plain network"],
        ["both", "sub-network 1"],
        ["both", "sub-network 2"],
        ["both", "mean sub-network"],
        ["both", "ensemble of the logits"],
        ["both", "fused classifier"],
        ["nobody", "mean sub-network"],
        ["nobody", "ensemble of the logits"],
        ["nobody", "fused classifier"],
    ]

    def right(network):
        hits = []
        for batch in laid.task.batches(laid.test, batch_size=60).epoch(0):
            with torch.no_grad():
                hits.append((network.eval()(batch["image"]).argmax(1) == batch["label"]).float())
        return 100 * torch.cat(hits).mean().item()

    fused = [right(laid.further["fused"][seed]) for seed in (0, 1)]
    plain = [right(laid.baselines[seed]) for seed in (0, 1)]
    row = found.table[6]
    assert row[2].startswith(f"{sum(fused) / 2:.2f} % ± ")
    assert row[3].startswith(f"{(sum(fused) - sum(plain)) / 2:+.2f} (")
    alone = [right(n) for s in (0, 1) for n in method.teams["both", s].subnetworks]
    assert found.table[4][2].startswith(f"{sum(alone) / 4:.2f} % ± ")
    assert "one with both taught differs by" in found.caption
    (chart,) = found.charts
    assert set(chart.lines) == {"baseline", "student", "fused"}
    assert [x for x, _ in chart.lines["fused"]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("given", "method", "sentence"),
    [
        (
            {"candidates": [Candidate(build("cnn-4", ["a", "b", "c"], INPUT))]},
            FFL(),
            "takes no teacher",
        ),
        (
            {"task": SequentialClassification("abcd", sequence=2)},
            FFL(),
            "works on classification, not on sequence",
        ),
        ({"transfer": Split("train", split(12, 1).images, None)}, FFL(), "labels too"),
        (
            {"make_student": lambda seed: build("mlp-8", ["a", "b", "c"], INPUT, seed)},
            FFL(),
            "no feature maps",
        ),
        ({}, FFL(peers=("resnet9",)), "no network named 'resnet9'"),
        (
            {"make_student": lambda seed: Network(CNN((4, 8), 3, 3))},
            FFL(peers=("cnn-4",)),
            "peers by name need data by name",
        ),
    ],
)
def test_what_does_not_fit_is_found_before_training(given, method, sentence):
    with pytest.raises(UserError, match=sentence):
        method.rehearse(bench(**given))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"branches": 1}, "branches=1"),
        ({"taught": "all"}, "taught"),
        ({"temperature": 0.0}, "temperature"),
        ({"ramp": -1}, "ramp"),
        ({"rivals": ["both"]}, "its own rival"),
    ],
)
def test_wrong_hyper_parameters_are_one_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        FFL(**given)


def test_it_adds_up_with_no_other_method():
    with pytest.raises(UserError, match="phases of its own"):
        FFL() + KD()


def test_the_command_line_delivers_both_and_refuses_a_teacher(tmp_path, command):
    folder = tmp_path / "run"
    short = ["--set", "student.training.epochs=1", "--set", "data.limit=200"]
    status, said, _ = command("run", "ffl", "--preset", "smoke", *short, "--out", folder)
    assert status == 0
    assert "fused classifier" in said
    result = json.loads((folder / "result.json").read_text())
    assert set(result["further"]) == {"fused"}
    assert set(result["parameters"]) == {"baseline", "student", "fused"}
    assert result["further"]["fused"] == result["seeds"][0]["fused"]
    assert load(folder / "student").name == "cnn-8-16"
    status, said, _ = command("evaluate", f"file:{folder / 'fused'}", "--data", "digits", "--json")
    assert status == 0
    assert json.loads(said)["accuracy"] == pytest.approx(result["further"]["fused"])
    status, _, wrong = command(
        "run", "ffl", "--preset", "smoke", "--teacher", "cnn-4", "--out", tmp_path / "other"
    )
    assert status == 2
    assert "takes no teacher" in wrong
    assert not (tmp_path / "other").exists()
