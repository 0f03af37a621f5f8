"""A domain that knows no images: what a recipe's task may stand for, from a test's own file."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from carrying import noise
from limbeck import distillation, recipes
from limbeck.errors import UserError
from limbeck.models import build, load
from limbeck.models import input as intakes
from limbeck.models.libraries import Offer, Way
from limbeck.tasks import DOMAINS
from limbeck.training.domain import Domain, Words
from limbeck.training.progress import Voice
from limbeck.training.run import Run
from limbeck.training.task import Answer, Task


@dataclass(frozen=True)
class Places(intakes.Intake):
    """Points in space, which are centred."""

    centre: tuple[float, ...]

    kind = "places"

    def __call__(self, view):
        return view - torch.tensor(self.centre)

    def sample(self):
        return torch.zeros(1, len(self.centre))

    def describe(self):
        return f"points in {len(self.centre)} dimensions"

    def offers(self):
        def own(order):
            width = re.fullmatch(r"net-(\d+)", order.name)
            if width is None:
                raise UserError(f"there is no network named {order.name!r}; known: net-WIDTH")
            sizes = (len(order.input.centre), int(width[1]))
            return Offer(
                [
                    Way(
                        lambda: nn.Sequential(nn.Linear(*sizes), nn.Tanh(), nn.Linear(sizes[1], 1)),
                        order.input,
                    )
                ]
            )

        return {"": own}

    @classmethod
    def from_json(cls, facts):
        return cls(tuple(facts["centre"]))


class Heights(Task):
    """The height of a point, whose squared error is to be small."""

    name = "heights"
    metric = "squared error"
    higher_is_better = False

    def batches(self, split, *, batch_size, seed=0, train=False):
        return Slices(split, batch_size, seed if train else None)

    def run(self, network, batch, taps=None):
        return Answer({"height": network(batch["place"]).squeeze(1)})

    def loss(self, answer, batch):
        return nn.functional.mse_loss(answer["height"], batch["label"])

    @torch.no_grad()
    def measure(self, network, split):
        batch = {"place": split[0], "label": split[1]}
        return {self.metric: float(self.loss(self.answer(network.eval(), batch), batch))}


class Slices:
    def __init__(self, split, size, seed):
        self.split, self.size, self.seed = split, size, seed

    def __len__(self):
        return math.ceil(len(self.split) / self.size)

    def epoch(self, epoch, start=0):
        places, heights = self.split
        order = torch.arange(len(places))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(100 * self.seed + epoch)
            order = torch.randperm(len(places), generator=generator)
        for chosen in order.split(self.size)[start:]:
            yield {"place": places[chosen], "label": heights[chosen]}


class Points(tuple):
    """Places (N, D) and heights (N,), as long as they are many."""

    def __new__(cls, number, seed):
        places = noise(number, 2, seed=seed, dtype=torch.float32)
        return super().__new__(cls, (places, places.prod(1)))

    def __len__(self):
        return len(self[0])


class HillWords(Words):
    steep: float = 1.0


class Hills(Domain):
    words_type = HillWords
    source = "hills"

    def __init__(self, words, *, device, workers, voice):
        self.words = words
        train = Points(words.limit or 64, 0)
        self.splits: Mapping = {
            "train": train,
            "transfer": train,
            "validation": Points(32, 1),
            "test": Points(32, 2),
        }
        self.facts = {"data": words.source, "fingerprint": "hills"}

    @staticmethod
    def kind_of(source):
        return "hills"

    def task(self, augment=None):
        return Heights()

    def network(self, name, seed=None):
        return build(name, ["height"], Places((0.5, 0.0)), seed)

    def sample(self):
        return Places((0.5, 0.0)).sample()


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The domain and what its networks are fed, under their names."""
    monkeypatch.setitem(DOMAINS, "heights", f"{__name__}:Hills")
    monkeypatch.setitem(intakes.KINDS, "places", f"{__name__}:Places")


RECIPE = {
    "system": "train",
    "task": "heights",
    "data": {"source": "hills", "steep": 2.0},
    "student": {"model": "net-16", "training": {"epochs": 6, "lr": 0.1, "batch_size": 16}},
    "baseline": {"model": "net-1", "training": {"epochs": 6, "lr": 0.1, "batch_size": 16}},
    "seeds": 3,
    "engine": {"device": "cpu", "checkpoint_seconds": 0.0},
}


def run(path: Path, **change) -> Run:
    recipe = recipes.validate(recipes.merged(RECIPE, change))
    return distillation.start(recipe, path, Voice(quiet=True))


def test_a_recipe_of_any_domain_runs_is_measured_and_reported(tmp_path):
    done = run(tmp_path / "run")
    result = done.result()
    assert result["task"] == "heights"
    assert result["metric"] == {"name": "squared error", "higher_is_better": False}
    assert result["multiply_adds"] == {"student": 2 * 16 + 16, "baseline": 2 + 1}
    assert result["verdict"]["word"] in ("better", "not decided")
    assert all(seed["student"] < seed["baseline"] for seed in result["seeds"])
    assert "lower is better" in (done.path / "report.html").read_text()


def test_its_network_is_stored_with_what_it_is_fed_and_evaluated_by_its_run(tmp_path):
    done = run(tmp_path / "run")
    student = load(done.path / "student")
    assert student.input == Places((0.5, 0.0))
    found = distillation.measure(f"run:{done.path}", "hills")
    assert found["squared error"] == done.result()["student"]
    weighed = distillation.weigh(f"run:{done.path}", (3, 8, 8), 10)
    assert weighed["parameters"] == 2 * 16 + 16 + 16 + 1
    with pytest.raises(UserError, match="limbeck predict knows image classifiers only"):
        distillation.recognise(f"run:{done.path}", [Path("hill.txt")])


def test_it_resumes_to_the_same_bits(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    loss, calls = Heights.loss, []

    def failing(self, answer, batch):
        calls.append(1)
        if len(calls) == 40:
            raise RuntimeError("the power went")
        return loss(self, answer, batch)

    monkeypatch.setattr(Heights, "loss", failing)
    with pytest.raises(RuntimeError, match="the power went"):
        run(tmp_path / "cut")
    monkeypatch.setattr(Heights, "loss", loss)
    distillation.resume(tmp_path / "cut", Voice(quiet=True))
    ours, theirs = (load(tmp_path / p / "student").state_dict() for p in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert Run.open(tmp_path / "cut").result()["seeds"] == whole.result()["seeds"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": {"augment": {}}}, r"no key 'data\.augment', which is of the task classification"),
        ({"data": {"stepp": 1}}, r"no key 'data\.stepp'; did you mean steep"),
        ({"student": {"model": "timm:resnet18"}}, "no model of timm can be fed points in 2 dim"),
        ({"student": {"model": "resnet8"}}, "there is no network named 'resnet8'"),
        ({"task": "height"}, "there is no task 'height'; did you mean heights"),
    ],
)
def test_what_the_domain_does_not_know_is_one_sentence(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        run(tmp_path / "run", **change)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
