"""Packages that only some of Limbeck needs, and which install option brings them."""

from __future__ import annotations

import importlib
from typing import Any

from limbeck.errors import UserError

EXTRAS = {
    "datasets": "text",
    "flwr": "federated",
    "gymnasium": "rl",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "optuna": "search",
    "pycocotools": "detection",
    "sacrebleu": "text",
    "stable_baselines3": "rl",
    "timm": "vision",
    "tokenizers": "text",
    "transformers": "text",
}
"""Package -> the extra that installs it."""


def need(module: str) -> Any:
    """Import a module of an optional package.

    >>> need("onnx").__name__
    'onnx'

    Raises:
        UserError: the package is not installed; the sentence names the ``pip install``.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"{package} is not installed; pip install 'limbeck[{EXTRAS[package]}]'"
        ) from None
