import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MultilabelAveragePrecision

from limbeck import distillation, recipes
from limbeck.data.augment import Augment
from limbeck.data.data import ResidentImages, Split
from limbeck.errors import UserError
from limbeck.report import attributes as report
from limbeck.tasks.attributes import Attributes, attribute_table, average_precisions, measures
from limbeck.training.network import Network
from limbeck.training.progress import Voice
from limbeck.training.run import Run
from limbeck.training.task import Answer
from limbeck.training.teacher import Teacher

CLASSES = ("cat", "car", "bird")
HAVING = {"animal": ["cat", 2], "wheels": ["car"], "wings": [2]}
TASK = Attributes(CLASSES, attributes=HAVING)


def net(seed: int = 0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))


def split(n: int = 60, labelled: bool = True) -> Split:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return Split("test", ResidentImages(pixels), torch.arange(n) % 3 if labelled else None)


def by_hand(network: Network, part: Split) -> np.ndarray:
    pixels = torch.stack([part.images.read(int(row)) for row in part.rows])
    with torch.no_grad():
        return network.model.eval()(pixels.float() / 255).double().numpy()


def truth(part: Split) -> np.ndarray:
    return TASK.table[part.labels].numpy()


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def test_classes_by_name_and_number_become_rows_of_attributes():
    assert TASK.table.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert TASK.outputs == ("animal", "wheels", "wings")
    assert TASK.classes == CLASSES
    # a name that is written with digits is a name
    assert attribute_table(["7", "0"], {"a": ["0"], "b": [0]}).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("having", "sentence"),
    [
        ({}, "there are no attributes; name the classes"),
        ({"a": ["cta"]}, "the attribute 'a' names the class 'cta', .*; did you mean cat"),
        ({"a": [3]}, "names class 3, but classes run from 0 to 2"),
        ({"a": [-1]}, "names class -1, but"),
        ({"a": [0], "b": []}, "the attribute 'b' is true of none of the 3 classes"),
        ({"a": [0, 1, 2]}, "the attribute 'a' is true of all of the 3 classes"),
    ],
)
def test_attributes_that_do_not_fit_the_data_are_one_sentence(having, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        Attributes(CLASSES, attributes=having)
    assert "\n" not in str(caught.value)


def test_batches_hold_attributes_and_are_otherwise_those_of_the_classes():
    task = Attributes(CLASSES, Augment(crop=1, views=2), attributes=HAVING)
    batches = task.batches(split(), batch_size=16, seed=3, train=True)
    assert len(batches) == 4
    for batch, plain in zip(batches.epoch(1, 1), batches.batches.epoch(1, 1), strict=True):
        assert torch.equal(batch["label"], TASK.table[plain["label"]])
        assert torch.equal(batch["image"], plain["image"])
        assert batch["view"] == plain["view"]
    unlabelled = next(iter(task.batches(split(labelled=False), batch_size=8).epoch(0)))
    assert "label" not in unlabelled
    assert not task.labelled(unlabelled)


def test_a_loader_may_bring_attributes_or_classes():
    images = torch.zeros(6, 1, 4, 4)
    given = (torch.arange(18).view(6, 3) % 2).float()
    for labels, expected in ((given, given), (torch.arange(6) % 3, TASK.table.repeat(2, 1))):
        loader = DataLoader(TensorDataset(images, labels), batch_size=6)
        (batch,) = TASK.batches(loader, batch_size=1).epoch(0)
        assert torch.equal(batch["label"], expected)


def test_the_loss_is_the_mean_binary_cross_entropy_and_needs_labels():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]], dtype=torch.float16)
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    p, y = sigmoid(logits.double().numpy()), labels.numpy()
    expected = -np.log(np.where(y == 1, p, 1 - p)).mean()
    found = TASK.loss(Answer({"logits": logits}), {"label": labels})
    assert found.item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match="has no labels"):
        TASK.loss(Answer({"logits": logits}), {})


def test_the_loss_of_a_mixed_image_is_that_of_both_labels_by_their_shares():
    task = Attributes(CLASSES, Augment(mixup=1.0), attributes=HAVING)
    batch = next(iter(task.batches(split(8), batch_size=8, train=True).epoch(0)))
    assert batch["partner_label"].shape == (8, 3)
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    p, mix = sigmoid(logits.double().numpy()), batch["mix"].double().numpy()[:, None]
    own, partner = (
        -np.log(np.where(batch[name].numpy() == 1, p, 1 - p)) for name in ("label", "partner_label")
    )
    expected = (mix * own + (1 - mix) * partner).mean()
    assert task.loss(Answer({"logits": logits}), batch).item() == pytest.approx(expected, rel=1e-5)


