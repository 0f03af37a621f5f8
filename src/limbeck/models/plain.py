"""Networks without batch norm or shortcuts: a perceptron and a small convolutional network.

The perceptron with 800 or 1200 units in two hidden layers is the one of Hinton, Vinyals, Dean:
Distilling the Knowledge in a Neural Network, 2015, section 3.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.models.initialise import fan_out_normal


class MLP(nn.Sequential):
    """Linear layers with ReLU; a stage is a hidden layer. PyTorch's default initialisation.

    Args:
        inputs: numbers in one sample, channels x height x width.
        widths: units of the hidden layers.
        classes: number of outputs.
        dropout: chance of dropping a hidden unit.
        input_dropout: chance of dropping an input.

    Example:
        >>> import torch
        >>> MLP(64, (32, 16), classes=10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        classes: int,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for number, width in enumerate(widths, start=1):
            drop = nn.Dropout(input_dropout if number == 1 else dropout)
            layers[f"stage{number}"] = nn.Sequential(drop, nn.Linear(inputs, width), nn.ReLU())
            inputs = width
        layers["drop"] = nn.Dropout(dropout)
        layers["fc"] = nn.Linear(inputs, classes)
        super().__init__(layers)
        self.stages = tuple(name for name in layers if name.startswith("stage"))


class CNN(nn.Sequential):
    """One 3x3 convolution with ReLU a stage, max pooling between, 2 x 2 averages at the end.

    Convolutions start from N(0, 2 / fan-out) with bias zero, the classifier from PyTorch's default.

    Args:
        widths: channels of the stages; an image needs 2^len(widths) pixels a side.
        classes: number of outputs.
        channels: of the images, (B, channels, H, W).

    Example:
        >>> import torch
        >>> CNN((16, 32), classes=10, channels=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, widths: Sequence[int], classes: int, channels: int = 3) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, width in enumerate(widths, start=1):
            pool: nn.Module = nn.Identity() if number == 1 else nn.MaxPool2d(2)
            conv = nn.Conv2d(channels, width, 3, padding=1)
            layers[f"stage{number}"] = nn.Sequential(pool, conv, nn.ReLU())
            channels = width
        layers["pool"] = Quarters()
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(4 * channels, classes)
        super().__init__(layers)
        self.stages = tuple(name for name in layers if name.startswith("stage"))
        fan_out_normal(self)


class Quarters(nn.Module):
    """Adaptive average pooling to 2 x 2 by plain pooling, whose gradient is deterministic on GPUs.

    >>> import torch
    >>> Quarters()(torch.arange(9.0).view(1, 1, 3, 3)).flatten().tolist()
    [2.0, 3.0, 5.0, 6.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2, 2), H and W at least 2."""
        height, width = x.shape[2:]
        window = ((height + 1) // 2, (width + 1) // 2)
        return F.avg_pool2d(x, window, stride=(height // 2, width // 2))
