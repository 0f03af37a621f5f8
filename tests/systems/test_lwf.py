import copy
import math

import pytest
import torch
from torch import nn

from carrying import carry_out, same
from limbeck import KD, recipes
from limbeck.catalogue import system
from limbeck.data.augment import Augment
from limbeck.data.data import ResidentImages, Split
from limbeck.errors import UserError
from limbeck.losses import lwf, lwf_multilabel
from limbeck.systems.continual.lwf import Heads, LwF, as_named, with_heads
from limbeck.tasks.classification import Classification
from limbeck.tasks.sequence import SequentialClassification
from limbeck.training.bench import Bench, Candidate
from limbeck.training.engine import Engine
from limbeck.training.network import Network
from limbeck.training.phases import Training

CPU = Engine(device="cpu", checkpoint_seconds=0.0, channels_last=False)


# The loss.


def test_the_loss_has_the_values_worked_out_by_hand():
    now = torch.zeros(1, 2, requires_grad=True)
    before = torch.tensor([[2.0, 0.0]])
    loss = lwf(now, before, temperature=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.6931472)
    assert now.grad[0].tolist() == pytest.approx([-0.1155293, 0.1155293], abs=1e-6)
    entropy = -sum(p * math.log(p) for p in (0.7310586, 0.2689414))
    assert loss.item() - entropy == pytest.approx(0.1109441, abs=1e-6)


@pytest.mark.parametrize(
    ("temperature", "softened"), [(2.0, (2 / 3, 1 / 3)), (1.0, (0.8, 0.2)), (1e6, (0.5, 0.5))]
)
def test_recorded_probabilities_are_softened(temperature, softened):
    recorded = torch.tensor([[0.8, 0.2]], dtype=torch.float64).log()
    now = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    log_q = (now / temperature).log_softmax(1)[0]
    expected = -sum(p * float(q) for p, q in zip(softened, log_q, strict=True))
    assert lwf(now, recorded, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_value_and_gradient_follow_an_independent_formula():
    generator = torch.Generator().manual_seed(0)
    now = torch.randn(4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    before = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    temperature, total = 3.0, 0.0
    gradient = torch.zeros_like(now)
    for b in range(4):
        y = [math.exp(v) for v in before[b].tolist()]
        y = [v / sum(y) for v in y]
        raised = [v ** (1 / temperature) for v in y]
        wanted = [v / sum(raised) for v in raised]
        z = [math.exp(v / temperature) for v in now[b].tolist()]
        found = [v / sum(z) for v in z]
        total -= sum(w * math.log(f) for w, f in zip(wanted, found, strict=True)) / 4
        for i in range(5):
            gradient[b, i] = (found[i] - wanted[i]) / temperature / 4
    loss = lwf(now, before, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert torch.allclose(now.grad, gradient, atol=1e-14)


def test_a_constant_added_to_all_old_logits_changes_nothing():
    now, before = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.allclose(lwf(now + 5, before - 3), lwf(now, before), atol=1e-6)


def test_a_label_of_several_is_softened_by_itself():
    recorded = torch.tensor([[0.8, 0.8]], dtype=torch.float64).logit()
    now = torch.tensor([[0.7, -0.2]], dtype=torch.float64)
    q = (now / 2).sigmoid()[0]
    expected = -sum(float(2 / 3 * x.log() + 1 / 3 * (1 - x).log()) for x in q)
    assert lwf_multilabel(now, recorded).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4)), "of the same head"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), 0.0), "above 0"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        lwf(*arguments)


# Heads.


class Net(nn.Module):
    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.fc = nn.Linear(12, classes)

    def forward(self, x):
        return self.fc(self.body(x))


