import math

import pytest
import torch
from torch import nn

from limbeck import distillation, recipes
from limbeck.data.data import ResidentImages
from limbeck.data.scenes import Lanes, Scenes
from limbeck.errors import UserError
from limbeck.models import load
from limbeck.tasks.lanes import LaneDetection, read_off, tusimple_scores
from limbeck.training.network import Network
from limbeck.training.progress import Voice
from limbeck.training.task import Answer

CLASSES = ("background", "left 1", "right 1")
ROWS = torch.arange(100, 700, 50)
"""Twelve rows."""


def upright(*columns: float) -> Lanes:
    return Lanes(torch.tensor(columns)[:, None].expand(-1, 12).clone(), ROWS, (720, 1280))


# The challenge's measure.


def test_the_true_lanes_score_fully():
    lanes = upright(300.0, 700.0)
    assert tusimple_scores(lanes.x, lanes) == (1.0, 0.0, 0.0)
    assert tusimple_scores(lanes.x.flip(0), lanes) == (1.0, 0.0, 0.0), "in whatever order"


def test_a_point_is_right_within_twenty_pixels():
    lanes = upright(300.0)
    near, far = (lanes.x + off for off in (19.9, 20.0))
    assert tusimple_scores(near, lanes) == (1.0, 0.0, 0.0)
    assert tusimple_scores(far, lanes) == (0.0, 1.0, 1.0)


def test_a_slanting_lane_has_more_room_along_the_row():
    x = 100 + 1.0 * (ROWS - 100.0)  # 45 degrees: 20 sqrt 2 = 28.28
    lanes = Lanes(x[None], ROWS, (720, 1280))
    assert tusimple_scores(lanes.x + 28.2, lanes)[0] == 1
    assert tusimple_scores(lanes.x + 28.4, lanes)[0] == 0


def test_a_lane_is_missed_below_85_percent_of_its_points_and_still_counts_with_them():
    lanes = upright(300.0)
    said = lanes.x.clone()
    said[0, :1] = 900
    assert tusimple_scores(said, lanes) == (11 / 12, 0.0, 0.0)
    said[0, :2] = 900  # 10 of 12 are 83 %
    assert tusimple_scores(said, lanes) == (10 / 12, 1.0, 1.0)


def test_rows_without_a_point_are_right_where_neither_has_one():
    lanes = upright(300.0)
    lanes.x[0, :6] = -2
    assert tusimple_scores(lanes.x, lanes)[0] == 1
    everywhere = torch.full((1, 12), 300.0)
    assert tusimple_scores(everywhere, lanes)[0] == 0.5


def test_a_lane_too_many_is_a_false_positive_and_three_too_many_void_the_image():
    lanes = upright(300.0)
    one_more = upright(300.0, 900.0).x
    assert tusimple_scores(one_more, lanes) == (1.0, 0.5, 0.0)
    many = upright(300.0, 900.0, 1000.0, 1100.0).x
    assert tusimple_scores(many, lanes) == (0.0, 0.0, 1.0)


def test_of_five_true_lanes_one_may_be_missed():
    lanes = upright(100.0, 300.0, 500.0, 700.0, 900.0)
    assert tusimple_scores(lanes.x[:4], lanes) == (1.0, 0.0, 0.0)
    accuracy, false, missed = tusimple_scores(lanes.x[:3], lanes)
    assert (accuracy, false, missed) == (0.75, 0.0, 0.25)


def test_nothing_said_misses_every_lane_and_nothing_true_is_no_failure():
    lanes, none = upright(300.0, 700.0), torch.full((2, 12), -2.0)
    assert tusimple_scores(none, lanes) == (0.0, 0.0, 1.0)
    empty = Lanes(torch.zeros(0, 12), ROWS, (720, 1280))
    assert tusimple_scores(none, empty) == (0.0, 0.0, 0.0)
    assert tusimple_scores(lanes.x, empty) == (0.0, 1.0, 0.0)


# What a network sees.


