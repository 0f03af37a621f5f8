"""KTAN for detectors: the map of the trunk, a layer that says what an image shows."""

import pytest
import torch

from carrying import carry_out, same, struck
from limbeck.data import boxed
from limbeck.errors import UserError
from limbeck.models.build import build
from limbeck.models.detectors import BoxedInput
from limbeck.systems.classification.ktan import KTANDetection, shown
from limbeck.tasks.classification import Classification
from limbeck.tasks.detection import Detection
from limbeck.training.bench import Bench, Candidate
from limbeck.training.engine import Engine
from limbeck.training.phases import Training


def bench() -> Bench:
    data = boxed.merged(boxed.load("scenes"))
    input = BoxedInput(3, data.size, data.mean, data.std)
    training = Training(epochs=2, batch_size=4, lr=0.01)
    train = data.train.subset(range(12))
    return Bench(
        task=Detection(data.classes),
        train=train,
        transfer=train,
        validation=data.validation.subset(range(3)),
        test=data.test.subset(range(3)),
        candidates=[Candidate(build("rcnn-6-8-12-24", data.classes, input, 1), training)],
        make_student=lambda seed: build("rcnn-4-8-12-16", data.classes, input, seed),
        training=training,
        engine=Engine(device="cpu", checkpoint_seconds=0.0),
    )


def method() -> KTANDetection:
    return KTANDetection(layer=Training(epochs=2, batch_size=4, optimiser="adam", lr=1e-3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Bench:
    laid = bench()
    carry_out(tmp_path_factory.mktemp("whole") / "run", method(), laid)
    return laid


@pytest.mark.parametrize("phase", ["layer", "student"])
def test_a_run_goes_on_where_it_failed_to_the_same_bits(tmp_path, whole, phase):
    def pull(found):
        if found.name == phase:
            update = found.updates[-1]
            # After the audit and one epoch of three steps.
            update.terms = struck(update.terms, 5)

    with pytest.raises(RuntimeError, match="the power went"):
        carry_out(tmp_path / "run", method(), bench(), pull)
    again = bench()
    carry_out(tmp_path / "run", method(), again)
    assert same(again.students[0], whole.students[0])


def test_the_student_differs_from_the_plain_one(whole):
    assert not same(whole.students[0], whole.baselines[0])


def test_what_an_image_shows_is_its_classes_without_boxes_that_do_not_count():
    labels = torch.tensor([[1, 3, 3], [2, -2, 0], [0, 0, 0]])
    assert shown(labels, 3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_the_layer_learns_by_the_entropy_of_each_class():
    logits = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    loss = KTANDetection()._classified(Detection("ab"), logits, {"label": torch.tensor([[2, 0]])})
    expected = (torch.tensor(2.0).log() + (1 + torch.tensor(-2.0).exp()).log()) / 2
    assert loss.item() == pytest.approx(expected.item())


def test_other_tasks_are_refused():
    with pytest.raises(UserError, match="KTANDetection works on detection, not on classification"):
        KTANDetection().check_task(Classification("ab"))


def test_the_command_line_knows_it_by_the_papers_name(command, tmp_path):
    quick = ["data.limit=12", "student.training.epochs=1", "teacher.training.epochs=1"]
    quick += ["methods.ktan:detection.layer.epochs=1"]
    words = [word for setting in quick for word in ("--set", setting)]
    path = tmp_path / "run"
    status, said, wrong = command("run", "ktan", "--preset", "detection", *words, "--out", path)
    assert (status, wrong) == (0, "")
    assert "layer: first batch labels" in said
    page = (path / "report.html").read_text()
    assert "Test image 1, distilled student" in page
    assert "Discriminator" in page
