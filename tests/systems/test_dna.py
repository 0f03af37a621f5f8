import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import limbeck
from carrying import carry_out, noise, same, struck
from limbeck import recipes
from limbeck.catalogue import system
from limbeck.data.data import ResidentImages, Split
from limbeck.errors import UserError
from limbeck.losses import relative_l1, similarity_divergence
from limbeck.models import Input, build, load, profile
from limbeck.models.resnet_cifar import SmallResNet
from limbeck.systems.search.dna import (
    DNA,
    PUBLISHED,
    Candidate,
    DNANet,
    InvertedResidual,
    Operation,
    Plan,
    Space,
    Supernet,
    frontier,
    network,
    rate,
    search,
)
from limbeck.tasks.classification import Classification
from limbeck.training.bench import Bench
from limbeck.training.bench import Candidate as Taught
from limbeck.training.engine import Engine
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Solve, Training
from limbeck.training.progress import Voice

CAREFUL = Engine(device="cpu", checkpoint_seconds=0.0)
GREY = Input(1, (8, 8), (0.5,), (0.25,))
CLASSES = tuple("abc")
GIVEN = "dna-4-4.34-6s2.34.34"
OPERATIONS = (Operation(3, 4), Operation(5, 4), Operation(3, 2))
QUICK = Training(epochs=1, batch_size=16, optimiser="adam", lr=0.01)


def split(number: int = 48, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 3
    centres = torch.randint(40, 216, (3, 1, 8, 8), generator=torch.Generator().manual_seed(9))
    pixels = centres[labels] + torch.randint(-39, 40, (number, 1, 8, 8), generator=generator)
    return Split("train", ResidentImages(pixels.to(torch.uint8)), labels)


def teacher() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = SmallResNet(8, (4, 4, 6, 8), 3, 1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.normal_(module.running_mean, std=0.3)
    return Network(model, GREY, "", CLASSES)


def bench(**other) -> Bench:
    facts = {
        "task": Classification(CLASSES),
        "train": split(),
        "transfer": split(),
        "validation": split(30, 1),
        "test": split(30, 2),
        "candidates": [Taught(teacher())],
        "make_student": lambda seed: build(GIVEN, CLASSES, GREY, seed),
        "training": QUICK,
        "engine": CAREFUL,
        "voice": Voice(quiet=True),
    }
    return Bench(**{**facts, **other})


def method(**other) -> DNA:
    facts = {
        "teacher_layers": ("stage1", "stage2"),
        "kernels": (3, 5),
        "expansions": (4, 2),
        "blocks": QUICK.model_copy(update={"batch_size": 12}),
        "ranked": 3,
    }
    return DNA(**{**facts, **other})


def block(seed: int = 0, depth: int = 2, stem: bool = False) -> Supernet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        before = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)) if stem else None
        return Supernet(3, 4, 5, 2, depth, OPERATIONS, before)


# The losses.


def test_a_rating_is_the_one_worked_out_by_hand():
    teacher, student = torch.tensor([0.0, 2.0, 4.0, 6.0]), torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert F.mse_loss(student, teacher).item() == pytest.approx(0.5)
    assert relative_l1(student, teacher).item() == pytest.approx(0.1936492, abs=1e-6)


def test_a_rating_and_its_gradient_follow_an_independent_formula():
    student, teacher = noise(3, 4, 2, 2).requires_grad_(), noise(3, 4, 2, 2, seed=1)
    found = relative_l1(student, teacher)
    found.backward()
    s, t = student.detach().numpy(), teacher.numpy()
    deviation = np.std(t, ddof=1) + 1e-9
    assert found.item() == pytest.approx(np.abs(s - t).mean() / deviation, rel=1e-12)
    assert np.allclose(student.grad.numpy(), np.sign(s - t) / s.size / deviation, rtol=1e-12)


