"""Weights as files: reading without executing anything, fitting, writing."""

from __future__ import annotations

import io
import pickle
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from limbeck.errors import UserError


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
        content = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"the weights {path} cannot be read: {reason}") from None
    try:
        if path.suffix == ".safetensors":
            return load(content)
        state: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is refused: it is not a plain state dict and may want to run code when it is "
            "opened; write it with torch.save(model.state_dict(), ...) or as .safetensors"
        ) from None
    except Exception as error:  # Foreign bytes can fail in any way.
        raise UserError(f"{path} is damaged or not a weights file: {first_line(error)}") from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        found = f"the keys {_few(map(str, state))}" if isinstance(state, dict) else "no dict"
        raise UserError(
            f"{path} holds {found}, not a plain state dict; write it with "
            "torch.save(model.state_dict(), ...)"
        )
    return state


def fit(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load a state dict that fits exactly.

    Args:
        model: receives copies of the tensors.
        state: its own keys and shapes.
        origin: where the tensors come from, named in errors.

    Raises:
        UserError: tensors are missing, surplus, of another shape, or hold NaN or infinity.

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
    }
    if any(wrong.values()):
        said = "; ".join(f"{kind} {_few(names)}" for kind, names in wrong.items() if names)
        raise UserError(f"{origin} does not fit the model: {said}")
    check_finite(state, origin)
    model.load_state_dict(state)


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

    >>> first_line(ValueError("no such thing.\\nTraceback"))
    'no such thing'
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
