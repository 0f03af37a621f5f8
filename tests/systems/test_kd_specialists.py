import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

import limbeck
from limbeck import recipes
from limbeck.catalogue import system
from limbeck.data.augment import Augment, uniforms
from limbeck.data.data import Data, ResidentImages, Split
from limbeck.distillation import resume, start
from limbeck.errors import UserError
from limbeck.systems.classification.kd import (
    KD,
    SpecialistEnsemble,
    Specialists,
    confusable_classes,
    correct_dustbin,
    merge,
    oversampling,
    specialist,
    specialist_split,
)
from limbeck.systems.classification.kd.specialists import SpecialistBatches
from limbeck.tasks.classification import Classification
from limbeck.training.bench import Bench, Candidate
from limbeck.training.engine import Engine
from limbeck.training.network import Network
from limbeck.training.phases import Training
from limbeck.training.progress import Voice

CPU = Engine(device="cpu")


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def problem(classes: int, sets: list[list[int]], rows: int = 6, scale: float = 2.0, seed: int = 0):
    """Logits of a generalist and of a specialist for each set."""
    general = logits(rows, classes, seed=seed, scale=scale)
    special = [
        logits(rows, len(own) + 1, seed=seed + 1 + m, scale=scale) for m, own in enumerate(sets)
    ]
    return general, special


def divergence(z, general, special, sets):
    """The sum that eq. 5 minimises, from logits of q, by its definition."""
    q, p = z.softmax(-1), general.softmax(-1)
    total = (p * (p / q).log()).sum(-1)
    for own_logits, own in zip(special, sets, strict=True):
        p = own_logits.softmax(-1)
        rest = [c for c in range(q.shape[-1]) if c not in own]
        summed = torch.cat([q[..., own], q[..., rest].sum(-1, keepdim=True)], -1)
        total = total + (p * (p / summed).log()).sum(-1)
    return total


SETS = [
    [[0, 1]],
    [[2, 0], [3, 4]],
    [[0, 1, 2], [2, 3]],
    [[0, 1, 2], [1, 2, 3], [5, 0], [4, 1]],
    [[0, 1], [0, 1]],
    [[0, 1, 2, 3, 4], [5, 4]],
]
every_set = pytest.mark.parametrize("sets", SETS, ids=str)


def test_of_a_single_specialist_the_halves_are_worked_out_by_hand():
    # Inside the means, 0.35 and 0.5; what is left, 0.15, is shared 3 to 1 as the generalist has it.
    general = torch.tensor([[0.5, 0.1, 0.3, 0.1]], dtype=torch.float64).log()
    special = torch.tensor([[0.2, 0.9, 0.1]], dtype=torch.float64)
    special = (special / special.sum()).log()
    p0, p1, d = 0.2 / 1.2, 0.9 / 1.2, 0.1 / 1.2
    rest = (0.4 + d) / 2
    expected = [(0.5 + p0) / 2, (0.1 + p1) / 2, rest * 0.75, rest * 0.25]
    q = merge(general, [special], [[0, 1]]).exp()
    assert q[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_two_disjoint_specialists_have_the_value_worked_out_by_hand():
    # By symmetry q = (s, s, r): s (3 - 1 / (1 - s)) = 1/2, whose root is 1/3 where both dustbins
    # are sure.
    general = torch.tensor([[0.5, 0.5, 1e-9]], dtype=torch.float64).log()
    sure = torch.tensor([[1e-12, 1.0]], dtype=torch.float64).log()
    q = merge(general, [sure, sure], [[0], [1]]).exp()
    assert q[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3], abs=1e-7)


def test_without_an_active_specialist_the_answer_is_the_generalists():
    general, special = problem(6, SETS[3])
    none = torch.zeros(6, 4, dtype=torch.bool)
    assert torch.equal(merge(general, special, SETS[3], none), general.log_softmax(-1))
    assert torch.equal(merge(general, [], []), general.log_softmax(-1))
    some = none.clone()
    some[2, 1] = True
    mixed = merge(general.float(), special, SETS[3], some)
    kept = [0, 1, 3, 4, 5]
    assert torch.equal(mixed[kept], general.float().log_softmax(-1)[kept])
    assert not torch.equal(mixed[2], general.float().log_softmax(-1)[2])