def test_a_rating_does_not_depend_on_the_scale_and_no_gradient_reaches_the_teacher():
    student, teacher = noise(3, 8), noise(3, 8, seed=1).requires_grad_()
    one, other = relative_l1(student, teacher), relative_l1(70 * student, 70 * teacher)
    assert one.item() == pytest.approx(other.item(), rel=1e-8)
    assert not one.requires_grad
    assert relative_l1(student.half(), student.half()).dtype == torch.float32


def test_the_divergence_of_similarities_follows_an_independent_formula():
    student, teacher = noise(5, 2, 3, 3).requires_grad_(), noise(5, 2, 3, 3, seed=1)
    found = similarity_divergence(student, teacher)
    found.backward()
    assert torch.isfinite(student.grad).all()

    def likeness(features):
        rows = [row / (np.sqrt((row**2).sum()) + 1e-7) for row in features.reshape(5, -1)]
        table = np.array([[(np.dot(a, b) + 1) / 2 for b in rows] for a in rows])
        return table / table.sum(1, keepdims=True)

    s, t = likeness(student.detach().numpy()), likeness(teacher.numpy())
    expected = sum(
        t[a, b] * math.log((t[a, b] + 1e-7) / (s[a, b] + 1e-7)) for a in range(5) for b in range(5)
    )
    assert found.item() == pytest.approx(expected, rel=1e-10)
    assert similarity_divergence(3 * teacher, teacher).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [relative_l1, similarity_divergence])
def test_features_of_other_shapes_are_one_sentence(loss):
    with pytest.raises(UserError, match=r"shape \(2, 3\), the teacher's \(2, 4\)"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4))


# The networks.


@pytest.mark.parametrize(
    ("width", "parameters"),
    [
        (192, (569_520, 587_952, 615_600, 284_976, 294_192, 308_016)),
        (24, (10_710, 13_014, 16_470, 5_382, 6_534, 8_262)),
    ],
)
def test_operations_have_the_parameters_of_the_published_code(width, parameters):
    operations = DNA().operations
    assert [str(o) for o in operations] == ["36", "56", "76", "33", "53", "73"]
    for operation, expected in zip(operations, parameters, strict=True):
        layer = InvertedResidual(width, width, operation)
        assert sum(p.numel() for p in layer.parameters()) == expected


def test_an_operation_adds_what_it_takes_in_where_the_shape_stays():
    x = noise(2, 6, 5, 5, dtype=torch.float32)
    for outputs, stride, shortcut in ((6, 1, True), (6, 2, False), (8, 1, False)):
        layer = InvertedResidual(6, outputs, Operation(5, 3), stride).eval()
        nn.init.zeros_(layer.project[1].weight)
        found = layer(x)
        assert found.shape == (2, outputs, -(-5 // stride), -(-5 // stride))
        assert torch.equal(found, x) if shortcut else not found.any()


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("dna-a", 4.2e6, 348e6),
        ("dna-b", 4.9e6, 394e6),
        ("dna-c", 5.3e6, 466e6),
        ("dna-d", 6.4e6, 611e6),
    ],
)
def test_the_networks_of_the_paper_have_the_published_size(name, parameters, multiply_adds):
    with torch.device("meta"):
        found = profile(Network(network(name, 1000, 3, (224, 224))), (3, 224, 224), latency=False)
    assert round(found.parameters, -5) == parameters
    # What is published counts more than products: 348 M for the 335 M of DNA-a.
    assert found.multiply_adds == pytest.approx(multiply_adds, rel=0.04)
    assert Plan.parse(name).name == PUBLISHED[name]


@pytest.mark.parametrize(
    "name", ["dna-8-8.34", "dna-32s2.16-24s2.53.33-40s2.76-320.36-1280", "dna-4-4.34-6s2.34.34"]
)
def test_a_name_says_all_of_a_network(name):
    plan = Plan.parse(name)
    assert plan.name == name
    found = network(name, 5, 1, (16, 16))
    assert found(torch.zeros(2, 1, 16, 16)).shape == (2, 5)
    assert len(found.stages) == len(plan.stages)


