"""A run's student as a file that other programs load, with a model card beside it."""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import string
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from torch import Tensor, nn

from limbeck import data as sources
from limbeck.catalogue import systems
from limbeck.data.data import Data, Split
from limbeck.data.sources import KINDS
from limbeck.errors import UserError, did_you_mean
from limbeck.extras import need
from limbeck.models import Input, load, save
from limbeck.models.weights import first_line
from limbeck.recipes import validate
from limbeck.tasks.classification import Classification
from limbeck.tasks.images import ImageWords
from limbeck.training.folding import fold_batch_norm
from limbeck.training.network import Network
from limbeck.training.run import Run
from limbeck.training.task import model_output

FILES = {
    "onnx": "student.onnx",
    "torch-export": "student.pt2",
    "safetensors": "student.safetensors",
    "packed": "student.safetensors",
}
"""The formats, and the file that each writes."""

LIBRARIES = {
    "onnx": "onnx",
    "torch-export": "pytorch",
    "safetensors": "limbeck",
    "packed": "limbeck",
}
"""What a model card names as the library that loads the file."""

HUB = {
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}
"""Public names of kinds of data."""

MOST = 256
"""So many samples at most are compared, and as many are calibrated on."""

TOLERANCE = 1e-3
"""The largest difference of a float export's logits, as a share of their largest magnitude."""

Classifier = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) in [0, 1] to logits (B, classes)."""


class Student:
    """The student of a finished run, in eval mode on the CPU.

    Args:
        network: a network that knows its classes and its input.

    Example:
        >>> from limbeck.models import build
        >>> student = Student(build("mlp-4", ["even", "odd"], Input(1, (8, 8), (0.5,), (0.5,)), 0))
        >>> student(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 2])
        >>> len(student.predict(torch.zeros(3, 1, 8, 8)))
        3
    """

    def __init__(self, network: Network) -> None:
        self.network = network.eval()

    @classmethod
    def from_run(cls, path: str | Path) -> Self:
        """Load the student of a run folder, which may be named ``run:PATH``.

        Raises:
            UserError: there is no run, it is not finished, or its student is no model by name.
        """
        folder = run_folder(path)
        Run.open(folder).result()
        return cls(load(folder / "student"))

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the logits."""
        return self.network.classes

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        return model_output(self.network(images))

    def predict(self, images: Tensor) -> list[str]:
        """The most probable class of each image."""
        return [self.classes[i] for i in self(images).argmax(1).tolist()]


@dataclass(frozen=True)
class Samples:
    """Images to compare on and to calibrate with, at the network's own size and in [0, 1].

    ``labels`` is ``None`` where there are none; ``what`` says in words what the images are.
    """

    images: Tensor
    labels: Tensor | None
    calibration: Tensor
    what: str


@dataclass(frozen=True)
class Export:
    """What was written, and how it compares with the PyTorch student.

    ``largest_difference`` is between logits, of which ``largest_logit`` is the largest magnitude;
    ``equal_predictions`` and the accuracies lie in [0, 1]; latencies are medians for one image.
    Accuracies are ``None`` where the samples have no labels.
    """

    folder: str
    file: str
    format: str
    quantize: str | None
    samples: int
    sampled: str
    largest_difference: float
    largest_logit: float
    equal_predictions: float
    accuracy: float | None
    student_accuracy: float | None
    bytes: int
    student_bytes: int
    latency_ms: float
    student_latency_ms: float
    loader: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def export(
    run: str | Path, format: str, quantize: str | None = None, out: Path | None = None
) -> Export:
    """Write the student of a run into a folder that can be published as it is.

    The exported function has the student's normalisation within: images (B, C, H, W) in [0, 1] at
    the network's own size go in, for any B, and logits come out. Safetensors hold the student's own
    weights under their own names, for :func:`limbeck.models.load`; ``packed`` are safetensors with
    quantised weights in as few bits as they have.

    Args:
        run: a finished run, as a path or ``run:PATH``.
        format: ``onnx``, ``torch-export``, ``safetensors`` or ``packed``.
        quantize: ``int8`` for 8-bit weights and activations, with ``onnx`` only.
        out: the folder; ``export-FORMAT`` in the run folder if not given.

    Raises:
        UserError: anything that cannot be exported, or an export that answers otherwise than the
            student; nothing is then written.
    """
    check(format, quantize)
    folder = run_folder(run)
    opened = Run.open(folder)
    student = Student.from_run(folder)
    network = student.network
    if type(network.input) is not Input:
        raise UserError(
            f"the student of {folder} is no classifier of images that says what it is fed, which "
            "alone can be exported; its weights lie in student.safetensors there"
        )
    target = out or folder / "-".join(["export", format, *([quantize] if quantize else [])])
    check_free(target)
    recipe = opened.recipe()
    data = _data(recipe, network.classes)
    samples = gather(data, network.input, recipe)
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        found = write(student, samples, made, format, quantize)
        loader = snippet(format, network.input, ".")
        (made / "README.md").write_text(
            card(opened, recipe, network, found, data, loader), encoding="utf-8"
        )
        try:
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(made.iterdir()):
                shutil.copyfile(file, target / file.name)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"{target} cannot be written: {reason}") from None
    return replace(found, folder=str(target), loader=snippet(format, network.input, str(target)))