@every_set
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_the_merged_distribution_is_a_stationary_point(sets, scale):
    general, special = problem(6, sets, scale=scale)
    z = merge(general, special, sets).requires_grad_()
    assert torch.allclose(z.exp().sum(1), torch.ones(6, dtype=torch.float64), atol=1e-12)
    divergence(z, general, special, sets).sum().backward()
    assert z.grad.abs().max() < 1e-10


@every_set
def test_the_merged_distribution_is_what_another_optimiser_finds(sets):
    general, special = problem(6, sets, rows=3, seed=7)
    q = merge(general, special, sets)
    for row in range(3):
        g, s = general[row], [own[row] for own in special]

        def value(x, g=g, s=s):
            z = torch.tensor(x, requires_grad=True)
            f = divergence(z, g, s, sets)
            f.backward()
            return f.item(), z.grad.numpy()

        found = minimize(value, np.zeros(6), jac=True, method="BFGS", options={"gtol": 1e-10})
        best = torch.from_numpy(found.x).softmax(0)
        assert torch.allclose(q[row].exp(), best, atol=1e-7)
        assert divergence(q[row], g, s, sets).item() <= found.fun + 1e-12


def completed(q, general, special, sets):
    """Each distribution with its dustbin spread over the other classes as q is, and their mean."""
    whole = [general.softmax(-1)]
    for own_logits, own in zip(special, sets, strict=True):
        p, spread = own_logits.softmax(-1), q.clone()
        spread[:, own] = 0
        spread = spread * (p[:, -1:] / spread.sum(1, keepdim=True))
        spread[:, own] = p[:, :-1]
        whole.append(spread)
    return torch.stack(whole).mean(0)


@every_set
def test_each_mean_of_completed_distributions_is_nearer_and_the_merged_one_stays(sets):
    general, special = problem(6, sets, seed=3)
    q = torch.full_like(general, 1 / 6)
    before = divergence(q.log(), general, special, sets)
    for _ in range(5):
        q = completed(q, general, special, sets)
        after = divergence(q.log(), general, special, sets)
        assert (after <= before + 1e-14).all()
        before = after
    merged = merge(general, special, sets).exp()
    assert torch.allclose(completed(merged, general, special, sets), merged, atol=1e-12)
    assert (divergence(merged.log(), general, special, sets) <= before + 1e-14).all()


@every_set
def test_single_precision_is_enough(sets):
    general, special = problem(6, sets, rows=50)
    exact = merge(general, special, sets).exp()
    q = merge(general.float(), [s.float() for s in special], sets)
    assert q.dtype == torch.float32
    assert torch.allclose(q.exp().double(), exact, atol=2e-6)
    assert merge(general.half(), [s.half() for s in special], sets).dtype == torch.float32


def test_speakers_who_contradict_each_other_surely_are_merged_all_the_same():
    sets = [[0, 1, 2], [2, 3], [4, 5]]
    for scale in (30.0, 300.0):
        general, special = problem(6, sets, rows=40, scale=scale)
        for dtype in (torch.float32, torch.float64):
            q = merge(general.to(dtype), [s.to(dtype) for s in special], sets)
            assert q.isfinite().all()
            assert torch.allclose(q.exp().sum(1), torch.ones(40, dtype=dtype), atol=1e-3)


def test_an_inactive_specialist_is_as_good_as_none():
    sets = SETS[3]
    general, special = problem(6, sets)
    active = torch.zeros(6, 4, dtype=torch.bool)
    active[:, [0, 2]] = True
    only = merge(general, [special[0], special[2]], [sets[0], sets[2]])
    assert torch.allclose(merge(general, special, sets, active), only, atol=1e-12)


def test_what_a_sample_gets_does_not_depend_on_the_others():
    sets = SETS[3]
    general, special = problem(6, sets, scale=5.0)
    whole = merge(general, special, sets)
    for row in range(6):
        alone = merge(general[row : row + 1], [s[row : row + 1] for s in special], sets)
        assert torch.allclose(whole[row], alone[0], atol=1e-10)


@pytest.mark.parametrize(
    ("own", "shape", "sentence"),
    [
        ([0, 1], (2, 2), r"\[0, 1\] answers 2 samples with logits of the shape \(2, 3\)"),
        ([0, 4], (2, 3), r"lie from 0 to 3, not \[0, 4\]"),
        ([1, 1], (2, 3), r"\[1, 1\]"),
    ],
)
def test_a_specialist_that_does_not_fit_is_one_sentence(own, shape, sentence):
    with pytest.raises(UserError, match=sentence):
        merge(torch.zeros(2, 4), [torch.zeros(shape)], [own])