@pytest.mark.parametrize(
    "name",
    ["dna", "dna-e", "dna-8", "dna-8-16", "dna-8-8.44", "dna-8-8.3", "dna-0-8.33", "dna-8-8s3.33"],
)
def test_a_name_that_is_none_is_one_sentence(name):
    with pytest.raises(UserError, match=f"no network named '{name}'.*dna-STEM-STAGE"):
        build(name, CLASSES, GREY)


def test_images_that_are_too_small_are_one_sentence():
    with pytest.raises(UserError, match="at least 32 x 32 pixels, not 8 x 8"):
        build("dna-a", CLASSES, GREY)


# The supernet.


def test_candidates_are_counted_in_their_order():
    net = Supernet(3, 4, 5, 1, 2, DNA().operations)
    assert len(net.paths) == 36
    assert (net.paths[0], net.paths[1], net.paths[-1]) == ((0, 0), (0, 1), (5, 5))


def test_paths_are_drawn_uniformly_by_the_global_generator():
    net = block()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [net.draw() for _ in range(900)]
        torch.manual_seed(0)
        assert [net.draw() for _ in range(9)] == drawn[:9]
    counts = [drawn.count(path) for path in net.paths]
    assert len(counts) == 9
    assert all(60 < n < 140 for n in counts)


def test_widths_lie_between_the_teachers():
    net = Supernet(3, 4, 5, 2, 3, OPERATIONS)
    widths = [[m.project[0].out_channels for m in choices] for choices in net.layers]
    assert widths == [[4] * 3, [4] * 3, [5] * 3]
    assert net(torch.zeros(1, 3, 7, 7), (0, 1, 2)).shape == (1, 5, 4, 4)
    one = Supernet(3, 4, 5, 1, 1, OPERATIONS)
    assert one(torch.zeros(1, 3, 7, 7), (0,)).shape == (1, 5, 7, 7)


def alone(net: Supernet, path, given, seen) -> float:
    """One candidate's rating: its statistics are those of one batch run through it alone."""
    chosen = nn.Sequential(
        copy.deepcopy(net.stem),
        *(copy.deepcopy(c[n]) for c, n in zip(net.layers, path, strict=True)),
    )
    for module in chosen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = 1.0
    chosen.train()(given)
    chosen.eval()
    ratings = [(chosen(x) - y).abs().mean() / (y.std() + 1e-9) for x, y in seen]
    return float(torch.stack(ratings).mean())


@torch.no_grad()
def test_what_candidates_share_is_run_once_and_changes_no_rating():
    net, calls = block(stem=True), {}
    for number, choices in enumerate(net.layers):
        for operation in choices:
            operation.register_forward_hook(
                lambda *_, n=number: calls.update({n: calls.get(n, 0) + 1})
            )
    given = noise(6, 3, 9, 9, dtype=torch.float32)
    seen = [
        (noise(4, 3, 9, 9, seed=n, dtype=torch.float32), noise(4, 5, 4, 4, seed=n).float())
        for n in (1, 2)
    ]
    found = rate(net, given, seen)
    # Once for the statistics and once a batch: 3 ways to the first layer, 9 to the second.
    assert calls == {0: 3 * 3, 1: 9 * 3}
    expected = [alone(net, path, given, seen) for path in net.paths]
    assert found == pytest.approx(expected, rel=1e-6)
    assert [r for n in range(3) for r in rate(net, given, seen, first=n)] == found


@torch.no_grad()
def test_statistics_left_by_training_do_not_enter_a_rating():
    net, given = block(), noise(6, 3, 9, 9, dtype=torch.float32)
    seen = [(noise(4, 3, 9, 9, seed=1, dtype=torch.float32), noise(4, 5, 5, 5).float())]
    before = rate(net, given, seen)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(5.0)
            assert module.momentum == 0.1
    assert rate(net, given, seen) == before


# The search.


