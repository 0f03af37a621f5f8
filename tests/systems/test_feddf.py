import importlib.util
import math
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

from carrying import carry_out, noise, same
from limbeck import KD, recipes
from limbeck.catalogue import system
from limbeck.data.augment import Augment
from limbeck.data.data import ResidentImages, Split
from limbeck.errors import UserError
from limbeck.losses import feddf
from limbeck.models.zoo import make
from limbeck.systems.federated.feddf import (
    FedDF,
    average,
    dirichlet_partition,
    drop_worst,
    proximal,
    sampled,
    server_momentum,
)
from limbeck.systems.federated.feddf import clients as federation
from limbeck.systems.federated.feddf.clients import Client, Order, put, weights_of
from limbeck.systems.federated.feddf.fusion import Stretches
from limbeck.tasks.attributes import Attributes
from limbeck.tasks.classification import Classification
from limbeck.training.bench import Bench, Candidate
from limbeck.training.engine import Engine
from limbeck.training.network import Network
from limbeck.training.phases import Training

CPU = Engine(device="cpu", checkpoint_seconds=0.0, channels_last=False, threads=1)
TARGETS = ("avg_logits", "avg_probs", "avg_losses")
with_flower = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None, reason="Flower is not installed"
)


# The loss.


def test_the_loss_has_the_values_worked_out_by_hand():
    members = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
    student = torch.zeros(1, 2)
    assert feddf(student, members, "avg_logits").item() == pytest.approx(0, abs=1e-7)
    assert feddf(student, members, "avg_probs").item() == pytest.approx(0, abs=1e-7)
    # Each client's divergence is ln 2 minus the entropy of (0.8807971, 0.1192029).
    assert feddf(student, members, "avg_losses").item() == pytest.approx(0.3278133, abs=1e-6)


def softmax(values: list[float]) -> list[float]:
    raised = [math.exp(v) for v in values]
    return [v / sum(raised) for v in raised]


@pytest.mark.parametrize("target", TARGETS)
def test_value_and_gradient_follow_an_independent_formula(target):
    student, members = noise(4, 5).requires_grad_(), noise(3, 4, 5, seed=1)
    weights, temperature = [0.5, 0.3, 0.2], 2.0
    total, gradient = 0.0, torch.zeros(4, 5, dtype=torch.float64)
    for b in range(4):
        q = softmax([float(v) / temperature for v in student[b]])
        each = [softmax([float(v) / temperature for v in members[k, b]]) for k in range(3)]
        if target == "avg_logits":
            mean = [
                sum(w * float(members[k, b, c]) for k, w in enumerate(weights)) / temperature
                for c in range(5)
            ]
            wanted = [(1.0, softmax(mean))]
        elif target == "avg_probs":
            mixed = [sum(w * each[k][c] for k, w in enumerate(weights)) for c in range(5)]
            wanted = [(1.0, mixed)]
        else:
            wanted = list(zip(weights, each, strict=True))
        for share, p in wanted:
            for c in range(5):
                total += share * p[c] * math.log(p[c] / q[c]) / 4
                gradient[b, c] += share * (q[c] - p[c]) / temperature / 4
    loss = feddf(student, members, target, torch.tensor(weights), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-6)
    assert torch.allclose(student.grad, gradient, atol=1e-7)


def test_one_client_is_plain_divergence_whatever_the_target():
    student, member = noise(3, 4), noise(1, 3, 4, seed=1)
    p, q = member[0].softmax(1), student.softmax(1)
    plain = (p * (p / q).log()).sum(1).mean()
    for target in TARGETS:
        assert torch.allclose(feddf(student, member, target), plain)


@pytest.mark.parametrize("target", TARGETS)
def test_a_student_equal_to_clients_that_are_all_alike_has_no_loss_and_no_gradient(target):
    student = noise(3, 4).requires_grad_()
    loss = feddf(student, student.detach().expand(5, 3, 4), target)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-12


def test_the_teacher_comes_first_in_the_divergence():
    student, member = torch.tensor([[0.0, 0.0]]), torch.tensor([[[3.0, 0.0]]])
    one, other = feddf(student, member), feddf(member[0], student[None])
    p = softmax([3.0, 0.0])
    assert one.item() == pytest.approx(sum(v * math.log(v / 0.5) for v in p), rel=1e-5)
    assert other.item() == pytest.approx(sum(0.5 * math.log(0.5 / v) for v in p), rel=1e-5)