def test_the_dustbin_is_corrected_to_the_frequencies_before_sampling():
    # In one cell of the images, of 90 samples 10 are special and 80 are not; in training special
    # ones come 4 times as often, 40 to 80.
    sampled = torch.tensor([40 / 120, 80 / 120]).log()
    assert correct_dustbin(sampled, 4.0).softmax(0).tolist() == pytest.approx([10 / 90, 80 / 90])
    assert torch.equal(correct_dustbin(sampled, 1.0), sampled)
    for ratio in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="ratio is a number above 0"):
            correct_dustbin(sampled, ratio)


def planted(n: int = 400) -> torch.Tensor:
    """Predictions of 8 classes that are confused in pairs and in a set of three; 7 is not."""
    generator = torch.Generator().manual_seed(0)
    sets = [[0, 4], [1, 5], [2, 3, 6], [7]]
    z = torch.full((n, 8), -4.0)
    for row in range(n):
        own = sets[row % 4]
        z[row, own] = 3 + torch.rand(len(own), generator=generator)
    return z.softmax(1)


def test_classes_that_are_predicted_together_are_found():
    assert confusable_classes(planted(), 4) == ((0, 4), (1, 5), (2, 3, 6))
    assert confusable_classes(planted(), 4, seed=5) == ((0, 4), (1, 5), (2, 3, 6))
    assert confusable_classes(planted(), 4, most=2)[2] in ((2, 3), (2, 6), (3, 6))


def test_covariances_as_they_are_set_widely_predicted_classes_apart():
    # Ten pairs are confused; of the first two pairs the generalist is surer.
    p = torch.zeros(20, 20)
    for c in range(20):
        own, partner = (0.8, 0.2) if c < 4 else (0.3, 0.2)
        p[c] = (1 - own - partner) / 18
        p[c, c], p[c, c ^ 1] = own, partner
    assert confusable_classes(p, 10) == tuple((c, c + 1) for c in range(0, 20, 2))
    assert {c for own in confusable_classes(p, 10, scaled=False) for c in own} == set(range(4, 20))


def test_a_class_that_is_never_predicted_harms_nobody():
    p = torch.cat([planted(), torch.zeros(400, 1)], 1)
    assert confusable_classes(p, 5)[:3] == ((0, 4), (1, 5), (2, 3, 6))


def test_a_set_of_given_size_is_the_nearest_to_a_centre_and_may_overlap():
    found = confusable_classes(planted(), 4, size=3)
    assert all(len(own) == 3 for own in found)
    assert (2, 3, 6) in found
    assert any({0, 4} < set(own) for own in found)
    assert sum(map(len, found)) > len({c for own in found for c in own})


def test_single_classes_and_all_classes_are_nothing_to_specialise_in():
    assert confusable_classes(planted(), 8) == ()
    assert confusable_classes(planted(), 1) == ()
    for p, clusters in ((planted(), 9), (planted(), 0), (planted()[:1], 2)):
        with pytest.raises(UserError, match="cannot be parted into"):
            confusable_classes(p, clusters)