def brute(blocks, budget):
    best = None
    for places in itertools.product(*(range(len(b)) for b in blocks)):
        cell, cost, rating = 0, 0, 0.0
        for candidates, place in zip(blocks, places, strict=True):
            cost += candidates[place].costs[cell]
            rating += candidates[place].rating
            cell = candidates[place].cell
        if cost <= budget and (best is None or rating < best):
            best = rating
    return best


def test_the_choice_within_a_budget_is_the_one_worked_out_by_hand():
    first = [Candidate(0.1, (5,)), Candidate(0.3, (2,))]
    second = [Candidate(0.2, (4,)), Candidate(0.05, (6,))]
    found = search([first, second], 7)
    assert (found.places, found.cost) == ((1, 0), 6)
    assert found.rating == pytest.approx(0.5)
    assert search([first, second], 8).rating == pytest.approx(0.35)
    assert search([first, second], 11).rating == pytest.approx(0.15)
    assert search([first, second], 5) is None
    assert search([first, second], 6) is not None, "a budget may be used up"


@pytest.mark.parametrize("cells", [1, 2])
def test_the_choice_is_that_of_trying_all(cells):
    generator = np.random.default_rng(cells)
    answers = set()
    for _ in range(100):
        blocks = [
            [
                Candidate(
                    float(generator.random()),
                    tuple(map(float, generator.integers(1, 40, cells if n else 1))),
                    int(generator.integers(cells)),
                )
                for _ in range(9)
            ]
            for n in range(3)
        ]
        for budget in generator.integers(3, 90, 2):
            found, expected = search(blocks, budget), brute(blocks, budget)
            assert (found is None) == (expected is None)
            answers.add(expected is None)
            if found is not None:
                assert found.cost <= budget
                assert found.rating == pytest.approx(expected)
    assert answers == {True, False}


def test_the_frontier_rises_in_cost_and_falls_in_rating():
    generator = np.random.default_rng(5)
    blocks = [
        [Candidate(float(a), (float(b),)) for a, b in generator.random((20, 2))] for _ in range(4)
    ]
    points = [(c.cost, c.rating) for c in frontier(blocks)]
    assert points == sorted(points)
    ratings = [rating for _, rating in points]
    assert ratings == sorted(ratings, reverse=True)
    assert len(points) > 5


# The space.


def space(cost="multiply_adds", cells=(), plan=GIVEN, view=(1, 8, 8)) -> Space:
    return Space(Plan.parse(plan), cells, OPERATIONS, view, 3, cost)


@pytest.mark.parametrize("cost", ["multiply_adds", "parameters"])
def test_the_sum_of_costs_is_what_the_whole_network_costs(cost):
    cells = (((8, 2),), ((4, 1), (10, 3)))
    laid = space(cost, cells, "dna-4s2.3-4.34-6s2.34.34-16", (1, 9, 8))
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        places = laid.draw(generator)
        plan = laid.plan_of(places)
        whole = profile(Network(DNANet(plan, 3, 1)), (1, 9, 8), latency=False)
        assert laid.cost_of(places) == getattr(whole, cost) == laid.cost_of_plan(plan)
        assert laid.places_of(plan) == places
    costs = {laid.cost_of(p) for p in itertools.product(*(range(len(c)) for c in laid.candidates))}
    assert laid.cheapest == min(costs)
    assert laid.number == math.prod([3 + 9, 9 + 3 + 27])


def test_cells_compete_and_their_widths_are_those_of_the_network():
    laid = space(cells=((), ((10, 1),)))
    ratings = [[1.0] * 3, [1.0] * 9 + [0.1, 0.2, 0.3]]
    choice = search(laid.blocks(ratings), 1e12)
    assert laid.plan_of(choice.places[:-1]).stages[1].width == 10
    assert choice.cost == laid.cost_of(choice.places[:-1])


