import math
import sys
from dataclasses import replace

import pytest
import torch

from carrying import noise
from limbeck.data import ResidentImages
from limbeck.data.boxed import Boxed
from limbeck.errors import UserError
from limbeck.models.build import build, load, save
from limbeck.models.detectors import Asked, BoxedInput, small
from limbeck.tasks import domain
from limbeck.tasks.detection import (
    BEND,
    Detection,
    DetectionWords,
    ImageDetection,
    box_loss,
    by_class,
    measures,
)
from limbeck.training.phases import Training
from limbeck.training.progress import Voice
from limbeck.training.taps import Taps
from limbeck.training.teacher import Teacher

CLASSES = ("circle", "square")
TASK = Detection(CLASSES)
INPUT = BoxedInput(3, (48, 64), (0.5,) * 3, (0.25,) * 3)


def net(name: str = "rcnn-4-8-12-16", seed: int = 0):
    return build(name, CLASSES, INPUT, seed)


def split(number: int = 5) -> Boxed:
    pixels = (255 * noise(number, 3, 48, 64).sigmoid()).byte()
    boxes = torch.tensor([[4.0, 4, 20, 24], [30, 10, 54, 40]]).expand(number, 2, 4).clone()
    labels = torch.tensor([[1, 2], [2, 0]])[torch.arange(number) % 2]
    return Boxed("test", ResidentImages(pixels), labels, boxes=boxes)


def batch() -> dict:
    return next(TASK.batches(split(), batch_size=5, train=True).epoch(0))


def found(boxes: list, labels: list, scores: list | None = None) -> dict:
    answer = {"boxes": torch.tensor(boxes).float().view(-1, 4), "labels": torch.tensor(labels)}
    return answer if scores is None else {**answer, "scores": torch.tensor(scores)}


# What is measured.


def test_precision_has_the_values_worked_out_by_hand():
    truth = [found([[0, 0, 10, 10], [20, 20, 30, 30]], [1, 1])]
    half = [found([[0, 0, 10, 10], [50, 50, 60, 60]], [1, 1], [0.9, 0.8])]
    # Recall 0 to 0.5 at a precision of 1, on 101 points of which 51 are reached.
    assert measures(half, truth)["mAP@0.5"] == pytest.approx(51 / 101)
    wrong = [found([[0, 0, 10, 10]], [2], [0.9])]
    assert measures(wrong, truth)["mAP@0.5"] == 0
    loose = [found([[0, 0, 10, 6], [20, 20, 30, 26]], [1, 1], [0.9, 0.8])]
    assert measures(loose, truth)["mAP@0.5"] == pytest.approx(1)
    assert measures(loose, truth)["mAP@0.75"] == 0


def test_each_class_has_a_precision_of_its_own():
    truth = [found([[0, 0, 10, 10], [20, 20, 30, 30]], [1, 2])]
    one = [found([[0, 0, 10, 10]], [1], [0.9])]
    assert by_class(one, truth) == {1: pytest.approx(1), 2: 0}


def test_a_box_that_is_not_counted_is_neither_missed_nor_a_false_alarm():
    truth = found([[0, 0, 10, 10], [20, 20, 30, 30]], [1, 1]) | {"iscrowd": torch.tensor([0, 1])}
    one = found([[0, 0, 10, 10]], [1], [0.9])
    both = found([[20, 20, 30, 30], [0, 0, 10, 10]], [1, 1], [0.99, 0.9])
    assert measures([one], [truth])["mAP@0.5"] == pytest.approx(1)
    assert measures([both], [truth])["mAP@0.5"] == pytest.approx(1)


# What is learnt.