def test_answers_are_averaged_as_probabilities_or_as_logits():
    generator = torch.Generator().manual_seed(3)
    logits = [4 * torch.randn(6, 3, generator=generator) for _ in range(3)]
    answers = [Answer({"logits": v}) for v in logits]
    shares = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    pairs = list(zip(shares.tolist(), (v.double().numpy() for v in logits), strict=True))
    mean = TASK.combine(answers, shares, "probabilities")
    expected = sum(s * sigmoid(v) for s, v in pairs)
    assert np.allclose(mean["logits"].sigmoid().numpy(), expected, atol=1e-6)
    assert mean.members == tuple(answers)
    mean = TASK.combine(answers, shares, "logits")
    assert np.allclose(mean["logits"].numpy(), sum(s * v for s, v in pairs), atol=1e-5)


def test_measures_are_what_their_names_say():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 4, generator=generator)
    labels = (torch.rand(200, 4, generator=generator) < 0.3).float()
    found = measures(logits, labels)
    z, y = logits.double().numpy(), labels.numpy()
    precisions = [average_precision_score(y[:, a], z[:, a]) for a in range(4)]
    assert np.allclose(average_precisions(logits, labels).numpy(), precisions, atol=1e-5)
    assert found["mean average precision"] == pytest.approx(np.mean(precisions), abs=1e-5)
    theirs = MultilabelAveragePrecision(num_labels=4)(logits, labels.long())
    assert found["mean average precision"] == pytest.approx(theirs.item(), abs=1e-5)
    assert found["accuracy"] == pytest.approx(((z > 0) == (y == 1)).mean())
    nats = -np.log(np.where(y == 1, sigmoid(z), 1 - sigmoid(z)))
    assert found["cross_entropy"] == pytest.approx(nats.mean(), rel=1e-5)


def test_an_attribute_that_no_sample_has_is_left_out_of_the_mean():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert average_precisions(logits, labels).isnan().tolist() == [False, True]
    assert measures(logits, labels)["mean average precision"] == 1.0


def test_large_logits_are_still_told_apart():
    logits = torch.tensor([[30.0], [20.0], [25.0]])
    assert average_precisions(logits, torch.tensor([[1.0], [0.0], [1.0]])).item() == 1.0


def test_a_comparison_tells_the_precision_of_each_attribute_and_the_agreement():
    part = split()
    networks = {"teacher": Teacher(net(1)), "baseline": net(2), "student": net(1)}
    found = TASK.compare(networks, part)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    teacher, baseline = (by_hand(net(seed), part) for seed in (1, 2))
    expected = average_precision_score(truth(part)[:, 1], baseline[:, 1])
    assert found["attributes"]["baseline"]["wheels"] == pytest.approx(expected, abs=1e-5)
    assert found["agreement"]["student"] == 1.0
    same = ((teacher > 0) == (baseline > 0)).all(1).mean()
    assert found["agreement"]["baseline"] == pytest.approx(same)
    assert found["frequencies"]["animal"] == pytest.approx(2 / 3)
    assert set(found["measures"]) == set(networks)
    empty = Attributes(CLASSES, attributes=HAVING).compare({"student": net()}, part.subset([0, 3]))
    assert empty["attributes"]["student"]["wheels"] is None


def test_what_is_recorded_are_probabilities_of_attributes(tmp_path):
    part = split().subset(range(20, 60))
    TASK.record({"teacher": Teacher(net(1)), "student": net(2)}, part, tmp_path)
    tensors = load_file(tmp_path / "predictions.safetensors")
    with safe_open(tmp_path / "predictions.safetensors", "np") as file:
        assert file.metadata()["classes"].split("\n") == list(HAVING)
    assert np.array_equal(tensors["labels"].numpy(), truth(part))
    assert torch.equal(tensors["rows"], part.rows)
    expected = sigmoid(by_hand(net(2), part))
    assert np.allclose(tensors["probabilities.student"].double().numpy(), expected, atol=1e-3)


# From a recipe to a report.

