import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from limbeck.catalogue import systems
from limbeck.models import load

SMOKE = ["run", "kd", "--preset", "smoke", "--set", "engine.device=cpu"]
# Sums are split over threads, so the same bits need the same number of them.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
KEYS = {
    *("system", "preset", "data", "seed", "metric", "teacher", "baseline", "student"),
    *("parameters", "multiply_adds", "seconds", "limbeck"),
}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "smoke"
    words = [sys.executable, "-m", "limbeck", *SMOKE, "--out", str(path)]
    subprocess.run(words, check=True, capture_output=True, timeout=120, env=ONE_THREAD)
    return path


def test_list_and_show_tell_of_every_system(command):
    status, out, _ = command("list", "--json")
    assert status == 0
    assert [entry["slug"] for entry in json.loads(out)] == list(systems())
    for slug in systems():
        assert slug in command("list")[1]
        assert systems()[slug].paper.title in command("show", slug)[1]
    assert json.loads(command("list", "--json", "--task", "juggling")[1]) == []
    assert (
        "image classification] better by 1.48 points on MNIST"
        in (command("list", "--domain", "classification")[1])
    )


def test_listing_the_systems_does_not_import_torch():
    code = "import sys, limbeck.cli, limbeck.catalogue; limbeck.catalogue.systems(); "
    code += "print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_a_run_leaves_everything_that_was_promised(smoke):
    result = json.loads((smoke / "result.json").read_text())
    assert set(result) >= KEYS
    assert result["metric"] == {"name": "accuracy", "higher_is_better": True}
    assert (result["system"], result["preset"], result["data"]) == ("kd", "smoke", "digits")
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "report.html", "student.json"):
        assert (smoke / name).is_file()
    predictions = load_file(smoke / "predictions.safetensors")
    for role in ("teacher", "baseline", "student"):
        answers = predictions[f"probabilities.{role}"].float().argmax(1)
        accuracy = (answers == predictions["labels"]).float().mean().item()
        assert result[role] == pytest.approx(accuracy, abs=1e-6)


def test_the_deliverable_is_the_student_alone_under_its_own_names(smoke):
    weights = load_file(smoke / "student.safetensors")
    network = load(smoke / "student")
    assert set(weights) == set(network.model.state_dict())
    parameters = json.loads((smoke / "result.json").read_text())["parameters"]
    assert sum(w.numel() for w in weights.values()) == parameters["student"]


def test_evaluate_agrees_with_the_result(command, smoke):
    status, out, _ = command("evaluate", f"run:{smoke}", "--data", "digits", "--json")
    assert status == 0
    result = json.loads((smoke / "result.json").read_text())
    assert json.loads(out)["accuracy"] == pytest.approx(result["student"])


def test_predict_says_what_the_network_says(command, smoke, tmp_path):
    digits = load_digits()
    pixels = (digits.images[:3] * (255 / 16)).round().astype("uint8")
    files = []
    for number, image in enumerate(pixels):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(image).save(files[-1])
    found = json.loads(command("predict", smoke, *files, "--top", 10, "--json")[1])
    network = load(smoke / "student").eval()
    with torch.no_grad():
        expected = network(torch.tensor(pixels)[:, None].float() / 255).softmax(1)
    for entry, row in zip(found, expected, strict=True):
        assert sum(c["probability"] for c in entry["classes"]) == pytest.approx(1, abs=1e-5)
        assert entry["classes"][0]["class"] == str(int(row.argmax()))


def test_report_and_resume_of_a_finished_run(command, smoke):
    before = (smoke / "student.safetensors").read_bytes()
    assert command("report", smoke)[1].strip() == str(smoke / "report.html")
    assert "nothing to resume" in command("resume", smoke)[1]
    assert (smoke / "student.safetensors").read_bytes() == before


def test_a_recorded_recipe_gives_the_same_student_again(command, smoke, tmp_path):
    assert command("run", smoke / "recipe.yaml", "--out", tmp_path / "again")[0] == 0
    same = (tmp_path / "again" / "student.safetensors").read_bytes()
    assert same == (smoke / "student.safetensors").read_bytes()


def test_tensorboard_writes_when_asked(command, tmp_path):
    words = [*SMOKE, "--set", "engine.trackers=[tensorboard]", "--set", "baseline=false"]
    assert command(*words, "--out", tmp_path / "run")[0] == 0
    assert list((tmp_path / "run" / "logs").glob("*tfevents*"))


