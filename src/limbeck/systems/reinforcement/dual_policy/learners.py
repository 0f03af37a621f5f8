"""A learner: a policy, what judges it, and Stable-Baselines3's algorithm that trains both.

PPO and DDPG, their buffers, losses and updates are the library's. What is added: the parts of the
policy that it trains are those of a network of ours, observations are standardised within it, and
after an update a step of distillation follows.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import Space
from stable_baselines3 import DDPG, PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.policy import Policy, Standardise, begin, hidden
from limbeck.systems.reinforcement.dual_policy.distillation import (
    choice_distance,
    dual_policy,
    squared_distance,
)
from limbeck.tasks.control import make
from limbeck.training.phases import Training

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

    from limbeck.systems.reinforcement.dual_policy.distillation import DualPolicy


class Standardised(BaseFeaturesExtractor):
    """The library's place for what comes before the layers: a policy's own standardisation."""

    def __init__(self, space: Space[Any], standardise: Standardise) -> None:
        super().__init__(space, features_dim=len(standardise.mean))
        self.standardise = standardise

    def forward(self, seen: Tensor) -> Tensor:
        shown: Tensor = self.standardise(seen)
        return shown


class Memory:
    """The last observations, as the library's replay buffer holds them."""

    def __init__(self, size: int, width: int, dtype: Any) -> None:
        self.buffer_size, self.pos, self.full = size, 0, False
        self.observations = np.zeros((size, 1, width), dtype)

    def add(self, seen: Any) -> None:
        """Take observations, (N, width), in."""
        where = (self.pos + np.arange(len(seen))) % self.buffer_size
        self.observations[where, 0] = seen
        self.full = self.full or self.pos + len(seen) >= self.buffer_size
        self.pos = (self.pos + len(seen)) % self.buffer_size


