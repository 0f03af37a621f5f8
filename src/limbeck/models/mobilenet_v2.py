"""MobileNetV2 for small images.

Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR
2018, table 2, in the variant of Jin et al. (Knowledge Distillation via Route Constrained
Optimization, ICCV 2019): half the width, strides for 32 x 32 images, ReLU in place of ReLU6, and an
expanding convolution in the first block too.
"""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.models.initialise import fan_out_normal, small_linear


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter each channel by 3x3, project by 1x1 without activation.

    >>> import torch
    >>> InvertedResidual(8, 12, stride=2, expansion=6)(torch.zeros(1, 8, 4, 4)).shape
    torch.Size([1, 12, 2, 2])
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            *_convolution(inputs, hidden, 1),
            *_convolution(hidden, hidden, 3, stride, groups=hidden),
            *_convolution(hidden, outputs, 1)[:-1],
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        out: Tensor = self.body(x)
        return x + out if self.adds else out


class MobileNetV2(nn.Module):
    """Inverted residuals in four stages; 32 x 32 images become maps of 16, 8, 4 and 2.

    A stage puts out a linear bottleneck: there is no activation to come after. Convolutions start
    from N(0, 2 / fan-out), the classifier from N(0, 0.01^2).

    Args:
        classes: number of outputs.
        channels: of the images, (B, channels, H, W).
        width: factor on the channels of the paper's table; beyond 1 the last 1280 grow too.

    Example:
        >>> import torch
        >>> MobileNetV2(classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    stages = ("stage1", "stage2", "stage3", "stage4")

    def __init__(self, classes: int, channels: int = 3, width: float = 0.5) -> None:
        super().__init__()
        stem, *c = (int(width * n) for n in (32, 16, 24, 32, 64, 96, 160, 320))
        last = int(max(width, 1.0) * 1280)
        self.stem = nn.Sequential(*_convolution(channels, stem, 3, stride=2))
        self.stage1 = nn.Sequential(*_row(stem, c[0], 1, 1, 1), *_row(c[0], c[1], 2, 1))
        self.stage2 = nn.Sequential(*_row(c[1], c[2], 3, 2))
        self.stage3 = nn.Sequential(*_row(c[2], c[3], 4, 2), *_row(c[3], c[4], 3, 1))
        self.stage4 = nn.Sequential(*_row(c[4], c[5], 3, 2), *_row(c[5], c[6], 1, 1))
        self.last = nn.Sequential(*_convolution(c[6], last, 1))
        self.fc = nn.Linear(last, classes)
        fan_out_normal(self)
        small_linear(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return self.fc(self.last(x).mean((2, 3)))  # type: ignore[no-any-return]


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def _row(
    inputs: int, outputs: int, blocks: int, stride: int, expansion: int = 6
) -> list[InvertedResidual]:
    """A row of the paper's table; its first block changes width and resolution."""
    first = InvertedResidual(inputs, outputs, stride, expansion)
    return [first, *(InvertedResidual(outputs, outputs, 1, expansion) for _ in range(blocks - 1))]