def test_a_network_near_a_cost_is_within_a_twentieth_of_it():
    laid = space(plan="dna-8-8.34.34-16s2.34.34.34")
    costs = [laid.cost_of(laid.draw(torch.Generator().manual_seed(n))) for n in range(5)]
    for number, cost in enumerate(costs):
        near = laid.draw_near(cost, torch.Generator().manual_seed(100 + number))
        assert abs(laid.cost_of(near) - cost) <= 0.05 * cost


def test_the_space_of_the_paper_has_the_published_size():
    recipe = recipes.validate(recipes.preset(system("dna"), "paper", "folder"))
    dna = recipe.method()
    plan = Plan.parse(recipe.student.model)
    laid = Space(plan, dna.cells, dna.operations, (3, 224, 224), 1000, dna.cost)
    assert laid.number == 609_359_740_010_496
    assert [s.width for s in plan.stages] == [24, 40, 80, 112, 192, 320]
    assert [s.stride for s in plan.stages] == [2, 2, 2, 1, 2, 1]
    assert laid.cheapest < dna.budget < laid.cost_of(tuple(0 for _ in laid.candidates))
    generator = np.random.default_rng(0)
    ratings = [generator.random(len(c)).tolist() for c in laid.candidates]
    choice = search(laid.blocks(ratings), dna.budget)
    assert 0.9 * dna.budget < choice.cost <= dna.budget


def test_the_teacher_of_the_paper_puts_out_what_the_blocks_do():
    import torchvision

    recipe = recipes.validate(recipes.preset(system("dna"), "paper", "folder"))
    dna = recipe.method()
    assert recipe.teachers[0].model == "torchvision:efficientnet_b7@pretrained"
    with torch.device("meta"):
        model = torchvision.models.efficientnet_b7()
    assert sum(p.numel() for p in model.parameters()) == 66_347_960
    from limbeck.training.taps import Taps

    _, features = Taps(model.eval(), dna.layers)(torch.zeros(1, 3, 224, 224, device="meta"))
    shapes = [tuple(f.shape[1:]) for f in features.values()]
    assert [c for c, _, _ in shapes] == [48, 80, 160, 224, 384, 640]
    assert [h for _, h, _ in shapes] == [56, 28, 14, 14, 7, 7]


# The method.


def test_a_step_changes_the_path_drawn_and_nothing_else(tmp_path):
    states = {}

    def look(phase):
        if isinstance(phase, Fit) and phase.name == "block-2":
            module = phase.modules()["block"]
            (update,) = phase.updates
            states["before"] = copy.deepcopy(module.state_dict())
            states["block"], states["terms"], drawn = module, update.terms, []
            draw = module.draw
            module.draw = lambda: drawn.append(draw()) or drawn[-1]
            states["drawn"] = drawn

    one = Training(epochs=1, batch_size=48, optimiser="adam", lr=0.01)
    laid = bench()
    weights = copy.deepcopy(laid.candidates[0].network.state_dict())
    carry_out(tmp_path / "run", method(blocks=one, ranked=0), laid, look)
    audited, (first, second) = states["drawn"][0], states["drawn"][1]
    assert audited == (first, second), "the audit sees the path of the first step"
    changed = {
        ".".join(name.split(".")[:3])
        for name, value in states["block"].state_dict().items()
        if not torch.equal(value, states["before"][name])
    }
    assert changed == {f"layers.0.{first}", f"layers.1.{second}"}
    assert same(laid.candidates[0].network, _with(laid.candidates[0].network, weights))


def _with(network, weights):
    other = copy.deepcopy(network)
    other.load_state_dict(weights)
    return other


def test_a_block_is_given_what_the_teachers_block_takes_in(tmp_path):
    laid, dna = bench(), method()
    given, taught = laid.make_student(0), laid.candidates[0].network
    batch = laid.sample()
    model = copy.deepcopy(taught.model).eval()
    first = model.stage1(model.stem(taught.input(batch["image"])))
    x, y = dna._look(laid, given, dna._teacher(laid, given, taught), 0)(batch)
    assert torch.equal(x, GREY(batch["image"]))
    assert torch.allclose(y, first, atol=1e-5)
    x, y = dna._look(laid, given, dna._teacher(laid, given, taught), 1)(batch)
    assert torch.allclose(x, first, atol=1e-5)
    assert torch.allclose(y, model.stage2(first), atol=1e-5)
    assert not y.requires_grad


