"""Models of Limbeck, torchvision, timm and transformers by name, sized for the data.

Each function answers with the ways to make a model, best first: for the data's size, and for the
model's own where only that may do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import UserError, did_you_mean
from limbeck.extras import need
from limbeck.models import weights, zoo
from limbeck.models.input import Input, Intake
from limbeck.models.spec import has_weights
from limbeck.training.network import Network

SIZES = {"vit": "image_size", "maxvit": "input_size"}
"""Families of torchvision whose size is an argument, and that argument."""

SIDED = {"googlenet", "inception_v3"}
"""torchvision's models with side classifiers, which stay off; their published weights were made for
mean and deviation of one half."""


@dataclass(frozen=True)
class Way:
    """A way to make a model, and what it is then fed."""

    make: Callable[[], nn.Module]
    input: Intake


@dataclass(frozen=True)
class Offer:
    """The ways to make a model, best first.

    ``native`` is the size it was designed for, where known; ``loaded`` says that making it loads
    weights.
    """

    ways: list[Way]
    native: tuple[int, int] | None = None
    loaded: bool = False


@dataclass(frozen=True)
class Order:
    """What is asked for.

    Args:
        library: "" for Limbeck's own, or ``torchvision``, ``timm``, ``hf``.
        name: the library's name of the model.
        classes: names of the outputs.
        input: what the data feeds to models, a :class:`limbeck.models.input.Intake`.
        pretrained: take the library's own weights, which may download them.
        config: a transformers configuration kept by ``save``, in place of its name.
    """

    library: str
    name: str
    classes: tuple[str, ...]
    input: Any
    pretrained: bool = False
    config: dict[str, Any] | None = None

    @property
    def title(self) -> str:
        """The name that ``limbeck.models.build`` knows the model by."""
        return f"{self.library}:{self.name}" if self.library else self.name


def network(
    order: Order, seed: int | None = None, state: dict[str, Tensor] | None = None, origin: str = ""
) -> Network:
    """Make the model the first way that fits weights and a trial image; in training mode.

    Args:
        order: what is asked for.
        seed: of the initialisation; the global generator is then left alone.
        state: weights to load.
        origin: where they come from, named in errors.

    Raises:
        UserError: there is no such model, or no way works.
    """
    offers = order.input.offers()
    if order.library not in offers:
        known = [library or "Limbeck's own, by their bare names" for library in offers]
        raise UserError(
            f"no model of {order.library} can be fed {order.input.describe()}; "
            f"known: {', '.join(known)}"
        )
    try:
        offer = offers[order.library](order)
    except UserError:
        raise
    except Exception as error:  # A configuration can be wrong in any way.
        raise UserError(
            f"{order.title} is no model that can be made: {weights.first_line(error)}"
        ) from error
    errors: list[Exception] = []
    held = None if state is None else sum(tensor.nbytes for tensor in state.values())
    for way in offer.ways:
        # What a library raises is its own affair; the first way's error is told in one sentence.
        try:
            with nullcontext() if seed is None else _seeded(seed), _bounded(held, origin):
                model = way.make()
            if state is not None:
                weights.fit(model, state, origin)
            elif offer.loaded:
                weights.check_finite(model.state_dict(), order.title)
            _try(model, way.input, len(order.classes))
        except Exception as error:
            errors.append(error)
            continue
        return Network(model, way.input, order.title, order.classes)
    if isinstance(errors[0], UserError):
        raise errors[0]
    raise UserError(_refusal(order, offer, errors[0])) from errors[0]


def _refusal(order: Order, offer: Offer, error: Exception) -> str:
    reason = weights.first_line(error)
    if offer.loaded:
        return f"the weights of {order.title} could not be had: {reason}"
    wanted, native = offer.ways[0].input, offer.native
    sentence = f"{order.title} cannot read {wanted.describe()} ({reason})"
    if native is None or native == getattr(wanted, "size", native):
        return sentence
    return f"{sentence}; it is made for {native[0]} x {native[1]}"


def _bounded(held: int | None, origin: str) -> AbstractContextManager[None]:
    return nullcontext() if held is None else weights.bounded(held, origin)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # torch.manual_seed would seed the GPUs' generators too, which the fork does not bring back.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _try(model: nn.Module, input: Intake, classes: int) -> None:
    model.eval()
    with torch.no_grad():
        output = Network(model, input)(input.sample())
    model.train()
    input.check(output, classes)


def _own(order: Order) -> Offer:
    if order.pretrained:
        raise UserError(
            f"Limbeck ships no weights for {order.name}; train it, or take timm:NAME@pretrained"
        )
    input = order.input

    def make() -> nn.Module:
        return zoo.make(order.name, len(order.classes), input.channels, input.size)

    return Offer([Way(make, input)])


def _torchvision(order: Order) -> Offer:
    import torchvision
    from torchvision.models import get_model, get_model_weights, list_models

    name = order.name
    _known(name, list_models(module=torchvision.models), "torchvision")
    best = get_model_weights(name).DEFAULT
    facts = best.transforms()
    native = (facts.crop_size[0], facts.crop_size[0])
    options: dict[str, Any] = {"num_classes": len(order.classes)}
    if name in SIDED:
        options |= {"aux_logits": False, "init_weights": True}

    def make(**size: Any) -> nn.Module:
        model: nn.Module = get_model(name, weights=None, **options, **size)
        return model

    def make_pretrained() -> nn.Module:
        model = make()
        own = model.state_dict()
        theirs: dict[str, Tensor] = best.get_state_dict(progress=False, check_hash=True)
        # Only the classifier's shape depends on the classes; where they agree in number it stays.
        model.load_state_dict(
            own | {k: v for k, v in theirs.items() if k in own and v.shape == own[k].shape}
        )
        return model

    if order.pretrained:
        mean, std = tuple(facts.mean), tuple(facts.std)
        if name in SIDED:
            mean = std = (0.5, 0.5, 0.5)
        return Offer([Way(make_pretrained, Input(3, native, mean, std))], native, loaded=True)
    input = _coloured(order.input)
    argument = SIZES.get(name.split("_")[0])
    if argument is None:
        return Offer([Way(make, input)], native)
    height, width = input.size
    size: Any = height if argument == "image_size" and height == width else (height, width)
    return Offer(
        [Way(lambda: make(**{argument: size}), input), Way(make, replace(input, size=native))],
        native,
    )


def _timm(order: Order) -> Offer:
    timm = need("timm")
    name, input = order.name, order.input
    if not timm.is_model(name):
        _known(name, timm.list_models(), "timm")
    try:
        facts = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"timm:{name} is unknown: {weights.first_line(error)}") from None
    native = None if facts is None else (facts.input_size[1], facts.input_size[2])

    def make(**size: Any) -> nn.Module:
        model: nn.Module = timm.create_model(
            name, num_classes=len(order.classes), in_chans=input.channels, **size
        )
        return model

    def make_pretrained() -> nn.Module:
        model: nn.Module = timm.create_model(name, pretrained=True, num_classes=len(order.classes))
        return model

    if facts is None or native is None:
        return Offer([Way(make, input)])
    if order.pretrained:
        own = Input(facts.input_size[0], native, tuple(facts.mean), tuple(facts.std))
        return Offer([Way(make_pretrained, own)], native, loaded=True)
    if not facts.fixed_input_size:
        return Offer([Way(make, input)], native)
    ways = [Way(lambda: make(img_size=input.size), input), Way(make, replace(input, size=native))]
    return Offer(ways, native)


def _transformers(order: Order) -> Offer:
    transformers = need("transformers")
    models: Any = transformers.AutoModelForImageClassification
    name, input = order.name, order.input
    loads = order.pretrained or (order.config is None and has_weights(name))
    config = configuration(order)
    size = getattr(config, "image_size", None)
    native = _pair(size) if isinstance(size, int | list | tuple) else None

    def make(size: tuple[int, int] | None = None) -> nn.Module:
        if hasattr(config, "num_channels"):
            config.num_channels = input.channels
        if size is not None and native is not None:
            config.image_size = size[0] if size[0] == size[1] else size
        return answering(models.from_config(config, trust_remote_code=False))

    if loads:
        channels = getattr(config, "num_channels", input.channels)
        way = Way(lambda: with_weights(models, order, config), _processed(order, channels, native))
        return Offer([way], native, loaded=True)
    if native is None or order.config is not None:
        return Offer([Way(make, input)])
    return Offer(
        [
            Way(lambda: make(input.size), input),
            Way(lambda: make(native), replace(input, size=native)),
        ],
        native,
    )


def configuration(order: Order) -> Any:
    """The configuration of a transformers model for an order's classes.

    Raises:
        UserError: there is none in the folder or the local cache.
    """
    transformers = need("transformers")
    labels = dict(enumerate(order.classes))
    named = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    try:
        facts = order.config
        if facts is None:
            facts, _ = transformers.PretrainedConfig.get_config_dict(
                order.name, local_files_only=not order.pretrained
            )
        # Labels of its own might be any number of them.
        config: Any = transformers.AutoConfig.for_model(
            **{"model_type": "none"} | facts | named | {"num_labels": len(labels)}
        )
    except Exception as error:
        hint = "" if order.pretrained else f" (hf:{order.name}@pretrained may download it)"
        raise UserError(
            f"hf:{order.name} is neither a folder written by save_pretrained nor a model that can "
            f"be reached{hint}: {weights.first_line(error)}"
        ) from error
    config.dtype = torch.float32
    return config


def with_weights(models: Any, order: Order, config: Any) -> nn.Module:
    """A transformers model with its published weights, but for a head that does not fit.

    Raises:
        UserError: they lack more than that, which would stay as it was drawn.
    """
    folder = Path(order.name)
    held = sum(f.stat().st_size for f in folder.iterdir()) if folder.is_dir() else None
    with _bounded(held, order.title):
        model, found = models.from_pretrained(
            order.name,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            local_files_only=not order.pretrained,
            output_loading_info=True,
        )
    body = f"{model.base_model_prefix}."
    drawn = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    lacking = sorted(name for name in drawn if name.startswith(body) and "pooler" not in name)
    if lacking:
        raise UserError(
            f"the weights in {order.name} are not its configuration's: {lacking[0]} is missing or "
            "of another shape"
        )
    return answering(model)


def answering(model: Any) -> nn.Module:
    """Let a transformers model put out its logits, without a wrapper that renames its tensors."""
    model.register_forward_hook(_logits)
    return model  # type: ignore[no-any-return]


def _logits(_: nn.Module, __: Any, output: Any) -> Any:
    return output.logits


def _processed(order: Order, channels: int, native: tuple[int, int] | None) -> Input:
    """What the image processor beside the weights prepares; the data's where there is none."""
    import transformers

    processors: Any = transformers.AutoImageProcessor
    fallback = _coloured(order.input, channels)
    try:
        processor = processors.from_pretrained(
            order.name, trust_remote_code=False, local_files_only=not order.pretrained
        )
        cropped = getattr(processor, "do_center_crop", False)
        size = processor.crop_size if cropped else processor.size
        edge = size.get("shortest_edge")
        normalises = getattr(processor, "do_normalize", True)
        return Input.from_json(
            {
                "channels": channels,
                "size": (edge, edge) if edge else (size["height"], size["width"]),
                "mean": processor.image_mean if normalises else [0.0] * channels,
                "std": processor.image_std if normalises else [1.0] * channels,
            }
        )
    except Exception as error:  # Foreign JSON can fail in any way.
        if Path(order.name, "preprocessor_config.json").exists():
            raise UserError(
                f"the preprocessor_config.json in {order.name} cannot be used: "
                + weights.first_line(error)
            ) from error
        return replace(fallback, size=native or fallback.size)


def _coloured(input: Input, channels: int = 3) -> Input:
    """The data's input for a model of a fixed number of channels: Input repeats or averages."""
    if input.channels == channels:
        return input

    def fitted(numbers: tuple[float, ...]) -> tuple[float, ...]:
        return (sum(numbers) / len(numbers),) * channels

    return Input(channels, input.size, fitted(input.mean), fitted(input.std))


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _known(name: str, names: Sequence[str], library: str) -> None:
    if name not in names:
        raise UserError(f"{library} has no model named {name!r}; {did_you_mean(name, names)}")


OFFERS: dict[str, Callable[[Order], Offer]] = {
    "": _own,
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _transformers,
}
