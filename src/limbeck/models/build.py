"""Models from a name, and networks stored as a file of weights with its facts beside it.

torch is imported when a model is made, so that names and their mistakes are known without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.errors import UserError
from limbeck.files import regular
from limbeck.models.spec import LIBRARIES, PRETRAINED, STORED, Spec, weights_given

if TYPE_CHECKING:
    from limbeck.models.input import Intake
    from limbeck.training.network import Network

__all__ = ["build", "described", "load", "save", "weights_given"]


def build(spec: str, classes: Sequence[str], input: Intake, seed: int | None = None) -> Network:
    """Make the model that a string names.

    ===================  ==========================================================================
    ``NAME``             one of Limbeck's own (:func:`limbeck.models.zoo.names`)
    ``torchvision:NAME`` a classifier of torchvision
    ``timm:NAME``        a model of timm
    ``hf:FOLDER``        what ``save_pretrained`` wrote, with the weights in it if there are any
    ``hf:NAME``          a transformers model whose configuration is in the local cache
    ``run:FOLDER``       the student of a run
    ``file:PATH``        a network that :func:`save` wrote
    ``...@pretrained``   the library's own weights, downloaded if need be
    ``...@PATH``         weights from a .safetensors file or a plain state dict in a .pt or .pth
    ===================  ==========================================================================

    Nothing in a file is executed. A library's model is made for the data's channels and size where
    it allows that; otherwise, and with the library's weights, ``network.input`` says what it wants.

    Args:
        spec: the name, as above.
        classes: class names of the data; each gets an output.
        input: what the data feeds to models; of images their channels, size and normalisation.
        seed: of the initialisation, leaving the global generator alone; ``None`` draws from it.

    Returns:
        The network, on the CPU and in training mode.

    Raises:
        UserError: no such model, classes or weights that do not fit, or files that are damaged.

    Example:
        >>> from limbeck.models import Input
        >>> network = build("resnet8", ["cat", "dog"], Input(3, (32, 32), (0.5,) * 3, (0.5,) * 3))
        >>> network.model.fc.out_features
        2
    """
    from limbeck.models import libraries, weights

    parsed = Spec.parse(spec)
    file = "" if parsed.weights == PRETRAINED else parsed.weights
    if parsed.kind in STORED:
        place = Path(parsed.name) / "student" if parsed.kind == "run" else Path(parsed.name)
        return _load(place, classes, file)
    if not classes:
        raise UserError(f"{spec} cannot be built without the names of the classes")
    state = weights.read(Path(file)) if file else None
    order = libraries.Order(
        parsed.kind, parsed.name, tuple(classes), input, parsed.weights == PRETRAINED
    )
    return libraries.network(order, seed, state, file)


def save(
    network: Network, path_without_suffix: Path, extra: dict[str, Any], packed: bool = False
) -> None:
    """Write PATH.safetensors and, beside it, PATH.json: how to build the model again, and SHA-256.

    The tensors carry the model's own names. Each file is put in place in one move.

    Args:
        network: what to write.
        path_without_suffix: where; folders are made.
        extra: more facts for the JSON file; plain values.
        packed: quantised weights in as few bits as they have.

    Raises:
        UserError: the folder cannot be written, or there is nothing to pack.

    Example:
        >>> import tempfile
        >>> from limbeck.models import Input
        >>> digits = Input(1, (8, 8), (0.3,), (0.4,))
        >>> network = build("cnn-4-8", ["even", "odd"], digits)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(network, Path(folder, "student"), {"accuracy": 0.5})
        ...     load(Path(folder, "student")).classes
        ('even', 'odd')
    """
    from limbeck.models import weights
    from limbeck.training.checkpoint import write_atomically

    content = weights.to_bytes(network.model, packed)
    facts = {**extra, **network.facts(), "sha256": hashlib.sha256(content).hexdigest()}
    if network.name.startswith("hf:"):
        config: Any = network.model.config
        facts["config"] = json.loads(config.to_json_string(use_diff=False))
    file, card = _files(path_without_suffix)
    write_atomically(file, content)
    write_atomically(card, json.dumps(facts, indent=2).encode())


def load(path: Path) -> Network:
    """Read a network that :func:`save` wrote, by its path with or without suffix.

    Raises:
        UserError: a file is missing or damaged, or the network was not built by name.
    """
    return _load(path, (), "")


def described(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote beside a network's weights, by the network's path.

    Raises:
        UserError: the file is missing or damaged.
    """
    return _facts(_files(_stem(path))[1])


