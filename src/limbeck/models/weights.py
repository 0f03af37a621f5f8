"""Weights as files: reading without executing anything, fitting, writing."""

from __future__ import annotations

import pickle
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from limbeck.errors import UserError
from limbeck.files import regular

A_BYTE, BESIDES, A_TENSOR = 8, 2**24, 2**10
"""How much larger than its weights a model may be made: so many numbers for a byte, as packed ones
have a bit at least, and so many besides; a tensor, which has its cost, counts as so many more."""


class Packs(nn.Module):
    """A layer whose weights take few values and so can be stored in few bits."""

    @abstractmethod
    def pack(self, state: dict[str, Tensor], prefix: str) -> None:
        """Put the few bits in the place of the weights; the layer's names begin with ``prefix``."""

    @abstractmethod
    def unpack(self, state: dict[str, Tensor], prefix: str) -> None:
        """Put the weights back in their place, if it holds few bits.

        Raises:
            UserError: they are another layer's.
        """


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a state dict saved by ``torch.save``.

    Raises:
        UserError: the file is missing or damaged, holds something else, or wants to run code.
    """
    try:
        file = regular(path).open("rb")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"the weights {path} cannot be read: {reason}") from None
    try:
        with file:
            if path.suffix == ".safetensors":
                return load_file(path)
            if is_zipfile(path) and any(part.compress_type for part in ZipFile(path).infolist()):
                raise ValueError("its parts are compressed, as torch.save writes none")
            state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # Foreign bytes can fail in any way.
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise UserError(
                f"{path} is refused: it is not a plain state dict and may want to run code when it "
                "is opened; write it with torch.save(model.state_dict(), ...) or as .safetensors"
            ) from None
        raise UserError(f"{path} is damaged or not a weights file: {first_line(error)}") from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        found = f"the keys {_few(map(str, state))}" if isinstance(state, dict) else "no dict"
        raise UserError(
            f"{path} holds {found}, not a plain state dict; write it with "
            "torch.save(model.state_dict(), ...)"
        )
    odd = [n for n, t in state.items() if t.layout != torch.strided or t.is_quantized or t.is_meta]
    if odd:
        raise UserError(
            f"{path} holds {_few(odd)} as sparse, quantised or empty tensors; plain ones are wanted"
        )
    return state


@contextmanager
def bounded(held: int, origin: str) -> Iterator[None]:
    """Stop the making of a model that is out of all proportion to its weights.

    So a few words that lie beside weights cannot fill the memory.

    Args:
        held: bytes that the weights have.
        origin: where they come from, named in errors.

    Raises:
        UserError: within; the model is many times larger than its weights.

    >>> with bounded(40, "w.pt"):
    ...     model = nn.Linear(5000, 5000)
    Traceback (most recent call last):
    limbeck.errors.UserError: w.pt does not fit the model, which is many times larger
    """
    left = held * A_BYTE + BESIDES

    def count(_: nn.Module, __: str, tensor: Tensor | None) -> None:
        nonlocal left
        left -= A_TENSOR + (0 if tensor is None else tensor.numel())
        if left < 0:
            raise UserError(f"{origin} does not fit the model, which is many times larger")

    hooks: list[Any] = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def fit(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load a state dict that fits exactly.

    Args:
        model: receives copies of the tensors.
        state: its own keys and shapes.
        origin: where the tensors come from, named in errors.

    Raises:
        UserError: tensors are missing, surplus, of another shape or kind, or hold NaN or infinity.

    What :class:`Packs` layers have packed is unpacked.

    Example:
        >>> fit(nn.Linear(2, 1), {"weight": torch.ones(1, 2)}, "w.pt")
        Traceback (most recent call last):
        limbeck.errors.UserError: w.pt does not fit the model: missing bias
    """
    own, state = model.state_dict(), dict(state)
    for prefix, layer in _packing(model).items():
        layer.unpack(state, prefix)
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    wrong = {
        "missing": [name for name in own if name not in state],
        "surplus": sorted(name for name in state if name not in own),
        "wrongly shaped": shapes,
        "of another kind": [
            f"{name} {_type(state[name])} instead of {_type(own[name])}"
            for name in own
            if name in state and _kind(state[name]) != _kind(own[name])
        ],
    }
    if any(wrong.values()):
        said = "; ".join(f"{kind} {_few(names)}" for kind, names in wrong.items() if names)
        raise UserError(f"{origin} does not fit the model: {said}")
    try:
        model.load_state_dict(state)
    except ValueError as error:
        raise UserError(f"{origin} does not fit the model: {error}") from None
    check_finite(model.state_dict(), origin)


def check_finite(state: Mapping[str, Tensor], origin: str) -> None:
    """Refuse weights that hold NaN or infinity.

    >>> check_finite({"bias": torch.tensor([1.0, float("nan")])}, "w.pt")
    Traceback (most recent call last):
    limbeck.errors.UserError: w.pt holds NaN or infinity in bias; such weights cannot be used
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{origin} holds NaN or infinity in {name}; such weights cannot be used"
            )


def to_bytes(model: nn.Module, packed: bool = False) -> bytes:
    """A model's state dict in the safetensors format.

    Args:
        packed: weights of :class:`Packs` layers in few bits.

    Raises:
        UserError: there is nothing to pack.

    >>> from safetensors.torch import load
    >>> sorted(load(to_bytes(nn.Linear(2, 1))))
    ['bias', 'weight']
    """
    # The format knows neither strides nor shared storage: a tied tensor is written twice.
    state = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
    }
    if packed:
        layers = _packing(model)
        if not layers:
            raise UserError(
                "there are no weights of few bits to pack; a quantised student, as of limbeck run "
                "qkd, has some, and every student can be exported as safetensors or onnx"
            )
        for prefix, layer in layers.items():
            layer.pack(state, prefix)
    return save(state)


def _packing(model: nn.Module) -> dict[str, Packs]:
    """The layers that pack, by what the names of their tensors begin with."""
    return {
        f"{path}." if path else "": layer
        for path, layer in model.named_modules()
        if isinstance(layer, Packs)
    }


def first_line(error: BaseException) -> str:
    """What an error of another library says first.

    >>> first_line(ValueError("no such thing. Try another.\\nTraceback"))
    'no such thing'
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.split(r"\. (?=[A-Z])", lines[0].strip())[0].rstrip(".:")


def _kind(tensor: Tensor) -> object:
    """Types of a kind are copied into one another; those of a byte mean only themselves."""
    if tensor.element_size() == 1:
        return tensor.dtype
    return tensor.is_floating_point(), tensor.is_complex()


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
