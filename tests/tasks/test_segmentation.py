import json
import math

import pytest
import torch
from torch import nn

from carrying import noise
from limbeck import distillation, recipes
from limbeck.data.data import ResidentImages
from limbeck.data.scenes import IGNORE, Scenes, Warp
from limbeck.errors import UserError
from limbeck.models import load
from limbeck.report.segmentation import palette
from limbeck.tasks.segmentation import Segmentation, iou
from limbeck.training.network import Network
from limbeck.training.progress import Voice
from limbeck.training.task import Answer


def answer(labels: torch.Tensor, classes: int) -> Answer:
    return Answer({"logits": noise(*labels.shape, classes, dtype=torch.float32)})


def test_pixels_without_a_class_count_nowhere():
    labels = torch.tensor([[[0, 1], [2, IGNORE]]])
    said = answer(labels, 3)
    rows = said["logits"].double().flatten(0, 2).log_softmax(1)
    expected = -sum(float(rows[i, c]) for i, c in ((0, 0), (1, 1), (2, 2))) / 3
    assert float(Segmentation("abc").loss(said, {"label": labels})) == pytest.approx(expected)
    none = torch.full_like(labels, IGNORE)
    assert float(Segmentation("abc").loss(said, {"label": none})) == 0


def test_a_class_weighs_as_much_as_is_said():
    labels = torch.tensor([[[0, 1], [1, IGNORE]]])
    said = answer(labels, 2)
    rows = said["logits"].double().flatten(0, 2).log_softmax(1)
    parts = [(0.4, float(rows[0, 0])), (1.0, float(rows[1, 1])), (1.0, float(rows[2, 1]))]
    expected = -sum(w * v for w, v in parts) / 2.4
    task = Segmentation("ab", [0.4, 1.0])
    assert float(task.loss(said, {"label": labels})) == pytest.approx(expected)