def fed(path: Path) -> Intake:
    """What a network is fed that :func:`save` wrote, by its path.

    Raises:
        UserError: the file beside the weights is missing or damaged, or does not say it.
    """
    return _fed(described(path), _files(_stem(path))[1])


def _load(path: Path, classes: Sequence[str], other: str) -> Network:
    """As :func:`load`, for data with these classes if any are given, with other weights if any."""
    from limbeck.models import libraries, weights

    stem = _stem(path)
    file, card = _files(stem)
    facts = _facts(card)
    name, config = facts["model"], facts.get("config")
    if not name:
        raise UserError(
            f"{card} describes a module that was passed in Python, not built by name; make the "
            f"module there and give it safetensors.torch.load_file({str(file)!r})"
        )
    before, colon, behind = name.partition(":")
    library, name = (before, behind) if colon else ("", name)
    if library not in ("", *LIBRARIES) or (library == "hf") != isinstance(config, dict):
        raise UserError(f"{card} describes no model that Limbeck can build: {facts['model']!r}")
    input = _fed(facts, card)
    known = tuple(facts["classes"])
    _agree(known, classes, stem)
    source = Path(other) if other else file
    state = weights.read(source)
    if source == file and facts.get("sha256", digest := _sha256(file)) != digest:
        raise UserError(f"{file} is not the file that {card} describes: its SHA-256 differs")
    order = libraries.Order(library, name, known or tuple(classes), input, config=config)
    network = libraries.network(order, state=state, origin=str(source))
    network.input = input
    return network


def _stem(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".safetensors", ".json") else path


def _files(stem: Path) -> tuple[Path, Path]:
    return stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.json")


def _facts(card: Path) -> dict[str, Any]:
    try:
        facts = json.loads(regular(card).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{card} cannot be read: {(error.strerror or 'error').lower()}; a stored network is a "
            ".safetensors file with a .json file of the same name beside it"
        ) from None
    except (ValueError, RecursionError):
        raise UserError(f"{card} is damaged: it is not JSON") from None
    if (
        not isinstance(facts, dict)
        or not isinstance(facts.get("model"), str)
        or not isinstance(facts.get("classes"), list)
        or not all(isinstance(name, str) for name in facts["classes"])
        or not isinstance(facts.get("task", ""), str)
    ):
        raise UserError(f"{card} does not name a model and its classes")
    return facts


def _fed(facts: dict[str, Any], card: Path) -> Intake:
    from limbeck.models.input import intake

    try:
        return intake(facts["input"])
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{card} does not say what the model is fed") from None
    except ValueError as error:
        raise UserError(f"{card} does not say what the model is fed: {error}") from None


def _agree(known: Sequence[str], wanted: Sequence[str], stem: Path) -> None:
    if not known and not wanted:
        raise UserError(f"{stem} was stored without the names of its classes")
    if not known or not wanted:
        return
    if len(known) != len(wanted):
        raise UserError(f"{stem} knows {len(known)} classes, but the data has {len(wanted)}")
    for number, (theirs, ours) in enumerate(zip(known, wanted, strict=True)):
        if theirs != ours:
            raise UserError(
                f"class {number} of {stem} is {theirs!r}, but {ours!r} in the data; the classes "
                "must have the same names in the same order"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
