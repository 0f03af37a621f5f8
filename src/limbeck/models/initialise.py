"""Initialisation shared by several families."""

from __future__ import annotations

from torch import nn


def fan_out_normal(model: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 2 / fan-out) and set its bias to zero.

    Fan-out is kernel area x output channels, also in grouped convolutions. He et al., Delving Deep
    into Rectifiers, ICCV 2015, Eq. 14.

    >>> conv = nn.Conv2d(3, 4, 3)
    >>> fan_out_normal(conv)
    >>> conv.bias.tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def small_linear(layer: nn.Linear) -> None:
    """Draw a classifier's weights from N(0, 0.01^2) and set its bias to zero.

    >>> layer = nn.Linear(2, 2)
    >>> small_linear(layer)
    >>> layer.bias.tolist()
    [0.0, 0.0]
    """
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
