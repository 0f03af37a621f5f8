"""Models: networks by family, those of other libraries by name, and what they are fed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Bound here and not on first use: importing the module ``limbeck.models.build`` afterwards would
# otherwise put the module in the function's place. Neither imports torch.
from limbeck.models.build import build, described, load, save, weights_given
from limbeck.models.profile import Profile, profile

if TYPE_CHECKING:
    from limbeck.models.input import Input
    from limbeck.training.network import Network

__all__ = [
    "Input",
    "Network",
    "Profile",
    "build",
    "described",
    "load",
    "profile",
    "save",
    "weights_given",
]

_HOMES = {"Input": "limbeck.models.input", "Network": "limbeck.training.network"}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used: the names of the zoo do not."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'limbeck.models' has no attribute {name!r}")