def check(format: str, quantize: str | None) -> None:
    """Refuse what cannot be asked for, and formats whose packages are not installed."""
    if format not in FILES:
        raise UserError(f"there is no format {format!r}; {did_you_mean(format, FILES)}")
    if quantize not in (None, "int8"):
        raise UserError(f"--quantize takes int8, not {quantize!r}")
    if quantize and format != "onnx":
        raise UserError(f"--quantize goes with --format onnx only, not with {format}")
    if format == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            need(name)


def check_free(folder: Path) -> None:
    """Refuse a folder that holds something."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder; choose another name with --out")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another folder with --out")


def run_folder(run: str | Path) -> Path:
    """The path in ``run:PATH``, or the path itself."""
    return Path(str(run).removeprefix("run:"))


def write(
    student: Student, samples: Samples, folder: Path, format: str, quantize: str | None = None
) -> Export:
    """Write one format into a folder, and compare what the file answers with the student.

    Raises:
        UserError: the student cannot be exported, or the file answers otherwise.
    """
    network = student.network
    file = folder / FILES[format]
    if LIBRARIES[format] == "limbeck":
        save(network, folder / "student", {}, packed=format == "packed")
    else:
        facts = {**network.facts(), "model": _architecture(network.name)}
        text = json.dumps(facts, indent=2)
        (folder / "student.json").write_text(text, encoding="utf-8")
        with _quiet():
            try:
                _write_program(network, samples, file, quantize)
            except UserError:
                raise
            except Exception as error:  # a model's own code, traced, may raise anything
                raise UserError(
                    f"the student cannot be exported as {format}: {first_line(error)}"
                ) from error
    answer = loaded(file, format)
    ours, theirs = _answers(student, samples.images), _answers(answer, samples.images)
    difference = float((ours - theirs).abs().max())
    largest = float(ours.abs().max())
    # NaN is a difference too.
    if not quantize and not difference <= TOLERANCE * largest:
        raise UserError(
            f"the {format} file answers otherwise than the student: its logits differ by up to "
            f"{difference:.2g}, where the largest is {largest:.2g}; nothing was written"
        )

    def accuracy(logits: Tensor) -> float | None:
        if samples.labels is None:
            return None
        return float((logits.argmax(1) == samples.labels).float().mean())

    return Export(
        folder=str(folder),
        file=file.name,
        format=format,
        quantize=quantize,
        samples=len(samples.images),
        sampled=samples.what,
        largest_difference=difference,
        largest_logit=largest,
        equal_predictions=float((ours.argmax(1) == theirs.argmax(1)).float().mean()),
        accuracy=accuracy(theirs),
        student_accuracy=accuracy(ours),
        bytes=file.stat().st_size,
        student_bytes=sum(t.numel() * t.element_size() for t in network.state_dict().values()),
        latency_ms=_median_ms(answer, samples.images[:1]),
        student_latency_ms=_median_ms(student, samples.images[:1]),
        loader="",
    )


def loaded(file: Path, format: str) -> Classifier:
    """What an exported file answers, run by the library that it is for."""
    if LIBRARIES[format] == "limbeck":
        return Student(load(file))
    if format == "torch-export":
        module = torch.export.load(str(file)).module()

        @torch.no_grad()
        def run(images: Tensor) -> Tensor:
            logits: Tensor = module(images)
            return logits

        return run
    onnxruntime = need("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def answer(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return answer


class _Logits(nn.Module):
    """A network whose output is the tensor of logits, whatever its model wraps it in."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return model_output(self.network(images))


