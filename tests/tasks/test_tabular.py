import json

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from carrying import carry_out, same
from limbeck import distillation, recipes
from limbeck.data import tables
from limbeck.errors import UserError
from limbeck.models import build, load
from limbeck.systems.classification.kd import KD
from limbeck.tasks.tabular import RankedTabular, Tabular, auc
from limbeck.training.bench import Bench, Candidate
from limbeck.training.engine import Engine
from limbeck.training.method import Supervised
from limbeck.training.phases import Fit, Solve, Training
from limbeck.training.progress import Voice

IRIS = tables.load("iris")
CAREFUL = Engine(device="cpu", checkpoint_seconds=0.0)
RECIPE = {
    "system": "kd",
    "task": "tabular",
    "data": {"source": "iris"},
    "teacher": {"model": "forest-10-8"},
    "student": {"model": "mlp-8", "training": {"epochs": 4, "lr": 0.1, "batch_size": 16}},
    "methods": {"kd": {"temperature": 1.0}},
    "engine": {"device": "cpu"},
}


def run(path, **change):
    recipe = recipes.validate(recipes.merged(RECIPE, change))
    return distillation.start(recipe, path, Voice(quiet=True))


def bench(student: str = "mlp-8", teacher: str = "forest-10-8") -> Bench:
    return Bench(
        task=Tabular(IRIS.classes, IRIS.input),
        train=IRIS.train,
        transfer=IRIS.train,
        validation=IRIS.validation,
        test=IRIS.test,
        candidates=[Candidate(build(teacher, IRIS.classes, IRIS.input, 0), Training())],
        make_student=lambda seed: build(student, IRIS.classes, IRIS.input, seed),
        training=Training(epochs=3, batch_size=32, lr=0.1),
        engine=CAREFUL,
    )