def test_a_constant_added_to_a_clients_logits_changes_nothing():
    student, members = noise(3, 4), noise(2, 3, 4, seed=1)
    moved = members + torch.tensor([5.0, -2.0]).view(2, 1, 1)
    for target in TARGETS:
        assert torch.allclose(feddf(student, moved, target), feddf(student, members, target))


def test_logits_are_averaged_before_the_softmax():
    student, members = noise(3, 4), noise(2, 3, 4, seed=1)
    p, log_q = members.mean(0).softmax(1), student.log_softmax(1)
    assert torch.allclose(feddf(student, members), (p * (p.log() - log_q)).sum(1).mean())
    assert not torch.allclose(feddf(student, members), feddf(student, members, "avg_probs"))


def test_no_gradient_flows_into_the_clients_logits():
    members = noise(2, 3, 4, seed=1).requires_grad_()
    feddf(noise(3, 4).requires_grad_(), members, "avg_losses").backward()
    assert members.grad is None


def test_there_is_no_factor_of_the_squared_temperature():
    student, members = noise(3, 4), noise(2, 3, 4, seed=1)
    cold = feddf(student, members, temperature=4.0)
    assert torch.allclose(cold, feddf(student / 4, members / 4))


@pytest.mark.parametrize(
    ("members", "given", "sentence"),
    [
        (noise(3, 4), {}, r"must be \(B, C\) and \(K, B, C\)"),
        (noise(2, 3, 5), {}, "must be"),
        (noise(2, 3, 4), {"temperature": 0.0}, "above 0"),
        (noise(2, 3, 4), {"weights": torch.ones(3)}, "2 clients need 2 weights"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(members, given, sentence):
    with pytest.raises(UserError, match=sentence):
        feddf(noise(3, 4), members, **given)


# Averages.


def test_averages_have_the_values_worked_out_by_hand():
    received = [[torch.tensor([1.0])], [torch.tensor([4.0])]]
    assert average(received, [300, 100])[0].item() == 1.75
    assert average(received, [1, 1])[0].item() == 2.5


def test_statistics_are_averaged_and_the_number_of_batches_is_not():
    one, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    one.running_var.fill_(3.0)
    one.num_batches_tracked.fill_(7)
    other.num_batches_tracked.fill_(100)
    found = average([list(one.state_dict().values()), list(other.state_dict().values())], [1, 1])
    state = dict(zip(one.state_dict(), found, strict=True))
    assert state["running_var"].tolist() == [2.0, 2.0]
    assert state["num_batches_tracked"].item() == 7
    assert state["num_batches_tracked"].dtype == torch.int64


@with_flower
def test_the_average_is_that_of_flower_up_to_rounding():
    federation.carrier("flower")  # which keeps Flower from speaking to the outside
    from flwr.server.strategy.aggregate import aggregate

    received = [[noise(3, 2, seed=k).float(), noise(4, seed=10 + k).float()] for k in range(3)]
    theirs = aggregate([([t.numpy() for t in r], n) for r, n in zip(received, (5, 9, 2))])  # noqa: B905
    for mine, other in zip(average(received, [5, 9, 2]), theirs, strict=True):
        np.testing.assert_allclose(mine.numpy(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [[1], [0, 0], [1, -1], []])
def test_weights_that_do_not_fit_are_one_sentence(weights):
    with pytest.raises(UserError, match="cannot be averaged by the weights"):
        average([[torch.ones(1)], [torch.ones(1)]], weights)


def test_a_server_with_momentum_goes_on_in_its_direction():
    x, v = torch.tensor([0.0]), torch.tensor([0.0])
    for mean in (1.0, 1.0):
        x, v = server_momentum(x, torch.tensor([mean]), v, beta=0.5)
    # First v = -1 and x = 1; then the mean is where x is, v = -0.5 and x = 1.5.
    assert (x.item(), v.item()) == (1.5, -0.5)
    assert server_momentum(torch.ones(1), torch.zeros(1), torch.zeros(1), 0.0)[0].item() == 0


def test_the_proximal_term_pulls_with_mu_times_the_distance():
    p = torch.tensor([3.0, 0.0], requires_grad=True)
    term = proximal([p], [torch.tensor([0.0, 4.0])], mu=0.1)
    term.backward()
    assert term.item() == pytest.approx(0.05 * 25)
    assert p.grad.tolist() == pytest.approx([0.3, -0.4])


# Who is left out.


def test_the_worst_are_dropped_as_worked_out_by_hand():
    # Of 100 % together; 3 %, 30 %: nobody is below 1.2 times chance of a thousand classes.
    assert drop_worst([0.3, 0.3, 0.3, 0.02, 0.08], 1000) == ([0, 1, 2, 3, 4],) * 2
    assert drop_worst([0.21, 0.20, 0.20, 0.20, 0.19], 1000) == ([0, 1, 2, 3, 4], [0, 1, 2, 3])


def test_a_client_near_chance_is_neither_averaged_nor_heard():
    assert drop_worst([0.3, 0.119, 0.121], 10) == ([0, 2], [0, 2])


@pytest.mark.parametrize("accuracies", [[0.05, 0.1], [0.5], [0.4, 0.4, 0.4], [0.4, 0.2]])
def test_somebody_is_always_left_and_equals_are_not_told_apart(accuracies):
    everyone = list(range(len(accuracies)))
    assert drop_worst(accuracies, 10) == (everyone, everyone)


# The split.


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("clients", [4, 10, 23])
def test_every_split_is_a_partition_whose_parts_have_half_of_the_average(alpha, clients):
    labels = torch.randint(0, 10, (2000,), generator=torch.Generator().manual_seed(1))
    parts = dirichlet_partition(labels, clients, alpha, seed=3)
    assert sorted(torch.cat(parts).tolist()) == list(range(2000))
    for first in range(0, clients, 10):
        sizes = [len(p) for p in parts[first : first + 10]]
        assert min(sizes) >= sum(sizes) / len(sizes) / 2


def test_a_large_alpha_is_nearly_even_and_a_small_one_is_not():
    labels = torch.arange(4000) % 10

    def largest_shares(alpha):
        parts = dirichlet_partition(labels, 10, alpha, seed=0)
        return [torch.bincount(labels[p], minlength=10).max().item() / len(p) for p in parts]

    assert max(largest_shares(100.0)) < 0.2
    assert sum(largest_shares(0.1)) / 10 > 0.4


def test_a_split_is_a_function_of_its_seed():
    labels = torch.arange(500) % 5
    one, same, other = (dirichlet_partition(labels, 5, 0.5, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_too_few_samples_and_splits_that_do_not_exist_are_one_sentence():
    with pytest.raises(UserError, match="four or more for each"):
        dirichlet_partition(torch.zeros(15, dtype=torch.int64), 4, 1.0, 0)
    with pytest.raises(UserError, match="take a larger alpha"):
        dirichlet_partition(torch.zeros(40, dtype=torch.int64), 10, 0.01, 0)


def test_a_round_draws_its_share_of_clients_in_rising_order():
    rounds = [sampled(0, n, 20, 0.4) for n in range(1, 30)]
    assert all(len(r) == 8 and r == sorted(set(r)) for r in rounds)
    assert len({tuple(r) for r in rounds}) > 20
    assert set().union(*map(set, rounds)) == set(range(20))
    assert len(sampled(0, 1, 5, 0.01)) == 1


def test_stretches_walk_through_the_batches_without_a_gap_from_any_step():
    class Counted:
        def __len__(self):
            return 3

        def epoch(self, epoch, start=0):
            yield from ({"at": 3 * epoch + s} for s in range(start, 3))

    stretches = Stretches(Counted(), steps=4, begun=8)
    walked = [b["at"] for e in range(3) for b in stretches.epoch(e)]
    assert walked == list(range(8, 20))
    assert [b["at"] for b in stretches.epoch(1, 3)] == [15]
    assert list(stretches.epoch(0, 4)) == []


# A client.


class Net(nn.Module):
    def __init__(self, classes: int = 4, width: int = 12):
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(16, width), nn.BatchNorm1d(width), nn.ReLU()
        )
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.body(x))


def network(seed: int = 0, width: int = 12) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network(Net(width=width))


def split(n: int, seed: int, labelled: bool = True) -> Split:
    """Four classes of noisy patterns."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    means = 255 * torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(99))
    pixels = means[labels] + 60 * torch.randn(n, 1, 4, 4, generator=generator)
    images = ResidentImages(pixels.clamp(0, 255).to(torch.uint8))
    return Split(f"split-{seed}", images, labels if labelled else None)


LOCAL = Training(epochs=2, lr=0.1, batch_size=8, momentum=0.0, weight_decay=0.0, schedule="step")
TASK = Classification("abcd", Augment(crop=1))


def client(number: int = 0, **given) -> Client:
    given = {"split": split(20, 5), "settings": LOCAL, "seed": 0, **given}
    return Client(number, network=network(), task=TASK, device=torch.device("cpu"), **given)


def test_a_client_trains_by_plain_gradient_steps_from_the_weights_it_was_sent():
    private = split(8, 5)
    settings = LOCAL.model_copy(update={"epochs": 1})
    start = network(seed=3)
    report = client(split=private, settings=settings).train(Order(0, 1, weights_of(start)))
    batch = next(TASK.batches(private, batch_size=8, seed=0, train=True).epoch(0))
    start.train()
    loss = nn.functional.cross_entropy(start(batch["image"]), batch["label"])
    loss.backward()
    expected = {k: p.detach() - 0.1 * p.grad for k, p in start.named_parameters()}
    found = dict(zip(start.state_dict(), report.weights, strict=True))
    for key, value in expected.items():
        assert torch.allclose(found[key], value, atol=1e-6)
    assert report.samples == 8
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)


def test_a_client_keeps_nothing_between_rounds_and_sees_other_orders():
    one = client()
    order = Order(0, 1, weights_of(network(3)))
    first, again = one.train(order), one.train(order)
    later = one.train(Order(0, 2, order.weights))
    assert all(torch.equal(a, b) for a, b in zip(first.weights, again.weights, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.weights, later.weights, strict=True))


def test_a_sample_left_over_alone_is_no_batch_of_its_own():
    nine, eight = (client(split=split(20, 5).subset(range(n))) for n in (9, 8))
    reports = [c.train(Order(0, 1, weights_of(network(3)))) for c in (nine, eight)]
    place = list(network().state_dict()).index("model.body.2.num_batches_tracked")
    assert [int(r.weights[place]) for r in reports] == [2, 2]
    assert [r.samples for r in reports] == [9, 8]


def test_a_proximal_client_stays_nearer_to_what_it_was_sent():
    start = weights_of(network(3))

    def distance(mu):
        found = client().train(Order(0, 1, start, mu)).weights
        return sum(float((a - b).square().sum()) for a, b in zip(found[:2], start[:2], strict=True))

    assert distance(2.0) < 0.8 * distance(0.0)


# The run.


def bench(**given) -> Bench:
    given = {
        "task": TASK,
        "train": split(160, 1),
        "transfer": split(90, 2, labelled=False),
        "validation": split(60, 3),
        "test": split(80, 4),
        "candidates": [],
        "make_student": network,
        "training": LOCAL,
        "engine": CPU,
        **given,
    }
    return Bench(**given)


SMALL = {
    "rounds": 2,
    "clients": 4,
    "fraction": 0.75,
    "alpha": 0.5,
    "steps": 12,
    "every": 4,
    "patience": 12,
    "batch_size": 16,
}


def run(path, method, laid=None, look=None):
    laid = laid or bench()
    return laid, carry_out(path, method, laid, look)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    method = FedDF(**SMALL, rivals=("fedprox", "fedavgm"))
    laid, folder = run(tmp_path_factory.mktemp("feddf") / "run", method)
    return method, laid, folder


def test_a_round_is_one_phase_for_all_clients_and_one_for_the_distillation(done):
    _, _, folder = done
    names = [p.name.partition("-")[2] for p in sorted((folder.path / "phases").iterdir())]
    rivals = [
        f"clients-of-{way}@0.{n}.state"
        for way in ("baseline", "fedprox", "fedavgm")
        for n in (1, 2)
    ]
    fused = [f"{kind}student@0.{n}.state" for n in (1, 2) for kind in ("clients-of-", "")]
    assert names == rivals + fused, "and no journal is left"


def test_the_rivals_have_the_same_clients_and_begin_with_the_same_weights(done):
    method, _, _ = done
    ways = [method.ways[name, 0] for name in ("baseline", "fedprox", "fedavgm", "student")]
    for n in (0, 1):
        assert len({tuple(way.rounds[n]["chosen"]) for way in ways}) == 1
    # Before anything is distilled FedAvg and FedDF are one.
    first = [way.rounds[0] for way in (ways[0], ways[3])]
    assert first[0]["average"] == first[1]["average"]
    assert first[0]["loss"] == first[1]["loss"]
    assert ways[1].rounds[0]["loss"] != first[0]["loss"]


def test_the_average_is_weighed_by_samples_and_is_what_a_round_of_fedavg_ends_with(tmp_path):
    for averaging in ("samples", "uniform"):
        method = FedDF(**{**SMALL, "rounds": 1}, averaging=averaging)
        laid, _ = run(tmp_path / averaging, method)
        ground = method._lay_out(laid, 0)
        chosen = sampled(0, 1, 4, 0.75)
        reports = [
            ground.clients[k].train(Order(k, 1, weights_of(ground.networks[0]))) for k in chosen
        ]
        assert len({r.samples for r in reports}) > 1
        shares = [r.samples if averaging == "samples" else 1 for r in reports]
        shares = [s / sum(shares) for s in shares]
        for place, tensor in enumerate(laid.baselines[0].state_dict().values()):
            if tensor.is_floating_point():
                wanted = sum(
                    s * r.weights[place].double() for s, r in zip(shares, reports, strict=True)
                )
                assert torch.allclose(tensor.double(), wanted, atol=1e-6)


def test_what_is_distilled_is_the_divergence_from_clients_at_rest(tmp_path):
    seen = {}

    def look(phase):
        if phase.name == "student@0.1":
            student = phase.updates[0].train["student"]
            seen["start"] = [t.clone() for t in student.state_dict().values()]
            batch = next(phase.batches.epoch(0))
            assert "label" not in batch
            student.train()
            seen["term"] = phase.updates[0].terms(batch)["feddf"].item()
            put(student, seen["start"])
            seen["logits"] = student(batch["image"]).detach()
            put(student, seen["start"])
            seen["image"] = batch["image"]
            seen["settings"] = phase.updates[0].settings

    method = FedDF(**{**SMALL, "rounds": 1})
    laid, _ = run(tmp_path / "run", method, look=look)
    teacher = method.ways["student", 0].ensemble
    assert all(not n.training for n in teacher.networks)
    assert not any(p.requires_grad for n in teacher.networks for p in n.parameters())
    with torch.no_grad():
        members = torch.stack([n(seen["image"]) for n in teacher.networks])
    p, log_q = members.mean(0).softmax(1), seen["logits"].log_softmax(1)
    expected = (p * (p.log() - log_q)).sum(1).mean().item()
    assert seen["term"] == pytest.approx(expected, rel=1e-4)
    average_now = method.ways["student", 0].averages[0].state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(seen["start"], average_now, strict=True))
    settings = seen["settings"]
    assert (settings.optimiser, settings.clip_norm, settings.schedule) == ("adam", 5.0, "cosine")
    assert (settings.lr, settings.weight_decay) == (1e-3, 0.0)
    moved = laid.students[0].state_dict()["model.body.2.running_mean"]
    begun = dict(zip(laid.students[0].state_dict(), seen["start"], strict=True))
    assert not torch.equal(moved, begun["model.body.2.running_mean"]), (
        "the student is in train mode"
    )


def test_the_best_snapshot_on_validation_data_is_kept(done):
    _, laid, folder = done
    lines = [
        line["validation"]["accuracy"]
        for line in folder.metrics()
        if line["phase"] == "student@0.2" and "validation" in line
    ]
    assert len(lines) == 3
    assert laid.task.measure(laid.students[0], laid.validation)["accuracy"] == max(lines)


def test_the_distillation_ends_when_nothing_has_become_better(tmp_path):
    # A rate too small to change an answer: the first snapshot stays the best.
    method = FedDF(**{**SMALL, "rounds": 1, "steps": 40, "patience": 8}, rate=1e-12)
    _, folder = run(tmp_path / "run", method, bench(baseline=False))
    taken = [m["step"] for m in folder.metrics() if "validation" in m]
    assert taken[-1] < 40
    assert len(taken) <= 5


def test_a_start_from_the_previous_model_leaves_the_average_aside(tmp_path):
    starts = {}

    def look(phase):
        if phase.name.startswith("student@"):
            state = phase.updates[0].train["student"].state_dict()
            starts[phase.name] = [t.clone() for t in state.values()]

    method = FedDF(**{**SMALL, "rounds": 1}, start="previous")
    run(tmp_path / "run", method, bench(baseline=False), look)
    begun = starts["student@0.1"]
    assert all(torch.equal(a, b) for a, b in zip(begun, weights_of(network()), strict=True))


def test_the_average_is_taken_where_it_validates_better(tmp_path):
    # A rate so large that every snapshot is bad.
    method = FedDF(**{**SMALL, "rounds": 1}, rate=50.0, fall_back=True)
    laid, _ = run(tmp_path / "run", method)
    mean = method.ways["student", 0].averages[0]
    assert same(laid.students[0], mean)
    assert same(mean, laid.baselines[0])


def test_momentum_pushes_parameters_and_leaves_statistics_the_average(tmp_path):
    given = {**SMALL, "rounds": 1}
    method = FedDF(**given, rivals=("fedavgm",), momentum=0.3)
    laid, _ = run(tmp_path / "run", method)
    # In the first round there is no velocity yet.
    way = method.ways["fedavgm", 0]
    for a, b in zip(
        way.networks[0].state_dict().values(), laid.baselines[0].state_dict().values(), strict=True
    ):
        assert torch.allclose(a.double(), b.double(), atol=1e-6)
    method = FedDF(**SMALL, rivals=("fedavgm",), momentum=0.3)
    laid, _ = run(tmp_path / "two", method)
    pushed = method.ways["fedavgm", 0].networks[0].state_dict()
    assert not torch.allclose(pushed["model.fc.weight"], laid.baselines[0].model.fc.weight)
    assert (pushed["model.body.2.running_var"] > 0).all()


def test_dead_clients_are_left_out_of_average_and_ensemble(tmp_path):
    method = FedDF(**{**SMALL, "rounds": 1, "fraction": 1.0}, drop_worst=True)
    laid = bench(training=LOCAL.model_copy(update={"epochs": 8}))
    real = Client.train

    def poisoned(self, order):
        report = real(self, order)
        if self.number == 1:  # all of its answers are class 0, a guess of four
            report.weights[-1].copy_(torch.tensor([1e3, 0, 0, 0]))
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "train", poisoned)
        run(tmp_path / "run", method, laid)
    for name in ("baseline", "student"):
        found = method.ways[name, 0].rounds[0]
        assert 1 not in found["averaged"]
        assert 1 not in found["members"]
    assert laid.baselines[0].model.fc.bias.abs().max() < 10


def test_clients_may_be_heard_by_their_accuracy(tmp_path):
    method = FedDF(**{**SMALL, "rounds": 1}, ensemble="accuracy")
    laid, _ = run(tmp_path / "run", method)
    way = method.ways["student", 0]
    accuracies = [laid.task.measure(n, laid.validation)["accuracy"] for n in way.ensemble.networks]
    shares = [a / sum(accuracies) for a in accuracies]
    assert way.ensemble.weights.tolist() == pytest.approx(shares, abs=1e-5)


@pytest.mark.parametrize(
    ("phase", "call"),
    [("clients-of-baseline@0.2", 5), ("clients-of-student@0.2", 11), ("student@0.2", 6)],
)
def test_a_run_goes_on_in_any_phase_where_it_failed(tmp_path, done, phase, call):
    _, whole, _ = done
    trained = {"n": 0}
    real = Client.train

    def counting(self, order):
        trained["n"] += 1
        if phase.startswith("clients") and broken and trained["n"] == call:
            raise RuntimeError("as if the power had gone")
        return real(self, order)

    def break_off(found):
        if found.name == phase == "student@0.2":
            inner, calls = found.updates[0].terms, {"n": 0}

            def failing(batch):
                calls["n"] += 1
                if calls["n"] == call:
                    raise RuntimeError("as if the power had gone")
                return inner(batch)

            found.updates[0].terms = failing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "train", counting)
        broken = True
        with pytest.raises(RuntimeError):
            run(tmp_path / "run", FedDF(**SMALL, rivals=()), look=break_off)
        broken, before = False, trained["n"]
        again, _ = run(tmp_path / "run", FedDF(**SMALL, rivals=()))
        # Two ways, two rounds, three clients each: nobody trained twice but the one that failed.
        assert trained["n"] == 12 + (phase != "student@0.2")
        assert before < trained["n"] or phase == "student@0.2"
    assert same(again.students[0], whole.students[0])
    assert same(again.baselines[0], whole.baselines[0])


@with_flower
@pytest.mark.parametrize("carrier", ["flower", "loopback"])
def test_flower_ends_with_the_same_bits_and_goes_on_where_it_failed(tmp_path, done, carrier):
    _, whole, _ = done
    real, threads = Client.train, set()
    broken, trained = True, {"n": 0}

    def counting(self, order):
        threads.add(threading.get_ident())
        trained["n"] += 1
        if broken and trained["n"] == 8:
            raise UserError("as if the power had gone")
        return real(self, order)

    given = {**SMALL, "carrier": carrier}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "train", counting)
        with pytest.raises(UserError, match="as if the power had gone"):
            run(tmp_path / "run", FedDF(**given))
        broken = False
        again, _ = run(tmp_path / "run", FedDF(**given))
    assert same(again.students[0], whole.students[0])
    assert same(again.baselines[0], whole.baselines[0])
    assert threading.get_ident() not in threads, "Flower called the clients"
    assert trained["n"] == 13, "two ways, two rounds, three clients, and one of them again"


def test_without_flower_its_choice_is_one_sentence_and_the_rest_works(monkeypatch):
    for name in [n for n in sys.modules if n == "flwr" or n.startswith("flwr.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "limbeck.systems.federated.feddf.flower", raising=False)
    monkeypatch.setitem(sys.modules, "flwr", None)
    for carrier in ("flower", "loopback"):
        with pytest.raises(UserError, match=r"pip install 'limbeck\[federated\]'"):
            FedDF(**SMALL, carrier=carrier).rehearse(bench())
    FedDF(**SMALL).rehearse(bench())
    assert federation.carrier("own") is federation.own


# Several architectures.


def heterogeneous(tmp_path, monkeypatch, **given):
    """A run with the narrow network of :func:`network` and a wide one, two clients each."""
    monkeypatch.setattr(
        "limbeck.systems.federated.feddf.fusion.build",
        lambda name, classes, input, seed: network(seed, width=int(name)),
    )

    def make_student(seed):
        made = network(seed)
        made.input = lambda x: x
        return made

    method = FedDF(**{**SMALL, "fraction": 1.0, "rounds": 1, "architectures": ("20",), **given})
    seen = {}

    def look(phase):
        if phase.name.startswith("student@"):
            update = phase.updates[0]
            batch = next(phase.batches.epoch(0))
            before = weights_of(update.train["student"])
            seen[phase.name] = (before, batch["image"], update)

    laid, _ = run(tmp_path / "run", method, bench(make_student=make_student), look)
    return method, laid, seen


def test_groups_are_averaged_apart_and_learn_from_everybody(tmp_path, monkeypatch):
    method, laid, seen = heterogeneous(tmp_path, monkeypatch)
    assert list(seen) == ["student@0.1", "student@0.1-20"]
    narrow, wide = method.ways["student", 0].networks
    assert (narrow.model.fc.in_features, wide.model.fc.in_features) == (12, 20)
    ground = method._lay_out(laid, 0)
    assert [ground.group(k) for k in range(4)] == [0, 1, 0, 1]
    for g, (before, _, _) in enumerate(seen.values()):
        members = [k for k in range(4) if k % 2 == g]
        reports = [
            ground.clients[k].train(Order(k, 1, weights_of(ground.networks[g]))) for k in members
        ]
        wanted = average([r.weights for r in reports], [r.samples for r in reports])
        assert all(torch.equal(a, b) for a, b in zip(before, wanted, strict=True))
    (_, one, _), (_, other, _) = seen.values()
    assert torch.equal(one, other), "both groups see the same batches"
    assert len(method.ways["student", 0].ensemble.networks) == 4
    assert [len(way.networks) for way in method.ways.values()] == [2, 2]


def test_silent_clients_halve_the_logits_that_are_distilled():
    heard, student = noise(2, 3, 4, seed=1), noise(3, 4)
    members = torch.cat([heard, torch.zeros(2, 3, 4, dtype=torch.float64)])
    p = (heard.mean(0) / 2).softmax(1)
    expected = (p * (p.log() - student.log_softmax(1))).sum(1).mean()
    assert torch.allclose(feddf(student, members), expected)


# Where the images come from.


def test_without_unlabelled_images_a_share_is_held_back_from_the_clients():
    method = FedDF(**SMALL, public=0.25)
    laid = bench(train=split(160, 1), transfer=split(160, 1))
    ground = method._lay_out(laid, 0)
    private = torch.cat([c.split.rows for c in ground.clients.values()])
    assert ground.public.labels is None
    assert len(ground.public) == 40
    assert sorted([*private.tolist(), *ground.public.rows.tolist()]) == list(range(160))


def test_unlabelled_images_of_the_recipe_leave_the_clients_everything():
    laid = bench()
    ground = FedDF(**SMALL)._lay_out(laid, 0)
    assert ground.public is laid.transfer
    assert sum(len(c.split) for c in ground.clients.values()) == len(laid.train)


def test_a_run_without_validation_data_keeps_the_last_snapshot(tmp_path):
    method = FedDF(**{**SMALL, "rounds": 1})
    laid, folder = run(tmp_path / "run", method, bench(validation=[]))
    assert not any("validation" in m for m in folder.metrics())
    titles = [f.title for f in method.findings(laid, folder.metrics())]
    assert titles == ["After the last round", "Who has which classes"]


def test_the_report_shows_the_course_the_end_and_the_split(done):
    method, laid, folder = done
    course, end, owned = method.findings(laid, folder.metrics())
    lines, within = (chart.lines for chart in course.charts)
    assert set(lines) == {"baseline", "student", "FedProx", "FedAvgM"}
    assert set(within) == {"student", "average", "ensemble"}
    averages = [found["average"][0] for found in method.ways["student", 0].rounds]
    assert within["average"] == [(1.0, averages[0]), (2.0, averages[1])]
    last = laid.task.measure(laid.students[0], laid.validation)["accuracy"]
    assert lines["student"][-1] == (2.0, last)
    tested = {row[0]: row[2] for row in end.table[1:]}
    value = laid.task.measure(laid.students[0], laid.test)["accuracy"]
    assert tested["FedDF"] == f"{100 * value:.2f} %"
    assert set(tested) == {
        "FedAvg",
        "FedProx",
        "FedAvgM",
        "FedDF",
        "FedDF's last average",
        "FedDF's last ensemble",
    }
    counts = [[int(c) for c in row[1:]] for row in owned.table[1:]]
    assert [sum(column) for column in zip(*counts, strict=True)] == [40, 40, 40, 40, 160]
    assert owned.pictures["clients by classes"].shape == (4 * 16, 4 * 16)


# What does not fit.


@pytest.mark.parametrize(
    ("method", "laid", "sentence"),
    [
        (
            {},
            {"candidates": [Candidate(network())]},
            "the teachers of a federation are its clients",
        ),
        ({}, {"train": []}, "give data by name"),
        ({}, {"train": split(160, 1, labelled=False)}, "clients learn from labels"),
        ({"clients": 100}, {}, "four or more for each"),
        ({"drop_worst": True}, {"validation": []}, "keep some with data.validation"),
        ({"architectures": ("resnet8",)}, {}, "leave architectures out"),
        ({}, {"task": Attributes("abcd", attributes={"x": (0,)})}, "not on attributes"),
    ],
)
def test_what_does_not_fit_is_found_before_training(method, laid, sentence):
    with pytest.raises(UserError, match=sentence):
        FedDF(**{**SMALL, **method}).rehearse(bench(**laid))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"steps": 150}, "multiples of that"),
        ({"patience": 150}, "multiples of that"),
        ({"clients": 1, "architectures": ("resnet8",)}, "cannot have 2 architectures"),
        ({"fraction": 0.0}, "fraction=0.0"),
        ({"target": "avg"}, "target"),
        ({"carrier": "ray"}, "carrier"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"momentum": 1.0}, "momentum"),
    ],
)
def test_wrong_hyper_parameters_are_one_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        FedDF(**given)


def test_a_local_training_that_diverges_is_one_sentence(tmp_path):
    wild = LOCAL.model_copy(update={"lr": 1e30})
    with pytest.raises(UserError, match=r"the loss of client .* in round 1; lower the learning"):
        run(tmp_path / "run", FedDF(**SMALL), bench(training=wild))


def test_it_adds_up_with_no_other_method():
    with pytest.raises(UserError, match="phases of its own"):
        FedDF() + KD()


# The paper's setting.


def test_the_papers_setting_and_networks_are_those_published():
    recipe = recipes.validate(recipes.preset(system("feddf"), "paper", "cifar10"))
    method = recipe.method()
    assert isinstance(method, FedDF)
    assert (method.clients, method.fraction, method.rounds) == (20, 0.4, 100)
    assert (method.target, method.temperature, method.averaging) == ("avg_logits", 1.0, "samples")
    assert (method.steps, method.every, method.patience) == (10_000, 100, 1_000)
    assert (method.rate, method.batch_size, method.clip) == (1e-3, 128, 5.0)
    local = recipe.student.training
    assert (local.epochs, local.batch_size, local.lr) == (40, 64, 0.1)
    assert (local.momentum, local.weight_decay, local.schedule) == (0.0, 0.0, "constant")
    sizes = {
        "resnet8": (78_042, 83_892),
        "resnet20": (272_474, 278_324),
        "resnet32": (466_906, 472_756),
    }
    assert recipe.student.model == "resnet8"
    for name, published in sizes.items():
        for classes, count in zip((10, 100), published, strict=True):
            made = make(name, classes, 3, (32, 32))
            assert sum(p.numel() for p in made.parameters()) == count