TINY = {
    "system": "mobilenet",
    "task": "attributes",
    "data": {
        "source": "digits",
        "limit": 60,
        "augment": {"crop": 1},
        "attributes": {"even": [0, 2, 4, 6, 8], "loop": ["0", "6", "8", "9"]},
    },
    "teacher": {"model": "mlp-8", "training": {"epochs": 1}},
    "student": {"model": "mlp-4", "training": {"epochs": 1}},
    "methods": {"mobilenet": {}},
    "engine": {"device": "cpu"},
}


def start(path, **change):
    recipe = recipes.validate(recipes.merged(TINY, change))
    return distillation.start(recipe, path, Voice(quiet=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return start(tmp_path_factory.mktemp("runs") / "run")


def test_a_network_of_a_run_puts_out_attributes(run):
    card = json.loads((run.path / "student.json").read_text())
    assert (card["classes"], card["task"]) == (["even", "loop"], "attributes")
    result = run.result()
    assert result["metric"] == {"name": "mean average precision", "higher_is_better": True}
    assert result["student"] == result["measures"]["student"]["mean average precision"]


def test_the_report_has_a_row_for_each_attribute(run):
    (section,) = report.sections(run)
    headings, *rows = section.table
    assert headings == ["", "samples", "teacher", "plain student", "distilled student"]
    assert [row[0] for row in rows] == ["even", "loop"]
    found = run.result()["attributes"]
    assert rows[1][4] == f"{found['student']['loop']:.4f}"
    assert "Attribute by attribute" in (run.path / "report.html").read_text()


def test_attributes_of_an_image_file_are_told_one_by_one(run, tmp_path):
    from PIL import Image

    Image.fromarray(np.full((8, 8), 100, np.uint8)).save(tmp_path / "a.png")
    (found,) = distillation.recognise(str(run.path), [tmp_path / "a.png"])
    told = {entry["class"]: entry["probability"] for entry in found["classes"]}
    from limbeck.models import load

    network = load(run.path / "student").eval()
    view = torch.full((1, 1, 8, 8), 100 / 255)
    expected = network(view).sigmoid()[0].tolist()
    assert told == {
        n: pytest.approx(p, abs=1e-6) for n, p in zip(told, sorted(expected)[::-1], strict=True)
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": {"attributes": {"even": [0], "odd": ["eins"]}}}, "names the class 'eins'"),
        ({"data": {"attributes": {"all": list(range(10))}}}, "is true of all of the 10 classes"),
        ({"methods": {"mobilenet": {}, "kd": {}}}, "these methods have no task in common"),
        ({"student": {"model": "resnet9"}}, "no network named 'resnet9'"),
    ],
)
def test_what_does_not_fit_is_said_before_a_run_folder_exists(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        start(tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()


def test_the_task_and_its_attributes_come_together_or_not_at_all():
    with pytest.raises(UserError, match=r"'data.attributes', which is of the task attributes;"):
        recipes.validate(recipes.merged(TINY, {"task": "classification"}))
    without = {k: v for k, v in TINY["data"].items() if k != "attributes"}
    with pytest.raises(UserError, match=r"the recipe lacks the key 'data\.attributes'"):
        recipes.validate({**TINY, "data": without})
    with pytest.raises(UserError, match=r"recipe key data.attributes.even"):
        recipes.validate(recipes.merged(TINY, {"data": {"attributes": {"even": "all"}}}))


def test_soft_targets_of_classes_say_that_attributes_are_none(tmp_path):
    values = recipes.merged(TINY, {"system": "kd"})
    values["methods"] = {"kd": {}}
    with pytest.raises(UserError, match=r"KD works on classification, .*, not on attributes"):
        distillation.start(recipes.validate(values), tmp_path / "run", Voice(quiet=True))
    assert not (tmp_path / "run").exists()


def test_an_ensemble_and_other_methods_teach_attributes_too(tmp_path):
    change = {
        "teachers": [{"model": f"mlp-{n}", "training": {"epochs": 1}} for n in (8, 9)],
        "engine": {"cache": "top-1", "cache_folder": str(tmp_path / "cache")},
        "data": {"augment": {"views": 1, "mixup": 0.5}},
    }
    values = {k: v for k, v in TINY.items() if k != "teacher"}
    recipe = recipes.validate(recipes.merged(values, change))
    run = distillation.start(recipe, tmp_path / "run", Voice(quiet=True))
    assert 0 < run.result()["student"] <= 1
