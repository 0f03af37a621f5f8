import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import limbeck
from carrying import carry_out
from limbeck import KD, recipes
from limbeck.catalogue import system
from limbeck.errors import UserError
from limbeck.systems.classification.rco import RCO, equal_intervals, next_anchor
from limbeck.tasks.classification import Classification
from limbeck.training.bench import Bench, Candidate
from limbeck.training.engine import Engine
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Solve, Training
from limbeck.training.progress import Voice
from limbeck.training.run import Run
from limbeck.training.task import Answer
from limbeck.training.trainer import Trainer

CPU = Engine(device="cpu", checkpoint_seconds=0.0)
TEACHER = Training(epochs=6, lr=0.1)


class Net(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU())
            self.fc = nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(self.body(x))


def loader(n: int = 60, seed: int = 0) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 4, 4, generator=generator)
    return DataLoader(TensorDataset(images, images.flatten(1)[:, :3].argmax(1)), 20, shuffle=True)


def bench(**given) -> Bench:
    train, held = loader(), loader(40, 1)
    given = {
        "task": Classification(["a", "b", "c"]),
        "train": train,
        "transfer": train,
        "validation": held,
        "test": held,
        "candidates": [Candidate(Network(Net(16, 9)), TEACHER)],
        "make_student": lambda seed: Network(Net(4, seed)),
        "training": Training(epochs=7, lr=0.1),
        "baseline": False,
        "engine": CPU,
        **given,
    }
    return Bench(**given)


def run(path, method, laid: Bench | None = None):
    """Carry a method out, or go on with it; returns the bench and the phases seen."""
    laid = laid or bench()
    seen = []

    def look(phase):
        weights = copy.deepcopy(laid.students[0].state_dict()) if laid.students else None
        seen.append((phase, weights))

    folder = carry_out(path, method, laid, look)
    return laid, seen, folder


def same(one, other) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


# Where the anchors are.


@pytest.mark.parametrize(
    ("epochs", "anchors", "expected"),
    [(240, 4, [60, 120, 180, 240]), (10, 3, [4, 7, 10]), (5, 1, [5]), (3, 3, [1, 2, 3])],
)
def test_equal_intervals_end_with_the_converged_teacher(epochs, anchors, expected):
    assert equal_intervals(epochs, anchors) == expected


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((0.2, 0.5, 0.79, 0.9, 0.95), 4),
        ((0.9, 0.9, 0.9, 0.9, 0.9), 2),
        ((0.1, 0.2, 0.3, 0.4, 0.5), 6),
        ((0.2, 0.9, 0.1, 0.1, 0.1), 2),
    ],
)
def test_the_greedy_choice_is_the_last_state_before_one_too_hard(ratios, expected):
    hardness = dict(zip(range(2, 7), ratios, strict=True))
    assert next_anchor(hardness, threshold=0.8) == expected


# What a run does.


def test_a_stage_begins_with_the_student_that_the_one_before_left(tmp_path):
    _, seen, folder = run(tmp_path / "run", RCO(anchors=3))
    stages = [(p, w) for p, w in seen if p.name.startswith("student")]
    assert [p.name for p, _ in stages] == ["student-1", "student-2", "student-3"]
    assert [p.epochs for p, _ in stages] == [2, 2, 3]
    for (phase, _), (_, weights) in pairwise(stages):
        index = next(i for i, (p, _) in enumerate(seen) if p is phase)
        left = folder.finished_phase(index, phase.name)["modules"]["student"]
        assert same(weights, left)


def test_anchors_are_states_of_their_own_and_stay_as_they_are(tmp_path):
    _, seen, _ = run(tmp_path / "run", RCO(anchors=3))
    (fit, _), *_ = seen
    assert fit.keep == (2, 4, 6)
    images = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    stages = [p for p, _ in seen if p.name.startswith("student")]
    anchors = [p.updates[0].terms.teacher.networks[0] for p in stages]
    with torch.no_grad():
        said = [a.eval()(images) for a in anchors]
    assert not torch.allclose(said[0], said[1])
    assert not torch.allclose(said[1], said[2])
    assert same(anchors[2].state_dict(), fit.updates[0].train["student"].state_dict())
    assert not any(p.requires_grad for a in anchors for p in a.parameters())


def test_later_anchors_do_not_change_the_first_stage(tmp_path):
    ends = []
    for name, anchors in (("one", (2, 4)), ("other", (2, 6))):
        _, _, folder = run(tmp_path / name, RCO(anchors=anchors))
        ends.append(folder.finished_phase(1, "student-1")["modules"]["student"])
    assert same(*ends)


def test_a_single_anchor_is_plain_distillation_step_for_step(tmp_path):
    students = [
        run(tmp_path / name, method)[0].students[0].state_dict()
        for name, method in (("rco", RCO(anchors=1)), ("kd", KD()))
    ]
    assert same(*students)


def test_stages_begin_the_schedule_anew_or_follow_one(tmp_path):
    quick = Engine(device="cpu", checkpoint_seconds=0.0, log_every=1)
    for schedule in ("restart", "continuous"):
        folder = Run.create(tmp_path / schedule, {"test": True})
        phases = RCO(anchors=2, schedule=schedule).phases(bench())
        Trainer(folder, quick, Voice(quiet=True)).work(phases)
        first, second = (
            [m["lr"] for m in folder.metrics() if m["phase"] == f"student-{n}" and "lr" in m]
            for n in (1, 2)
        )
        assert second[-1] < second[0]
        assert (second[0] > first[-1]) == (schedule == "restart")
        assert first[0] == pytest.approx(0.1, rel=0.1)