def _write_program(network: Network, samples: Samples, file: Path, quantize: str | None) -> None:
    folded = Network(fold_batch_norm(network.model), network.input).lay_out(torch.contiguous_format)
    module = _Logits(folded.requires_grad_(False)).eval()
    # One image would be taken for a batch that always has one.
    example = samples.images[:1].expand(2, -1, -1, -1).contiguous()
    program = torch.export.export(
        module, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
    )
    for graph in program.graph_module.modules():
        if isinstance(graph, torch.fx.GraphModule):
            for node in graph.graph.nodes:
                node.meta.pop("stack_trace", None)  # it holds this machine's paths
    if file.suffix == ".pt2":
        torch.export.save(program, str(file))
        return
    onnx = need("onnx")
    made: Any = torch.onnx.export(
        program,
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    model = made.model_proto
    _forget_origins(model)
    onnx.checker.check_model(model, full_check=True)
    if quantize is None:
        onnx.save(model, str(file))
    else:
        _quantise(model, samples.calibration, file)


def _forget_origins(model: Any) -> None:
    """Drop the notes on which line of which file a node comes from."""
    for part in (model.graph, *model.functions):
        for node in part.node:
            del node.metadata_props[:]
        del part.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]


class _Calibration:
    """Batches of images as onnxruntime asks for them."""

    def __init__(self, images: Tensor) -> None:
        self.batches = iter(images.split(32))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}


def _quantise(model: Any, calibration: Tensor, file: Path) -> None:
    """Products and convolutions in 8 bits, one scale for each output channel.

    Weights and activations get scales that calibration finds; without convolutions activations are
    scaled as they come, which needs no calibration and costs a matrix product little.
    """
    onnx = need("onnx")
    quantization = need("onnxruntime.quantization")
    plain, prepared = file.with_name("plain.onnx"), file.with_name("prepared.onnx")
    onnx.save(model, str(plain))
    need("onnxruntime.quantization.shape_inference").quant_pre_process(
        str(plain), str(prepared), skip_symbolic_shape=True
    )
    if any(node.op_type == "Conv" for node in model.graph.node):
        quantization.quantize_static(
            str(prepared),
            str(file),
            _Calibration(calibration),
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
        )
    else:
        quantization.quantize_dynamic(str(prepared), str(file), per_channel=True)
    for beside in (plain, prepared):
        beside.unlink()


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters tell of their own affairs; errors still come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _answers(classifier: Classifier, images: Tensor) -> Tensor:
    return torch.cat([classifier(batch) for batch in images.split(32)])


def _median_ms(
    classifier: Classifier, image: Tensor, most: int = 100, seconds: float = 0.5
) -> float:
    """The median of single passes, after a few to warm up."""
    times: list[float] = []
    for number in range(most + 3):
        start = time.perf_counter()
        classifier(image)
        if number >= 3:
            times.append((time.perf_counter() - start) * 1e3)
        if len(times) >= 5 and sum(times) > seconds * 1e3:
            break
    return statistics.median(times)


def gather(data: Data | None, input: Input, recipe: Mapping[str, Any]) -> Samples:
    """Samples of the test split, and of the validation or else training split to calibrate with.

    Without data these are random images.
    """
    if data is None or not len(data.test):
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(64, input.channels, *input.size, generator=generator)
        why = (
            "the data is gone or has other classes" if "data" in recipe else "the run names no data"
        )
        return Samples(images, None, images, f"random images, for {why}")
    images, labels = _first(data.test, input)
    calibration, _ = _first(data.validation if len(data.validation) else data.train, input)
    return Samples(images, labels, calibration, "images of the test split")


