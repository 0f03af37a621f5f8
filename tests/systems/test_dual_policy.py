"""Dual policy distillation: the paper's equations, and two learners that take turns."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from carrying import noise
from limbeck import distillation, recipes
from limbeck.catalogue import system
from limbeck.errors import UserError
from limbeck.losses import dual_policy, peer_weights
from limbeck.models import build, load
from limbeck.models.policy import Observations
from limbeck.systems.reinforcement.dual_policy import (
    DualPolicy,
    choice_distance,
    hybrid_policy,
    squared_distance,
)
from limbeck.tasks.control import Control
from limbeck.training.phases import Training
from limbeck.training.progress import Voice
from limbeck.training.run import Run
from limbeck.training.seeding import seed_all

pytest.importorskip("stable_baselines3")

from limbeck.systems.reinforcement.dual_policy import learners as parts

# The losses.


def test_weights_have_the_values_worked_out_by_hand():
    found = peer_weights(torch.tensor([1.0, 0.0, -2.0, 20.0], dtype=torch.float64), 0.5)
    assert found.tolist() == pytest.approx([0.0160046, 0.0097073, 0.0035711, 0.9707170], abs=1e-6)


def test_weights_neither_vanish_nor_explode():
    found = peer_weights(torch.tensor([-1e6, 1e6]), 1.0)
    assert found.tolist() == pytest.approx([0.01 / 100.01, 100 / 100.01])


@pytest.mark.parametrize("advantage", [torch.tensor([3.0, -1.0]), torch.tensor([2.0, 2.0])])
def test_without_trust_or_differences_all_states_count_alike(advantage):
    alpha = 0.0 if advantage[0] != advantage[1] else 0.7
    own, peer = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    assert peer_weights(advantage, alpha).tolist() == [0.5, 0.5]
    # ((1 + 4) / 2 + (9 + 1) / 2) / 2
    assert dual_policy(own, peer, advantage, alpha).item() == pytest.approx(3.75)


def test_weights_of_a_quarter_and_three():
    advantage = torch.tensor([0.0, math.log(3.0)])
    own, peer = torch.zeros(2, 1), torch.tensor([[1.0], [math.sqrt(3.0)]])
    assert dual_policy(own, peer, advantage).item() == pytest.approx(0.25 * 1 + 0.75 * 3)
    swapped = dual_policy(own, peer, advantage, weights="reversed")
    assert swapped.item() == pytest.approx(0.75 * 1 + 0.25 * 3)
    assert dual_policy(own, peer, advantage, weights="equal").item() == pytest.approx(2.0)
    assert dual_policy(own, peer, advantage, weights="hard").item() == pytest.approx(1.5)


@pytest.mark.parametrize("choosing", [False, True])
def test_value_and_gradient_follow_an_independent_formula(choosing):
    own, peer, xi = noise(6, 3, seed=0).requires_grad_(), noise(6, 3, seed=1), noise(6, seed=2)
    alpha = 0.75
    distance = choice_distance if choosing else squared_distance
    loss = dual_policy(own, peer, 8 * xi, alpha, distance=distance)
    loss.backward()
    weights = [min(max(math.exp(alpha * 8 * x), 0.01), 100.0) for x in xi.tolist()]
    total, gradient = 0.0, torch.zeros(6, 3, dtype=torch.float64)
    for i, weight in enumerate(w / sum(weights) for w in weights):
        a, b = own[i].tolist(), peer[i].tolist()
        p = [math.exp(v) / sum(map(math.exp, a)) for v in a]
        q = [math.exp(v) / sum(map(math.exp, b)) for v in b]
        for j in range(3):
            if choosing:
                total += weight * q[j] * math.log(q[j] / p[j])
                gradient[i, j] = weight * (p[j] - q[j])
            else:
                total += weight * (a[j] - b[j]) ** 2 / 3
                gradient[i, j] = weight * 2 * (a[j] - b[j]) / 3
    assert loss.item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(own.grad, gradient, rtol=1e-10, atol=1e-14)


def test_no_gradient_flows_into_the_peer_or_the_values():
    own, peer, xi = (noise(4, 2, seed=s).requires_grad_() for s in range(3))
    dual_policy(own, peer, xi[:, 0]).backward()
    assert own.grad.abs().sum() > 0
    assert peer.grad is None
    assert xi.grad is None


def test_learners_that_do_the_same_have_nothing_to_learn():
    same = noise(5, 2)
    assert dual_policy(same, same, noise(5, seed=1)).item() == 0
    assert choice_distance(same, same).abs().max() < 1e-15


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        (((4, 2), (4, 1), (4,)), r"the learner's actions have the shape \(4, 2\), the peer's"),
        (((4,), (4,), (4,)), r"both must be \(B, actions\)"),
        (((4, 2), (4, 2), (4, 1)), "each state would count for all"),
    ],
)
def test_shapes_that_would_broadcast_are_one_sentence(shapes, sentence):
    with pytest.raises(UserError, match=sentence):
        dual_policy(*(torch.zeros(shape) for shape in shapes))
    with pytest.raises(UserError, match="must be"):
        peer_weights(torch.zeros(4, 1))


# The theory, in two states: in each one can stay or go to the other, as it will.

REWARDS = torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
TO = torch.tensor([[0, 1], [0, 1]])


def values(policy: torch.Tensor) -> torch.Tensor:
    """V of a policy (states, actions), from the Bellman equation as a linear system."""
    steps = torch.zeros(2, 2, dtype=torch.float64)
    for state in range(2):
        for action in range(2):
            steps[state, TO[state, action]] += policy[state, action]
    earned = (policy * REWARDS).sum(1)
    return torch.linalg.solve(torch.eye(2, dtype=torch.float64) - 0.9 * steps, earned)


def test_the_hybrid_policy_is_as_good_as_both_in_every_state():
    for seed in range(50):
        own, peer = (noise(2, 2, seed=2 * seed + i).mul(2).softmax(1) for i in range(2))
        hybrid = hybrid_policy(own, peer, values(peer) - values(own))
        best = torch.maximum(values(own), values(peer))
        assert (values(hybrid) >= best - 1e-12).all()


def test_the_hard_objective_leads_to_the_hybrid_policy():
    own = torch.tensor([[2.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    peer = torch.tensor([[-1.0, 1.0], [-1.0, 2.0]], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0], dtype=torch.float64)
    wanted = hybrid_policy(own.softmax(1), peer.softmax(1), advantage)
    learns = own.clone().requires_grad_()
    for _ in range(400):
        loss = dual_policy(learns, peer, advantage, weights="hard", distance=choice_distance)
        (step,) = torch.autograd.grad(loss, learns)
        learns = (learns - 2.0 * step).detach().requires_grad_()
    torch.testing.assert_close(learns.softmax(1), wanted, rtol=0, atol=1e-6)
    assert torch.equal(learns[1], own[1])


# The learners.


def pair(algorithm="ddpg", source="Pendulum-v1", **given):
    """Two learners with some experience."""
    task = Control(source)
    settings = {"states": 8, "rollout": 20, "cycles": 2, "updates": 2, "memory": 200}
    method = DualPolicy(algorithm=algorithm, **settings | given)
    training = Training(batch_size=10, optimiser="adam", lr=0.001, schedule="constant")
    name = "mlp-8-8-norm" if algorithm == "ddpg" else "mlp-8-8"
    seed_all(0)
    found = []
    for seed in range(2):
        policy = build(name, task.outputs, task.input, seed).model
        kind = parts.LEARNERS[algorithm]
        found.append(kind(method, training, policy, source, torch.device("cpu")))
        found[-1].begin(seed)
        found[-1].cycle()
    return found


def step(learner, peer, seen):
    """The loss of one step of distillation, and what changed by it."""
    before = [
        {k: v.clone() for k, v in one.engine.policy.state_dict().items()} for one in (learner, peer)
    ]
    loss = learner._distil(peer, seen).item()
    changed = [
        {k for k, v in one.engine.policy.state_dict().items() if not torch.equal(v, old[k])}
        for one, old in zip((learner, peer), before, strict=True)
    ]
    return loss, *changed


SEEN = noise(8, 3, seed=5, dtype=torch.float32)


def test_a_step_of_ddpg_imitates_what_the_peer_does_now_and_trains_the_actor_alone():
    one, other = pair(alpha=0.3)
    with torch.no_grad():
        own, theirs = one.engine.actor(SEEN), other.engine.actor(SEEN)
        q = [
            x.engine.critic(SEEN, theirs)[0].flatten().double() for x in (one, other)
        ]  # both of the peer's action
        w = (0.3 * (q[1] - q[0])).exp().clamp(0.01, 100)
        expected = (w / w.sum() * (own - theirs).double().square().mean(1)).sum().item()
    loss, changed, touched = step(one, other, SEEN)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert touched == set()
    assert changed
    assert all(name.startswith("actor.mu") for name in changed)


def test_the_released_ddpg_sums_the_errors_whatever_the_values():
    one, other = pair(as_released=True)
    errors = (one.engine.actor(SEEN) - other.engine.actor(SEEN)).square().mean(1)
    loss, _, _ = step(one, other, SEEN)
    assert loss == pytest.approx(errors.sum().item(), rel=1e-5)


@pytest.mark.parametrize(("released", "sign"), [(False, 1.0), (True, -1.0)])
def test_a_step_of_ppo_imitates_a_sample_and_weighs_by_values_on_one_scale(released, sign):
    one, other = pair("ppo", alpha=0.5, as_released=released)
    one.scaled.ret_rms.var, other.scaled.ret_rms.var = torch.tensor([4.0, 9.0]).double().numpy()
    torch.manual_seed(7)
    with torch.no_grad():
        theirs = other.engine.policy.get_distribution(SEEN).sample()
        own = one.engine.policy.get_distribution(SEEN).distribution.mean
        v = [x.engine.policy.predict_values(SEEN).flatten().double() for x in (one, other)]
        w = (sign * 0.5 * (3 * v[1] - 2 * v[0]) / 2).exp().clamp(0.01, 100)
        expected = (w / w.sum() * (own - theirs).double().square().mean(1)).sum().item()
    torch.manual_seed(7)
    loss, changed, touched = step(one, other, SEEN)
    assert loss == pytest.approx(expected / (8 if released else 1), rel=1e-4)
    assert touched == set()
    assert {name.split(".")[0] for name in changed} == {"mlp_extractor", "action_net"}
    assert not any("value_net" in name or "log_std" in name for name in changed)


def test_where_one_of_several_is_chosen_the_peers_distribution_is_imitated():
    one, other = pair("ppo", "CartPole-v1", alpha=0.0)
    seen = noise(8, 4, seed=5, dtype=torch.float32)
    with torch.no_grad():
        for each in (one, other):
            each.policy.head.weight *= 100
        p, q = (x.policy(seen) for x in (one, other))
        expected = F.kl_div(p.log_softmax(1), q.softmax(1), reduction="batchmean").item()
    loss, _, touched = step(one, other, seen)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert touched == set()


def test_nobody_imitates_before_the_peer_has_seen_as_many_states_as_a_batch():
    one, other = pair(states=21)
    one.peer = other
    one.after_update()
    assert one.imitated == 0
    other.cycle()
    one.after_update()
    assert one.imitated == 1


def test_states_come_from_the_peers_memory(monkeypatch):
    one, other = pair(states=6)
    one.peer, heard = other, []
    other.memory().observations[:20] = 7.0
    monkeypatch.setattr(one, "_distil", lambda peer, seen: heard.append(seen) or torch.zeros(()))
    one.after_update()
    assert heard[0].shape == (6, 3)
    assert (heard[0] == 7.0).all()


@pytest.mark.parametrize("algorithm", ["ddpg", "ppo"])
def test_a_learner_that_became_nan_is_one_sentence(algorithm):
    one, _ = pair(algorithm)
    with torch.no_grad():
        one.policy.head.weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"became NaN or infinite .* lower student\.training\.lr"):
        one.cycle()


def test_distillation_follows_every_so_many_updates():
    one, other = pair(every=2, updates=4)
    one.peer, one.updates = other, 0
    one.cycle()
    assert (one.updates, one.imitated) == (4, 2)


@pytest.mark.parametrize("algorithm", ["ddpg", "ppo"])
def test_the_policy_that_is_measured_is_the_one_that_is_trained(algorithm):
    one, _ = pair(algorithm)
    before = one.policy(SEEN)
    one.cycle()
    after = one.policy(SEEN)
    assert not torch.equal(before, after)
    done, _ = one.engine.predict(SEEN.numpy(), deterministic=True)
    expected = after.detach().clamp(-2, 2)
    torch.testing.assert_close(torch.from_numpy(done), expected, rtol=1e-4, atol=1e-5)


def test_a_learner_is_put_back_to_the_same_bits_also_around_the_end_of_its_memory():
    ways = []
    for stop in (False, True):
        (one, _), (fresh, _) = pair(memory=50), pair(memory=50)
        for epoch in range(4):
            seed_all(epoch)
            one.begin(epoch)
            row = one.memory().pos
            one.cycle()
            state = one.state(row)
            if stop:
                fresh.put_back(state)
                one, fresh = fresh, one
        ways.append(one)
    ours, theirs = (way.engine.policy.state_dict() for way in ways)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ways[0].memory().full
    for name in parts.DDPGLearner.columns:
        first, second = (getattr(way.memory(), name) for way in ways)
        assert (first == second).all()


def test_the_critic_has_the_published_parameters_for_17_numbers_and_6_actions():
    critic = parts.LateActions(17, 6, (64, 64))
    assert sum(p.numel() for p in critic.parameters()) == 6017
    decayed, others = parts._kernels(critic, 0.01)
    assert sum(p.numel() for p in decayed["params"]) == 17 * 64 + 70 * 64
    assert "weight_decay" not in others


# Runs.

SMALL = {
    "system": "dual-policy",
    "task": "control",
    "data": {"source": "Pendulum-v1", "episodes": 2},
    "student": {
        "model": "mlp-8-8-norm",
        "training": {
            "epochs": 3,
            "batch_size": 10,
            "optimiser": "adam",
            "lr": 0.001,
            "schedule": "constant",
        },
    },
    "methods": {
        "dual-policy": {"states": 16, "rollout": 20, "cycles": 2, "updates": 3, "memory": 100}
    },
    "engine": {"device": "cpu", "threads": 1},
}
PPO = {"student": {"model": "mlp-8-8"}, "methods": {"dual-policy": {"algorithm": "ppo"}}}


def run(path, **change):
    recipe = recipes.validate(recipes.merged(SMALL, change))
    return distillation.start(recipe, path, Voice(quiet=True))


@pytest.mark.parametrize("change", [{}, PPO], ids=["ddpg", "ppo"])
def test_a_run_that_is_stopped_in_any_phase_ends_with_the_same_bits(tmp_path, monkeypatch, change):
    change = recipes.merged(change, {"methods": {"dual-policy": {"rivals": ["single"]}}})
    whole, calls, kind = run(tmp_path / "whole", **change), [], parts.Learner
    cycle = kind.cycle

    def failing(self):
        calls.append(1)
        # 12 cycles of the pair apart, 12 of the distilled one, 12 of the one alone.
        if len(calls) in (7, 22, 39):
            raise RuntimeError("the power went")
        cycle(self)

    monkeypatch.setattr(kind, "cycle", failing)
    with pytest.raises(RuntimeError, match="the power went"):
        run(tmp_path / "cut", **change)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the power went"):
            distillation.resume(tmp_path / "cut", Voice(quiet=True))
    distillation.resume(tmp_path / "cut", Voice(quiet=True))
    for role in ("baseline", "student", "peer", "single"):
        ours, theirs = (load(tmp_path / p / role).state_dict() for p in ("cut", "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert Run.open(tmp_path / "cut").result()["seeds"] == whole.result()["seeds"]
    read = [json.loads((tmp_path / p / "findings.json").read_text()) for p in ("cut", "whole")]
    assert read[0] == read[1]
    # One learner alone has all the steps of a pair.
    assert [row[1] for row in read[0]["findings"][0]["table"][1:]] == ["240"] * 3
    assert not list((tmp_path / "cut" / "phases").glob("*.journal"))


def test_the_report_has_the_course_with_its_interval_and_an_episode(tmp_path):
    change = {"seeds": 2, "methods": {"dual-policy": {"threshold": -1.0, "rivals": ["reversed"]}}}
    done = run(tmp_path / "run", **change)
    found = done.findings()[0]
    course, distilled = found["charts"]
    assert list(course["lines"]) == ["baseline", "student", "with weights reversed"]
    assert [x for x, _ in course["lines"]["student"]] == [80, 160, 240]
    assert len(course["bands"]["student"]) == 3
    assert distilled["lines"]["student"][-1][1] > 0
    assert found["table"][0][-1] == "steps to reach -1"
    assert [row[-1] for row in found["table"][1:]] == ["none of 2 seeds"] * 3
    assert "±" in found["table"][1][3]
    page = (done.path / "report.html").read_text()
    assert "An episode" in page
    assert "two learners apart" in page
    result = done.result()
    assert result["metric"] == {"name": "return", "higher_is_better": True}
    assert distillation.measure(f"run:{done.path}", "Pendulum-v1")["length"] == 200
    assert all({"baseline", "student", "peer", "reversed"} <= set(s) for s in result["seeds"])


def test_the_pairs_begin_with_the_same_weights_and_the_two_of_a_pair_with_others(tmp_path):
    none = {"student": {"training": {"epochs": 0}}}
    done = run(tmp_path / "run", **none)
    student, peer, baseline = (load(done.path / r) for r in ("student", "peer", "baseline"))
    first, other, apart = (n.model.hidden.fc1.weight for n in (student, peer, baseline))
    assert torch.equal(first, apart)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"student": {"model": "mlp-8-8"}}, r"set student\.model=mlp-64-64-norm"),
        ({"methods": {"dual-policy": {"algorithm": "ppo"}}}, r"set student\.model=mlp-64-64$"),
        (
            {"data": {"source": "CartPole-v1"}, "student": {"model": "mlp-8-8"}},
            r"in CartPole-v1 one of 2 is chosen; set method\.algorithm=ppo",
        ),
        ({"data": {"source": "CartPole-v1"}}, "an environment that has such"),
        ({"data": {"source": "CartPool-v1"}}, "did you mean CartPole-v1"),
        ({"data": {"validation": 0}}, r"set data\.validation above 0"),
        ({"student": {"training": {"optimiser": "sgd"}}}, "policies learn by Adam"),
        ({"select": "best"}, "set select=last"),
        ({"teacher": {"model": "mlp-8-8-norm"}}, "leave --teacher out"),
        ({"baseline": {"model": "mlp-8-8-norm"}}, "set baseline to true or false"),
        ({"methods": {"dual-policy": {"memory": 40}}}, r"set method\.memory higher"),
        (recipes.merged(PPO, {"methods": {"dual-policy": {"rollout": 25}}}), "does not part into"),
        ({"methods": {"dual-policy": {"gamma": 1.5}}}, "gamma"),
        ({"task": "classification", "data": {"source": "digits"}}, "no key 'data.episodes'"),
    ],
)
def test_what_does_not_fit_is_one_sentence_before_anything_is_written(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        run(tmp_path / "run", **change)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_presets_are_recipes():
    chosen = system("dual-policy")
    for name in chosen.presets:
        for kind in ("Pendulum-v1", "CartPole-v1", "Acrobot-v1"):
            recipes.validate(recipes.preset(chosen, name, kind))


def test_the_paper_preset_has_networks_of_published_size_and_splits_the_published_steps():
    recipe = recipes.validate(recipes.preset(system("dual-policy"), "paper", "HalfCheetah-v5"))
    bounds = (-1.0,) * 6, (1.0,) * 6
    policy = build(recipe.student.model, [str(i) for i in range(6)], Observations(17, *bounds))
    assert sum(p.numel() for p in policy.parameters()) == 5958
    method = recipe.method()
    cycle = method.rollout * method.cycles
    assert 2 * recipe.student.training.epochs * cycle == 5_000_000
    assert (method.alpha, method.states, method.updates) == (0.75, 64, 50)
