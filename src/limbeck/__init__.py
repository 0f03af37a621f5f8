"""Knowledge distillation in PyTorch: a large teacher goes in, a small student comes out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from limbeck.distillation import Distiller, distill
    from limbeck.errors import UserError
    from limbeck.export import Student
    from limbeck.systems.classification.kd import KD
    from limbeck.training.method import Method
    from limbeck.training.network import Network
    from limbeck.training.taps import Taps
    from limbeck.training.teacher import Teacher

_HOMES = {
    "distill": "limbeck.distillation",
    "Distiller": "limbeck.distillation",
    "KD": "limbeck.systems.classification.kd",
    "Method": "limbeck.training.method",
    "Network": "limbeck.training.network",
    "Student": "limbeck.export",
    "Taps": "limbeck.training.taps",
    "Teacher": "limbeck.training.teacher",
    "UserError": "limbeck.errors",
}

__all__ = [
    "KD",
    "Distiller",
    "Method",
    "Network",
    "Student",
    "Taps",
    "Teacher",
    "UserError",
    "distill",
]


def __getattr__(name: str) -> Any:
    """Names are imported when they are first used: ``limbeck list`` needs no torch."""
    if name == "losses":
        return import_module("limbeck.losses")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
