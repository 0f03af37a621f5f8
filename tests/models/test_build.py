"""Models from a name, of each library; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from limbeck.errors import UserError
from limbeck.models import Input, build, load, save, weights_given
from limbeck.models.spec import Spec
from limbeck.training.taps import Taps

GREY = Input(1, (28, 28), (0.3,), (0.4,))
COLOUR = Input(3, (32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
CLASSES = ("ant", "bee", "cat", "dog", "eel")


def tiny_vit() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=len(CLASSES),
    )


@pytest.mark.parametrize(
    ("spec", "input", "fed"),
    [
        ("resnet8", COLOUR, COLOUR),
        ("mlp-16-8", GREY, GREY),
        ("timm:mobilenetv3_small_050", COLOUR, COLOUR),
        ("timm:mobilenetv3_small_050", GREY, GREY),
        ("timm:test_vit", COLOUR, COLOUR),
        ("timm:test_vit", GREY, Input(1, (160, 160), (0.3,), (0.4,))),
        ("torchvision:mobilenet_v3_small", COLOUR, COLOUR),
        ("torchvision:mobilenet_v3_small", GREY, Input(3, (28, 28), (0.3,) * 3, (0.4,) * 3)),
    ],
)
def test_a_model_is_made_for_the_data_where_it_allows_that(
    spec: str, input: Input, fed: Input
) -> None:
    if spec.startswith("timm"):
        pytest.importorskip("timm")
    network = build(spec, CLASSES, input)
    assert network.input == fed
    assert (network.name, network.classes) == (spec, CLASSES)
    assert network.training
    assert network.model.training
    network.eval()
    assert network(torch.rand(2, input.channels, *input.size)).shape == (2, len(CLASSES))


def test_a_transformers_configuration_is_made_for_the_data(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path / "vit")
    network = build(f"hf:{tmp_path / 'vit'}", CLASSES, Input(1, (16, 24), (0.3,), (0.4,)), seed=0)
    assert network.input == Input(1, (16, 24), (0.3,), (0.4,))
    network.eval()
    assert network(torch.rand(2, 1, 16, 24)).shape == (2, len(CLASSES))


def test_a_saved_transformers_model_comes_with_weights_and_its_own_input(tmp_path: Path) -> None:
    import transformers

    theirs: Any = transformers.ViTForImageClassification(tiny_vit())
    theirs.eval()
    theirs.save_pretrained(tmp_path)
    spec = f"hf:{tmp_path}"
    assert weights_given(spec)
    assert build(spec, CLASSES, GREY).input == Input(3, (32, 32), (0.3,) * 3, (0.4,) * 3)

    transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    ).save_pretrained(tmp_path)
    network = build(spec, CLASSES, GREY)
    assert network.input == Input(3, (32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    network.eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network.model(x), theirs(x).logits)
    with Taps(network.model, ["classifier"]) as taps:
        output, features = taps(x)
    assert torch.equal(output, features["classifier"])
    assert set(network.model.state_dict()) == set(theirs.state_dict())

    other = build(spec, [*CLASSES, "fox"], COLOUR)
    body = "vit.embeddings.cls_token"
    assert torch.equal(other.model.state_dict()[body], theirs.state_dict()[body])
    other.eval()
    assert other.model(x).shape == (2, 6)


def test_a_transformers_model_is_stored_with_its_configuration(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path / "vit")
    network = build(f"hf:{tmp_path / 'vit'}", CLASSES, GREY).eval()
    save(network, tmp_path / "student", {})
    (tmp_path / "vit" / "config.json").unlink()
    again = load(tmp_path / "student").eval()
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(network(x), again(x))


def test_a_damaged_transformers_folder_is_one_sentence(tmp_path: Path) -> None:
    import transformers

    transformers.ViTForImageClassification(tiny_vit()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"the weights of hf:.* could not be had"):
        build(f"hf:{tmp_path}", CLASSES, COLOUR)


def configured(folder: Path, **facts: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def prepared(folder: Path, **facts: Any) -> None:
    content = json.dumps({"image_processor_type": "ViTImageProcessor", **facts})
    (folder / "preprocessor_config.json").write_text(content)


def written(folder: Path, **tensors: torch.Tensor) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "config.json").write_text("["), "hf:.* is neither a folder"),
        (lambda folder: configured(folder, image_size=[]), "hf:.* is no model that can be made"),
        (lambda folder: configured(folder, hidden_size=10**5), "hf:.* which is many times larger"),
        (lambda folder: configured(folder, num_hidden_layers=10**6), "many times larger"),
        (lambda folder: configured(folder, hidden_size=32), "cls_token is missing or of another"),
        (lambda folder: written(folder), "cls_token is missing or of another"),
        (
            lambda folder: prepared(folder, size={"height": 10**6, "width": 8}),
            r"_config.json .* size",
        ),
        (lambda folder: prepared(folder, image_std=[0, 0, 0]), r"preprocessor_config.json .* std"),
    ],
)
def test_a_transformers_folder_that_fits_nothing_is_one_sentence(
    damage: Callable[[Path], Any], sentence: str, tmp_path: Path
) -> None:
    import transformers

    transformers.ViTForImageClassification(tiny_vit()).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=sentence) as refusal:
        build(f"hf:{tmp_path}", CLASSES, COLOUR)
    assert str(tmp_path) in str(refusal.value)


def test_so_many_labels_as_a_configuration_names_are_not_made(tmp_path: Path) -> None:
    import transformers

    transformers.ViTForImageClassification(tiny_vit()).save_pretrained(tmp_path)
    configured(tmp_path, num_labels=10**9, id2label=None, label2id=None)
    assert build(f"hf:{tmp_path}", CLASSES, COLOUR).classes == CLASSES


@pytest.mark.parametrize("kind", ["vit", "foreign"])
@pytest.mark.parametrize("auto", ["AutoConfig", "AutoModelForImageClassification", "processor"])
def test_code_beside_weights_is_never_run(auto: str, kind: str, tmp_path: Path) -> None:
    import transformers

    folder, canary = tmp_path / "vit", tmp_path / "canary"
    transformers.ViTForImageClassification(tiny_vit()).save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    if auto == "processor":
        configured(folder, model_type=kind)
        prepared(folder, auto_map={"AutoImageProcessor": "evil.Evil"}, image_processor_type="Evil")
    else:
        configured(folder, model_type=kind, auto_map={auto: "evil.Evil"})
    with suppress(UserError):
        build(f"hf:{folder}", CLASSES, COLOUR)
    assert not canary.exists()


class Malicious:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.mkdir, (self.canary,))


def test_weights_of_transformers_that_want_to_run_code_are_refused(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path)
    torch.save({"classifier.bias": Malicious(tmp_path / "canary")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"the weights of hf:.* could not be had: Weights only load"
    ):
        build(f"hf:{tmp_path}", CLASSES, COLOUR)
    assert not (tmp_path / "canary").exists()


def test_a_hub_name_without_network_is_one_sentence() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="hf:no/such is neither a folder") as refusal:
        build("hf:no/such", CLASSES, COLOUR)
    assert "\n" not in str(refusal.value)


def published(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision find these weights where it would download."""
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: model.state_dict()
    )


