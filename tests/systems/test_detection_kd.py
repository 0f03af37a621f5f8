import math

import pytest
import torch
from torch import nn

from carrying import carry_out, noise, same, struck
from limbeck import recipes
from limbeck.catalogue import system
from limbeck.data import boxed
from limbeck.errors import UserError
from limbeck.losses import bounded_regression, hint, weighted_soft_targets
from limbeck.models.build import build, load
from limbeck.models.detectors import BoxedInput, large
from limbeck.systems.detection.detection_kd import DetectionKD
from limbeck.tasks.classification import Classification
from limbeck.tasks.detection import BEND, Detection, Head, box_loss
from limbeck.training.bench import Bench, Candidate
from limbeck.training.distiller import Distiller
from limbeck.training.engine import Engine
from limbeck.training.phases import Training

CLASSES = ("circle", "square")
TASK = Detection(CLASSES)
INPUT = BoxedInput(3, (48, 64), (0.5,) * 3, (0.25,) * 3)


def net(name: str = "rcnn-4-8-12-16", seed: int = 0):
    return build(name, CLASSES, INPUT, seed)


def batch() -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[4.0, 4, 20, 24], [30, 10, 54, 40]])
    return {
        "image": noise(3, 3, 48, 64, dtype=torch.float32).sigmoid(),
        "boxes": boxes.expand(3, 2, 4).clone(),
        "label": torch.tensor([[1, 2], [2, 0], [1, 1]]),
    }


def distiller(method: DetectionKD, teacher=None, student=None) -> Distiller:
    student = student or net()
    teacher = teacher or net("rcnn-6-8-12-24", seed=1)
    return Distiller(student, teacher, method, TASK, batch()).train()


def step(module: Distiller, seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)  # which boxes are sampled
    return module(batch())


# The losses.


def test_soft_targets_have_the_values_worked_out_by_hand():
    even = torch.zeros(1, 2, dtype=torch.float64)
    assert weighted_soft_targets(even, even).item() == pytest.approx(1.25 * math.log(2), abs=1e-12)
    assert weighted_soft_targets(even, even, 1.0).item() == pytest.approx(math.log(2), abs=1e-12)


def test_soft_targets_of_equal_distributions_pull_only_where_the_background_weighs_more():
    for weight, still in ((1.0, True), (1.5, False)):
        student = noise(3, 4).requires_grad_()
        weighted_soft_targets(student, noise(3, 4), weight).backward()
        assert bool((student.grad.abs() < 1e-12).all()) is still


def test_soft_targets_follow_an_independent_formula_in_value_and_gradient():
    student, teacher = noise(5, 4).requires_grad_(), noise(5, 4, seed=1).requires_grad_()
    weights, total, gradient = [1.7, 1, 1, 1], 0.0, torch.zeros(5, 4, dtype=torch.float64)
    for n in range(5):
        p = [math.exp(z) for z in student[n].tolist()]
        q = [math.exp(z) for z in teacher[n].tolist()]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total -= sum(w * b * math.log(a) for w, a, b in zip(weights, p, q, strict=True)) / 5
        mass = sum(w * b for w, b in zip(weights, q, strict=True))
        for c in range(4):
            gradient[n, c] = (mass * p[c] - weights[c] * q[c]) / 5
    loss = weighted_soft_targets(student, teacher, 1.7)
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert torch.allclose(student.grad, gradient, atol=1e-14)
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("teacher", "margin", "found"),
    [(2.0, 0.0, 0.0), (0.5, 0.0, 1.0), (2.0, 3.0, 0.0), (2.0, 3.1, 1.0), (1.0, 0.0, 0.0)],
)
def test_the_teacher_bounds_a_box_as_worked_out_by_hand(teacher, margin, found):
    student, target = torch.tensor([[1.0, 0, 0, 0]]), torch.zeros(1, 4)
    bound = torch.tensor([[teacher, 0, 0, 0]])
    assert bounded_regression(student, bound, target, margin).tolist() == [found]


def test_a_bounded_box_has_the_gradient_of_its_squared_error_or_none():
    student, teacher = noise(6, 4).requires_grad_(), noise(6, 4, seed=1).requires_grad_()
    target = noise(6, 4, seed=2)
    wanted, total = torch.zeros(6, 4, dtype=torch.float64), []
    for n in range(6):
        ours = sum((float(a) - float(b)) ** 2 for a, b in zip(student[n], target[n], strict=True))
        theirs = sum((float(a) - float(b)) ** 2 for a, b in zip(teacher[n], target[n], strict=True))
        total.append(ours if ours > theirs else 0.0)
        if ours > theirs:
            wanted[n] = 2 * (student[n].detach() - target[n])
    found = bounded_regression(student, teacher, target)
    found.sum().backward()
    assert 0 < sum(x > 0 for x in total) < 6, "both cases occur"
    assert found.tolist() == pytest.approx(total, rel=1e-12)
    assert torch.allclose(student.grad, wanted, atol=1e-14)
    assert teacher.grad is None


