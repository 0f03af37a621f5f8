import pytest
import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.models import Input, build
from limbeck.tasks.classification import Classification
from limbeck.training.distiller import Distiller
from limbeck.training.method import Method
from limbeck.training.network import Network
from limbeck.training.task import View
from limbeck.training.teacher import Teacher

TASK = Classification(["a", "b", "c"])


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout())


def batch(n: int = 6) -> dict[str, torch.Tensor]:
    return {"image": torch.randn(n, 1, 2, 2), "label": torch.zeros(n, dtype=torch.int64)}


def test_a_parents_train_does_not_wake_the_teacher():
    parent = nn.Module()
    parent.teacher = Teacher(net())
    parent.train()
    assert not any(m.training for m in parent.teacher.networks[0].modules())


def test_a_teacher_woken_behind_its_back_sleeps_again_when_it_answers():
    model = net()
    teacher, x = Teacher(model), batch()
    before = model[2].running_mean.clone()
    model.train()
    first, second = teacher(TASK, x)["logits"], teacher(TASK, x)["logits"]
    assert torch.equal(first, second)
    assert torch.equal(model[2].running_mean, before)


def test_a_teacher_is_in_no_state_dict_and_has_no_parameters_to_train():
    parent = nn.Module()
    parent.teacher = Teacher(net())
    assert not parent.state_dict()
    assert not list(parent.parameters())
    assert not any(p.requires_grad for p in parent.teacher.networks[0].parameters())


def test_a_teacher_follows_to_another_dtype_and_device():
    teacher = Teacher(net()).to(torch.float64)
    assert teacher.networks[0].model[1].weight.dtype == torch.float64
    assert Teacher(net()).to("meta").networks[0].model[1].weight.is_meta


def test_answers_carry_no_gradient():
    assert not Teacher(net())(TASK, batch())["logits"].requires_grad


def test_the_mean_of_probabilities_and_of_logits_are_two_targets():
    one, two, x = net(1), net(2), batch()
    members = [Teacher(m)(TASK, x)["logits"].double() for m in (one, two)]
    weights = torch.tensor([0.75, 0.25], dtype=torch.float64)
    arithmetic = sum(w * m.softmax(1) for w, m in zip(weights, members, strict=True))
    geometric = sum(w * m for w, m in zip(weights, members, strict=True))
    by_probabilities = Teacher([one, two], weights=[3, 1])(TASK, x)
    by_logits = Teacher([one, two], weights=[3, 1], mean="logits")(TASK, x)
    assert torch.allclose(by_probabilities["logits"].double().softmax(1), arithmetic, atol=1e-6)
    assert torch.allclose(by_logits["logits"].double(), geometric, atol=1e-6)
    assert len(by_probabilities.members) == 2
    assert not by_logits.members


def test_a_column_says_which_teacher_answers():
    one, two, x = net(1), net(2), batch(4)
    x["who"] = torch.tensor([0, 1, 1, 0])
    routed = Teacher([one, two], route="who")(TASK, x)["logits"]
    a, b = (Teacher(m)(TASK, x)["logits"] for m in (one, two))
    assert torch.equal(routed, torch.stack([a[0], b[1], b[2], a[3]]))
    with pytest.raises(UserError, match="no 'who'"):
        Teacher([one, two], route="who")(TASK, batch())


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="at least one network"):
        Teacher([])
    with pytest.raises(UserError, match="2 teachers need 2 positive weights"):
        Teacher([net(), net()], weights=[1])
    with pytest.raises(UserError, match="cannot be averaged; give one teacher"):
        Teacher([net(), net()]).tap(["1"])
    with pytest.raises(UserError, match="not 'median'"):
        Teacher(net(), mean="median")  # type: ignore[arg-type]


def test_plain_modules_are_wrapped():
    network = Network(net())
    assert Teacher(network).networks[0] is network
    assert isinstance(Teacher(net()).networks[0], Network)


def residual(seed: int = 0) -> Network:
    shape = Input(3, (16, 16), (0.5,) * 3, (0.5,) * 3)
    network = build("resnet8", ["a", "b", "c"], shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network


def photos(n: int = 20) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {"image": torch.rand(n, 3, 16, 16)}


STAGES = ("stem", "stage1", "stage2")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_folded_teacher_answers_as_it_did_up_to_rounding(layout):
    plain, folded = Teacher(residual(), fold=False), Teacher(residual().lay_out(layout))
    for teacher in (plain, folded):
        teacher.tap(STAGES)
    one, other = plain(TASK, photos()), folded(TASK, photos())
    assert torch.allclose(one["logits"], other["logits"], atol=1e-5)
    assert all(torch.allclose(one.features[p], other.features[p], atol=1e-5) for p in STAGES)
    assert any(isinstance(m, nn.BatchNorm2d) for m in folded.networks[0].modules())


def test_the_copies_that_answer_share_the_weights_that_are_not_folded():
    network = residual()
    teacher = Teacher(network, fold=False)
    before = teacher(TASK, photos())["logits"]
    with torch.no_grad():
        network.model.fc.weight.mul_(2)
        network.model.fc.bias.mul_(2)
    assert torch.allclose(teacher(TASK, photos())["logits"], 2 * before)


def test_a_method_that_reads_features_alone_lets_the_teacher_stop_at_the_last_tap():
    network, ran = residual(), []
    network.model.stage3.register_forward_hook(lambda *_: ran.append(True))
    teacher = Teacher(network)
    teacher.tap(STAGES, outputs=False)
    first = teacher(TASK, photos())
    ran.clear()
    second = teacher(TASK, photos())
    assert not ran
    assert not first.outputs
    assert not second.outputs
    assert all(torch.equal(first.features[p], second.features[p]) for p in STAGES)
    with pytest.raises(KeyError, match="teacher_outputs = False"):
        second["logits"]


def test_a_teacher_may_answer_in_lower_precision_and_keep_its_weights():
    network = residual()
    exact = Teacher(network)(TASK, photos())["logits"]
    rough = Teacher(network, precision=torch.bfloat16)(TASK, photos())["logits"]
    assert rough.dtype == torch.bfloat16
    assert torch.allclose(rough.float(), exact, atol=0.05 * float(exact.abs().max()))
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_the_surrounding_precision_does_not_reach_a_teacher_that_has_its_own():
    teacher = Teacher(residual(), precision=torch.float32)
    exact = teacher(TASK, photos())["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(TASK, photos())["logits"], exact)


@pytest.mark.parametrize("size", [1, 3, 7, 15])
def test_an_answer_does_not_depend_on_how_many_are_asked_for(size):
    teacher, x = Teacher(residual()), photos(40)
    view = View("here", 0, 1, 40, 40)
    whole = teacher(TASK, {**x, "row": torch.arange(40), "view": view})["logits"]
    part = {"image": x["image"][5 : 5 + size], "row": torch.arange(5, 5 + size), "view": view}
    assert torch.equal(teacher(TASK, part)["logits"], whole[5 : 5 + size])


def test_a_task_may_have_the_teacher_judge_what_the_student_proposes():
    class Proposals(Classification):
        def question(self, batch, student):
            return {**batch, "image": student["logits"].detach()[:, :, None, None]}

    class Difference(Method):
        label_weight = 0.0

        def terms(self, student, teacher, batch):
            return {"difference": (student["logits"] - teacher["logits"]).square().mean()}

    student, teacher = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), nn.Flatten()
    sample = batch()
    terms = Distiller(student, teacher, Difference(), Proposals(["a", "b", "c"]), sample)(sample)
    assert terms["difference"] == 0, "a teacher that says again what the student has said"
