"""Control: what a policy earns in a Gymnasium environment, by its id."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from limbeck.errors import UserError, did_you_mean
from limbeck.extras import need
from limbeck.models import build
from limbeck.models.policy import Observations
from limbeck.report.control import EPISODES
from limbeck.training.checkpoint import write_state
from limbeck.training.domain import Domain, Words
from limbeck.training.network import Network
from limbeck.training.progress import Voice
from limbeck.training.seeding import derive
from limbeck.training.taps import Taps
from limbeck.training.task import Answer, Batch, Batches, Task
from limbeck.training.teacher import Teacher

_MOST_STEPS = 100_000
_FRAMES = 6
_SPLITS = ("train", "validation", "test")


def make(name: str, **more: Any) -> Any:
    """A Gymnasium environment by its id, checked for what policies can see and do.

    Args:
        name: such as ``CartPole-v1``; an id with a colon would import a module, and is refused.
        more: for ``gymnasium.make``.

    Raises:
        UserError: no such environment, a package that it needs is missing, or observations or
            actions of a kind that no policy is for.

    >>> make("Pendulum-v1").action_space.shape
    (1,)
    """
    gymnasium = need("gymnasium")
    if name not in gymnasium.registry:
        hint = did_you_mean(name, gymnasium.registry)
        if ":" in name:
            hint = "an id with a colon would import a module, which nothing in a recipe does"
        raise UserError(f"there is no environment {name!r} in Gymnasium; {hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = gymnasium.make(name, **more)
    except Exception as error:  # What an environment's maker raises is its own affair.
        raise UserError(f"the environment {name} cannot be made: {_first_line(error)}") from None
    seen, done = made.observation_space, made.action_space
    boxes = gymnasium.spaces.Box
    if not isinstance(seen, boxes) or len(seen.shape) != 1:
        raise UserError(
            f"{name} shows {seen}, but policies see vectors of numbers, as those of Pendulum-v1 are"
        )
    discrete = isinstance(done, gymnasium.spaces.Discrete) and done.start == 0
    if not discrete and not (isinstance(done, boxes) and len(done.shape) == 1):
        raise UserError(
            f"{name} wants actions {done}, but policies choose one of several, as in CartPole-v1, "
            "or give a vector of numbers, as in Pendulum-v1"
        )
    return made


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0].rstrip(".")


@dataclass(frozen=True)
class Episodes:
    """Episodes of an environment by where each begins.

    Args:
        name: the environment's id.
        seeds: what the environment is reset with, one an episode.
    """

    name: str
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.seeds)

    @cached_property
    def wandered(self) -> Tensor:
        """What is seen in the first episode by who does anything at random, (N, size)."""
        world, seed = make(self.name), self.seeds[0]
        world.action_space.seed(seed)
        seen = [world.reset(seed=seed)[0]]
        for _ in range(200):
            shown, _, ended, cut, _ = world.step(world.action_space.sample())
            seen.append(shown)
            if ended or cut:
                break
        world.close()
        return torch.from_numpy(np.stack(seen))


class Control(Task):
    """What a policy earns in an environment, episode after episode.

    Nobody says what would have been right, so there is no supervised loss: systems of this task
    act in the environment (``bench.transfer.name``) themselves. A policy is measured by what it
    does without dice: the most probable action, or the mean of numbers, brought within bounds.

    Args:
        environment: its id.
        device: where policies live.

    Raises:
        UserError: see :func:`make`.

    Example:
        >>> Control("Pendulum-v1").outputs
        ('action 1',)
    """

    name: ClassVar[str] = "control"
    metric: ClassVar[str] = "return"
    higher_is_better: ClassVar[bool] = True

    def __init__(self, environment: str, device: torch.device | None = None) -> None:
        self.environment = environment
        self.device = device or torch.device("cpu")
        world = make(environment)
        space = world.action_space
        self.discrete = hasattr(space, "n")
        size = int(world.observation_space.shape[0])
        if self.discrete:
            self.outputs = tuple(f"action {i}" for i in range(int(space.n)))
            self.input = Observations(size)
        else:
            self.outputs = tuple(f"action {i + 1}" for i in range(space.shape[0]))
            self.input = Observations(size, tuple(space.low.tolist()), tuple(space.high.tolist()))
        world.close()

    def batches(
        self, split: Episodes, *, batch_size: int, seed: int = 0, train: bool = False
    ) -> Batches:
        return _Seen(split.wandered, batch_size)

    def run(self, network: Network, batch: Batch, taps: Taps | None = None) -> Answer:
        if taps is None:
            return Answer({"action": network(batch["observation"])})
        output, features = taps.watch(network, batch["observation"])
        return Answer({} if output is None else {"action": output}, features)

    def loss(self, answer: Answer, batch: Batch) -> Tensor:
        raise UserError(
            "an environment has no labels to learn from; run a system that acts in it, such as "
            "dual-policy"
        )

    def act(self, answers: Tensor) -> Any:
        """What is done, (B,) or (B, numbers), where a policy's answers are (B, actions)."""
        if self.discrete:
            return answers.argmax(1).cpu().numpy()
        done = answers.cpu().numpy()
        return np.clip(done, self.input.low, self.input.high).astype(np.float32)

    def measure(self, network: Network | Teacher, split: Episodes) -> dict[str, float]:
        """The mean over the episodes of what is earned in each, and of how long it lasts."""
        earned, lasted = self.returns(network, split)
        return {"return": _mean(earned), "length": _mean(lasted)}

    @torch.no_grad()
    def returns(
        self, network: Network | Teacher, split: Episodes
    ) -> tuple[list[float], list[float]]:
        """What is earned in each episode, and how many steps each lasts."""
        mode = network.training
        network.eval()
        worlds = [make(split.name) for _ in split.seeds]
        pairs = zip(worlds, split.seeds, strict=True)
        seen = [world.reset(seed=seed)[0] for world, seed in pairs]
        earned, lasted = [0.0] * len(worlds), [0.0] * len(worlds)
        going = list(range(len(worlds)))
        for _ in range(_MOST_STEPS):
            shown = torch.from_numpy(np.stack([seen[i] for i in going])).to(self.device)
            actions = self.act(self.answer(network, {"observation": shown})["action"])
            still = []
            for i, action in zip(going, actions, strict=True):
                seen[i], reward, ended, cut, _ = worlds[i].step(action)
                earned[i] += float(reward)
                lasted[i] += 1
                if not (ended or cut):
                    still.append(i)
            going = still
            if not going:
                break
        for world in worlds:
            world.close()
        network.train(mode)
        return earned, lasted

    def record(
        self, networks: Mapping[str, Network | Teacher], split: Episodes, folder: Path
    ) -> None:
        """The first test episode as each network lives it, with frames where they can be drawn."""
        lived = {role: self._lived(network, split) for role, network in networks.items()}
        write_state(folder / EPISODES, lived)

    @torch.no_grad()
    def _lived(self, network: Network | Teacher, split: Episodes) -> dict[str, Any]:
        mode = network.training
        network.eval()
        world, begin = make(split.name), split.seeds[0]
        shown, _ = world.reset(seed=begin)
        seen, done, earned = [], [], []
        for _ in range(_MOST_STEPS):
            fed = torch.from_numpy(np.asarray(shown)[None]).to(self.device)
            action = self.act(self.answer(network, {"observation": fed})["action"])[0]
            seen.append(shown)
            done.append(action)
            shown, reward, ended, cut, _ = world.step(action)
            earned.append(float(reward))
            if ended or cut:
                break
        world.close()
        network.train(mode)
        return {
            "seen": torch.from_numpy(np.stack(seen)).float(),
            "done": torch.from_numpy(np.stack(done)).float().reshape(len(done), -1),
            "earned": torch.tensor(earned),
            "frames": _frames(split.name, begin, done),
        }


