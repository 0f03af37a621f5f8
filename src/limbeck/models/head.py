"""The last layer of a classifier."""

from __future__ import annotations

from torch import nn


def last_linear(model: nn.Module, outputs: int | None = None) -> tuple[str, nn.Linear] | None:
    """The last linear layer, with so many outputs if that is said, and its path.

    ``None`` if there is none; a model that is nothing but the layer gives an empty path.

    >>> last_linear(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), outputs=3)
    ('0', Linear(in_features=4, out_features=3, bias=True))
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and outputs in (None, module.out_features)
    ]
    return found[-1] if found else None