def split(n: int = 60, classes: int = 6, labels: bool = True, seed: int = 1) -> Split:
    """Images whose brightest column says their class, in noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 130, (n, 1, 6, 6), generator=generator, dtype=torch.uint8)
    label = torch.arange(n) % classes
    for row, c in enumerate(label.tolist()):
        pixels[row, 0, :, c] += 90
    return Split("train", ResidentImages(pixels), label if labels else None)


def test_half_of_what_a_specialist_sees_is_special_and_half_is_the_rest():
    whole = split()
    part = specialist_split(whole, [4, 1], seed=0, epoch=0)
    assert len(part) == 40
    original = whole.labels[part.rows]
    assert (original[part.labels == 0] == 4).all()
    assert (original[part.labels == 1] == 1).all()
    assert not torch.isin(original[part.labels == 2], torch.tensor([4, 1])).any()
    assert part.labels.bincount().tolist() == [10, 10, 20]
    assert len(part.rows.unique()) == 40


def test_the_random_half_is_a_function_of_seed_sample_and_epoch():
    whole = split()
    drawn = {
        (seed, epoch): set(specialist_split(whole, [0], seed, epoch).rows[10:].tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({frozenset(rows) for rows in drawn.values()}) == 4
    turned = whole.subset(torch.arange(59, -1, -1))
    again = specialist_split(turned, [0], seed=1, epoch=1)
    assert set(again.rows[10:].tolist()) == drawn[1, 1]


def test_who_is_drawn_says_nothing_about_how_it_is_augmented():
    whole = split(6000)
    for seed, epoch in ((0, 0), (0, 1), (3, 0)):
        drawn = specialist_split(whole, [0], seed, epoch).rows[1000:]
        means = uniforms(drawn, 40, seed, epoch).mean(0)
        assert (means - 0.5).abs().max() < 0.04


def test_a_rest_smaller_than_the_special_half_is_shown_as_often_as_it_takes():
    part = specialist_split(split(), [0, 1, 2, 3, 4], seed=0, epoch=0)
    assert part.labels.bincount().tolist() == [10, 10, 10, 10, 10, 50]
    _, counts = part.rows[50:].unique(return_counts=True)
    assert counts.tolist() == [5] * 10
    assert oversampling(split(), [0, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert oversampling(split(), [0, 1]) == pytest.approx(2.0)
    for own in ([], range(6)):
        with pytest.raises(UserError, match="needs samples of them and of others"):
            oversampling(split(), list(own))


def test_batches_are_those_of_the_epochs_split_and_mixed_labels_are_the_specialists():
    task = Classification("abcdef", Augment(mixup=1.0))
    batches = SpecialistBatches(task, split(), (1, 4), batch_size=16, seed=3)
    assert len(batches) == 3
    seen = list(batches.epoch(1))
    rows = torch.cat([b["row"] for b in seen])
    expected = specialist_split(split(), [1, 4], seed=3, epoch=1)
    assert rows.sort().values.tolist() == expected.rows.sort().values.tolist()
    for name in ("label", "partner_label"):
        labels = torch.cat([b[name] for b in seen])
        assert labels.unique().tolist() == [0, 1, 2]
    late = list(batches.epoch(1, start=2))
    assert torch.equal(late[0]["image"], seen[2]["image"])


def net(seed: int = 0, classes: int = 6, width: int = 12, bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(36, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, classes, bias=bias),
        )


def test_a_specialist_begins_as_the_generalist():
    general = net().eval()
    x = torch.rand(9, 1, 6, 6)
    for bias in (True, False):
        general = net(bias=bias).eval()
        special = specialist(general, 6, [4, 1], ratio=2.0).eval()
        z, own = general(x), special(x)
        assert torch.allclose(own[:, :2], z[:, [4, 1]], atol=1e-6)
        dustbin = z[:, [0, 2, 3, 5]].mean(1) + (math.log(4 / 2) if bias else 0)
        assert torch.allclose(own[:, 2], dustbin, atol=1e-6)
    assert all(p.requires_grad for p in special.parameters())
    assert not any(p is q for p in special.parameters() for q in general.parameters())


def test_with_equal_logits_for_the_rest_a_fresh_specialist_says_what_the_generalist_says():
    general = net().eval()
    with torch.no_grad():
        general[4].weight[[0, 2, 3, 5]] = general[4].weight[0].clone()
        general[4].bias[[0, 2, 3, 5]] = general[4].bias[0].clone()
    x = torch.rand(9, 1, 6, 6)
    special = specialist(general, 6, [4, 1], ratio=2.0).eval()
    own = correct_dustbin(special(x), 2.0).softmax(1)
    p = general(x).softmax(1)
    assert torch.allclose(own[:, :2], p[:, [4, 1]], atol=1e-6)


class Counted(nn.Module):
    """Says how many images it was asked about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, 0

    def forward(self, x):
        self.asked += len(x)
        return self.model(x)


@pytest.mark.parametrize("top", [1, 2, 9])
def test_an_ensemble_asks_the_specialists_for_the_most_probable_classes_alone(top):
    sets, ratios = [[0, 1], [1, 2, 3]], [2.0, 1.0]
    general = net().eval()
    parts = [Counted(net(seed=m + 1, classes=len(own) + 1)) for m, own in enumerate(sets)]
    ensemble = SpecialistEnsemble(general, parts, sets, ratios, top).eval()
    x = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found, active = ensemble.answer(x)
        z = general(x)
        best = z.argsort(1, descending=True)[:, :top].tolist()
        expected = [[bool(set(own) & set(row)) for own in sets] for row in best]
        assert active.tolist() == expected
        assert [p.asked for p in parts] == active.sum(0).tolist()
        answers = [correct_dustbin(p(x), r) for p, r in zip(parts, ratios, strict=True)]
        whole = merge(z, answers, sets, active)
    assert torch.allclose(found, whole, atol=1e-5)
    assert found.dtype == torch.float32
    assert torch.equal(ensemble(x).detach(), found)