def test_the_teacher_may_use_the_statistics_of_a_batch():
    laid = bench()
    given, taught = laid.make_student(0), laid.candidates[0].network
    batch = laid.sample()
    dna = method(teacher_bn="batch")
    before = copy.deepcopy(taught.state_dict())
    _, found = dna._look(laid, given, dna._teacher(laid, given, taught), 0)(batch)
    model = copy.deepcopy(taught.model).train()
    assert torch.allclose(found, model.stage1(model.stem(taught.input(batch["image"]))), atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in taught.state_dict().items())


def test_the_teacher_sees_images_as_large_as_the_student_does():
    laid = bench()
    given, taught = laid.make_student(0), laid.candidates[0].network
    taught.input = Input(1, (16, 16), (0.4,), (0.3,))
    own = method()._teacher(laid, given, taught).networks[0]
    assert own.input == Input(1, (8, 8), (0.4,), (0.3,))
    assert own.model is taught.model
    assert taught.input.size == (16, 16)


def test_phases_follow_each_other_and_all_networks_have_the_same_budget(tmp_path):
    phases = []
    laid, dna = bench(), method()
    carry_out(tmp_path / "run", dna, laid, phases.append)
    assert [p.name for p in phases] == [
        "baseline",
        *("untrained-1", "block-1", "rate-1", "untrained-2", "block-2", "rate-2"),
        *("search", "random", "ranked-1", "ranked-2", "ranked-3", "student"),
    ]
    (ratings,) = dna.ratings.values()
    assert [len(r) for r in ratings] == [4, 16]
    assert {len({*r}) for r in ratings} == {4, 16}
    found = dna.found[0]
    laid_space = dna._space(laid, laid.make_student(0))
    costs = {role: laid_space.cost_of(found[role]) for role in ("found", "random")}
    assert costs["found"] <= dna._budget(laid_space)
    assert costs["random"] == pytest.approx(costs["found"], rel=0.2)
    sums = [sum(r[p] for r, p in zip(ratings, places, strict=True)) for places in found["ranked"]]
    assert sums == sorted(sums)
    assert laid.students[0].name == laid_space.plan_of(found["found"]).name
    assert laid.further["random"][0].name == laid_space.plan_of(found["random"]).name


def test_each_seed_has_a_search_of_its_own_and_networks_are_ranked_once(tmp_path):
    laid, dna, phases = bench(seeds=(0, 1)), method(), []
    carry_out(tmp_path / "run", dna, laid, phases.append)
    assert dna.ratings[0] != dna.ratings[1]
    assert [p.name for p in phases if p.name.startswith("ranked")] == [
        f"ranked-{n}@0" for n in (1, 2, 3)
    ]
    assert len(dna.rivals) == 3
    assert set(laid.students) == set(laid.further["random"]) == {0, 1}


def test_cells_are_trained_and_rated_each_by_itself(tmp_path):
    laid, dna, phases = bench(), method(cells=((), ((4, 1),)), ranked=0), []
    carry_out(tmp_path / "run", dna, laid, phases.append)
    names = [p.name for p in phases if "block" in p.name or "rate" in p.name]
    assert names == ["block-1", "rate-1", "block-2-1", "rate-2-1", "block-2-2", "rate-2-2"]
    assert [len(r) for r in dna.ratings[0]] == [4, 16 + 4]


PHASES = ("block-2", "random", "ranked-2", "student")
SOLVES = ("untrained-1", "rate-2", "search")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    laid, dna = bench(), method()
    carry_out(tmp_path_factory.mktemp("whole") / "run", dna, laid)
    return laid, dna