def test_the_loss_is_cross_entropies_and_smooth_errors_over_the_sampled_boxes():
    torch.manual_seed(0)
    answer = TASK.run(net().train(), batch())
    total = 0.0
    chosen = answer["anchor_label"] >= 0
    label = answer["anchor_label"][chosen].double()
    z = answer["objectness"][chosen].double()
    p = 1 / (1 + (-z).exp())
    total += float(-(label * p.log() + (1 - label) * (1 - p).log()).mean())
    apart = (
        (answer["offsets"] - answer["anchor_target"]).abs()[answer["anchor_label"] == 1].double()
    )
    b = BEND["rpn"]
    smooth = torch.where(apart < b, apart.square() / (2 * b), apart - b / 2)
    total += float(smooth.sum()) / int(chosen.sum())
    logits, label = answer["logits"].double(), answer["label"]
    own = logits[torch.arange(len(label)), label]
    total += float((logits.exp().sum(1).log() - own).mean())
    there = (label > 0).nonzero().flatten()
    apart = (answer["corrections"][there, label[there]] - answer["target"][there]).abs().double()
    total += float(torch.where(apart < 1, apart.square() / 2, apart - 0.5).sum()) / len(label)
    assert TASK.loss(answer, batch()).item() == pytest.approx(total, rel=1e-5)


def test_sampled_proposals_hold_the_true_boxes_with_no_offset_to_learn():
    torch.manual_seed(0)
    answer = TASK.run(net().train(), batch())
    exact = (answer["target"].abs().max(1).values < 1e-5) & (answer["label"] > 0)
    assert int(exact.sum()) == 3 * 2 + 2 * 1, "a true box is among the proposals"
    of = answer["proposals"][:, 0]
    assert of.unique().tolist() == [0, 1, 2, 3, 4]
    head = TASK.heads(answer, answer)["rcn"]
    assert box_loss(head).item() >= 0


