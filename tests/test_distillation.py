from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import limbeck
from limbeck import KD, Distiller, Method, UserError
from limbeck.tasks.classification import Classification
from limbeck.training.engine import Engine
from limbeck.training.method import Supervised
from limbeck.training.network import Network
from limbeck.training.phases import Training
from limbeck.training.task import Answer, Batch, Terms

CPU = Engine(device="cpu")


def net(width: int, seed: int, classes: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, classes)
        )


def loaders(n: int = 90, parts: int = 2) -> list[DataLoader]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 1, 4, 4, generator=generator)
    labels = images.flatten(1)[:, :3].argmax(1)
    return [
        DataLoader(TensorDataset(images, labels), 30, shuffle=not number) for number in range(parts)
    ]


def distil(path, student=None, teacher=None, data=None, **given):
    given = {"training": Training(epochs=3, lr=0.1), "quiet": True, "engine": CPU, **given}
    student = student if student is not None else net(4, 1)
    teacher = teacher if teacher is not None else net(16, 2)
    return limbeck.distill(student, teacher, data or loaders(), out=path, **given)


class Regressor(Method):
    """Matches a hidden layer through an adapter that is shaped by probing."""

    student_taps = ("1",)
    teacher_taps = ("1",)

    def __init__(self, weight: float = 2.0) -> None:
        super().__init__()
        self.weight = weight

    def build(self, student: Answer, teacher: Answer, batch: Batch) -> None:
        sizes = (features.shape[1] for features in (student.features["1"], teacher.features["1"]))
        self.adapter = nn.Linear(*sizes)

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        difference: Tensor = self.adapter(student.features["1"]) - teacher.features["1"]
        return {"match": self.weight * difference.square().mean()}


class OwnPhases(Method):
    def distil(self, bench, seed):
        yield from ()


class Smaller(Method):
    """Delivers a network with fewer units, and keeps the time that its phases took."""

    def phases(self, bench):
        yield from super().phases(bench)
        bench.students[0] = Network(net(2, 5))

    def findings(self, bench, metrics):
        self.seconds = dict(bench.seconds)
        return []

    def terms(self, student, teacher, batch):
        return {}


def test_any_modules_and_loaders_are_distilled_in_place(tmp_path):
    student, teacher = net(4, 1), net(16, 2)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    first = student[1].weight.clone()
    done = distil(tmp_path / "run", student, teacher, loaders(parts=3))
    assert done.student is student
    assert not torch.equal(student[1].weight, first)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert set(done.result["measures"]) == {"teacher", "baseline", "student"}
    assert done.result["student"] == done.result["measures"]["student"]["accuracy"]


def test_a_network_of_another_shape_than_the_students_is_handed_back(tmp_path):
    student, before = net(4, 1), net(4, 1)
    done = distil(tmp_path / "run", student, method=Smaller())
    assert done.student is not student
    assert done.student[1].out_features == 2
    assert torch.equal(student[1].weight, before[1].weight)


def test_a_method_sees_what_its_phases_took(tmp_path):
    method = Smaller()
    done = distil(tmp_path / "run", method=method)
    assert set(method.seconds) == {"baseline", "student"}
    assert sum(method.seconds.values()) == pytest.approx(done.result["seconds"]["total"])


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    ends = [
        distil(tmp_path / str(n), seed=seed).student[1].weight for n, seed in enumerate((5, 5, 6))
    ]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


class WithAnother(Supervised):
    """Delivers the student once more, and with it one that knows nothing."""

    roles: ClassVar[dict[str, str]] = {"again": "the same again"}

    def phases(self, bench):
        yield from super().phases(bench)
        for seed in bench.seeds:
            bench.deliver("again", seed, bench.students[seed])
            bench.deliver("fresh", seed, bench.make_student(seed))