@pytest.mark.parametrize("poisoned", PHASES + SOLVES)
def test_a_run_goes_on_to_the_same_bits_wherever_it_failed(tmp_path, poisoned, whole):
    def look(phase):
        if phase.name != poisoned:
            return
        if isinstance(phase, Solve):
            phase.run = _failing_solve(phase.run)
        else:
            # The audit's call and a step before it.
            phase.updates[0].terms = struck(phase.updates[0].terms, 3)

    with pytest.raises(RuntimeError, match="power"):
        carry_out(tmp_path / "run", method(), bench(), look)
    laid, dna = bench(), method()
    carry_out(tmp_path / "run", dna, laid)
    unbroken, before = whole
    assert laid.students[0].name == unbroken.students[0].name
    assert same(laid.students[0], unbroken.students[0])
    assert (dna.ratings, dna.untrained) == (before.ratings, before.untrained)


def _failing_solve(run):
    """Fails behind the second piece of work, or behind all of it."""

    class Watched:
        def __init__(self, journal):
            self.journal, self.pieces = journal, 0

        def remember(self, name, work):
            found = self.journal.remember(name, work)
            self.pieces += 1
            if self.pieces == 2:
                raise RuntimeError("as if the power had gone")
            return found

    def failing(journal):
        run(Watched(journal))
        raise RuntimeError("as if the power had gone")

    return failing


def test_what_was_rated_already_is_not_rated_again(tmp_path, monkeypatch):
    from limbeck.systems.search import dna as module

    rated = []

    def counting(net, given, seen, first):
        rated.append(first)
        return rate(net, given, seen, first)

    monkeypatch.setattr(module, "rate", counting)

    def look(phase):
        if phase.name == "rate-1":
            phase.run = _failing_solve(phase.run)

    with pytest.raises(RuntimeError, match="power"):
        carry_out(tmp_path / "run", method(ranked=0), bench(), look)
    assert rated == [0, 1]
    carry_out(tmp_path / "run", method(ranked=0), bench())
    assert rated == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"kernels": (4,)}, "kernels"),
        ({"kernels": ()}, "kernels"),
        ({"expansions": (0,)}, "expansions"),
        ({"budget": 0}, "budget"),
        ({"cost": "latency"}, "cost"),
        ({"loss": "l1"}, "loss"),
        ({"teacher_layers": ()}, "teacher_layers"),
        ({"ranked": 2}, "ranked"),
        ({"blocs": QUICK}, "no parameter 'blocs'; did you mean blocks"),
    ],
)
def test_wrong_hyper_parameters_are_one_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        DNA(**given)


@pytest.mark.parametrize(
    ("laid", "given", "sentence"),
    [
        ({"candidates": []}, {}, "one teacher, not 0"),
        ({"candidates": [Taught(teacher())] * 2}, {}, "one teacher, not 2"),
        ({"validation": []}, {}, "rated on validation data"),
        (
            {"make_student": lambda seed: build("resnet8", CLASSES, GREY, seed)},
            {},
            "resnet8 is no network of the space.*begins with dna-",
        ),
        ({}, {"teacher_layers": ("stage1",)}, "teacher_layers has 1 entries.*has 2 stages"),
        ({}, {"rates": (0.1,)}, "rates has 1 entries"),
        ({}, {"cells": ((), (), ())}, "cells has 3 entries"),
        ({}, {"teacher_layers": ("stage1", "stage9")}, "no module 'stage9' to tap"),
        ({}, {"teacher_layers": ("stage1", "fc")}, "feature maps"),
        (
            {},
            {"teacher_layers": ("stage1", "stage3")},
            "stage 2 of the student dna-4-4.34-6s2.34.34 would put out maps of 4 x 4, but the "
            "teacher's 'stage3' are 2 x 2",
        ),
        ({}, {"budget": 900}, "no network of the space costs 900 multiply-adds or less"),
    ],
)
def test_what_does_not_fit_is_found_in_the_rehearsal(laid, given, sentence):
    with pytest.raises(UserError, match=sentence):
        method(**given).rehearse(bench(**laid))