def test_a_detector_learns_where_the_bright_squares_are():
    torch.manual_seed(0)
    pixels = torch.zeros(16, 3, 48, 64, dtype=torch.uint8)
    boxes = torch.zeros(16, 1, 4)
    for n in range(16):
        left, top = 6 * (n % 4) + 4, 8 * (n // 4)
        pixels[n, :, top : top + 16, left : left + 16] = 255
        boxes[n, 0] = torch.tensor([left, top, left + 16, top + 16])
    data = Boxed("train", ResidentImages(pixels), torch.ones(16, 1).long(), boxes=boxes)
    network = net().train()
    settings = Training(optimiser="adamw", lr=0.01)
    optimiser = settings.build(network.parameters())
    before = TASK.measure(network, data)["mAP@0.5"]
    for epoch in range(15):
        for images in TASK.batches(data, batch_size=4, train=True).epoch(epoch):
            optimiser.zero_grad()
            TASK.loss(TASK.run(network, images), images).backward()
            optimiser.step()
    assert before < 0.2
    assert TASK.measure(network, data)["mAP@0.5"] > 0.8
    assert network.training


# What a detector is asked.


def test_boxes_are_found_in_the_pixels_of_the_view_whatever_the_networks_size():
    network = net().eval()
    with torch.no_grad():
        own = TASK.predict(network, split())
        view = torch.nn.functional.interpolate(
            split().images.pixels.float(), (96, 128), mode="nearest"
        )
        large = replace(split(), images=ResidentImages(view.byte()))
        twice = TASK.predict(network, large)
    assert len(own) == len(twice) == 5
    scale = INPUT.scale(torch.zeros(1, 3, 96, 128))
    assert scale.tolist() == [0.5] * 4
    for boxes in twice:
        assert float(boxes["boxes"].max()) <= 128
    asked = Asked(torch.zeros(1, 3, 96, 128), torch.tensor([[[8.0, 8, 40, 40]]]), torch.ones(1, 1))
    fed = INPUT(asked)
    assert fed.boxes.tolist() == [[[4, 4, 20, 20]]]
    assert fed.images.shape == (1, 3, 48, 64)


def test_proposals_that_are_given_are_judged_and_no_others():
    network, given = net().eval(), torch.tensor([[0, 4.0, 4, 20, 24], [2, 8, 8, 30, 30]])
    asked = {**batch(), "proposed": given}
    with torch.no_grad():
        answer = TASK.run(network, asked)
    assert torch.equal(answer["proposals"], given)
    assert answer["logits"].shape == (2, 3)
    assert answer["corrections"].shape == (2, 3, 4)


def test_corners_stay_in_full_precision_where_products_are_rounded():
    with torch.autocast("cpu", torch.bfloat16):
        answer = TASK.run(net().train(), batch())
        assert math.isfinite(TASK.loss(answer, batch()))
    assert answer["logits"].dtype == torch.bfloat16
    assert answer["proposals"].dtype == answer["target"].dtype == torch.float32
    teacher = Teacher(net(), precision=torch.bfloat16)
    with pytest.raises(UserError, match="detectors answer in float32; leave engine"):
        teacher(TASK, batch())


def test_taps_see_the_trunk_and_the_region_head():
    network = net()
    with Taps(network.model, ["backbone.stage2", "roi_heads.box_head"]) as taps:
        answer = TASK.run(network.train(), batch(), taps)
    assert answer.features["backbone.stage2"].shape == (5, 8, 12, 16)
    assert answer.features["roi_heads.box_head"].shape == (len(answer["label"]), 16)


def test_small_detectors_grow_with_their_widths():
    sizes = [
        sum(p.numel() for p in small(widths, units, 4).parameters())
        for widths, units in (((8, 16, 32, 32), 64), ((16, 32, 64, 64), 128))
    ]

    def worked_out(widths, units):
        total, before = 0, 3
        for width in widths:
            total += 9 * before * width + 9 * width * width + 4 * width
            before = width
        total += (9 * before + 1) * before + (before + 1) * (9 + 36)
        return total + (25 * before + 1) * units + (units + 1) * units + (units + 1) * 4 * 5

    assert sizes == [worked_out((8, 16, 32, 32), 64), worked_out((16, 32, 64, 64), 128)]


def test_a_stored_detector_finds_the_same_again(tmp_path):
    network = net().eval()
    save(network, tmp_path / "detector", {"task": "detection"})
    again = load(tmp_path / "detector").eval()
    assert again.input == INPUT
    for one, other in zip(
        TASK.predict(network, split()), TASK.predict(again, split()), strict=True
    ):
        assert torch.equal(one["boxes"], other["boxes"])


def test_the_detectors_of_torchvision_can_be_had_for_any_classes():
    network = build("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", CLASSES, INPUT, 0)
    answer = TASK.run(network.train(), batch())
    assert answer["logits"].shape[1] == 3
    assert math.isfinite(TASK.loss(answer, batch()))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet8", "there is no detector named 'resnet8'; known: rcnn-8-16-32-32-64"),
        ("rcnn-8-0-3", "there is no detector named"),
        ("torchvision:resnet18", "torchvision has no Faster R-CNN named 'resnet18'"),
        ("timm:resnet18", "no model of timm can be fed images of 48 x 64 pixels with boxes"),
        ("rcnn-8-16-32-32-64@pretrained", "Limbeck ships no weights"),
    ],
)
def test_a_detector_that_there_is_not_is_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        net(name)
    assert "\n" not in str(caught.value)


def test_several_teachers_are_one_sentence():
    with pytest.raises(UserError, match="several detectors find cannot be averaged"):
        TASK.measure(Teacher([net(), net()]), split())


# The domain.


def ground(**words) -> ImageDetection:
    return ImageDetection(
        DetectionWords(source="scenes", **words),
        device=torch.device("cpu"),
        workers=0,
        voice=Voice(quiet=True),
    )


def test_the_words_of_a_recipe_choose_size_number_and_classes():
    assert domain("detection") is ImageDetection
    found = ground(size=(32, 40), limit=20, merge=True)
    assert found.classes == ("thing",)
    assert len(found.splits["train"]) == len(found.splits["transfer"]) == 20
    assert found.sample().shape == (1, 3, 32, 40)
    assert found.splits["train"].labels.unique().tolist() == [0, 1]
    with pytest.raises(UserError, match=r"by data\.flip; leave the model's augment out"):
        found.task(augment={"crop": 4})


def test_without_its_extra_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UserError, match=r"pip install 'limbeck\[detection\]'"):
        ground()