class Canary:
    """A pickle that would leave a file behind if it were executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def mistakes(tmp: Path, smoke: Path) -> dict[str, tuple[list[object], str]]:
    out = ["--out", tmp / "new"]
    run = [*SMOKE, *out]
    (tmp / "empty").mkdir()
    for label in ("a", "b"):
        (tmp / "broken" / label).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp / "broken" / label / f"{number}.png")
    (tmp / "broken" / "b" / "bad.png").write_bytes(b"no image")
    torch.save({"w": Canary(tmp / "canary")}, tmp / "code.pt")
    weights = load_file(smoke / "teacher.safetensors")
    first = next(iter(weights))
    save_file({**weights, first: weights[first] * float("nan")}, tmp / "nan.safetensors")
    save_file({first: weights[first]}, tmp / "short.safetensors")
    (tmp / "list.yaml").write_text("- 1")
    (tmp / "tag.yaml").write_text("a: !!python/object/apply:os.system ['touch canary']")
    (tmp / "file").write_text("")
    broken = ["--data", f"folder:{tmp / 'broken'}"]
    return {
        "system": (["run", "kdd", *out], "did you mean kd or qkd?"),
        "preset": (["run", "kd", "--preset", "smke", *out], "did you mean smoke?"),
        "recipe key": ([*run, "--set", "student.trainin.epochs=1"], "did you mean training?"),
        "deep key": ([*run, "--set", "data.augment.cropp=1"], "did you mean crop?"),
        "epochs": ([*run, "--set", "student.training.epochs=-1"], "epochs=-1"),
        "temperature": ([*run, "--set", "method.temperature=-1"], "temperature=-1"),
        "parameter": ([*run, "--set", "method.temprature=1"], "did you mean temperature?"),
        "tracker": ([*run, "--set", "engine.trackers=[nope]"], "unknown or not installed"),
        "no equals": ([*run, "--set", "epochs"], "key.key=value"),
        "no data": ([*run, "--data", "folder:nowhere"], "does not exist"),
        "source": ([*run, "--data", "digitz"], "did you mean digits?"),
        "no images": ([*run, "--data", f"folder:{tmp / 'empty'}"], "holds no images"),
        "bad image": ([*run, *broken], "bad.png cannot be read"),
        "classes": ([*run, "--teacher", f"run:{smoke}", "--data", tmp / "two"], "10 classes"),
        "model": ([*run, "--student", "resnet2O"], "or resnet20"),
        "no run": ([*run, "--teacher", "run:nowhere"], "cannot be read"),
        "code": ([*run, "--teacher", f"mlp-256-256@{tmp / 'code.pt'}"], "is refused"),
        "nan": ([*run, "--teacher", f"mlp-256-256@{tmp / 'nan.safetensors'}"], "NaN"),
        "fit": ([*run, "--teacher", f"mlp-256-256@{tmp / 'short.safetensors'}"], "missing"),
        "absent": ([*run, "--set", "method.absent=[99]"], "0 to 9"),
        "unlabelled": ([*run, "--set", "data.transfer.labels=false"], "has no labels"),
        "taken": ([*SMOKE, "--out", smoke], "already exists; continue it with: limbeck resume"),
        "not a folder": ([*SMOKE, "--out", tmp / "file" / "x"], "cannot be written"),
        "list": (["run", tmp / "list.yaml", *out], "holds no mapping"),
        "tag": (["run", tmp / "tag.yaml", *out], "no YAML that a recipe"),
        "resume": (["resume", tmp / "empty"], "is no run folder"),
        "report": (["report", tmp / "empty"], "is no run folder"),
        "image": (["predict", smoke, tmp / "nothing.png"], "nothing.png does not exist"),
        "split": (["evaluate", f"run:{smoke}", "--data", "digits", "--split", "x"], "not 'x'"),
    }


def test_every_mistake_is_one_sentence_and_leaves_nothing_behind(command, smoke, tmp_path):
    cases = mistakes(tmp_path, smoke)
    for label in ("a", "b"):
        (tmp_path / "two" / label).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), number).save(tmp_path / "two" / label / f"{number}.png")
    for name, (words, part) in cases.items():
        status, _, err = command(*words)
        assert status == 2, f"{name}: {err}"
        assert err.startswith("limbeck: "), name
        assert err.count("\n") == 1, f"{name}: {err}"
        assert part in err, f"{name}: {err}"
        assert not (tmp_path / "new").exists(), name
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on_and_ends_with_the_same_bits(command, tmp_path, number):
    words = [*SMOKE, "--set", "student.training.epochs=60", "--set", "baseline=false"]
    assert command(*words, "--out", tmp_path / "whole")[0] == 0
    started = [sys.executable, "-m", "limbeck", *words, "--out", str(tmp_path / "stopped")]
    process = subprocess.Popen(
        started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD
    )
    metrics = tmp_path / "stopped" / "phases"
    deadline = time.monotonic() + 60
    while not list(metrics.glob("*teacher.state")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"limbeck resume {tmp_path / 'stopped'}" in err
    assert command("resume", tmp_path / "stopped")[0] == 0
    same = (tmp_path / "stopped" / "student.safetensors").read_bytes()
    assert same == (tmp_path / "whole" / "student.safetensors").read_bytes()


def test_two_processes_learn_what_one_does(smoke, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = [*launcher, "--standalone", "-m", "limbeck", *SMOKE, "--out", str(tmp_path / "two")]
    subprocess.run(words, check=True, capture_output=True, timeout=180, env=ONE_THREAD)
    for role in ("teacher", "baseline", "student"):
        one, two = (load_file(p / f"{role}.safetensors") for p in (smoke, tmp_path / "two"))
        assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_a_wheel_runs_without_the_checkout(tmp_path):
    root = Path(__file__).parent.parent
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(root)],
        capture_output=True,
        text=True,
    )
    if built.returncode and "No matching distribution" in built.stderr:
        pytest.skip("no package index in reach to build a wheel with")
    assert not built.returncode, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    code = "import limbeck, limbeck.cli, sys; print(limbeck.__file__); limbeck.cli.main()"
    ran = subprocess.run(
        [sys.executable, "-c", code, *SMOKE, "--out", "run"],
        cwd=tmp_path,
        env={**ONE_THREAD, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0].startswith(str(target))
    assert (tmp_path / "run" / "report.html").is_file()
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["system"] == "kd"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--set", "data.augment.crop=1000000"], "data.augment.crop=1000000: .* 1024"),
        (["--set", "data.augment.rand_ops=1000000"], "data.augment.rand_ops=1000000: .* 100"),
        (["--set", "data.size=[8192, 8192]"], "1,797 images of 8,192 x 8,192 pixels .* memory"),
        (["--student", "mlp" + "-99999" * 40], "the network mlp-.* would take .* GB of memory"),
        (["--student", "mlp-1000000"], "mlp-1000000: no network has a layer of more than 100,000"),
        (["--student", "wrn-99994-1"], "wrn-99994-1: a wide ResNet is wrn-DEPTH-WIDTH"),
        (["--set", "teachers=[]"], "KD needs a teacher; name one with --teacher"),
        (["--set", "method.temperature=1e-300"], "the loss term 'kd' is NaN or infinite"),
        (["--set", "method.temperature=1e+300"], r"KD\(temperature=1e\+300\): so large a number"),
        (["--set", "student.training.lr=1e300"], r"student.training.lr=1e\+300: so large"),
        (
            ["--cache-teacher", "--set", "engine.cache_folder=/dev/null/x"],
            "cannot be kept in /dev/null/x, where nothing can be written",
        ),
        (["--data", "cifar10:/dev/zero"], "/dev/zero cannot be read: it is a device or a pipe"),
        (["--out", "x" * 300], "x\\.\\.\\.x+: file name too long"),
        (["--data", "a\nb\x1b[31m"], r"no data source 'a\\nb\\x1b\[31m'"),
    ],
)
def test_what_can_only_fail_is_one_sentence_before_there_is_a_run(
    command, tmp_path, monkeypatch, words, sentence
):
    monkeypatch.chdir(tmp_path)
    status, _, said = command(*SMOKE, "--out", "run", *words)
    assert status == 2
    assert re.fullmatch(f"limbeck: [^\n]*{sentence}[^\n]*\n", said), said
    assert not Path("run").exists()
