"""What two learners learn from each other: losses, and the method that trains both in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.extras import need
from limbeck.models.policy import Policy
from limbeck.report.verdict import mean_interval
from limbeck.tasks.control import Control
from limbeck.training.bench import Bench
from limbeck.training.finding import Chart, Finding
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network
from limbeck.training.phases import Journal, Solve
from limbeck.training.seeding import derive, seed_all

if TYPE_CHECKING:
    from limbeck.systems.reinforcement.dual_policy.learners import Learner

Weights = Literal["soft", "hard", "reversed", "equal"]
Rival = Literal["single", "reversed", "equal"]
Distance = Callable[[Tensor, Tensor], Tensor]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]

RIVALS: dict[str, str] = {
    "single": "one learner, all steps",
    "reversed": "with weights reversed",
    "equal": "with equal weights",
}
PAIRED = ("baseline", "student", "reversed", "equal")
"""Ways that have two learners."""


def peer_weights(advantage: Tensor, alpha: float = 1.0, kind: Weights = "soft") -> Tensor:
    r"""How much each state counts when a learner imitates its peer.

    .. math:: \bar w_i = w_i / \sum_j w_j, \qquad w_i = e^{\alpha \xi(s_i)}
        \text{ within } [0.01, 100], \qquad \xi(s) = \tilde V(s) - V(s)

    Args:
        advantage: xi, (B,): what the peer expects of each state less what the learner does.
        alpha: trust in these estimates; 0 is none.
        kind: ``soft`` as above; ``hard`` is 1 / B where xi > 0, else 0; ``reversed`` is soft with
            the opposite sign of xi, for comparison; ``equal`` is 1 / B.

    Returns:
        (B,); no gradient flows into them.

    >>> peer_weights(torch.tensor([1.0, 0.0, -2.0, 20.0]), 0.5)
    tensor([0.0160, 0.0097, 0.0036, 0.9707])
    """
    xi = advantage.detach()
    if xi.ndim != 1:
        raise UserError(f"the peer's advantage has the shape {tuple(xi.shape)}, but must be (B,)")
    if kind == "hard":
        return (xi > 0).to(xi) / len(xi)
    signed = {"soft": alpha, "reversed": -alpha, "equal": 0.0}[kind] * xi
    weights = signed.exp().clamp(0.01, 100.0)
    return weights / weights.sum()


def squared_distance(own: Tensor, peer: Tensor) -> Tensor:
    """D of two actions (B, numbers): their mean squared difference, (B,).

    >>> squared_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.5000])
    """
    _alike(own, peer)
    return (own - peer.detach()).square().mean(1)


def choice_distance(own: Tensor, peer: Tensor) -> Tensor:
    """D where one of several actions is chosen, logits (B, actions): KL(peer || own), (B,).

    Not in the paper, whose actions are numbers.

    >>> choice_distance(torch.zeros(1, 2), torch.tensor([[0.0, 100.0]]))
    tensor([0.6931])
    """
    _alike(own, peer)
    log_own, log_peer = own.log_softmax(1), peer.detach().log_softmax(1)
    return (log_peer.exp() * (log_peer - log_own)).sum(1)


def _alike(own: Tensor, peer: Tensor) -> None:
    if own.shape != peer.shape or own.ndim != 2:
        raise UserError(
            f"the learner's actions have the shape {tuple(own.shape)}, the peer's "
            f"{tuple(peer.shape)}; both must be (B, actions)"
        )


def dual_policy(
    own: Tensor,
    peer: Tensor,
    advantage: Tensor,
    alpha: float = 1.0,
    weights: Weights = "soft",
    distance: Distance = squared_distance,
) -> Tensor:
    r"""What a learner loses by not doing as its peer where the peer expects more.

    .. math:: J^w(\theta) = E_{s \sim \tilde\pi}
        \big[ D(\pi_\theta(\cdot|s), \tilde\pi(\cdot|s)) \, e^{\alpha \xi(s)} \big]

    with the weights of :func:`peer_weights`, on states that the peer has visited. ``hard`` weights
    make it the objective :math:`J` with the indicator of :math:`\xi(s) > 0`.

    Args:
        own: (B, actions): the learner's actions or means; through them alone gradients flow.
        peer: (B, actions): what the peer does.
        advantage: xi, (B,).
        alpha: trust in xi.
        weights: see :func:`peer_weights`.
        distance: D, from (B, actions) twice to (B,).

    Returns:
        A scalar; 0 where both do the same.

    >>> own, peer = torch.tensor([[0.0], [0.0]]), torch.tensor([[1.0], [2.0]])
    >>> dual_policy(own, peer, torch.zeros(2)).item()
    2.5
    """
    apart = distance(own, peer)
    if advantage.shape != apart.shape:
        raise UserError(
            f"the peer's advantage has the shape {tuple(advantage.shape)}, the distances "
            f"{tuple(apart.shape)}; both must be (B,), or each state would count for all"
        )
    return (peer_weights(advantage, alpha, weights) * apart).sum()


def hybrid_policy(own: Tensor, peer: Tensor, advantage: Tensor) -> Tensor:
    """The policy that follows the peer where xi > 0, and itself elsewhere.

    Args:
        own, peer: (B, actions).
        advantage: xi, (B,).

    >>> hybrid_policy(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([0.5, -0.5])).flatten()
    tensor([1., 0.])
    """
    return torch.where((advantage > 0)[:, None], peer, own)


class DualPolicy(Method):
    """Two learners, alternately: one acts and learns, then imitates the other on its states.

    For each seed the two begin with different weights in copies of the environment. The baseline
    are the same two without distillation. Of each pair the learner that is better on validation
    episodes is delivered; of the distilled pair the other one too, as ``peer``.

    A step of the recipe's epochs is a cycle: ``rollout`` steps of the environment and ``updates``
    of the algorithm. ``student.training`` has epochs, mini-batch (``batch_size``) and learning
    rate, of Adam. At the end of an epoch environments begin anew; an episode that is cut there is
    worth what is expected of where it stood.

    Args:
        algorithm: ``ddpg`` for actions that are numbers; ``ppo`` for these or one of several.
        alpha: trust in the values by which states are weighted.
        states: of the peer's that are imitated in a step of distillation.
        every: a step of distillation after so many updates; one of ppo's is a rollout's.
        rollout: steps of the environment in a cycle.
        cycles: in an epoch.
        updates: gradient steps of ddpg, or passes of ppo, over a cycle.
        gamma: discount.
        memory: transitions that ddpg learns from, or observations that the peer samples.
        weights: ``soft`` as in practice, ``hard`` as in the theory, or for comparison ``reversed``
            and ``equal``.
        as_released: the published code's loss: with ddpg the weights cancel and errors are summed,
            with ppo xi has the opposite sign and the loss is divided by ``states``.
        rivals: further ways: ``single`` is one learner with all the pair's steps, the others are
            pairs with other weights.
        threshold: a return; the report says after how many steps it is reached.
        critic_lr, critic_decay, distil_lr, tau, noise, warmup: of ddpg: the critic's learning rate
            and L2 norm, the learning rate of distillation, how fast target networks follow, the
            deviation of the noise on actions, and the steps at random before.
        gae, entropy: of ppo.
    """

    tasks = ("control",)
    takes_teacher = False
    roles: Mapping[str, str] = {
        "baseline": "two learners apart",
        "student": "dual policy distillation",
        "peer": "its other learner",
        **RIVALS,
    }

    def __init__(
        self,
        algorithm: Literal["ddpg", "ppo"] = "ddpg",
        alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0,
        states: Count = 512,
        every: Count = 1,
        rollout: Count = 100,
        cycles: Count = 20,
        updates: Count = 50,
        gamma: Share = 0.99,
        memory: Annotated[int, Field(ge=2)] = 1_000_000,
        weights: Weights = "soft",
        as_released: bool = False,
        rivals: tuple[Rival, ...] = (),
        threshold: float | None = None,
        critic_lr: Positive = 1e-3,
        critic_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01,
        distil_lr: Positive = 1e-4,
        tau: Share = 0.01,
        noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2,
        warmup: Annotated[int, Field(ge=0)] = 0,
        gae: Annotated[float, Field(ge=0, le=1)] = 0.95,
        entropy: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
    ) -> None:
        super().__init__()
        self.algorithm, self.alpha, self.states, self.every = algorithm, alpha, states, every
        self.rollout, self.cycles, self.updates, self.gamma = rollout, cycles, updates, gamma
        self.memory, self.weights, self.as_released = memory, weights, as_released
        self.rivals, self.threshold = rivals, threshold
        self.critic_lr, self.critic_decay, self.distil_lr = critic_lr, critic_decay, distil_lr
        self.tau, self.noise, self.warmup = tau, noise, warmup
        self.gae, self.entropy = gae, entropy
        self.networks: dict[tuple[str, int], list[Network]] = {}
        self.courses: dict[tuple[str, int], list[dict[str, Any]]] = {}
        self.chosen: dict[tuple[str, int], int] = {}

    def rehearse(self, bench: Bench) -> None:
        task, training = _control(self, bench), bench.training
        need("stable_baselines3")
        if bench.candidates:
            raise UserError("two learners teach each other; leave --teacher out")
        if bench.rival is not None:
            raise UserError(
                "what the two learners are compared with is themselves without distillation; set "
                "baseline to true or false"
            )
        if training.optimiser != "adam" or training.schedule != "constant":
            raise UserError(
                "policies learn by Adam at a constant rate; set student.training.optimiser=adam "
                "and student.training.schedule=constant"
            )
        if bench.select == "best":
            raise UserError("policies count as they are in the end; set select=last")
        if not len(bench.validation):
            raise UserError(
                "which of two learners is the better is decided on validation episodes; set "
                "data.validation above 0"
            )
        if self.memory <= self.rollout * self.cycles:
            raise UserError(
                f"the memory of {self.memory:,} is not above the {self.rollout * self.cycles:,} "
                "steps of an epoch; set method.memory higher or method.cycles lower"
            )
        with torch.random.fork_rng(devices=[]):
            policy = _policy(bench.laid_out(bench.make_student(bench.seeds[0])))
            if self.algorithm == "ddpg" and not policy.norm:
                name = "mlp-64-64-norm"
                if task.discrete:
                    raise UserError(
                        f"ddpg gives actions as numbers, but in {task.environment} one of "
                        f"{len(task.outputs)} is chosen; set method.algorithm=ppo with "
                        "student.model=mlp-64-64"
                    )
                raise UserError(
                    f"ddpg needs a policy whose actions lie within bounds; set student.model={name}"
                )
            if self.algorithm == "ppo" and policy.norm:
                raise UserError(
                    "ppo draws actions around a mean without bounds; set student.model=mlp-64-64"
                )
            if self.algorithm == "ppo" and (
                training.batch_size < 2 or self.rollout % training.batch_size
            ):
                raise UserError(
                    f"a rollout of {self.rollout} steps does not part into mini-batches of "
                    f"{training.batch_size}; set method.rollout to a multiple of "
                    "student.training.batch_size, which is 2 or more"
                )
            self._learner(bench, policy)

    def phases(self, bench: Bench) -> Phases:
        ways = ["baseline", "student"] if bench.baseline else ["student"]
        for seed in bench.seeds:
            for way in (*ways, *dict.fromkeys(self.rivals)):
                yield from self._way(bench, way, seed)

    def _way(self, bench: Bench, way: str, seed: int) -> Phases:
        """Train the learners of one way, and deliver the better of them."""
        networks = [
            bench.laid_out(bench.make_student(derive(seed, number) % 2**31))
            for number in range(2 if way in PAIRED else 1)
        ]
        course = yield Solve(
            name=bench.label(way, seed),
            seed=seed,
            run=partial(self._learn, bench, way, seed, networks),
            writes={f"learner {i + 1}": network for i, network in enumerate(networks)},
        )
        self.networks[way, seed], self.courses[way, seed] = networks, course
        for network in networks:
            network.eval()
        final = course[-1]["returns"] if course else [0.0] * len(networks)
        better = self.chosen[way, seed] = max(range(len(final)), key=final.__getitem__)
        network = networks[better]
        if way == "student":
            bench.students[seed] = network
            bench.deliver("peer", seed, networks[1 - better])
        elif way == "baseline":
            bench.baselines[seed] = network
        else:
            bench.deliver(way, seed, network)

    def _learn(
        self, bench: Bench, way: str, seed: int, networks: Sequence[Network], journal: Journal
    ) -> list[dict[str, Any]]:
        """Epoch after epoch, each a piece of the journal; what the learners earn after each."""
        own = copy.deepcopy(self)
        if way in RIVALS and way in PAIRED:
            own.weights = way  # type: ignore[assignment]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(seed, 2) % 2**31)
            learners = [own._learner(bench, _policy(network)) for network in networks]
        if way != "baseline" and len(learners) == 2:
            learners[0].peer, learners[1].peer = learners[1], learners[0]
        course, name = [], bench.label(way, seed)
        epochs = bench.training.epochs * (1 if len(learners) == 2 else 2)
        bench.voice.begin(name, epochs)
        try:
            for epoch in range(epochs):
                work = partial(self._epoch, bench, seed, epoch, learners, networks)
                done = journal.remember(f"{epoch:06d}", work)
                for learner, state in zip(learners, done["learners"], strict=True):
                    learner.put_back(state)
                course.append(done["found"])
                earned = {"return": _mean(course[-1]["returns"])}
                bench.voice.step(epoch + 1, earned, self.rollout * self.cycles * len(learners))
        finally:
            bench.voice.end()
        if course:
            ends = " and ".join(f"{value:.4g}" for value in course[-1]["returns"])
            bench.voice.say(
                f"{name}: {course[-1]['steps']:,} steps, return {ends} on the validation episodes"
            )
        return course

    def _epoch(
        self,
        bench: Bench,
        seed: int,
        epoch: int,
        learners: Sequence[Learner],
        networks: Sequence[Network],
    ) -> dict[str, Any]:
        """Cycles of the learners in turn; their state, and what they earn on validation data."""
        seed_all(seed, epoch)
        rows = [learner.memory().pos for learner in learners]
        for number, learner in enumerate(learners):
            learner.begin(derive(seed, number, epoch) % 2**31)
            learner.loss, learner.imitated = 0.0, 0
        for _ in range(self.cycles):
            for learner in learners:
                learner.cycle()
        found = {
            "steps": sum(learner.engine.num_timesteps for learner in learners),
            "returns": [
                bench.task.measure(network, bench.validation)["return"] for network in networks
            ],
            "imitation": [learner.loss / max(learner.imitated, 1) for learner in learners],
        }
        states = [learner.state(row) for learner, row in zip(learners, rows, strict=True)]
        return {"learners": states, "found": found}

    def _learner(self, bench: Bench, policy: Policy) -> Learner:
        from limbeck.systems.reinforcement.dual_policy.learners import LEARNERS

        task = _control(self, bench)
        kind = LEARNERS[self.algorithm]
        return kind(self, bench.training, policy, task.environment, bench.device)

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """What is earned over the steps, and by each learner in the end."""
        ways = list(dict.fromkeys(way for way, _ in self.courses))
        if not all(self.courses.values()):
            return []
        seeds = len(bench.seeds)
        shade = "; the shade is the 95 % interval over the seeds" if seeds > 1 else ""
        lines: dict[str, list[tuple[float, float]]] = {}
        bands: dict[str, list[tuple[float, float, float]]] = {}
        for way in ways:
            name = way if way in ("baseline", "student") else RIVALS[way]
            lines[name], bands[name] = [], []
            for points in zip(*(self.courses[way, seed] for seed in bench.seeds), strict=True):
                mean, half = mean_interval([_mean(p["returns"]) for p in points])
                steps = points[0]["steps"]
                lines[name].append((steps, mean))
                if half is not None:
                    bands[name].append((steps, mean - half, mean + half))
        charts = [
            Chart("Validation episodes", "steps, of both learners", "return", lines, bands=bands)
        ]
        if any(p["imitation"][0] for p in self.courses["student", bench.seeds[0]]):
            imitation = [
                (p[0]["steps"], _mean([_mean(q["imitation"]) for q in p]))
                for p in zip(*(self.courses["student", s] for s in bench.seeds), strict=True)
            ]
            charts.append(
                Chart("Distillation", "steps, of both learners", "loss", {"student": imitation})
            )
        caption = (
            "Return of the validation episodes, mean over the learners" + shade + ". In the table "
            "the return while learning is the mean over that course; better and other are by "
            "validation and measured on the test episodes."
        )
        return [Finding("Learning", caption, self._table(bench, ways), charts)]

    def _table(self, bench: Bench, ways: Sequence[str]) -> list[list[str]]:
        heading = ["", "steps", "return while learning", "better", "other"]
        if self.threshold is not None:
            heading.append(f"steps to reach {self.threshold:g}")
        rows = [heading]
        for way in ways:
            courses = [self.courses[way, seed] for seed in bench.seeds]
            while_learning = [_mean([_mean(p["returns"]) for p in c]) for c in courses]
            better: list[float] = []
            other: list[float] = []
            for seed in bench.seeds:
                for number, network in enumerate(self.networks[way, seed]):
                    earned = bench.task.measure(network, bench.test)["return"]
                    (better if number == self.chosen[way, seed] else other).append(earned)
            steps = f"{courses[0][-1]['steps']:,}"
            cells = [_said(values) if values else "" for values in (while_learning, better, other)]
            if self.threshold is not None:
                cells.append(_reached(courses, self.threshold))
            rows.append([self.roles[way], steps, *cells])
        return rows


def _reached(courses: Sequence[Sequence[Mapping[str, Any]]], threshold: float) -> str:
    """After how many steps the mean over the learners is so high, and in how many seeds.

    >>> course = [{"steps": 10, "returns": [0.0, 2.0]}, {"steps": 20, "returns": [2.0, 2.0]}]
    >>> _reached([course], 1.5), _reached([course], 9.0)
    ('20 (1 of 1 seeds)', 'none of 1 seeds')
    """
    firsts = [
        next((p["steps"] for p in c if _mean(p["returns"]) >= threshold), None) for c in courses
    ]
    there = [first for first in firsts if first is not None]
    if not there:
        return f"none of {len(courses)} seeds"
    return f"{_mean(there):,.0f} ({len(there)} of {len(courses)} seeds)"


def _said(values: Sequence[float]) -> str:
    """Returns as people read them, with half the interval over the seeds.

    >>> _said([-150.04]), _said([1.0, 3.0])
    ('-150.0', '2.0 ± 12.7')
    """
    mean, half = mean_interval(values)
    return f"{mean:.1f}" + (f" ± {half:.1f}" if half is not None else "")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _control(method: Method, bench: Bench) -> Control:
    method.check_task(bench.task)
    assert isinstance(bench.task, Control)
    return bench.task


def _policy(network: nn.Module) -> Policy:
    """The policy in a network.

    Raises:
        UserError: it is none of Limbeck's own.
    """
    model = network.model if isinstance(network, Network) else network
    if not isinstance(model, Policy):
        raise UserError(
            f"the learners' layers must be those of a policy such as mlp-64-64, not of a "
            f"{type(model).__name__}"
        )
    return model
