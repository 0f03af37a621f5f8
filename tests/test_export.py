import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import limbeck
from limbeck import data
from limbeck.catalogue import system
from limbeck.distillation import start
from limbeck.errors import UserError
from limbeck.export import Export, Student, export, gather, loaded, write
from limbeck.models import Input, Network, build
from limbeck.recipes import merged, preset, validate
from limbeck.training.folding import fold_batch_norm
from limbeck.training.progress import Voice
from limbeck.training.run import Run

FORMATS = ("onnx", "torch-export", "safetensors")
ONNX = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason="limbeck[export] is not installed",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("export") / "run"
    given = {
        "data": {"limit": 400},
        "student": {"model": "resnet8", "training": {"epochs": 1}},
        "baseline": False,
        "engine": {"device": "cpu"},
    }
    start(validate(merged(preset(system("kd"), "smoke", "digits"), given)), path, Voice(quiet=True))
    return path


@pytest.fixture(scope="module")
def exported(run) -> dict[str, Export]:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    found = {format: export(run, format) for format in FORMATS}
    return {**found, "int8": export(f"run:{run}", "onnx", "int8")}


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    test = data.load("digits").test
    return torch.stack([test.images.read(int(row)) for row in test.rows[:7]]) / 255


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batch", [1, 7])
def test_a_file_answers_as_the_student_for_any_batch(run, exported, digits, format, batch):
    student = limbeck.Student.from_run(run)
    folder = Path(exported[format].folder)
    answers = loaded(folder / exported[format].file, format)(digits[:batch])
    assert answers.shape == (batch, 10)
    assert torch.allclose(answers, student(digits[:batch]), atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_told_of_a_float_export_is_so(run, exported, format):
    found = exported[format]
    assert found.samples == 256
    assert found.sampled == "images of the test split"
    assert found.equal_predictions == 1
    assert found.accuracy == found.student_accuracy
    assert found.bytes == (Path(found.folder) / found.file).stat().st_size
    assert found.student_bytes == sum(
        w.numel() * w.element_size() for w in load_file(run / "student.safetensors").values()
    )
    assert min(found.latency_ms, found.student_latency_ms) > 0


def test_int8_is_smaller_and_mostly_agrees(exported):
    assert exported["int8"].bytes < exported["onnx"].bytes / 2
    assert exported["int8"].equal_predictions > 0.8
    assert 0 < exported["int8"].largest_difference < exported["int8"].largest_logit / 5


@ONNX
def test_int8_without_convolutions_is_smaller_too(tmp_path):
    digits = data.load("digits")
    input = Input(1, (8, 8), digits.mean, digits.std)
    student = Student(build("mlp-64-64", digits.classes, input, seed=0))
    samples = gather(digits, input, {})
    sizes = []
    for quantize in (None, "int8"):
        (tmp_path / str(quantize)).mkdir()
        found = write(student, samples, tmp_path / str(quantize), "onnx", quantize)
        sizes.append(found.bytes)
    assert sizes[1] < sizes[0] / 2
    assert found.equal_predictions > 0.9
    assert {f.name for f in (tmp_path / "int8").iterdir()} == {"student.onnx", "student.json"}


def test_safetensors_hold_the_weights_as_they_are(run, exported):
    theirs = load_file(Path(exported["safetensors"].folder) / "student.safetensors")
    ours = load_file(run / "student.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_packed_weights_of_two_bits_take_a_sixteenth_and_answer_the_same(tmp_path):
    digits = data.load("digits")
    input = Input(1, (8, 8), digits.mean, digits.std)
    student = Student(build("qkd-w2a4-cnn-16-32-64", digits.classes, input, seed=0))
    found = write(student, gather(digits, input, {}), tmp_path, "packed")
    assert found.largest_difference == 0
    whole = student.network.model.state_dict()
    inner = "stage2.1.weight"
    ours = load_file(tmp_path / "student.safetensors")
    assert ours[inner].numel() * 16 == whole[inner].numel() * 4
    assert found.bytes < found.student_bytes / 4


@ONNX
def test_a_student_of_timm_predicts_the_same_in_onnx(tmp_path):
    pytest.importorskip("timm")
    digits = data.load("digits")
    input = Input(3, (32, 32), (0.3,) * 3, (0.4,) * 3)
    network = build("timm:mobilenetv3_small_050", digits.classes, input, seed=0)
    network.train()
    samples = gather(digits, input, {})
    with torch.no_grad():
        for _ in range(5):  # running statistics that are not those of the initialisation
            network(samples.calibration[:64])
    found = write(Student(network), samples, tmp_path, "onnx")
    assert found.equal_predictions == 1


@pytest.mark.parametrize("format", [*FORMATS, "int8"])
def test_the_card_parses_and_its_loader_runs(
    run, exported, digits, tmp_path, monkeypatch, capsys, format
):
    folder = Path(exported[format].folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["metrics"] == ["accuracy"]
    assert "knowledge-distillation" in facts["tags"]
    assert system("kd").paper.link in body
    assert f"{Run.open(run).result()['student']:.4f}" in body
    assert str(run) not in text
    pixels = (digits[0, 0] * 255).round().numpy().astype(np.uint8)
    expected = Student.from_run(run).predict(digits[:1])
    for place, code in (
        (folder, body.split("```python\n")[1].split("```")[0]),
        (tmp_path, exported[format].loader),
    ):
        monkeypatch.chdir(place)
        Image.fromarray(pixels).save("image.png")
        exec(code, {})
        Path("image.png").unlink()
        assert capsys.readouterr().out.split() == expected


def test_odd_names_do_not_break_the_card(tmp_path, run):
    classes = ["a: b", "--- #x", "new\nline", "<b>|`*", "\udcff", *"56789"]
    for name in ("recipe.yaml", "result.json", "student.safetensors", "student.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    facts = json.loads((tmp_path / "student.json").read_text())
    (tmp_path / "student.json").write_text(json.dumps({**facts, "classes": classes}))
    found = export(tmp_path, "safetensors")
    assert found.sampled.startswith("random images")
    assert found.accuracy is None
    text = (tmp_path / "export-safetensors" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---\n")[1])["metrics"] == ["accuracy"]
    assert "a: b, --- \\#x, new line, \\<b\\>\\|\\`\\*, \\\\udcff, 5" in text
    assert Student.from_run(tmp_path).classes == tuple(classes)


@ONNX
def test_an_export_that_answers_otherwise_is_refused(run, tmp_path, monkeypatch):
    def broken(model):
        folded = fold_batch_norm(model)
        next(folded.parameters()).data.mul_(1.5)
        return folded

    monkeypatch.setattr("limbeck.export.fold_batch_norm", broken)
    with pytest.raises(UserError, match="answers otherwise than the student"):
        export(run, "onnx", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_command_tells_what_it_wrote(command, run, tmp_path):
    words = ["export", run, "--format", "safetensors", "--out"]
    status, out, _ = command(*words, tmp_path / "json", "--json")
    assert status == 0
    assert json.loads(out)["folder"] == str(tmp_path / "json")
    status, out, _ = command(*words, tmp_path / "table")
    assert status == 0
    assert "100.0% of predictions are equal" in out
    assert str(tmp_path / "table" / "student.safetensors") in out


def test_every_mistake_is_one_sentence_and_leaves_nothing_behind(
    command, run, tmp_path, monkeypatch
):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.yaml").write_text("system: kd")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    onnx = ["--format", "onnx"]
    safe = ["--format", "safetensors"]
    cases = {
        "no run": ([tmp_path / "nowhere", *safe], "is no run folder"),
        "unfinished": ([f"run:{tmp_path / 'unfinished'}", *safe], "is not finished"),
        "format": ([run, "--format", "onxx"], "did you mean onnx?"),
        "bits": ([run, *onnx, "--quantize", "int4"], "takes int8, not 'int4'"),
        "quantize": ([run, *safe, "--quantize", "int8"], "goes with --format onnx only"),
        "no bits": ([run, "--format", "packed"], "no weights of few bits to pack"),
        "packages": ([run, *onnx], "pip install 'limbeck[export]'"),
        "full": ([run, *safe, "--out", tmp_path / "full"], "is not empty"),
    }
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, (words, part) in cases.items():
        out = [] if name == "full" else ["--out", tmp_path / "new"]
        status, _, err = command("export", *words, *out)
        assert status == 2, f"{name}: {err}"
        assert err.startswith("limbeck: "), name
        assert err.count("\n") == 1, f"{name}: {err}"
        assert part in err, f"{name}: {err}"
        assert not (tmp_path / "new").exists(), name
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["something"]


def test_a_module_made_in_python_is_refused_in_one_sentence(tmp_path):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    made = Network(net, None, "", ["a", "b"])
    assert made.facts()["model"] == ""
    (tmp_path / "recipe.yaml").write_text("system: kd")
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "student.json").write_text(json.dumps(made.facts()))
    with pytest.raises(UserError, match="not built by name"):
        export(tmp_path, "safetensors")