def _data(recipe: Mapping[str, Any], classes: Sequence[str]) -> Data | None:
    """The data that a recipe names, if it is still there and has these classes."""
    if "data" not in recipe:
        return None
    try:
        part = validate(recipe).data
        if not isinstance(part, ImageWords):
            return None
        data = sources.load(
            part.source, validation=part.validation, size=part.size, label=part.label
        )
    except UserError:
        return None
    return data if data.classes == tuple(classes) else None


def _first(split: Split, input: Input) -> tuple[Tensor, Tensor | None]:
    """Samples spread over a split, as this input resizes them but not normalised."""
    chosen = torch.linspace(0, len(split) - 1, min(MOST, len(split))).round().long()
    batch = next(iter(Classification(()).batches(split.subset(chosen), batch_size=MOST).epoch(0)))
    raw = replace(input, mean=(0.0,) * input.channels, std=(1.0,) * input.channels)
    # Antialiased resizing may leave [0, 1] by rounding.
    return raw(batch["image"]).clamp(0, 1).contiguous(), batch.get("label")


# The model card.


def snippet(format: str, input: Input, folder: str) -> str:
    """Lines of Python that load an exported file and classify ``image.png``."""
    height, width = input.size
    mode = "L" if input.channels == 1 else "RGB"
    place = f"Path({folder!r})"
    if LIBRARIES[format] == "limbeck":
        return "\n".join(
            [
                "from pathlib import Path",
                "",
                "from limbeck import Student",
                "from limbeck.data import read_image",
                "from limbeck.models import load",
                "",
                f'student = Student(load({place} / "student"))',
                f'image = read_image(Path("image.png"), {input.channels}, ({height}, {width}))',
                "print(student.predict(image[None] / 255)[0])",
            ]
        )
    libraries = ["import onnxruntime"] if format == "onnx" else ["import torch"]
    lines = [
        "import json",
        "from pathlib import Path",
        "",
        "import numpy as np",
        *libraries,
        "from PIL import Image, ImageOps",
        "",
        f"folder = {place}",
        'classes = json.loads((folder / "student.json").read_text(encoding="utf-8"))["classes"]',
        f'image = Image.open("image.png").convert("{mode}")',
        f"image = ImageOps.fit(image, ({width}, {height}), Image.Resampling.BICUBIC)",
        f"pixels = np.array(image, np.float32).reshape(1, {height}, {width}, {input.channels})",
        "images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) / 255",
    ]
    if format == "onnx":
        return "\n".join(
            [
                *lines,
                'session = onnxruntime.InferenceSession(folder / "student.onnx")',
                '(logits,) = session.run(None, {"images": images})',
                "print(classes[logits[0].argmax()])",
            ]
        )
    return "\n".join(
        [
            *lines,
            'student = torch.export.load(folder / "student.pt2").module()',
            "logits = student(torch.from_numpy(images))",
            "print(classes[int(logits[0].argmax())])",
        ]
    )


