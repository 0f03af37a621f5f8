"""Control: environments by id, what policies earn, and every mistake in a sentence."""

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.models import build, load, save
from limbeck.models.policy import Observations, Policy, Standardise
from limbeck.report import control as report
from limbeck.tasks.control import Control, ControlWords, Environments, Episodes, make
from limbeck.training.checkpoint import read_state
from limbeck.training.network import Network
from limbeck.training.progress import Voice
from limbeck.training.run import Run

gymnasium = pytest.importorskip("gymnasium")

LINE = "Line-v0"


class Line(gymnasium.Env):
    """A walk on a line that is drawn: what is earned is the step to the right."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(-10, 10, (1,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None, **spaces):
        self.render_mode = render_mode
        self.__dict__.update(spaces)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-1, 1, 1)
        return self.place, {}

    def step(self, action):
        self.place = self.place + action
        return self.place, float(action[0]), bool(self.place[0] > 3), False, {}

    def render(self):
        return np.full((4, 6, 3), 100 + int(10 * self.place[0]), np.uint8)


@pytest.fixture(autouse=True)
def line():
    """The environment, and those of it that policies are not for."""
    spaces = gymnasium.spaces
    kinds = {
        LINE: {},
        "Picture-v0": {"observation_space": spaces.Box(0, 255, (8, 8, 3), np.uint8)},
        "Keys-v0": {"action_space": spaces.MultiDiscrete([2, 3])},
    }
    for name, changed in kinds.items():
        gymnasium.register(name, Line, max_episode_steps=5, kwargs=changed)
    yield
    for name in kinds:
        del gymnasium.registry[name]


class Always(nn.Module):
    """A policy that does the same whatever it sees."""

    def __init__(self, *answer):
        super().__init__()
        self.answer = nn.Parameter(torch.tensor(answer))

    def forward(self, seen):
        return self.answer.expand(len(seen), -1)


# Environments and mistakes.


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Pendulmu-v1", "no environment 'Pendulmu-v1' in Gymnasium; did you mean Pendulum-v1"),
        ("os:Pendulum-v1", "an id with a colon would import a module"),
        ("HalfCheetah-v5", "HalfCheetah-v5 cannot be made: .*gymnasium\\[mujoco\\]"),
        ("HalfCheetah-v2", "HalfCheetah-v2 cannot be made: .*gymnasium-robotics"),
        ("Picture-v0", "policies see vectors of numbers, as those of Pendulum-v1 are"),
        ("FrozenLake-v1", "policies see vectors of numbers"),
        ("Keys-v0", "Keys-v0 wants actions .*policies choose one of several"),
    ],
)
def test_an_environment_that_is_none_for_policies_is_one_sentence(name, sentence):
    if name == "HalfCheetah-v5" and find_spec("mujoco"):
        pytest.skip("mujoco is installed")
    with pytest.raises(UserError, match=sentence) as caught:
        make(name)
    assert "\n" not in str(caught.value)


def test_without_gymnasium_the_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UserError, match=r"pip install 'limbeck\[rl\]'"):
        make("Pendulum-v1")


def test_a_number_of_samples_means_nothing_where_they_never_run_out():
    words = ControlWords(source=LINE, limit=5)
    with pytest.raises(UserError, match=r"never runs out of samples: leave data\.limit out"):
        Environments(words, device=torch.device("cpu"), workers=0, voice=Voice(quiet=True))


def ground(**words):
    said = ControlWords(**{"source": LINE, "episodes": 3} | words)
    return Environments(said, device=torch.device("cpu"), workers=0, voice=Voice(quiet=True))


def test_splits_begin_elsewhere_and_the_same_in_every_run():
    splits = ground().splits
    seeds = [seed for name in ("train", "validation", "test") for seed in splits[name].seeds]
    assert len(set(seeds)) == 1 + 3 + 3
    assert ground().splits == splits
    assert ground().facts == ground().facts
    assert ground(episodes=4).facts["fingerprint"] != ground().facts["fingerprint"]


# What is measured.


def test_the_return_is_what_is_earned_until_the_end_or_the_limit_of_steps():
    task, episodes = Control(LINE), Episodes(LINE, (0, 1, 2))
    starts = [make(LINE).reset(seed=seed)[0][0] for seed in episodes.seeds]
    # A step of 1 ends beyond 3; a step of 0.25 is cut after five.
    lengths = [next(n for n in range(1, 9) if start + n > 3) for start in starts]
    earned, lasted = task.returns(Network(Always(1.0)), episodes)
    assert earned == lasted == [min(n, 5) for n in lengths]
    found = task.measure(Network(Always(0.25)), episodes)
    assert found == {"return": 1.25, "length": 5.0}


def test_actions_are_brought_within_bounds_or_the_most_probable_is_chosen():
    wide, choosing = Control(LINE), Control("CartPole-v1")
    assert wide.act(torch.tensor([[7.0], [-0.5]])).tolist() == [[1.0], [-0.5]]
    assert choosing.act(torch.tensor([[0.1, 0.2], [3.0, -1.0]])).tolist() == [1, 0]


def test_measuring_many_episodes_at_once_earns_what_one_after_the_other_does():
    task = Control("Pendulum-v1")
    network = build("mlp-8-8", task.outputs, task.input, 0)
    seeds = (3, 4, 5)
    together, _ = task.returns(network, Episodes("Pendulum-v1", seeds))
    alone = [task.returns(network, Episodes("Pendulum-v1", (seed,)))[0][0] for seed in seeds]
    assert together == pytest.approx(alone, rel=1e-4)
    assert network.training


def test_there_are_no_labels():
    task = Control(LINE)
    batch = next(task.batches(Episodes(LINE, (0,)), batch_size=4).epoch(0))
    assert batch["observation"].shape == (4, 1)
    assert not task.labelled(batch)
    with pytest.raises(UserError, match="an environment has no labels to learn from"):
        task.loss(task.run(Network(Always(0.0)), batch), batch)


# Policies.


def test_observations_are_standardised_by_all_that_was_seen():
    seen = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = 4 * seen + torch.tensor([1.0, -20.0, 0.0])
    whole, parts = Standardise(3), Standardise(3)
    whole.look(seen)
    for part in seen.split(7):
        parts.look(part)
    for known in (whole, parts):
        torch.testing.assert_close(known.mean, seen.mean(0))
        torch.testing.assert_close(known.variance, seen.var(0, correction=0))
    expected = ((seen - seen.mean(0)) / seen.std(0, correction=0)).clamp(-5, 5)
    torch.testing.assert_close(parts(seen), expected, rtol=1e-6, atol=1e-6)
    assert whole(torch.full((1, 3), 1e9)).tolist() == [[5.0, 5.0, 5.0]]


def test_a_policy_has_the_published_parameters_for_17_numbers_and_6_actions():
    input = Observations(17, (-1.0,) * 6, (1.0,) * 6)
    policy = Policy(input, 6, (64, 64), norm=True)
    assert sum(p.numel() for p in policy.parameters()) == 5958
    assert policy.head.weight.abs().max() <= 3e-3
    assert policy(torch.randn(9, 17)).abs().max() < 0.1


def test_a_policy_of_the_other_kind_begins_with_orthogonal_weights():
    policy = Policy(Observations(17), 6, (64, 64))
    first, second = policy.hidden.fc1.weight, policy.hidden.fc2.weight
    torch.testing.assert_close(first.T @ first, 2 * torch.eye(17), rtol=0, atol=1e-5)
    torch.testing.assert_close(second @ second.T, 2 * torch.eye(64), rtol=0, atol=1e-5)
    head = policy.head.weight
    torch.testing.assert_close(head @ head.T, 1e-4 * torch.eye(6), rtol=0, atol=1e-8)


def test_bounded_actions_stay_within_bounds():
    policy = Policy(Observations(1, (-1.0, 0.0), (3.0, 8.0)), 2, (4,), norm=True)
    nn.init.constant_(policy.head.bias, 100.0)
    assert policy(torch.zeros(1, 1)).tolist() == [[3.0, 8.0]]
    nn.init.constant_(policy.head.bias, -100.0)
    assert policy(torch.zeros(1, 1)).tolist() == [[-1.0, 0.0]]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet8", "no policy named 'resnet8'; known: mlp-64-64"),
        ("mlp-0", "no policy named 'mlp-0'"),
        ("mlp-64-64-nrom", "did you mean mlp-64-64-norm"),
        ("mlp-64-64@pretrained", "no policy named"),
        ("timm:resnet18", "no model of timm can be fed observations of 4 numbers"),
        ("mlp-8-8-norm", "an environment that has such; where actions are drawn take mlp-8-8"),
    ],
)
def test_a_policy_that_there_is_not_is_one_sentence(name, sentence):
    task = Control("CartPole-v1")
    with pytest.raises(UserError, match=sentence):
        build(name, task.outputs, task.input, 0)


def test_a_stored_policy_knows_what_it_is_fed_and_what_it_has_seen(tmp_path):
    task = Control(LINE)
    network = build("mlp-8-8-norm", task.outputs, task.input, 0)
    network.model.standardise.look(torch.tensor([[1.0], [4.0]]))
    save(network, tmp_path / "policy", {"task": "control"})
    again = load(tmp_path / "policy")
    assert again.input == Observations(1, (-1.0,), (1.0,))
    shown = torch.tensor([[2.0], [-1.0]])
    assert torch.equal(again(shown), network(shown))


# The report.


def finished(path):
    run = Run.create(path, {"test": True})
    task = Control(LINE)
    networks = {"baseline": Network(Always(0.25)), "student": Network(Always(1.0))}
    task.record(networks, Episodes(LINE, (0, 1)), path)
    run.write_json("result.json", {"student": 1.0, "baseline": 0.5, "names": {"student": "fast"}})
    return run


def test_the_report_shows_an_episode_and_frames_where_they_can_be_drawn(tmp_path):
    run = finished(tmp_path / "run")
    lived = read_state(run.path / report.EPISODES)
    assert lived["baseline"]["earned"].tolist() == [0.25] * 5
    assert len(lived["student"]["frames"]) == len(lived["student"]["earned"])
    assert lived["student"]["frames"][0].shape == (4, 6, 3)
    (section,) = report.sections(run)
    labels = [panel.label for panel in section.figures[0].panels]
    assert labels[0].startswith("return so far")
    assert "fast ends at" in labels[0]
    assert "plain student ends at 1.25" in labels[0]
    assert [label.partition(" ")[0] for label in labels[1:]] == ["action", "observation"]
    assert section.galleries[0].pictures[0].source.startswith("data:image/png")


def test_the_report_does_without_frames(tmp_path, monkeypatch):
    def fail(self):
        raise ModuleNotFoundError("pygame")

    monkeypatch.setattr(Line, "render", fail)
    run = finished(tmp_path / "run")
    (section,) = report.sections(run)
    assert section.figures
    assert section.galleries == []


def test_a_damaged_episode_is_left_out(tmp_path):
    run = finished(tmp_path / "run")
    (run.path / report.EPISODES).write_bytes(b"nothing")
    assert report.sections(run) == []