def _frames(name: str, seed: int, actions: Sequence[Any]) -> list[Tensor]:
    """Some frames of an episode, (H, W, 3) in bytes; none where the environment draws none.

    Gymnasium draws by pygame and its like, which a run can do without.
    """
    try:
        world = make(name, render_mode="rgb_array")
        world.reset(seed=seed)
        wanted = {round(i * (len(actions) - 1) / (_FRAMES - 1)) for i in range(_FRAMES)}
        frames = []
        for step, action in enumerate(actions):
            if step in wanted:
                frames.append(torch.from_numpy(np.array(world.render(), np.uint8)))
            world.step(action)
        world.close()
    except Exception:  # A picture is no reason to lose a run.
        return []
    return frames if all(frame.ndim == 3 for frame in frames) else []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class _Seen:
    """Observations in their order."""

    def __init__(self, seen: Tensor, size: int) -> None:
        self.parts = seen.split(size)

    def __len__(self) -> int:
        return len(self.parts)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for part in self.parts[start:]:
            yield {"observation": part}


class ControlWords(Words):
    """An environment by its id in Gymnasium, and how policies are measured in it."""

    validation: float = Field(
        default=1.0, ge=0, description="episodes for decisions, as a multiple of those for tests"
    )
    episodes: int = Field(default=20, ge=1, le=10_000, description="of the test")


class Environments(Domain):
    """Gymnasium environments whose observations are vectors."""

    words_type: ClassVar[type[Words]] = ControlWords
    source = "Pendulum-v1"

    def __init__(
        self, words: ControlWords, *, device: torch.device, workers: int, voice: Voice
    ) -> None:
        if words.limit is not None:
            raise UserError(
                "an environment never runs out of samples: leave data.limit out, and say how long "
                "policies learn with student.training.epochs"
            )
        self.words, self.device = words, device
        self.control = Control(words.source, device)
        validation = round(words.validation * words.episodes)
        numbers = {"train": 1, "validation": validation, "test": words.episodes}
        splits = {split: self._episodes(split, number) for split, number in numbers.items()}
        self.splits = {**splits, "transfer": splits["train"]}
        said = repr((words.source, splits)).encode()
        self.facts = {"data": words.source, "fingerprint": hashlib.sha256(said).hexdigest()}
        input, kind = self.control.input, "one of" if self.control.discrete else "vectors of"
        voice.say(
            f"{words.source}: observations of {input.size} numbers, actions {kind} "
            f"{len(self.control.outputs)}; {validation} episodes for validation, "
            f"{words.episodes} for the test"
        )

    def _episodes(self, split: str, number: int) -> Episodes:
        """Episodes that begin elsewhere in each split."""
        place = _SPLITS.index(split)
        seeds = (derive(place, i) % 2**31 for i in range(number))
        return Episodes(self.words.source, tuple(seeds))

    @staticmethod
    def kind_of(source: str) -> str:
        return source

    def task(self, augment: Any = None) -> Control:
        return self.control

    def network(self, name: str, seed: int | None = None) -> Network:
        return build(name, self.control.outputs, self.control.input, seed)

    def sample(self) -> Tensor:
        return self.control.input.sample()