def card(
    run: Run,
    recipe: Mapping[str, Any],
    network: Network,
    found: Export,
    data: Data | None,
    loader: str,
) -> str:
    """A model card: front matter, then what the student is, learnt, can do and is loaded by."""
    result = run.result()
    assert isinstance(network.input, Input)
    kind, public = _named(result, data)
    architecture = _plain(_architecture(network.name))
    metric = str(result["metric"]["name"])
    tags = ["image-classification", "knowledge-distillation", "limbeck", found.format]
    front: dict[str, Any] = {
        "library_name": LIBRARIES[found.format],
        "pipeline_tag": "image-classification",
        "tags": [*tags, *([found.quantize] if found.quantize else [])],
        "metrics": [metric],
    }
    if public:
        front["datasets"] = [public]
    height, width = network.input.size
    parameters = sum(p.numel() for p in network.model.parameters())
    quantised = ", quantised to int8" if found.quantize else ""
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {architecture}, distilled",
        "",
        f"An image classifier of {len(network.classes)} classes as {found.format}{quantised}, made "
        "with Limbeck. "
        f"It takes images (B, {network.input.channels}, {height}, {width}) with values in [0, 1] "
        "and gives logits; the normalisation is part of it.",
        "",
        f"- Architecture: {architecture}, {parameters:,} parameters",
        f"- Teacher: {', '.join(map(_plain, _teachers(run.path))) or 'none'}",
        f"- Method: {_methods(recipe, result)}",
        f"- Trained on: {_plain(public or kind)}",
        f"- Classes: {_few(network.classes)}",
        "",
        "## How well it does",
        "",
        f"| on the test split | {_plain(metric)} |",
        "|---|---|",
    ]
    titles = {"teacher": "teacher", "baseline": "the same student without a teacher"}
    for role, title in {**titles, "student": "this student, in PyTorch"}.items():
        if isinstance(result.get(role), (int, float)):
            lines.append(f"| {title} | {result[role]:.4f} |")
    difference = f"{found.largest_difference:.2g} (the largest logit is {found.largest_logit:.2g})"
    lines += [
        "",
        f"The exported file was compared with the PyTorch student on {found.samples} "
        f"{found.sampled}: logits differ by up to {difference}, and "
        f"{found.equal_predictions:.1%} of the predictions are equal."
        + (f" Its accuracy on them is {found.accuracy:.4f}." if found.accuracy is not None else ""),
        "",
        "## How to load it",
        "",
        "```python",
        loader,
        "```",
        "",
        "## Licence",
        "",
        "The licence of these weights is their owner's to choose; none has been chosen here.",
        "",
    ]
    return "\n".join(lines)


def _named(result: Mapping[str, Any], data: Data | None) -> tuple[str, str]:
    """What data a run learnt from: its kind, and its public name if it has one; never a path."""
    if data is None:
        kind = str(result.get("data", "")).partition(":")[0]
        return (kind if kind in KINDS else "data of its owner's"), HUB.get(kind, "")
    name = data.source.partition(":")[2]
    if data.kind == "hf" and not Path(name).exists():
        return data.kind, name
    return data.kind, HUB.get(data.kind, "")


def _architecture(name: str) -> str:
    """The name of a model without the folder that it was read from.

    >>> _architecture("hf:/home/me/vit"), _architecture("timm:resnet18")
    ('hf:vit', 'timm:resnet18')
    """
    library, colon, rest = name.rpartition(":")
    local = library == "hf" and (Path(rest).is_absolute() or Path(rest).exists())
    return f"{library}{colon}{Path(rest).name if local else rest}"


def _teachers(folder: Path) -> list[str]:
    """The architectures of a run's teachers, from the facts beside their weights."""
    names = []
    for file in sorted(folder.glob("teacher*.json")):
        try:
            names.append(str(json.loads(file.read_text(encoding="utf-8"))["model"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return [_architecture(name) or "a module of its owner's" for name in names]


def _methods(recipe: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    named = recipe.get("methods")
    slugs = list(named) if isinstance(named, Mapping) else [result.get("system", "")]
    known = systems()
    told = []
    for slug in map(str, slugs):
        paper = known[slug].paper if slug in known else None
        told.append(
            _plain(slug)
            if paper is None
            else f"{slug}, [{_plain(paper.title)}]({paper.link}), {paper.year}"
        )
    return "; ".join(told) or "labels alone"


def _few(names: Sequence[str], most: int = 100) -> str:
    listed = ", ".join(map(_plain, names[:most]))
    more = len(names) - most
    return listed + (f" and {more:,} more, in student.json" if more > 0 else "")


def _plain(text: str) -> str:
    """Text of anybody's as one line that Markdown shows as it is.

    >>> _plain("a*b\\n| <i>")
    'a\\\\*b \\\\| \\\\<i\\\\>'
    """
    line = "".join(
        c if c.isprintable() else " " for c in text.encode(errors="backslashreplace").decode()
    )
    return "".join(f"\\{c}" if c in string.punctuation and c not in "-.,:'/()" else c for c in line)