def test_a_heads_offsets_add_up_as_worked_out_by_hand():
    head = Head(
        torch.zeros(1, 2),
        torch.tensor([[1.0, 0, 0, 0]]),
        torch.tensor([1]),
        torch.zeros(1, 4),
    )
    near = Head(head.logits, head.offsets / 2, head.label, head.target)
    far = Head(head.logits, head.offsets * 2, head.label, head.target)
    method = DetectionKD()
    assert method._boxes(head, near, 1.0).item() == pytest.approx(0.5 + 0.5)
    assert method._boxes(head, far, 1.0).item() == pytest.approx(0.5)
    always = DetectionKD(bounded=False)
    assert always._boxes(head, far, 1.0).item() == pytest.approx(0.5 + 0.5)


def test_background_boxes_are_counted_but_not_regressed():
    offsets, target = noise(4, 4), noise(4, 4, seed=1)
    head = Head(noise(4, 3), offsets, torch.tensor([0, 2, 0, 1]), target)
    other = Head(head.logits, noise(4, 4, seed=2), head.label, target)
    method, held = DetectionKD(margin=100.0), [1, 3]
    difference = offsets[held] - target[held]
    size = difference.abs()
    smooth = torch.where(size < 1, difference.square() / 2, size - 0.5).sum() / 4
    wanted = smooth + 0.5 * difference.square().sum() / 4
    assert torch.allclose(method._boxes(head, other, 1.0), wanted)


def test_equal_features_have_no_hint_and_the_mean_is_of_elements():
    one, other = noise(2, 3, 4, 5), noise(2, 3, 4, 5, seed=1).requires_grad_()
    assert hint(one, one) == 0
    assert torch.allclose(hint(one, other), (one - other).square().sum() / 120)
    hint(one.requires_grad_(), other).backward()
    assert other.grad is None


# The method.


def test_without_distillation_it_is_the_undistilled_loss_with_its_gradients():
    plain, distilled = net(), net()
    torch.manual_seed(3)
    TASK.loss(TASK.run(plain.train(), batch()), batch()).backward()
    terms = step(distiller(DetectionKD(hard=1.0, bound=0.0, hint=0.0), student=distilled))
    torch.stack(list(terms.values())).sum().backward()
    for ours, theirs in zip(distilled.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_the_terms_are_those_of_two_heads_and_the_hint():
    module = distiller(DetectionKD())
    terms = step(module)
    assert list(terms) == ["rpn classes", "rpn boxes", "rcn classes", "rcn boxes", "hint"]
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None for p in module.method.adapter.parameters())
    assert all(p.grad is None for n in module.teacher.networks for p in n.parameters())


def test_the_teacher_judges_the_boxes_that_were_sampled_for_the_student():
    student, teacher = net().train(), net("rcnn-6-8-12-24", seed=1).eval()
    torch.manual_seed(0)
    answer = TASK.run(student, batch())
    asked = TASK.run(teacher, TASK.question(batch(), answer))
    assert torch.equal(asked["proposals"], answer["proposals"])
    assert "label" not in asked.outputs, "the truth is the student's to learn"
    ours, theirs = TASK.heads(answer, answer), TASK.heads(asked, answer)
    for name in ("rpn", "rcn"):
        assert torch.equal(ours[name].target, theirs[name].target)
        assert ours[name].logits.shape == theirs[name].logits.shape
        assert not torch.equal(ours[name].logits, theirs[name].logits)


def test_a_teacher_equal_to_its_student_bounds_nothing():
    student, teacher = net().eval(), net().eval()
    method = DetectionKD(hard=1.0, hint=0.0, bound=1000.0)
    module = Distiller(student, teacher, method, TASK, batch())
    for part in student.modules():
        part.training = not isinstance(part, nn.BatchNorm2d)
    torch.manual_seed(3)
    terms = module(batch())
    torch.manual_seed(3)
    heads = TASK.heads(*[TASK.run(student, batch())] * 2)
    for name, head in heads.items():
        assert torch.allclose(terms[f"{name} boxes"], box_loss(head, BEND[name]), atol=1e-5)


def test_the_background_weighs_more_in_the_proposals_too():
    plain, heavy = (step(distiller(DetectionKD(hard=0.0, background=w))) for w in (1.0, 1.5))
    assert heavy["rpn classes"] > plain["rpn classes"]
    assert heavy["rcn classes"] > plain["rcn classes"]


def test_a_hint_may_be_of_rows_and_then_passes_through_a_linear_layer():
    module = distiller(DetectionKD(student_layer="roi_heads.box_head"))
    assert isinstance(module.method.adapter, nn.Linear)
    assert step(module)["hint"] > 0


def test_a_hint_without_adaptation_compares_the_features_themselves():
    teacher = net("rcnn-6-8-12-16", seed=1)
    module = distiller(DetectionKD(adaptation=False), teacher)
    assert not list(module.method.parameters())
    assert step(module)["hint"] > 0