def test_a_lane_is_read_off_where_it_is_most_probable():
    lanes = upright()
    seen = torch.zeros(72, 128, 3)
    seen[:, 30, 1] = 0.9
    seen[:, 90, 2] = 0.29
    said = read_off(seen, torch.tensor([True, True]), lanes)
    assert said[0].tolist() == [30.5 * 10 - 0.5] * 12
    assert said[1].tolist() == [-2.0] * 12, "nowhere probable enough"
    assert read_off(seen, torch.tensor([False, True]), lanes)[0].tolist() == [-2.0] * 12
    seen[:] = 0
    seen[10, 30, 1] = 0.9  # the row of one of the points
    assert (read_off(seen, torch.tensor([True, True]), lanes) == -2).all(), "one point is no lane"


def test_the_loss_is_that_of_the_pixels_and_of_which_lanes_there_are():
    labels = torch.tensor([[[0, 1]]])
    task = LaneDetection(CLASSES, [0.4, 1.0, 1.0])
    batch = {"label": labels, **task.more(labels)}
    assert batch["there"].tolist() == [[1.0, 0.0]]
    said = Answer({"logits": torch.zeros(1, 1, 2, 3), "existence": torch.tensor([[1.0, -2.0]])})
    existence = -(math.log(1 / (1 + math.exp(-1))) + math.log(1 - 1 / (1 + math.exp(2)))) / 2
    expected = math.log(3) + 0.1 * existence
    assert float(task.loss(said, batch)) == pytest.approx(expected, rel=1e-6)


class Seen(nn.Module):
    """Holds the lanes to be where the image is red, green."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        logits = torch.cat([torch.zeros_like(x[:, :1]), 20 * x[:, :2] - 10], 1)
        return logits, x[:, :2].flatten(2).amax(2) * 2 - 1


def test_a_network_that_sees_the_lanes_scores_fully():
    masks = torch.zeros(2, 72, 128, dtype=torch.uint8)
    masks[:, :, 30], masks[1, :, 90] = 1, 2
    pixels = torch.stack([masks == 1, masks == 2, masks == 3], 1).to(torch.uint8) * 255
    lanes = (upright(300.0), upright(300.0, 900.0))
    split = Scenes("test", ResidentImages(pixels), None, masks=masks, lanes=lanes)
    found = LaneDetection(CLASSES).measure(Network(Seen()), split)
    assert found == {
        "lane accuracy": 1.0,
        "false positives": 0.0,
        "false negatives": 0.0,
        "lane IoU": 1.0,
    }


# The domain.

RECIPE = {
    "system": "train",
    "task": "lanes",
    "data": {"source": "roads", "size": [32, 48], "limit": 32},
    "student": {
        "model": "dilated-resnet10-8",
        "training": {"epochs": 1, "batch_size": 16, "lr": 0.05},
    },
    "engine": {"device": "cpu", "threads": 1},
}


def run(path, **change):
    return distillation.start(
        recipes.validate(recipes.merged(RECIPE, change)), path, Voice(quiet=True)
    )


def test_a_run_on_generated_roads_is_measured_stored_and_shown(tmp_path):
    done = run(tmp_path / "run")
    result = done.result()
    assert set(result["measures"]["student"]) == {
        "lane accuracy",
        "false positives",
        "false negatives",
        "lane IoU",
    }
    assert "left 2" in (done.path / "report.html").read_text()
    assert load(done.path / "student").input.kind == "lanes"


def test_the_published_frames_can_be_trained_and_measured_on(tmp_path, real_data):
    source = str(real_data("tusimple_lane_sample"))
    done = run(
        tmp_path / "run", data={"source": source, "validation": 0}, student={"model": "enet"}
    )
    assert 0 <= done.result()["student"] <= 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": {"source": "digit-scenes"}}, "no data source 'digit-scenes' for this task"),
        ({"data": {"augment": {"flip": True}}}, "a mirrored road has its lanes at other places"),
        ({"data": {"lanes": 3}}, r"data\.lanes=3"),
        ({"data": {"balance": True}}, r"no key 'data\.balance', which is of the task segmentation"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        run(tmp_path / "run", **change)
    assert "\n" not in str(caught.value)


def test_a_model_without_an_answer_on_existence_is_one_sentence():
    network = Network(nn.Conv2d(3, 3, 1))
    with pytest.raises(UserError, match="a model for lanes puts out two tensors"):
        LaneDetection(CLASSES).run(network, {"image": torch.zeros(1, 3, 4, 4)})
