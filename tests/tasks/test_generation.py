import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from carrying import struck
from limbeck import distillation, recipes
from limbeck.data.data import ResidentImages, Split
from limbeck.errors import UserError
from limbeck.models import load
from limbeck.tasks.generation import Generation, JudgedGeneration, Penultimate
from limbeck.training.network import Network
from limbeck.training.progress import Voice
from limbeck.training.task import Answer


class Told(nn.Module):
    """Makes the condition itself, brighter by so much of the way from black to white."""

    def __init__(self, brighter: float = 0.0) -> None:
        super().__init__()
        self.brighter = brighter
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return 2 * (x + self.brighter) - 1


class First(nn.Module):
    """A classifier that looks at the first pixel alone."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(1, 2)

    def forward(self, x):
        return self.last(x[:, 0, 0, :1])


def pairs(values, others) -> Split:
    """Grey pairs of single values (0..255), 16 x 16."""
    both = torch.tensor([values, others], dtype=torch.uint8).T
    return Split(
        "test", ResidentImages(both[:, :, None, None].expand(-1, -1, 16, 16).clone()), None
    )


def test_the_loss_is_the_mean_absolute_difference_of_values_from_minus_one_to_one():
    said = torch.tensor([[[[1.0, -1.0]]]], requires_grad=True)
    target = torch.tensor([[[[0.5, 0.0]]]])
    loss = Generation(1).loss(Answer({"image": said}), {"target": target})
    assert float(loss) == pytest.approx(0.75)
    loss.backward()
    assert said.grad.flatten().tolist() == [0.5, -0.5]


def test_the_measures_are_those_counted_by_hand():
    split = pairs([51, 102], [51, 102])
    exact = Generation(1).measure(Network(Told()), split)
    assert exact["SSIM"] == pytest.approx(1, abs=1e-5)
    assert exact["absolute error"] == pytest.approx(0, abs=1e-6)
    off = Generation(1).measure(Network(Told(0.1)), split)
    assert off["absolute error"] == pytest.approx(0.1, abs=1e-5)
    assert off["PSNR"] == pytest.approx(10 * math.log10(1 / 0.01), abs=1e-3)
    # Of flat images only the first factor of the similarity differs from 1.
    factors = [(2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4) for a, b in ((0.2, 0.3), (0.4, 0.5))]
    assert off["SSIM"] == pytest.approx(sum(factors) / 2, abs=1e-4)


def test_what_leaves_the_range_is_cut_off():
    found = Generation(1).measure(Network(Told(5.0)), pairs([51, 51], [255, 255]))
    assert found["absolute error"] == pytest.approx(0, abs=1e-6)


def test_the_frechet_distance_is_that_of_the_normal_distributions():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Same(nn.Module):
        num_features = 1

        def forward(self, x):
            return x

    # Means 0 and 3, unbiased variances 1 and 4: 9 + 1 + 4 - 2 * 2.
    distance = FrechetInceptionDistance(feature=Same())
    one, other = (torch.tensor([[-s], [s]], dtype=torch.float64) for s in (0.5**0.5, 2**0.5))
    distance.update(one, real=True)
    distance.update(other + 3, real=False)
    assert float(distance.compute()) == pytest.approx(10)


def test_a_judge_compares_what_its_last_layer_reads():
    values = [20, 60, 120]
    task = JudgedGeneration(Network(First()), 1)
    found = task.measure(Network(Told(0.1)), pairs(values, values))
    assert task.metric == "Fréchet distance"
    assert task.better(1.0, 2.0)
    # The spread is the same, so what is left is the square of the difference of the means.
    assert found["Fréchet distance"] == pytest.approx(0.01, abs=1e-5)
    same = task.measure(Network(Told()), pairs(values, values))
    assert same["Fréchet distance"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="two images or more"):
        task.measure(Network(Told()), pairs([9], [9]))
    with pytest.raises(UserError, match="it has no linear layer"):
        Penultimate(Network(nn.Conv2d(1, 1, 1)))


# The domain.

RECIPE = {
    "system": "nst",
    "task": "generation",
    "data": {"source": "photographs", "size": [16, 16], "limit": 24},
    "teacher": {
        "model": "resnet-generator-8-2",
        "training": {"epochs": 1, "batch_size": 8, "lr": 0.01},
    },
    "student": {
        "model": "resnet-generator-4-1",
        "training": {"epochs": 2, "batch_size": 8, "lr": 0.01},
    },
    "methods": {"nst": {"student_layers": ["9", "10"], "teacher_layers": ["9", "11"]}},
    "engine": {"device": "cpu", "threads": 1},
}


def run(path, **change):
    values = recipes.merged(RECIPE, change)
    values["methods"] = change.get("methods", values["methods"])
    return distillation.start(recipes.validate(values), path, Voice(quiet=True))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "run")


def test_the_report_shows_what_each_network_makes(done):
    page = (done.path / "report.html").read_text()
    assert "What is made" in page
    # Six pairs: what is given, what is true, and what teacher and two students make.
    assert page.count("data:image/png;base64,") == 30
    kept = load_file(done.path / "made.safetensors")
    assert kept["given"].shape == (6, 1, 16, 16)
    assert kept["made.student"].shape == kept["true"].shape == (6, 3, 16, 16)
    result = done.result()
    assert result["metric"] == {"name": "SSIM", "higher_is_better": True}
    assert result["student"] == result["measures"]["student"]["SSIM"]


def test_a_stored_generator_is_built_again_and_measured_at_any_size(done):
    network = load(done.path / "student")
    assert network.input.kind == "conditions"
    assert network.classes == ("red", "green", "blue")
    assert json.loads((done.path / "student.json").read_text())["task"] == "generation"
    assert distillation.measure(f"run:{done.path}", "photographs")["PSNR"] > 3


def test_a_trained_classifier_judges(tmp_path):
    values = recipes.for_own_models([], "digits", "cnn-4-8", {"epochs": 1})
    judge = distillation.start(recipes.validate(values), tmp_path / "judge", Voice(quiet=True))
    data = {
        "source": "digits",
        "size": [16, 16],
        "condition": "edges",
        "judge": f"run:{judge.path}",
    }
    found = run(tmp_path / "run", data=data, student={"training": {"epochs": 1}}).result()
    assert found["metric"] == {"name": "Fréchet distance", "higher_is_better": False}
    assert found["student"] > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": {"source": "/nowhere/at/all"}}, "no source of images '/nowhere/at/all'"),
        ({"data": {"source": "photograph"}}, "no source of images 'photograph'; did you mean ph"),
        ({"data": {"source": "pairs:"}}, "pairs: wants a path behind the colon"),
        ({"data": {"source": "pairs:/nowhere"}}, "the data path /nowhere does not exist"),
        ({"data": {"size": [18, 16]}}, r"data\.size"),
        ({"data": {"augment": {"mixup": 0.2}}}, r"no key 'data\.augment\.mixup'"),
        ({"data": {"judge": "resnet8"}}, r"data\.judge=resnet8: a trained classifier is wanted"),
        ({"data": {"judge": "run:nowhere"}}, "nowhere"),
        ({"student": {"model": "resnet8"}}, "no generator named 'resnet8'"),
        ({"teacher": {"augment": {"flip": True}}}, "pairs are augmented alike for all models"),
        ({"system": "kd", "methods": {"kd": {}}}, "KD works on class"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        run(tmp_path / "run", **change)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_stopped_run_goes_on_to_the_same_bits_whether_the_teacher_is_remembered_or_not(
    tmp_path, monkeypatch
):
    change = {
        "data": {"augment": {"flip": True, "crop": 2, "views": 1}},
        "engine": {"checkpoint_seconds": 0.0},
    }
    whole = run(tmp_path / "whole", **change)
    loss = Generation.loss
    monkeypatch.setattr(Generation, "loss", struck(loss, 13))
    with pytest.raises(RuntimeError, match="the power went"):
        run(tmp_path / "cut", **recipes.merged(change, {"engine": {"cache": "full"}}))
    monkeypatch.setattr(Generation, "loss", loss)
    distillation.resume(tmp_path / "cut", Voice(quiet=True))
    ours, theirs = (load(p / "student").state_dict() for p in (tmp_path / "cut", whole.path))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