def test_a_rehearsal_changes_nothing():
    laid = bench()
    before, state = copy.deepcopy(laid.candidates[0].network), torch.get_rng_state()
    method().rehearse(laid)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(laid.candidates[0].network, before)
    assert laid.candidates[0].network.training == before.training


@pytest.mark.parametrize(
    ("loss", "formula"),
    [("mse", lambda s, t: (s - t).square().mean()), ("similarities", similarity_divergence)],
)
def test_a_block_learns_by_its_loss_on_the_path_drawn(tmp_path, loss, formula):
    found = {}

    def look(phase):
        if phase.name == "block-2":
            net, batch = phase.modules()["block"], laid.sample()
            torch.manual_seed(5)
            found["term"] = phase.updates[0].terms(batch)["features"].item()
            torch.manual_seed(5)
            model = copy.deepcopy(laid.candidates[0].network.model).eval()
            first = model.stage1(model.stem(GREY(batch["image"])))
            found["expected"] = formula(net(first, net.draw()), model.stage2(first)).item()

    laid = bench()
    carry_out(tmp_path / "run", method(loss=loss, ranked=0), laid, look)
    assert found["term"] == pytest.approx(found["expected"], rel=1e-4)


def test_a_method_with_phases_is_not_added_to_another():
    with pytest.raises(UserError, match="DNA has phases of its own"):
        DNA() + limbeck.KD()


def test_the_smoke_run_delivers_a_network_that_is_built_by_its_name(tmp_path, command):
    run = tmp_path / "run"
    status, _, wrong = command("run", "dna", "--preset", "smoke", "--out", run)
    assert (status, wrong) == (0, "")
    for role in ("student", "random", "baseline"):
        stored = load(run / role)
        assert Plan.parse(stored.name) == stored.model.plan
    facts = json.loads((run / "findings.json").read_text())["findings"]
    assert [f["title"] for f in facts] == ["Networks", "Search", "Blocks"]
    lines = facts[1]["charts"][0]["lines"]
    ((cost, rating),) = lines["student"]
    below = [r for c, r in lines["best within a budget"] if c <= cost]
    assert rating == pytest.approx(min(below))
    assert all(
        min((r for c, r in lines["best within a budget"] if c <= x), default=9) <= y + 1e-9
        for x, y in lines["any network"]
    )
    report = (run / "report.html").read_text()
    assert "Rating and cost" in report
    assert load(run / "student").name in report


def test_the_report_says_how_well_ratings_rank(whole):
    from scipy.stats import kendalltau

    laid, dna = whole
    shown = dna.findings(laid, [])
    assert [f.title for f in shown] == ["Networks", "Search", "Blocks", "Ranking"]
    table = {row[0]: row[1] for row in shown[-1].table}
    points = shown[-1].charts[0].lines["networks"]
    expected = kendalltau([-x for x, _ in points], [y for _, y in points]).statistic
    assert table["sum of ratings, the lower the better"] == f"{expected:+.3f}"
    assert len(points) == 3


def test_the_papers_setting_is_stated():
    recipe = recipes.validate(recipes.preset(system("dna"), "paper", "folder"))
    dna = recipe.method()
    blocks = dna.training_of_blocks
    assert dna.rates == (0.002, 0.005, 0.005, 0.005, 0.005, 0.002)
    assert (blocks.epochs, blocks.optimiser, blocks.weight_decay) == (20, "adam", 1e-4)
    assert [blocks.factor(e) for e in (0.0, 1.5, 19.0)] == pytest.approx([1, 0.9, 0.9**19])
    training = recipe.student.training
    assert (training.epochs, training.batch_size, training.lr) == (500, 1024, 0.064)
    assert training.factor(8.0) == pytest.approx(0.963**2)
    assert training.factor(498.5) == pytest.approx(0.963**166)