class Told(nn.Module):
    """Says the class that the image's red names, in steps of 10."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        said = (x[:, 0] * 25.5).round().long()
        return nn.functional.one_hot(said, self.classes).permute(0, 3, 1, 2).float() * 9


def scenes(said: torch.Tensor, true: torch.Tensor) -> Scenes:
    pixels = (said * 10)[:, None].expand(-1, 3, -1, -1).to(torch.uint8)
    return Scenes("test", ResidentImages(pixels), None, masks=true.to(torch.uint8))


def test_the_measures_are_those_counted_by_hand_and_of_torchmetrics():
    from torchmetrics.classification import MulticlassJaccardIndex

    generator = torch.Generator().manual_seed(0)
    said, true = (torch.randint(0, 3, (20, 6, 5), generator=generator) for _ in range(2))
    true[:, 0] = IGNORE
    found = Segmentation("abcd").measure(Network(Told(4)), scenes(said, true))
    known = true != IGNORE
    by_hand = []
    for c in range(3):  # the fourth class is neither there nor predicted
        one, other = said[known] == c, true[known] == c
        by_hand.append(float((one & other).sum() / (one | other).sum()))
    assert found["mean IoU"] == pytest.approx(sum(by_hand) / 3)
    assert found["pixel accuracy"] == pytest.approx(float((said == true)[known].float().mean()))
    library = MulticlassJaccardIndex(4, ignore_index=IGNORE)(said, true)
    assert found["mean IoU"] == pytest.approx(float(library))


def test_a_class_never_seen_has_no_iou_of_its_own():
    counts = torch.zeros(3, 3)
    counts[0, 0] = 4
    assert iou(counts).tolist() == [1, 0, 0]
    true = torch.zeros(2, 4, 4)
    task = Segmentation("abc")
    facts = task.compare({"student": Network(Told(3))}, scenes(true, true))
    assert facts["class_iou"]["student"] == {"a": 1.0, "b": None, "c": None}


def test_measuring_leaves_the_mode_alone_and_needs_scenes():
    network = Network(Told(3)).train()
    true = torch.zeros(2, 4, 4)
    task = Segmentation("abc")
    task.measure(network, scenes(true, true))
    assert network.training
    with pytest.raises(UserError, match="no scenes to measure on"):
        task.measure(network, scenes(true, true).subset([]))


def test_answers_have_the_size_of_the_image_and_classes_last():
    class Half(nn.Module):
        def forward(self, x):
            return nn.functional.avg_pool2d(x, 2)

    said = Segmentation("abc").run(Network(Half()), {"image": torch.zeros(2, 3, 6, 8)})
    assert said["logits"].shape == (2, 6, 8, 3)


def test_several_teachers_are_averaged_pixel_by_pixel():
    one, other = (noise(2, 3, 4, 5, seed=s, dtype=torch.float32) for s in (1, 2))
    weights = torch.tensor([0.25, 0.75])
    answers = [Answer({"logits": one}), Answer({"logits": other})]
    task = Segmentation("abcde")
    mixed = task.combine(answers, weights, "probabilities")["logits"].softmax(-1)
    expected = 0.25 * one.softmax(-1) + 0.75 * other.softmax(-1)
    assert torch.allclose(mixed, expected, atol=1e-6)
    logits = task.combine(answers, weights, "logits")["logits"]
    assert torch.allclose(logits, 0.25 * one + 0.75 * other, atol=1e-6)


def test_a_background_is_black_and_no_thing():
    assert list(Segmentation(("background", "a")).objects) == [1]
    assert list(Segmentation(("sky", "a")).objects) == [0, 1]
    colours = palette(["background", *map(str, range(12))])
    assert len({tuple(c) for c in colours.tolist()}) == 13


# The domain.

RECIPE = {
    "system": "train",
    "task": "segmentation",
    "data": {"source": "digit-scenes", "size": [32, 32], "limit": 32, "balance": True},
    "student": {
        "model": "dilated-resnet10-8",
        "training": {"epochs": 1, "batch_size": 16, "lr": 0.05},
    },
    "baseline": {"model": "enet", "training": {"epochs": 0, "batch_size": 16}},
    "engine": {"device": "cpu", "threads": 1},
}


def run(path, **change):
    return distillation.start(
        recipes.validate(recipes.merged(RECIPE, change)), path, Voice(quiet=True)
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "run")


def test_the_report_shows_masks_and_every_class(done):
    page = (done.path / "report.html").read_text()
    assert "Class by class" in page
    assert "From left to right, row by row: image, true, enet, dilated-resnet10-8" in page
    assert page.count("data:image/png;base64,") == 6
    result = done.result()
    assert result["metric"]["name"] == "mean IoU"
    assert set(result["class_iou"]["student"]) == {"background", *"0123456789"}
    assert 0 < result["measures"]["student"]["pixel accuracy"] < 1


def test_a_stored_network_is_built_again_and_measured(done):
    network = load(done.path / "student")
    assert network.input.kind == "scenes"
    facts = json.loads((done.path / "student.json").read_text())
    assert facts["task"] == "segmentation"
    found = distillation.weigh(f"run:{done.path}", (3, 8, 8), 10)
    assert found["parameters"] == done.result()["parameters"]["student"]
    # The data's own size is another than the network's, whose answer is brought to it.
    assert distillation.measure(f"run:{done.path}", "digit-scenes")["pixel accuracy"] > 0.3


def test_weights_of_balance_are_those_of_enet():
    from limbeck.tasks.scenes import ImageSegmentation, MaskWords

    words = MaskWords(source="digit-scenes", size=(32, 32), balance=True)
    ground = ImageSegmentation(
        words, device=torch.device("cpu"), workers=0, voice=Voice(quiet=True)
    )
    train = ground.splits["train"]
    share = float((train.masks[train.rows] == 0).float().mean())
    assert float(ground.task().weights[0]) == pytest.approx(1 / math.log(1.02 + share), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": {"source": "/nowhere/at/all"}}, "the data path /nowhere/at/all does not exist"),
        ({"data": {"source": "digit-scene"}}, "no data source 'digit-scene' for this task; did yo"),
        ({"data": {"source": "masks:"}}, "no data source 'masks:'"),
        ({"data": {"size": [8, 8]}}, r"data\.size"),
        ({"data": {"augment": {"crop": 2}}}, r"no key 'data\.augment\.crop'"),
        ({"student": {"model": "resnet8"}}, "no network for scenes named 'resnet8'"),
        (
            {"student": {"model": "dilated-resnet11"}},
            "no network for scenes named 'dilated-resnet11",
        ),
        ({"student": {"model": "timm:resnet18"}}, "no model of timm can be fed 3 x 32 x 32 images"),
        ({"student": {"model": "torchvision:fcn"}}, "torchvision has no model for scenes named"),
        ({"baseline": {"augment": {"flip": True}}}, "scenes are augmented alike for all models"),
        (
            {"system": "kd", "methods": {"kd": {}}, "teacher": {"model": "enet"}},
            "KD works on class",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        run(tmp_path / "run", **change)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_warped_scenes_train_to_the_same_bits_after_a_stop(tmp_path, monkeypatch):
    change = {
        "data": {"augment": Warp(zoom=0.7, rotate=5).model_dump()},
        "baseline": False,
        "student": {"training": {"epochs": 2}},
        "engine": {"checkpoint_seconds": 0.0},
    }
    whole = run(tmp_path / "whole", **change)
    loss, calls = Segmentation.loss, []

    def failing(self, *given):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("the power went")
        return loss(self, *given)

    monkeypatch.setattr(Segmentation, "loss", failing)
    with pytest.raises(RuntimeError, match="the power went"):
        run(tmp_path / "cut", **change)
    monkeypatch.setattr(Segmentation, "loss", loss)
    distillation.resume(tmp_path / "cut", Voice(quiet=True))
    ours, theirs = (load(p / "student").state_dict() for p in (tmp_path / "cut", whole.path))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