def test_further_networks_are_measured_stored_and_shown(tmp_path):
    done = distil(tmp_path / "run", teacher=[], method=WithAnother())
    result = done.result
    assert set(result["measures"]) == {"student", "again", "fresh"}
    assert result["further"]["again"] == result["student"] == result["seeds"][0]["again"]
    assert result["further"]["fresh"] == result["measures"]["fresh"]["accuracy"]
    assert result["teacher"] is None
    stored = load_file(tmp_path / "run" / "again.safetensors")
    assert all(torch.equal(stored[k], v) for k, v in done.student.state_dict().items())
    assert set(done.further) == {"again", "fresh"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "the same again: ECE" in page
    assert "fresh: ECE" in page


def test_a_method_without_a_teacher_is_given_none(tmp_path):
    done = distil(tmp_path / "run", teacher=[], method=Supervised())
    assert set(done.result["measures"]) == {"student"}


def test_an_ensemble_teaches(tmp_path):
    done = distil(tmp_path / "run", teacher=[net(16, 2), net(16, 3)])
    assert done.result["parameters"]["teacher"] == 2 * (16 * 16 + 16 + 16 * 3 + 3)


def test_a_run_of_python_objects_goes_on_where_it_failed(tmp_path):
    whole = distil(tmp_path / "whole").student[1].weight

    class Failing(KD):
        def terms(self, student, teacher, batch):
            calls["n"] += 1
            if calls["n"] == 8:
                raise RuntimeError("as if the power had gone")
            return super().terms(student, teacher, batch)

    calls = {"n": 0}
    often = Engine(device="cpu", checkpoint_seconds=0.0)
    with pytest.raises(RuntimeError):
        distil(tmp_path / "run", method=Failing(), engine=often)
    again = distil(tmp_path / "run", resume=True)
    assert torch.equal(again.student[1].weight, whole)


def test_an_adapter_is_shaped_by_probing_and_trained(tmp_path):
    student, teacher = net(4, 1), net(16, 2)
    sample = {"image": torch.randn(5, 1, 4, 4), "label": torch.zeros(5, dtype=torch.int64)}
    method = Regressor()
    distiller = Distiller(student, teacher, method, Classification("abc"), sample)
    assert method.adapter.weight.shape == (16, 4)
    sum(distiller(sample).values()).backward()
    assert method.adapter.weight.grad.abs().sum() > 0
    assert student[1].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert set(distiller.state_dict()) == {
        *(f"student.model.{k}" for k in student.state_dict()),
        "method.adapter.weight",
        "method.adapter.bias",
    }
    distil(tmp_path / "run", student, teacher, method=Regressor())


def test_methods_add_up_with_the_label_weight_of_the_first(tmp_path):
    sample = {"image": torch.randn(5, 1, 4, 4), "label": torch.zeros(5, dtype=torch.int64)}
    both = KD(label_weight=0.25) + Regressor() + Regressor(weight=1.0)
    student = net(4, 1)
    terms = Distiller(student, net(16, 2), both, Classification("abc"), sample)(sample)
    assert list(terms) == ["labels", "kd", "match", "regressor.match"]
    plain = nn.functional.cross_entropy(student(sample["image"]), sample["label"])
    assert terms["labels"].item() == pytest.approx(0.25 * plain.item())
    assert distil(tmp_path / "run", method=KD() + Regressor()).result["student"] > 0


def test_what_does_not_fit_is_said_before_a_run_folder_exists(tmp_path):
    class Lost(Regressor):
        teacher_taps = ("7",)

    class NotFinite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :3] * float("nan")

    class ForDetectors(KD):
        tasks = ("detection",)

    cases = [
        ({"teacher": net(16, 2, classes=5)}, "same classes"),
        ({"teacher": NotFinite()}, "NaN or infinity on the first batch"),
        ({"method": Lost()}, "no module '7' to tap"),
        ({"method": ForDetectors()}, "works on detection, not on classification"),
        ({"data": loaders(parts=1)}, "1 came"),
        ({"teacher": "run:nowhere"}, "pass the module itself"),
    ]
    for given, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            distil(tmp_path / "run", **given)
        assert not (tmp_path / "run").exists()


def test_a_method_with_phases_of_its_own_cannot_be_added():
    with pytest.raises(UserError, match="OwnPhases has phases of its own"):
        KD() + OwnPhases()


def test_a_method_is_not_changed_by_a_run(tmp_path):
    method = Regressor()
    distil(tmp_path / "run", method=method)
    assert not hasattr(method, "adapter")
