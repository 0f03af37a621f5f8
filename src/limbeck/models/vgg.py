"""VGG with batch norm for small images.

Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015;
one linear layer in place of three, as in the CIFAR-100 comparison of Tian, Krishnan, Isola (2020).
"""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.models.initialise import fan_out_normal, small_linear

CONVOLUTIONS: dict[int, tuple[int, ...]] = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Depth -> convolutions in the stem and the four stages."""


class VGG(nn.Module):
    """A stem and four stages of 3x3 convolutions, max pooling in front of the stages.

    The last pooling is left out below 64 x 64 pixels, so 32 x 32 images end as 4 x 4 maps.
    Convolutions start from N(0, 2 / fan-out) with bias zero, the classifier from N(0, 0.01^2).

    Args:
        depth: 8, 11, 13, 16 or 19.
        classes: number of outputs.
        channels: of the images, (B, channels, H, W).
        size: height and width that the network is meant for; at least 8.

    Example:
        >>> import torch
        >>> VGG(8, classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    stages = ("stage1", "stage2", "stage3", "stage4")

    def __init__(
        self, depth: int, classes: int, channels: int = 3, size: tuple[int, int] = (32, 32)
    ) -> None:
        super().__init__()
        counts = CONVOLUTIONS[depth]
        self.stem = nn.Sequential(*_convolutions(channels, 64, counts[0]))
        self.stage1 = _stage(64, 128, counts[1])
        self.stage2 = _stage(128, 256, counts[2])
        self.stage3 = _stage(256, 512, counts[3])
        self.stage4 = _stage(512, 512, counts[4], pool=min(size) >= 64)
        self.fc = nn.Linear(512, classes)
        fan_out_normal(self)
        small_linear(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def _convolutions(inputs: int, outputs: int, count: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width in [inputs] + [outputs] * (count - 1):
        layers += [nn.Conv2d(width, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return layers


def _stage(inputs: int, outputs: int, count: int, pool: bool = True) -> nn.Sequential:
    first: nn.Module = nn.MaxPool2d(2) if pool else nn.Identity()
    return nn.Sequential(first, *_convolutions(inputs, outputs, count))