def test_heads_answer_in_the_order_of_the_classes_and_fold_into_one_layer():
    parts = [(4, 0), (1, 5, 3, 2)]
    heads = Heads(3, parts)
    x = torch.randn(7, 3)
    said = heads(x)
    for head, part in zip(heads.heads, parts, strict=True):
        assert torch.equal(said[:, list(part)], head(x))
    one = heads.as_one()
    assert (one.in_features, one.out_features) == (3, 6)
    assert torch.allclose(one(x), said, atol=1e-6)
    network = with_heads(Network(Net()), parts).eval()
    images = torch.randn(5, 1, 4, 4)
    assert torch.allclose(as_named(network).eval()(images), network(images), atol=1e-6)
    assert set(as_named(network).model.state_dict()) == set(Net().state_dict())


# The run.


def split(number: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 6
    centres = torch.randint(40, 216, (6, 16), generator=torch.Generator().manual_seed(9))
    noise = torch.randint(-35, 36, (number, 16), generator=generator)
    pixels = (centres[labels] + noise).view(-1, 1, 4, 4).to(torch.uint8)
    return Split("train", ResidentImages(pixels), labels)


def bench(**given) -> Bench:
    train = split(240, 1)

    def make(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Network(Net())

    given = {
        "task": SequentialClassification("abcdef", Augment(), sequence=2),
        "train": train,
        "transfer": train,
        "validation": split(60, 2),
        "test": split(120, 3),
        "candidates": [],
        "make_student": make,
        "training": Training(epochs=6, lr=0.2, batch_size=16, weight_decay=0.0),
        "engine": CPU,
        **given,
    }
    return Bench(**given)


def run(path, method, laid=None, look=None):
    laid = laid or bench()
    return laid, carry_out(path, method, laid, look)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    method = LwF(warmup=3)
    laid, folder = run(tmp_path_factory.mktemp("lwf") / "run", method)
    return method, laid, folder


def test_what_was_learned_first_is_kept_and_fine_tuning_forgets_more(done):
    method, laid, _ = done
    old = {
        way: method._accuracies(laid.task, method.ways[way, 0][-1], laid.test, 2)
        for way in ("baseline", "student", "features", "joint")
    }
    assert old["student"][0] > old["baseline"][0]
    assert old["student"][1] > 0.8
    first = method._accuracies(laid.task, method.ways["student", 0][0], laid.test, 1)
    assert old["features"][0] == first[0], "a frozen trunk and head forget nothing"


def test_all_ways_begin_with_the_same_network_and_deliver_one_by_name(done):
    method, laid, _ = done
    assert method.ways["baseline", 0][0] is method.ways["student", 0][0]
    for network in (laid.students[0], laid.baselines[0]):
        assert isinstance(network.model.fc, nn.Linear)
    images = torch.randn(5, 1, 4, 4)
    answers = laid.students[0].eval()(images), method.ways["student", 0][-1].eval()(images)
    assert torch.allclose(*answers, atol=1e-6)


def test_the_warm_up_moves_nothing_but_the_new_head(done):
    method, _, folder = done
    index = [m["phase"] for m in folder.metrics()]
    assert "student-2-head" in index
    first, frozen = method.ways["features", 0]
    before, after = first.state_dict(), frozen.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"model.fc.heads.1.weight", "model.fc.heads.1.bias"}


def test_before_anything_moves_the_kept_answers_pull_nowhere(tmp_path):
    seen = {}

    def look(phase):
        if phase.name == "student-2":
            network = phase.updates[0].train["student"]
            network.eval()  # the records come from a network at rest
            batch = next(phase.batches.epoch(0))
            terms = phase.updates[0].terms(batch)
            network.zero_grad()
            terms["task 1"].backward()
            seen["grad"] = max(
                float(p.grad.abs().max()) for p in network.parameters() if p.grad is not None
            )
            network.zero_grad()
            with torch.no_grad():
                old = network(batch["image"])[:, :3]
            y = (old / 2).softmax(1)
            seen["entropy"] = float(-(y * y.log()).sum(1).mean())
            seen["loss"] = float(terms["task 1"])
            network.train()

    run(tmp_path / "run", LwF(warmup=1, rivals=()), look=look)
    assert seen["grad"] < 1e-5  # the teacher folds batch norms, which rounds
    assert seen["loss"] == pytest.approx(seen["entropy"], rel=1e-5)


def test_without_weight_it_is_fine_tuning_step_for_step(tmp_path):
    laid, _ = run(tmp_path / "run", LwF(weight=0.0, warmup=1, rivals=()))
    assert same(laid.students[0], laid.baselines[0])


def test_answers_are_recorded_once_or_asked_for_each_image(tmp_path):
    images = {}
    for targets in ("online", "recorded"):
        laid, _ = run(tmp_path / targets, LwF(targets=targets, warmup=1, rivals=()))
        images[targets] = laid.students[0].state_dict()
    # Nothing is augmented here, so both see the same images.
    for key, value in images["online"].items():
        assert torch.allclose(value.float(), images["recorded"][key].float(), atol=1e-4)


@pytest.mark.parametrize("phase", ["first", "student-2-head", "student-2", "joint-2"])
def test_a_run_goes_on_in_any_phase_where_it_failed(tmp_path, done, phase):
    _, whole, _ = done

    def break_off(found):
        if found.name == phase:
            inner, calls = found.updates[0].terms, {"n": 0}

            def failing(batch):
                calls["n"] += 1
                if calls["n"] == 5:
                    raise RuntimeError("as if the power had gone")
                return inner(batch)

            found.updates[0].terms = failing

    with pytest.raises(RuntimeError):
        run(tmp_path / "run", LwF(warmup=3), look=break_off)
    again, _ = run(tmp_path / "run", LwF(warmup=3))
    assert same(again.students[0], whole.students[0])
    assert same(again.baselines[0], whole.baselines[0])


def test_three_tasks_keep_two_old_answers_and_the_table_has_all(tmp_path):
    task = SequentialClassification("abcdef", Augment(), sequence=3)
    method, names = LwF(warmup=1, rivals=()), []
    laid = bench(task=task, training=Training(epochs=2, lr=0.1, batch_size=16))
    run(tmp_path / "run", method, laid, look=lambda phase: names.append(phase.name))
    assert names[-2:] == ["student-3-head", "student-3"]
    (found,) = method.findings(laid, [])
    assert [row[:2] for row in found.table[1:]] == [
        ["fine-tuning", "1"],
        ["fine-tuning", "2"],
        ["fine-tuning", "3"],
        ["learning without forgetting", "1"],
        ["learning without forgetting", "2"],
        ["learning without forgetting", "3"],
    ]
    assert found.table[1][3:5] == ["", ""]


@pytest.mark.parametrize(
    ("laid", "sentence"),
    [
        ({"task": Classification("abcdef")}, "task: sequence"),
        ({"candidates": [Candidate(Network(Net()))]}, "its own teacher"),
        ({"make_student": lambda seed: Network(nn.Flatten())}, "does not end in a linear layer"),
        (
            {"task": SequentialClassification("abcdef", Augment(mixup=0.2), sequence=2)},
            "mixup and cutmix",
        ),
        ({"transfer": Split("train", split(12, 1).images, None)}, "labelled data"),
    ],
)
def test_what_does_not_fit_is_found_before_training(laid, sentence):
    with pytest.raises(UserError, match=sentence):
        LwF().rehearse(bench(**laid))


def test_it_adds_up_with_no_other_method():
    with pytest.raises(UserError, match="phases of its own"):
        LwF() + KD()


def test_the_papers_setting_is_stated():
    recipe = recipes.validate(recipes.preset(system("lwf"), "paper", "cifar100"))
    method = copy.deepcopy(recipe.method())
    assert (method.temperature, method.weight, method.targets) == (2.0, 1.0, "recorded")
    assert recipe.student.model == "alexnet"
    assert (recipe.student.training.batch_size, recipe.student.training.weight_decay) == (192, 5e-4)
