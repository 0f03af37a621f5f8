"""Networks and weights as files: what comes back, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from limbeck.errors import UserError
from limbeck.models import Input, Network, build, load, save

COLOUR = Input(3, (32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
SMALL = Input(1, (8, 8), (0.3,), (0.4,))
CLASSES = ("ant", "bee", "cat")
FED = {"channels": 1, "size": [8, 8], "mean": [0.3], "std": [0.4]}


@pytest.fixture
def network() -> Network:
    return build("cnn-4-8", CLASSES, SMALL, seed=0).eval()


@pytest.fixture
def stored(network: Network, tmp_path: Path) -> Path:
    save(network, tmp_path / "run" / "student", {"accuracy": 0.5})
    return tmp_path / "run" / "student"


def rewrite(stem: Path, **facts: Any) -> None:
    card = stem.with_suffix(".json")
    card.write_text(json.dumps(json.loads(card.read_text()) | facts))


@pytest.mark.parametrize(
    ("spec", "input"),
    [
        ("resnet8", COLOUR),
        ("shufflenetv2", COLOUR),
        ("mlp-8-8", SMALL),
        ("timm:test_vit", Input(1, (28, 28), (0.3,), (0.4,))),
        ("torchvision:squeezenet1_1", COLOUR),
    ],
)
def test_a_stored_network_gives_equal_outputs(spec: str, input: Input, tmp_path: Path) -> None:
    network = build(spec, CLASSES, input)
    network(torch.rand(4, input.channels, *input.size))
    save(network, tmp_path / "n.v2", {})
    again = load(tmp_path / "n.v2")
    view = torch.rand(2, input.channels, *input.size)
    assert torch.equal(network.eval()(view), again.eval()(view))
    assert (again.name, again.classes, again.input) == (spec, CLASSES, network.input)


@pytest.mark.parametrize("prefix", ["run:{run}", "file:{run}/student.safetensors"])
def test_a_run_and_a_file_are_models_by_name(prefix: str, stored: Path, network: Network) -> None:
    spec = prefix.format(run=stored.parent)
    again = build(spec, CLASSES, COLOUR).eval()
    view = torch.rand(2, 1, 8, 8)
    assert torch.equal(again(view), network(view))
    assert again.name == "cnn-4-8"
    assert again.input == SMALL


def test_a_run_takes_other_weights(stored: Path, tmp_path: Path) -> None:
    other = build("cnn-4-8", CLASSES, SMALL, seed=9)
    torch.save(other.model.state_dict(), tmp_path / "anchor.pt")
    again = build(f"run:{stored.parent}@{tmp_path / 'anchor.pt'}", CLASSES, SMALL)
    assert torch.equal(again.state_dict()["model.fc.weight"], other.state_dict()["model.fc.weight"])


@pytest.mark.parametrize("path", ["student", "student.json", "student.safetensors"])
def test_a_path_is_taken_with_or_without_suffix(path: str, stored: Path) -> None:
    assert load(stored.parent / path).classes == CLASSES


def test_the_files_hold_the_models_own_names_the_facts_and_a_checksum(
    stored: Path, network: Network
) -> None:
    file = stored.with_suffix(".safetensors")
    assert set(load_file(file)) == set(network.model.state_dict())
    assert json.loads(stored.with_suffix(".json").read_text()) == {
        "model": "cnn-4-8",
        "classes": list(CLASSES),
        "input": {"kind": "images", "channels": 1, "size": [8, 8], "mean": [0.3], "std": [0.4]},
        "accuracy": 0.5,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    assert sorted(p.name for p in stored.parent.iterdir()) == [
        "student.json",
        "student.safetensors",
    ]


def test_shared_and_strided_tensors_are_written_whole(tmp_path: Path) -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    model = nn.Sequential(first, second, conv)
    save(Network(model), tmp_path / "m", {})
    read = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(read[k], v) for k, v in model.state_dict().items())


def test_a_module_built_elsewhere_is_stored_but_not_rebuilt(tmp_path: Path) -> None:
    save(Network(nn.Linear(2, 2)), tmp_path / "m", {})
    with pytest.raises(UserError, match=r"passed in Python.*load_file\('.*m.safetensors'\)"):
        load(tmp_path / "m")


def test_an_interrupted_write_leaves_the_old_files(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="no space left"):
        save(build("cnn-2-2", CLASSES, SMALL), stored, {})
    assert load(stored).name == "cnn-4-8"
    assert len(list(stored.parent.iterdir())) == 2


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        (("ant", "bee"), "knows 3 classes, but the data has 2"),
        (("ant", "cat", "bee"), "class 1 of .* is 'bee', but 'cat' in the data"),
    ],
)
def test_other_classes_are_refused(classes: tuple[str, ...], sentence: str, stored: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        build(f"run:{stored.parent}", classes, SMALL)


def test_unknown_class_names_are_taken_from_the_data(stored: Path) -> None:
    rewrite(stored, classes=[])
    assert build(f"run:{stored.parent}", CLASSES, SMALL).classes == CLASSES
    with pytest.raises(UserError, match="without the names of its classes"):
        load(stored)


def test_weights_that_are_not_the_described_ones_are_refused(stored: Path) -> None:
    save_file(
        build("cnn-4-8", CLASSES, SMALL, seed=5).model.state_dict(),
        stored.with_suffix(".safetensors"),
    )
    with pytest.raises(UserError, match="SHA-256 differs"):
        load(stored)


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"model": "timm:nothing_like_it"}, "timm has no model"),
        ({"model": "run:elsewhere"}, "describes no model that Limbeck can build"),
        ({"model": "file:student"}, "describes no model that Limbeck can build"),
        ({"model": "hf:no/such"}, "describes no model that Limbeck can build"),
        ({"model": "resnet8@pretrained"}, "no network named"),
        ({"model": 3}, "does not name a model"),
        ({"classes": [1, 2]}, "does not name a model and its classes"),
        ({"input": None}, "does not say what the model is fed"),
        ({"input": {"channels": 1}}, "does not say what the model is fed"),
        ({"input": "images"}, "does not say what the model is fed"),
        ({"input": {"kind": "os:system"}}, "does not say what the model is fed"),
        ({"input": FED | {"channels": 1e400}}, "does not say what the model is fed"),
        ({"input": FED | {"size": "88"}}, "does not say what the model is fed"),
        ({"input": FED | {"size": [8.5, 8]}}, "does not say what the model is fed"),
        ({"input": FED | {"size": [10**6, 10**6]}}, "does not say what the model is fed"),
        ({"input": FED | {"mean": [math.nan]}}, "does not say what the model is fed"),
        ({"input": FED | {"std": [0.0]}}, "does not say what the model is fed"),
        ({"input": {"kind": "tables", "columns": [{"name": 3}]}}, "does not say what the model is"),
        ({"input": {"kind": "text", "tokenizer": "{}", "length": 8}}, "does not say what the mod"),
        ({"task": ["classification"]}, "does not name a model"),
        (
            {"model": "hf:vit", "config": {"model_type": "vit"}},
            "safetensors does not fit the model",
        ),
    ],
)
def test_a_forged_description_is_refused(
    facts: dict[str, Any], sentence: str, stored: Path
) -> None:
    rewrite(stored, **facts)
    with pytest.raises(UserError, match=sentence):
        load(stored)


@pytest.mark.parametrize(
    "facts",
    [
        {"model": "mlp-20000-20000"},
        {"model": "mlp" + "-1" * 9000},
        {"model": "wrn-1996-1"},
        {"model": "timm:vit_gigantic_patch14_clip_224"},
        {"model": "hf:vit", "config": {"model_type": "vit", "num_hidden_layers": 10**9}},
        {"classes": [str(number) for number in range(10**6)]},
    ],
    ids=["wide", "deep", "a family", "a library", "a configuration", "classes"],
)
def test_a_description_cannot_announce_a_model_that_fills_the_memory(
    facts: dict[str, Any], stored: Path
) -> None:
    rewrite(stored, **facts)
    with pytest.raises(UserError, match="safetensors does not fit the model, which is many times"):
        load(stored)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "it is not JSON"),
        ("[]", "does not name"),
        ("\xff", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
    ],
    ids=["cut", "a list", "no text", "deep"],
)
def test_a_damaged_description_is_refused(content: str, sentence: str, stored: Path) -> None:
    stored.with_suffix(".json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=sentence):
        load(stored)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_a_plain_state_dict_is_loaded(suffix: str, network: Network, tmp_path: Path) -> None:
    file = tmp_path / f"w{suffix}"
    state = network.model.state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    again = build(f"cnn-4-8@{file}", CLASSES, SMALL).eval()
    view = torch.rand(2, 1, 8, 8)
    assert torch.equal(again(view), network(view))
    assert again.name == "cnn-4-8"


class Malicious:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.canary),))


def saved(content: Any, file: Path) -> None:
    torch.save(content, file)


def saved_as_of_old(content: Any, file: Path) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


def pickled(content: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(content))


def planted(content: Any, file: Path) -> None:
    """Put in the place of what ``torch.save`` wrote about whole tensors."""
    torch.save({"fc.bias": torch.zeros(3)}, file)
    with zipfile.ZipFile(file) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(file, "w") as altered:
        for name, part in parts.items():
            altered.writestr(name, pickle.dumps(content) if name.endswith("data.pkl") else part)


@pytest.mark.parametrize("write", [saved, saved_as_of_old, pickled, planted])
def test_a_file_that_wants_to_run_code_is_refused_and_nothing_runs(
    write: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    file, canary = tmp_path / "evil.pt", tmp_path / "canary"
    write({"fc.weight": Malicious(canary)}, file)
    with pytest.raises(UserError, match=r"evil.pt is refused: .* run code"):
        build(f"cnn-4-8@{file}", CLASSES, SMALL)
    assert not canary.exists()
    pickle.load(file.open("rb")) if write is pickled else torch.load(file, weights_only=False)
    assert canary.exists(), "the trap would have sprung"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_modules_and_programs_are_refused_without_advice_to_run_them(
    network: Network, tmp_path: Path
) -> None:
    module, program = tmp_path / "module.pt", tmp_path / "program.pt"
    torch.save(network.model, module)
    torch.jit.trace(network.model, torch.zeros(1, 1, 8, 8)).save(program)
    for file in (module, program):
        with pytest.raises(UserError, match=rf"{file.name} is (refused|damaged)") as refusal:
            build(f"cnn-4-8@{file}", CLASSES, SMALL)
        assert "weights_only" not in str(refusal.value)


def test_an_archive_that_swells_is_refused_before_it_does(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(UserError, match=r"w.pt is damaged .* its parts are compressed"):
        build(f"cnn-4-8@{tmp_path / 'w.pt'}", CLASSES, SMALL)


@pytest.mark.parametrize("name", ["student.safetensors", "student.json"])
@pytest.mark.parametrize("place", ["folder", "pipe", "device", "loop", "nothing"])
def test_what_is_no_file_is_refused_and_not_waited_for(place: str, name: str, stored: Path) -> None:
    file = stored.parent / name
    file.unlink()
    if place == "folder":
        file.mkdir()
    elif place == "pipe":
        os.mkfifo(file)
    elif place != "nothing":
        file.symlink_to("/dev/zero" if place == "device" else file)
    with pytest.raises(UserError, match=rf"{name} cannot be read: "):
        load(stored)


def header(facts: Any, length: int | None = None) -> bytes:
    text = json.dumps(facts).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


BIAS = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}


@pytest.mark.parametrize(
    "content",
    [
        header({"fc.bias": BIAS}, 2**40),
        header({"fc.bias": BIAS}, 5),
        header([BIAS]),
        header({"fc.bias": BIAS | {"dtype": "Q9"}}),
        header({"fc.bias": BIAS | {"shape": [2**40, 2**40]}}),
        header({"fc.bias": BIAS | {"data_offsets": [4, 16]}}),
        header({"fc.bias": BIAS | {"data_offsets": [-12, 0]}}),
        header({"fc.bias": BIAS, "fc.weight": BIAS}),
        header({"fc.bias": BIAS}) + b"more",
    ],
    ids=["long", "short", "list", "type", "shape", "outside", "before", "overlap", "surplus"],
)
def test_a_header_that_lies_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(content + bytes(12))
    with pytest.raises(UserError, match=r"w.safetensors is damaged or not a weights file"):
        build(f"cnn-4-8@{tmp_path / 'w.safetensors'}", CLASSES, SMALL)


@pytest.mark.parametrize(
    "type", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_of_another_kind_are_refused(
    suffix: str, type: torch.dtype, network: Network, tmp_path: Path
) -> None:
    file = tmp_path / f"w{suffix}"
    state = network.model.state_dict()
    state["fc.bias"] = state["fc.bias"].to(type)
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    name = str(type).removeprefix("torch.")
    with pytest.raises(UserError, match=rf"w{suffix} .*: of another kind fc.bias {name} instead"):
        build(f"cnn-4-8@{file}", CLASSES, SMALL)


@pytest.mark.parametrize("type", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_weights_of_another_length_are_taken(
    type: torch.dtype, network: Network, tmp_path: Path
) -> None:
    state = network.model.state_dict()
    save_file({name: tensor.to(type) for name, tensor in state.items()}, tmp_path / "w.safetensors")
    again = build(f"cnn-4-8@{tmp_path / 'w.safetensors'}", CLASSES, SMALL).model.state_dict()
    assert all(torch.equal(again[name], state[name].to(type).float()) for name in state)


def test_weights_too_large_for_the_model_are_refused(network: Network, tmp_path: Path) -> None:
    state = network.model.state_dict()
    state["fc.bias"] = torch.full((3,), 1e300, dtype=torch.float64)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"w.safetensors holds NaN or infinity in fc.bias"):
        build(f"cnn-4-8@{tmp_path / 'w.safetensors'}", CLASSES, SMALL)


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(3, 32).to_sparse(),
        torch.zeros(3, 32, device="meta"),
        torch.quantize_per_tensor(torch.zeros(3, 32), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "meta", "quantised"],
)
def test_tensors_that_are_not_plain_are_refused(
    odd: torch.Tensor, network: Network, tmp_path: Path
) -> None:
    torch.save(network.model.state_dict() | {"fc.weight": odd}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w.pt holds fc.weight as sparse, quantised or empty"):
        build(f"cnn-4-8@{tmp_path / 'w.pt'}", CLASSES, SMALL)


def test_weights_that_do_not_fit_are_named_three_of_each_kind(
    network: Network, tmp_path: Path
) -> None:
    state = network.model.state_dict()
    state["fc.weight"] = torch.zeros(7, 32)
    del state["fc.bias"]
    state |= {f"more.{i}": torch.zeros(1) for i in range(5)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError) as refusal:
        build(f"cnn-4-8@{tmp_path / 'w.safetensors'}", CLASSES, SMALL)
    assert str(refusal.value) == (
        f"{tmp_path / 'w.safetensors'} does not fit the model: missing fc.bias; "
        "surplus more.0, more.1, more.2 and 2 more; "
        "wrongly shaped fc.weight (7, 32) instead of (3, 32)"
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(
    bad: float, network: Network, tmp_path: Path
) -> None:
    state = network.model.state_dict()
    state["stage2.1.bias"][3] = bad
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w.pt holds NaN or infinity in stage2.1.bias"):
        build(f"cnn-4-8@{tmp_path / 'w.pt'}", CLASSES, SMALL)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_truncated_file_is_refused_by_its_path(
    suffix: str, kept: int, network: Network, tmp_path: Path
) -> None:
    file = tmp_path / f"w{suffix}"
    state = network.model.state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=rf"w{suffix} is (damaged|refused)") as refusal:
        build(f"cnn-4-8@{file}", CLASSES, SMALL)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_a_foreign_file_is_refused_by_its_path(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"w{suffix}"
    file.write_bytes(b"\x89PNG\r\n" + bytes(range(256)) * 4)
    with pytest.raises(UserError, match=rf"w{suffix} is (damaged|refused)"):
        build(f"cnn-4-8@{file}", CLASSES, SMALL)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, "the keys state_dict, epoch"),
        ({0: torch.zeros(1)}, "the keys 0"),
        ([torch.zeros(1)], "no dict"),
    ],
)
def test_a_checkpoint_that_is_no_plain_state_dict_is_refused(
    content: Any, found: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(UserError, match=f"holds {found}, not a plain state dict"):
        build(f"cnn-4-8@{tmp_path / 'c.pth'}", CLASSES, SMALL)