def test_torchvisions_weights_bring_their_input_and_keep_all_but_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torchvision.models import mobilenet_v3_small

    theirs = mobilenet_v3_small().eval()
    published(theirs, monkeypatch)
    network = build("torchvision:mobilenet_v3_small@pretrained", CLASSES, GREY)
    assert network.name == "torchvision:mobilenet_v3_small"
    assert network.input == Input(3, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    own, given = network.model.state_dict(), theirs.state_dict()
    differing = {name for name in own if not torch.equal(own[name], given[name])}
    assert differing == {"classifier.3.weight", "classifier.3.bias"}


def test_as_many_classes_as_imagenet_keep_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import squeezenet1_1

    theirs = squeezenet1_1().eval()
    published(theirs, monkeypatch)
    network = build("torchvision:squeezenet1_1@pretrained", [str(i) for i in range(1000)], COLOUR)
    network.eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(network.model(x), theirs(x))


def test_weights_made_for_another_normalisation_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import googlenet

    theirs = googlenet(init_weights=False, transform_input=True)
    published(theirs, monkeypatch)
    network = build("torchvision:googlenet@pretrained", CLASSES, COLOUR)
    view = torch.rand(1, 3, 224, 224)
    imagenet = Input(3, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert network.input is not None
    assert not network.model.transform_input
    torch.testing.assert_close(network.input(view), theirs._transform_input(imagenet(view)))


def test_timms_weights_bring_their_input(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    make, asked = timm.create_model, []

    def create(name: str, pretrained: bool = False, **options: Any) -> Any:
        asked.append((name, pretrained))
        return make(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    network = build("timm:mobilenetv3_small_050@pretrained", CLASSES, GREY)
    assert asked == [("mobilenetv3_small_050", True)]
    assert network.input == Input(3, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_a_failing_download_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(UserError, match=r"could not be had: no network$"):
        build("torchvision:squeezenet1_1@pretrained", CLASSES, COLOUR)


def test_nothing_is_downloaded_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    monkeypatch.setattr("urllib.request.urlopen", fail)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    for spec in ("resnet8", "torchvision:mobilenet_v3_small", "timm:mobilenetv3_small_050"):
        build(spec, CLASSES, COLOUR)


@pytest.mark.parametrize("spec", ["resnet8", "timm:test_vit", "torchvision:squeezenet1_1"])
def test_a_seed_decides_the_weights_and_leaves_the_global_generator_alone(spec: str) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = build(spec, CLASSES, COLOUR, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    same = build(spec, CLASSES, COLOUR, seed=3).state_dict()
    other = build(spec, CLASSES, COLOUR, seed=4).state_dict()
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_without_a_seed_the_global_generator_decides() -> None:
    torch.manual_seed(7)
    first = build("resnet8", CLASSES, COLOUR).state_dict()
    second = build("resnet8", CLASSES, COLOUR).state_dict()
    torch.manual_seed(7)
    again = build("resnet8", CLASSES, COLOUR).state_dict()
    assert not torch.equal(first["model.fc.weight"], second["model.fc.weight"])
    assert torch.equal(first["model.fc.weight"], again["model.fc.weight"])


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("resnet2O", "no network named 'resnet2O'; did you mean .*resnet20"),
        ("torchvision:resnet81", "torchvision has no model named 'resnet81'; did you mean resnet"),
        ("timm:mobilnetv3_small_050", "timm has no model .*; did you mean mobilenetv3_small_050"),
        ("timm:resnet50.nope", "nope"),
        ("tim:resnet18", "'tim' is no source of models; did you mean timm"),
        ("resnet8@pretraind", "behind @ comes a file of weights .* not 'pretraind'"),
        ("resnet8@pretrained", "ships no weights for resnet8"),
        ("timm:", "names no model"),
        ("", "names no model"),
        ("run:here@pretrained", "brings its own weights"),
        ("resnet8@none.pt", "none.pt cannot be read: no such file"),
        ("run:nowhere", "nowhere/student.json cannot be read"),
        ("torchvision:alexnet", "cannot read 3 x 32 x 32 images .*; it is made for 224 x 224"),
        ("vgg8@none.onnx", "behind @"),
    ],
)
def test_a_mistake_in_a_name_is_one_sentence(spec: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refusal:
        build(spec, CLASSES, COLOUR)
    assert "\n" not in str(refusal.value)


def test_a_model_without_classes_is_refused() -> None:
    with pytest.raises(UserError, match="without the names of the classes"):
        build("resnet8", (), COLOUR)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'limbeck\[vision\]'"):
        build("timm:resnet18", CLASSES, COLOUR)


@pytest.mark.parametrize(
    ("spec", "given"),
    [
        ("resnet8", False),
        ("resnet8@w.pt", True),
        ("timm:resnet18", False),
        ("timm:resnet18@pretrained", True),
        ("run:a", True),
        ("file:a.safetensors", True),
        ("hf:google/vit", False),
    ],
)
def test_a_name_says_whether_weights_come_with_it(spec: str, given: bool) -> None:
    assert weights_given(spec) is given


def test_a_path_with_an_at_sign_in_it_is_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "me@home"
    folder.mkdir()
    assert Spec.parse(f"run:{folder}") == Spec("run", str(folder), "")
    assert Spec.parse(f"run:{folder}@w.pt") == Spec("run", str(folder), "w.pt")