def test_a_greedy_route_moves_on_and_ends_with_the_converged_teacher(tmp_path):
    _, seen, folder = run(tmp_path / "run", RCO(anchors=4, select="greedy", threshold=0.9))
    solves = [p for p, _ in seen if isinstance(p, Solve)]
    fits = [p for p, _ in seen if isinstance(p, Fit) and p.name.startswith("student")]
    assert 1 <= len(solves) <= 3
    assert sum(f.epochs for f in fits) == 7
    places = [
        folder.finished_phase(i, p.name)["result"]
        for i, (p, _) in enumerate(seen)
        if isinstance(p, Solve)
    ]
    assert places == sorted(set(places))
    final = fits[-1].updates[0].terms.teacher.networks[0].state_dict()
    assert same(final, seen[0][0].updates[0].train["student"].state_dict())


@pytest.mark.parametrize("threshold", [1e-9, 1e9])
def test_a_threshold_that_all_or_none_exceed_takes_one_step_or_all(tmp_path, threshold):
    _, seen, folder = run(tmp_path / "run", RCO(anchors=3, select="greedy", threshold=threshold))
    first = next(i for i, (p, _) in enumerate(seen) if isinstance(p, Solve))
    assert folder.finished_phase(first, seen[first][0].name)["result"] == (
        1 if threshold < 1 else 6
    )


@pytest.mark.parametrize("select", ["equal", "greedy"])
@pytest.mark.parametrize("form", ["kd", "features"])
@pytest.mark.parametrize("poison", [2, 10, 16])
def test_a_run_goes_on_in_any_stage_where_it_failed(tmp_path, select, form, poison):
    given = {"anchors": 3, "select": select, "form": form}
    whole, _, _ = run(tmp_path / "whole", RCO(**given))
    calls = {"n": 0}

    class Failing(RCO):
        def terms(self, student, teacher, batch):
            calls["n"] += student_trains(student)
            if calls["n"] == poison:
                raise RuntimeError("as if the power had gone")
            return super().terms(student, teacher, batch)

    def student_trains(student: Answer) -> bool:
        return any(v.requires_grad for v in (*student.outputs.values(), *student.features.values()))

    with pytest.raises(RuntimeError):
        run(tmp_path / "run", Failing(**given))
    again, _, _ = run(tmp_path / "run", RCO(**given))
    assert same(again.students[0].state_dict(), whole.students[0].state_dict())


def test_features_are_mapped_by_one_layer_that_all_stages_share(tmp_path):
    _, seen, _ = run(tmp_path / "run", RCO(anchors=2, form="features"))
    stages = [p for p, _ in seen if p.name.startswith("student")]
    methods = [p.updates[0].train["method"] for p in stages]
    assert methods[0] is methods[1]
    assert (methods[0].map.in_features, methods[0].map.out_features) == (4, 16)


def test_the_loss_of_features_is_their_mean_squared_difference():
    method = RCO(form="features", weight=3.0)
    s, t = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    answers = Answer({}, {"fc:input": s}), Answer({}, {"fc:input": t})
    method.build(*answers, {})
    assert method.terms(*answers, {})["anchor"].item() == pytest.approx(3 * (1 + 4) / 2)


def test_finished_states_given_in_order_are_a_route(tmp_path):
    states = [Candidate(Network(Net(16, seed))) for seed in (1, 2)]
    _, seen, _ = run(tmp_path / "run", RCO(anchors=2), bench(candidates=states))
    assert [p.name for p, _ in seen] == ["student-1", "student-2"]
    first = seen[0][0].updates[0].terms.teacher.networks[0].state_dict()
    assert same(first, states[0].network.state_dict())


# What is refused.


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"anchors": 0}, "anchors"),
        ({"anchors": (3, 2)}, "rising order"),
        ({"anchors": (0, 2)}, "rising order"),
        ({"anchors": (1, 2), "select": "greedy"}, "a greedy choice finds its anchors"),
        ({"threshold": 0.0}, "threshold"),
        ({"form": "hint"}, "form"),
    ],
)
def test_wrong_hyper_parameters_are_one_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        RCO(**given)


@pytest.mark.parametrize(
    ("method", "laid", "sentence"),
    [
        (RCO(), {"candidates": [Candidate(Network(Net(16, 1)))]}, "no route"),
        (RCO(anchors=7), {"training": Training(epochs=9)}, "no anchor 7"),
        (RCO(anchors=5), {"training": Training(epochs=3)}, "need 5 epochs"),
        (RCO(select="greedy"), {"validation": []}, "validation data"),
        (
            RCO(),
            {
                "candidates": [
                    Candidate(Network(Net(16, 1)), TEACHER),
                    Candidate(Network(Net(16, 2))),
                ]
            },
            "not trained yet",
        ),
    ],
)
def test_what_makes_no_route_is_found_in_the_rehearsal(method, laid, sentence):
    with pytest.raises(UserError, match=sentence):
        method.rehearse(bench(**laid))


def test_a_later_state_is_the_harder_target_for_one_fixed_student(tmp_path):
    laid, seen, _ = run(tmp_path / "run", RCO(anchors=6))
    stages = [p for p, _ in seen if p.name.startswith("student")]
    fresh = Network(Net(4, 0)).eval()
    images = torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        said = [
            limbeck.losses.kd(fresh(images), p.updates[0].terms.teacher.networks[0].eval()(images))
            for p in stages
        ]
    assert said[-1] > said[0]
    assert laid.teacher is not None


def test_the_papers_setting_is_stated():
    recipe = recipes.validate(recipes.preset(system("rco"), "paper", "cifar100"))
    assert (recipe.teachers[0].model, recipe.student.model) == ("resnet50-cifar", "mobilenetv2")
    assert (recipe.student.training.lr, recipe.student.training.epochs) == (0.01, 240)
    assert recipe.method().anchors == 4