def test_a_batch_is_the_rows_that_its_identities_say():
    task = Tabular(IRIS.classes, IRIS.input)
    batches = task.batches(IRIS.train, batch_size=50, seed=1, train=True)
    found = list(batches.epoch(2))
    assert [len(b["row"]) for b in found] == [50, 50, 8]
    for batch in found:
        assert torch.equal(batch["cells"], IRIS.train.cells[batch["row"]])
    rows = torch.cat([b["row"] for b in found])
    assert sorted(rows.tolist()) == sorted(IRIS.train.rows.tolist())
    assert torch.equal(next(batches.epoch(2, start=1))["row"], found[1]["row"])
    assert not torch.equal(next(batches.epoch(3))["row"], found[0]["row"])
    plain = next(task.batches(IRIS.test, batch_size=30).epoch(0))
    assert torch.equal(plain["row"], IRIS.test.rows)
    assert torch.equal(plain["label"], IRIS.test.labels)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_area_under_the_curve_is_scikit_learns(classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(90, classes, generator=generator)
    labels = torch.arange(90) % classes
    p = logits.double().softmax(1).numpy()
    given = {"y_score": p[:, 1]} if classes == 2 else {"y_score": p, "multi_class": "ovr"}
    assert auc(logits, labels) == pytest.approx(roc_auc_score(labels.numpy(), **given), abs=1e-6)


def test_the_recipe_says_what_decides(tmp_path):
    assert RankedTabular.metric == "auc"
    result = run(tmp_path / "run", data={"metric": "auc"}).result()
    assert result["metric"]["name"] == "auc"
    assert result["student"] == result["measures"]["student"]["auc"]
    assert 0 < result["measures"]["student"]["accuracy"] <= 1


def test_a_forest_teaches_a_network_and_is_stored_as_arrays(tmp_path):
    done = run(tmp_path / "run")
    result = done.result()
    assert result["teacher"] > 0.85
    assert result["parameters"]["teacher"] == 10 * 15 * (1 + 3)
    teacher = load(done.path / "teacher")
    task = Tabular(IRIS.classes, IRIS.input)
    assert task.measure(teacher, IRIS.test)["accuracy"] == result["teacher"]
    again = run(tmp_path / "again", teacher={"model": f"file:{done.path / 'teacher'}"})
    assert again.result()["student"] == result["student"]
    assert not list(done.path.glob("**/*.pkl"))


def test_a_forests_answers_can_be_remembered(tmp_path):
    without = run(tmp_path / "without")
    cached = run(tmp_path / "cached", engine={"cache": "full"})
    assert (tmp_path / "teacher-cache").is_dir()
    ours, theirs = (load(r.path / "student").state_dict() for r in (without, cached))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_report_shows_what_the_answers_go_by(tmp_path):
    done = run(tmp_path / "run")
    found = load_file(done.path / "curves.safetensors")
    assert found["places"].shape == (4, 15)
    for role in ("teacher", "baseline", "student"):
        assert ((found[f"curve.{role}"] >= 0) & (found[f"curve.{role}"] <= 1)).all()
    page = (done.path / "report.html").read_text()
    assert "What the answers go by" in page
    assert "petal" in page
    assert "Calibration" in page
    json.loads((done.path / "result.json").read_text())


def test_a_curve_is_the_mean_answer_with_one_column_changed():
    task = Tabular(IRIS.classes, IRIS.input)
    network = build("mlp-8", IRIS.classes, IRIS.input, 0)
    (column, kind), *_ = (named := task.curves({"student": network}, IRIS.test))[0]
    place, found = named[1]["places"][0, 3], named[1]["curve.student"][0, 3]
    rows = IRIS.test.cells[IRIS.test.rows].clone()
    rows[:, [c.name for c in IRIS.input.columns].index(column.name)] = place
    with torch.no_grad():
        expected = network.eval()(rows).double().softmax(1)[:, kind].mean()
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_forests_are_fitted_at_one_go_and_networks_by_gradients(tmp_path):
    seen = []
    laid = bench(student="forest-5-8")
    carry_out(tmp_path / "run", Plainly(), laid, seen.append)
    assert [(p.name, type(p)) for p in seen] == [("teacher", Solve), ("baseline", Solve)]
    seen.clear()
    carry_out(tmp_path / "other", Plainly(), bench(), seen.append)
    assert [(p.name, type(p)) for p in seen] == [("teacher", Solve), ("baseline", Fit)]


class Plainly(Supervised):
    def phases(self, laid):
        yield from laid.teach()
        yield from laid.plain(0)


def test_a_fitted_forest_is_put_back_when_a_run_goes_on(tmp_path):
    whole = bench()
    carry_out(tmp_path / "run", KD(), whole)
    again, fitted = bench(), []
    again.candidates[0].network.model.solve = lambda *_: fitted.append(1)
    carry_out(tmp_path / "run", KD(), again)
    assert not fitted
    assert same(again.candidates[0].network, whole.candidates[0].network)
    assert same(again.students[0], whole.students[0])


def test_a_student_that_learns_by_no_gradient_is_one_sentence():
    with pytest.raises(UserError, match="forest-5-8 learns by no gradient, which KD needs"):
        KD().rehearse(bench(student="forest-5-8"))


def test_a_route_of_a_forest_is_one_sentence(tmp_path):
    laid = bench()
    with pytest.raises(UserError, match="fitted at one go and leaves no route"):
        next(laid.teach(keep=(1,)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": {"source": "irsi"}}, "there is no table 'irsi'; did you mean iris"),
        ({"data": {"augment": {}}}, r"no key 'data\.augment', which is of the task classification"),
        ({"data": {"metric": "f1"}}, r"data\.metric='f1'"),
        ({"data": {"test": 0}}, r"data\.test=0"),
        ({"data": {"transfer": {"only": [7]}}}, "class 7, which does not occur"),
        ({"data": {"transfer": {"labels": False}}, "teacher": {"model": "forst-1-2"}}, "forst"),
        ({"student": {"model": "resnet8"}}, "no network of tables named 'resnet8'"),
    ],
)
def test_what_the_domain_does_not_know_is_one_sentence(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        run(tmp_path / "run", **change)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_classes_is_one_sentence(tmp_path):
    done = run(tmp_path / "run")
    with pytest.raises(UserError, match=r"class 0 of .* is 'setosa', but 'class_0' in the data"):
        run(
            tmp_path / "other",
            data={"source": "wine"},
            teacher={"model": f"run:{done.path}"},
        )


def test_students_may_have_fewer_rows_and_no_labels(tmp_path):
    given = {"transfer": {"fraction": 0.5, "labels": False}, "limit": 90}
    done = run(tmp_path / "run", data=given, methods={"kd": {"label_weight": 0.0}})
    assert done.result()["student"] > 0.3