class Learner(ABC):
    """One of the two.

    Args:
        method: the hyper-parameters.
        training: mini-batch and learning rate.
        policy: what learns; its weights are trained in place.
        environment: an id.
        device: where.

    ``distils`` says whether it learns from its peer at all.
    """

    engine: BaseAlgorithm
    columns: tuple[str, ...] = ("observations",)

    def __init__(
        self,
        method: DualPolicy,
        training: Training,
        policy: Policy,
        environment: str,
        device: torch.device,
    ) -> None:
        self.method, self.training, self.policy = method, training, policy
        self.peer: Learner | None = None
        self.updates = self.imitated = 0
        self.loss = 0.0
        self.discrete = False
        self._lay_out(environment, device)
        self.engine.set_logger(Logger(None, []))

    @abstractmethod
    def _lay_out(self, environment: str, device: torch.device) -> None:
        """Make the algorithm, around the policy's own layers."""

    @abstractmethod
    def memory(self) -> Any:
        """The buffer that holds what was seen."""

    @abstractmethod
    def optimisers(self) -> list[torch.optim.Optimizer]:
        """All whose state decides what follows."""

    @abstractmethod
    def answer(self, seen: Tensor) -> Tensor:
        """Means of actions, or logits, (B, actions), through which gradients flow."""

    @abstractmethod
    def _distil(self, peer: Learner, seen: Tensor) -> Tensor:
        """One step towards what the peer does; the loss."""

    def begin(self, seed: int) -> None:
        """Let the environment begin anew, as this seed has it."""
        assert self.engine.env is not None
        self.engine.env.seed(seed)
        self.engine.action_space.seed(seed)
        self.engine.set_env(self.engine.env, force_reset=True)

    def cycle(self) -> None:
        """Act for a rollout, and learn from it.

        Raises:
            UserError: a network became NaN or infinite.
        """
        before = self.memory().pos
        try:
            self.engine.learn(self.method.rollout, log_interval=10**9, reset_num_timesteps=False)
        except ValueError:  # A distribution of NaN is none.
            self._check()
            raise
        self._check()
        self._remember()
        self.policy.standardise.look(torch.from_numpy(self._since(before)["observations"][:, 0]))

    def _check(self) -> None:
        if not all(bool(p.isfinite().all()) for p in self.engine.policy.parameters()):
            raise UserError(
                f"a learner's networks became NaN or infinite by its {self.engine.num_timesteps:,} "
                "steps; lower student.training.lr (the last epoch before it stands)"
            )

    def _remember(self) -> None:
        """Keep what the algorithm's own buffer will forget."""

    def after_update(self) -> None:
        """Distil after every so many updates, once the peer has seen as many states as a batch."""
        self.updates += 1
        if self.peer is None or self.updates % self.method.every:
            return
        memory, number = self.peer.memory(), self.method.states
        there = memory.buffer_size if memory.full else memory.pos
        if there < min(number, memory.buffer_size):
            return
        rows = np.random.randint(0, there, size=number)
        seen = torch.as_tensor(memory.observations[rows, 0], device=self.engine.device)
        self.loss += float(self._distil(self.peer, seen.float()))
        self.imitated += 1

    def _since(self, row: int) -> dict[str, Any]:
        """The buffer's columns from a row on, around its end if need be."""
        memory = self.memory()
        number = (memory.pos - row) % memory.buffer_size
        rows = (row + np.arange(number)) % memory.buffer_size
        return {name: getattr(memory, name)[rows] for name in self.columns}

    def state(self, row: int) -> dict[str, Any]:
        """All that decides how it goes on, of the buffer what was added from this row on."""
        memory = self.memory()
        return {
            "policy": copy.deepcopy(self.engine.policy.state_dict()),
            "optimisers": [copy.deepcopy(o.state_dict()) for o in self.optimisers()],
            "counts": [self.engine.num_timesteps, self.updates],
            "scale": self._scale(),
            "row": row,
            "rows": {name: torch.from_numpy(part) for name, part in self._since(row).items()},
            "buffer": [memory.pos, memory.full],
        }

    def put_back(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`, one after the other."""
        self.engine.policy.load_state_dict(state["policy"])
        for optimiser, kept in zip(self.optimisers(), state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        self.engine.num_timesteps, self.updates = state["counts"]
        self._rescale(state["scale"])
        memory, row = self.memory(), state["row"]
        for name, part in state["rows"].items():
            rows = (row + np.arange(len(part))) % memory.buffer_size
            getattr(memory, name)[rows] = part.numpy()
        memory.pos, memory.full = state["buffer"]

    def _scale(self) -> list[float]:
        """What rewards are divided by, where they are."""
        return []

    def _rescale(self, scale: Sequence[float]) -> None:
        """The inverse of :meth:`_scale`."""


class _DDPG(DDPG):
    after_update: Callable[[], None]

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        for _ in range(gradient_steps):
            super().train(1, batch_size)
            self.after_update()

    def _update_learning_rate(self, optimizers: Any) -> None:
        """Rates stay as they are: those of actor and critic differ."""


class _PPO(PPO):
    after_update: Callable[[], None]

    def train(self) -> None:
        super().train()
        self.after_update()


class LateActions(nn.Module):
    """What judges an action where something is seen: the action comes in at the second layer.

    >>> LateActions(17, 6, (64, 64))(torch.zeros(2, 23)).shape
    torch.Size([2, 1])
    """

    def __init__(self, seen: int, actions: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.sizes = (seen, actions)
        self.first = hidden(seen, widths[:1], norm=True)
        self.further = hidden(widths[0] + actions, widths[1:], norm=True)
        self.head = nn.Linear(widths[-1], 1)
        begin(self.head, norm=True)

    def forward(self, both: Tensor) -> Tensor:
        """(B, seen + actions) -> (B, 1)."""
        seen, action = both.split(self.sizes, 1)
        value: Tensor = self.head(self.further(torch.cat([self.first(seen), action], 1)))
        return value


def _widths(policy: Policy) -> list[int]:
    return [layer.out_features for layer in policy.hidden if isinstance(layer, nn.Linear)]


def _kernels(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Groups of parameters: the kernels of hidden layers decay."""
    named = list(module.named_parameters())
    decayed = [p for name, p in named if p.ndim > 1 and "head" not in name]
    others = [p for name, p in named if p.ndim == 1 or "head" in name]
    return [{"params": decayed, "weight_decay": decay}, {"params": others}]


class DDPGLearner(Learner):
    """A deterministic policy and a critic, which learn from a replay buffer."""

    columns = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
    engine: _DDPG

    def _lay_out(self, environment: str, device: torch.device) -> None:
        method, training, policy = self.method, self.training, self.policy
        world = DummyVecEnv([lambda: make(environment)])
        assert world.action_space.shape is not None
        actions, widths = world.action_space.shape[0], _widths(policy)
        self.engine = _DDPG(
            "MlpPolicy",
            world,
            learning_rate=training.lr,
            buffer_size=method.memory,
            learning_starts=method.warmup,
            batch_size=training.batch_size,
            tau=method.tau,
            gamma=method.gamma,
            train_freq=method.rollout,
            gradient_steps=method.updates,
            action_noise=NormalActionNoise(np.zeros(actions), np.full(actions, method.noise)),
            policy_kwargs={
                "net_arch": widths,
                "features_extractor_class": Standardised,
                "features_extractor_kwargs": {"standardise": policy.standardise},
            },
            device=device,
        )
        self.engine.after_update = self.after_update
        own = self.engine.policy
        seen = len(policy.standardise.mean)
        own.actor.mu = nn.Sequential(policy.hidden, policy.head, nn.Tanh()).to(device)
        own.actor_target.mu = copy.deepcopy(own.actor.mu)
        for critic in (own.critic, own.critic_target):
            critic.qf0 = LateActions(seen, actions, widths).to(device)
            critic.q_networks = [critic.qf0]
        own.critic_target.load_state_dict(own.critic.state_dict())
        own.actor.optimizer = torch.optim.Adam(own.actor.mu.parameters(), training.lr)
        groups = _kernels(own.critic, method.critic_decay)
        own.critic.optimizer = torch.optim.Adam(groups, method.critic_lr)
        self.imitation = torch.optim.Adam(own.actor.mu.parameters(), method.distil_lr)

    def memory(self) -> Any:
        return self.engine.replay_buffer

    def optimisers(self) -> list[torch.optim.Optimizer]:
        policy = self.engine.policy
        return [policy.actor.optimizer, policy.critic.optimizer, self.imitation]

    def answer(self, seen: Tensor) -> Tensor:
        """Actions on the scale on which their bounds are -1 and 1."""
        action: Tensor = self.engine.actor(seen)
        return action

    def values(self, seen: Tensor, actions: Tensor) -> Tensor:
        """Q, (B,)."""
        return self.engine.critic.q1_forward(seen, actions).flatten()

    def _distil(self, peer: Learner, seen: Tensor) -> Tensor:
        assert isinstance(peer, DDPGLearner)
        with torch.no_grad():
            actions = peer.answer(seen)
            advantage = peer.values(seen, actions) - self.values(seen, actions)
        own = self.answer(seen)
        if self.method.as_released:  # Weights (B, 1) times errors (B) are (B, B): they cancel.
            loss = squared_distance(own, actions).sum()
        else:
            loss = dual_policy(own, actions, advantage, self.method.alpha, self.method.weights)
        self.imitation.zero_grad()
        loss.backward()
        self.imitation.step()
        return loss.detach()


class PPOLearner(Learner):
    """A policy with dice and a value function, which learn from what was just done."""

    engine: _PPO

    def _lay_out(self, environment: str, device: torch.device) -> None:
        method, training, policy = self.method, self.training, self.policy
        world = DummyVecEnv([lambda: make(environment)])
        self.discrete = hasattr(world.action_space, "n")
        self.scaled = VecNormalize(world, norm_obs=False, gamma=method.gamma)
        widths = _widths(policy)
        self.engine = _PPO(
            "MlpPolicy",
            self.scaled,
            learning_rate=training.lr,
            n_steps=method.rollout,
            batch_size=training.batch_size,
            n_epochs=method.updates,
            gamma=method.gamma,
            gae_lambda=method.gae,
            clip_range=0.2,
            clip_range_vf=0.2,
            ent_coef=method.entropy,
            vf_coef=0.5,
            max_grad_norm=0.5,
            policy_kwargs={
                "net_arch": {"pi": widths, "vf": widths},
                "features_extractor_class": Standardised,
                "features_extractor_kwargs": {"standardise": policy.standardise},
            },
            device=device,
        )
        self.engine.after_update = self.after_update
        own = self.engine.policy
        own.mlp_extractor.policy_net, own.action_net = policy.hidden, policy.head
        own.optimizer = torch.optim.Adam(own.parameters(), training.lr, eps=1e-5)
        width = len(policy.standardise.mean)
        self.seen = Memory(method.memory, width, world.observation_space.dtype)

    def memory(self) -> Memory:
        return self.seen

    def optimisers(self) -> list[torch.optim.Optimizer]:
        return [self.engine.policy.optimizer]

    def answer(self, seen: Tensor) -> Tensor:
        found: Any = self.engine.policy.get_distribution(seen).distribution
        answer: Tensor = found.logits if self.discrete else found.mean
        return answer

    def values(self, seen: Tensor) -> Tensor:
        """V, (B,), of rewards as they come, whatever they are divided by for learning."""
        return self.engine.policy.predict_values(seen).flatten() * self.deviation

    @property
    def deviation(self) -> float:
        """What rewards are divided by."""
        return float(np.sqrt(self.scaled.ret_rms.var + self.scaled.epsilon))

    def _remember(self) -> None:
        width = self.seen.observations.shape[-1]
        self.seen.add(self.engine.rollout_buffer.observations.reshape(-1, width))

    def _distil(self, peer: Learner, seen: Tensor) -> Tensor:
        assert isinstance(peer, PPOLearner)
        method, policy = self.method, self.engine.policy
        with torch.no_grad():
            # In the learner's own unit, so that alpha means the same everywhere and always.
            advantage = (peer.values(seen) - self.values(seen)) / self.deviation
            found = peer.engine.policy.get_distribution(seen)
            theirs = peer.answer(seen) if self.discrete else found.sample()
        own = self.answer(seen)
        if method.as_released:  # The sign is reversed, and the weighted sum averaged once more.
            advantage = -advantage
        distance = choice_distance if self.discrete else squared_distance
        loss = dual_policy(own, theirs, advantage, method.alpha, method.weights, distance)
        if method.as_released:
            loss = loss / len(seen)
        policy.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), self.engine.max_grad_norm)
        policy.optimizer.step()
        return loss.detach()

    def _scale(self) -> list[float]:
        known = self.scaled.ret_rms
        return [float(known.mean), float(known.var), float(known.count)]

    def _rescale(self, scale: Sequence[float]) -> None:
        known = self.scaled.ret_rms
        known.mean, known.var = np.array(scale[0]), np.array(scale[1])
        known.count = scale[2]


LEARNERS: dict[str, type[Learner]] = {"ddpg": DDPGLearner, "ppo": PPOLearner}