def test_an_ensemble_without_specialists_is_the_generalist():
    general = net().eval()
    x = torch.rand(4, 1, 6, 6)
    assert torch.equal(SpecialistEnsemble(general, [], [], [])(x), general(x).log_softmax(1))


def data(**given) -> Data:
    splits = {"train": split(180), "validation": split(36, seed=2), "test": split(60, seed=3)}
    given = {"classes": tuple("abcdef"), **splits, **given}
    return Data("made", "made", size=(6, 6), mean=(0.5,), std=(0.3,), **given)


def taught(seed: int = 0) -> nn.Module:
    """A generalist that is somewhat trained."""
    model, images = net(seed), split(180)
    x = images.images.pixels.float() / 255
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model((x - 0.5) / 0.3), images.labels).backward()
        optimiser.step()
    return model


def specialise(path, method=None, **given):
    given = {
        "training": Training(epochs=2, batch_size=16),
        "quiet": True,
        "engine": CPU,
        "teacher": taught(),
        "data": data(),
        **given,
    }
    method = method or Specialists(clusters=3, size=3, top=2)
    return limbeck.distill(net(5), method=method, out=path, **given)


def test_a_run_compares_the_generalist_with_what_it_becomes(tmp_path):
    teacher = taught()
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    done = specialise(tmp_path / "run", teacher=teacher)
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    whole = done.student
    assert isinstance(whole, SpecialistEnsemble)
    assert all(torch.equal(t, before[name]) for name, t in whole.generalist.state_dict().items())
    assert not whole.training
    assert not any(p.requires_grad for p in whole.parameters())
    moved = [part[2].running_mean for part in whole.specialists]
    assert all(not torch.equal(m, before["2.running_mean"]) for m in moved)
    result = done.result
    assert result["teacher"] is None
    assert result["names"]["baseline"] == "generalist"
    x = (data().test.images.pixels.float() / 255 - 0.5) / 0.3
    right = (whole(x).argmax(1) == data().test.labels).float().mean().item()
    assert result["student"] == pytest.approx(right)
    clusters, cover = done.run.findings()
    assert len(clusters["table"]) == len(whole.members) + 2
    rows = cover["table"][1:]
    assert sum(int(row[1]) for row in rows[:-1]) == int(rows[-1][1]) == 60
    gained = float(rows[-1][4])
    assert gained == pytest.approx(60 * (result["student"] - result["baseline"]), abs=0.06)
    assert "generalist with specialists" in (done.run.path / "report.html").read_text()


def test_a_run_stopped_in_a_specialists_training_goes_on_bit_by_bit(tmp_path, monkeypatch):
    whole = specialise(tmp_path / "whole").student.state_dict()
    steps, loss = {"n": 0}, Classification.loss

    def failing(self, answer, batch):
        steps["n"] += 1
        if steps["n"] == 40:
            raise RuntimeError("as if the power had gone")
        return loss(self, answer, batch)

    often = Engine(device="cpu", checkpoint_seconds=0.0)
    monkeypatch.setattr(Classification, "loss", failing)
    with pytest.raises(RuntimeError):
        specialise(tmp_path / "run", engine=often)
    monkeypatch.undo()
    done = [path.name for path in (tmp_path / "run" / "phases").iterdir()]
    assert any("clusters" in name for name in done)
    assert any("specialist-1" in name for name in done)
    again = specialise(tmp_path / "run", resume=True).student.state_dict()
    assert list(again) == list(whole)
    assert all(torch.equal(t, whole[name]) for name, t in again.items())


def test_a_confused_generalist_gains_where_specialists_know_the_class(tmp_path):
    done = specialise(tmp_path / "run", training=Training(epochs=8, batch_size=16, lr=0.1))
    assert done.result["student"] > done.result["baseline"] + 0.05