@pytest.mark.parametrize(
    ("method", "teacher", "sentence"),
    [
        (DetectionKD(), "rcnn-4-8-16", "judges 432 anchors .* teacher 1,728; choose two detect"),
        (DetectionKD(adaptation=False), "rcnn-6-8-32-24", "12 channels .* 32, which wants"),
        (DetectionKD(teacher_layer="roi_heads.box_head"), "rcnn-6-8-12-24", "both must be maps"),
        (DetectionKD(student_layer="backbone.stage9"), "rcnn-6-8-12-24", "no module 'backbone.sta"),
    ],
)
def test_what_does_not_fit_is_one_sentence(method, teacher, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        distiller(method, net(teacher))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_compared_or_is_no_detection_is_one_sentence():
    with pytest.raises(UserError, match=r"the teacher's \(2, 4\); both must be"):
        weighted_soft_targets(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(UserError, match=r"all must be \(N, 4\)"):
        bounded_regression(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3, 4))
    with pytest.raises(UserError, match="works on detection, not on classification"):
        DetectionKD().check_task(Classification("ab"))
    with pytest.raises(UserError, match="background"):
        DetectionKD(background=-1.0)


# The run.


def bench(**given) -> Bench:
    data = boxed.merged(boxed.load("scenes"))
    input = BoxedInput(3, data.size, data.mean, data.std)
    training = Training(epochs=2, batch_size=4, lr=0.01)
    train = data.train.subset(range(12))
    return Bench(
        task=Detection(data.classes),
        train=train,
        transfer=train,
        validation=[],
        test=data.test.subset(range(4)),
        candidates=[Candidate(build("rcnn-6-8-12-24", data.classes, input, 1), training)],
        make_student=lambda seed: build("rcnn-4-8-12-16", data.classes, input, seed),
        training=training,
        engine=Engine(device="cpu", checkpoint_seconds=0.0),
        **given,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Bench:
    laid = bench()
    carry_out(tmp_path_factory.mktemp("whole") / "run", DetectionKD(), laid)
    return laid


@pytest.mark.parametrize("phase", ["teacher", "baseline", "student"])
def test_a_run_goes_on_in_every_phase_to_the_same_bits(tmp_path, whole, phase):
    def pull(found):
        if found.name == phase:
            update = found.updates[0]
            # After the audit and one epoch of three steps.
            update.terms = struck(update.terms, 5)

    with pytest.raises(RuntimeError, match="the power went"):
        carry_out(tmp_path / "run", DetectionKD(), bench(), pull)
    again = bench()
    carry_out(tmp_path / "run", DetectionKD(), again)
    assert same(again.students[0], whole.students[0])
    assert same(again.baselines[0], whole.baselines[0])


def test_a_run_leaves_the_adaptation_behind_and_shows_what_is_found(tmp_path, command):
    path = tmp_path / "run"
    quick = ["data.limit=12", "student.training.epochs=1", "teacher.training.epochs=1"]
    words = [word for setting in quick for word in ("--set", setting)]
    status, _, wrong = command("run", "detection-kd", "--preset", "smoke", *words, "--out", path)
    assert (status, wrong) == (0, "")
    stored = load(path / "student")
    assert not any("adapter" in name for name in stored.state_dict())
    page = (path / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 6 * 4
    assert "Test image 1, distilled student" in page
    assert "Class by class" in page
    with torch.no_grad():
        found = stored.eval()(torch.zeros(1, 3, 64, 64))
    assert set(found[0]) == {"boxes", "labels", "scores"}


# The paper's setting.


def test_the_papers_detectors_have_the_published_size_and_the_same_anchors():
    recipe = recipes.validate(recipes.preset(system("detection-kd"), "paper", "voc"))
    names = recipe.teachers[0].model, recipe.student.model
    assert names == ("rcnn-vgg16", "rcnn-alexnet")
    # Convolutions, and the first of the fully connected layers, which is as wide as the second.
    parts = [(14_714_688, 512 * 49, 512), (2_469_696, 256 * 36, 256)]
    cells = []
    for name, (convolutions, pooled, width) in zip(names, parts, strict=True):
        with torch.device("meta"):
            made = large(name.removeprefix("rcnn-"), 21)
            maps = made.backbone(torch.empty(1, 3, *recipe.data.size))
        layers = (pooled + 1) * 4096 + 4097 * 4096 + 4097 * 21 + 4097 * 4 * 21
        proposals = (9 * width + 1) * width + (width + 1) * (9 + 4 * 9)
        assert sum(p.numel() for p in made.parameters()) == convolutions + layers + proposals
        cells.append(maps.shape[2:])
    assert cells[0] == cells[1]
    method = recipe.method()
    assert isinstance(method, DetectionKD)
    assert (method.hard, method.background, method.bound, method.hint) == (0.5, 1.5, 0.5, 0.5)
    assert (method.margin, method.label_weight) == (0.0, 0.0)