class Twice(nn.Module):
    """Its last linear layer is not the one that answers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = net(), nn.Linear(6, 6)

    def forward(self, x):
        return self.body(x) + self.fc(torch.ones(len(x), 6)).softmax(1)


class Headless(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 6, 6), nn.Flatten())


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"method": Specialists(clusters=4)}, r"clusters=4\): 6 classes make at most 3 clusters"),
        ({"method": Specialists(clusters=2, size=6)}, r"size=6\): of 6 classes at most 5"),
        ({"teacher": [net(), net(1)]}, "copies of one generalist; name one teacher, not 2"),
        ({"teacher": net(width=13)}, "student is of the same make as the teacher"),
        ({"data": data(train=split(180, labels=False))}, "specialists learn from labels"),
        ({"data": data(train=split(180, classes=5))}, "lack the class 'f'"),
    ],
)
def test_what_does_not_fit_is_said_before_a_run_folder_exists(tmp_path, given, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        specialise(tmp_path / "run", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Headless(), "Headless does not end in a linear layer with an output for each of the 6"),
        (Twice(), "outputs of Twice are not those of its last linear layer"),
    ],
)
def test_a_generalist_without_a_last_linear_layer_is_found_in_the_rehearsal(model, sentence):
    images = split()
    bench = Bench(
        task=Classification("abcdef"),
        train=images,
        transfer=images,
        validation=[],
        test=images,
        candidates=[Candidate(Network(model))],
        make_student=lambda seed: Network(model),
        training=Training(),
    )
    with pytest.raises(UserError, match=sentence):
        Specialists(clusters=3).rehearse(bench)


def test_loaders_of_ones_own_cannot_be_drawn_from(tmp_path):
    tensors = torch.utils.data.TensorDataset(torch.rand(12, 1, 6, 6), torch.arange(12) % 6)
    loaders = [torch.utils.data.DataLoader(tensors, 6)] * 2
    with pytest.raises(UserError, match="instead of your own loaders"):
        specialise(tmp_path / "run", data=loaders)


def test_specialists_do_not_add_up_with_another_method():
    with pytest.raises(UserError, match="Specialists has phases of its own"):
        Specialists() + KD()


@pytest.mark.parametrize("given", [{"clusters": 1}, {"size": 1}, {"most": 1}, {"top": 0}])
def test_wrong_hyper_parameters_are_one_sentence(given):
    (name,) = given
    with pytest.raises(UserError, match=rf"Specialists\({name}="):
        Specialists(**given)


def short(words: list[str]) -> recipes.Recipe:
    values = recipes.preset(system("kd"), "specialists", "digits")
    words = [
        "teacher.training.epochs=1",
        "student.training.epochs=1",
        "data.limit=300",
        "engine.device=cpu",
        *words,
    ]
    return recipes.validate(recipes.assigned(values, words))


def test_the_preset_runs_from_a_recipe_and_a_finished_run_is_left_alone(tmp_path):
    run = start(short(["seeds=2"]), tmp_path / "run", Voice(quiet=True))
    result = run.result()
    assert len(result["seeds"]) == 2
    assert result["names"]["student"] == "generalist with specialists"
    assert result["seeds"][0]["baseline"] == result["seeds"][1]["baseline"]
    assert resume(tmp_path / "run", Voice(quiet=True)).result() == result


def test_a_rival_takes_the_generalists_place(tmp_path):
    recipe = short(["seeds=1", "baseline={model: cnn-4-8, training: {epochs: 1}, called: longer}"])
    run = start(recipe, tmp_path / "run", Voice(quiet=True))
    names = {"baseline": "longer", "student": "generalist with specialists"}
    assert run.result()["names"] == names
    assert any("baseline" in path.name for path in (tmp_path / "run" / "phases").iterdir())


def test_a_recipes_names_come_before_the_methods_and_those_before_the_models():
    rival = "baseline={model: mlp-8}"
    assert short([]).names() == {}
    assert short([]).names(Specialists.roles) == dict(Specialists.roles)
    assert short([rival]).names() == {"baseline": "mlp-8", "student": "cnn-4-8"}
    named = short([rival, "student.called=all of them"]).names(Specialists.roles)
    assert named == {"baseline": "mlp-8", "student": "all of them"}


def test_the_preset_for_cifar100_names_one_make_for_all():
    recipe = recipes.validate(recipes.preset(system("kd"), "specialists", "cifar100"))
    assert isinstance(recipe.method(), Specialists)
    assert recipe.student.model == recipe.teachers[0].model
