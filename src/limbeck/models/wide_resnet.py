"""Wide residual networks.

Zagoruyko, Komodakis: Wide Residual Networks, BMVC 2016. wrn-D-W has depth D and is W times as wide
as the thin network of the same depth.
"""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.models.initialise import fan_out_normal


class PreactivationBlock(nn.Module):
    """Batch norm and ReLU come before each of two 3x3 convolutions.

    >>> import torch
    >>> PreactivationBlock(8, 16, stride=2)(torch.zeros(1, 8, 6, 6)).shape
    torch.Size([1, 16, 3, 3])
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = (
            None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        active = self.relu1(self.bn1(x))
        residual: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        # A projection reads the activated input, an identity the raw one.
        return residual + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """A wide residual network in three stages that keep, halve, halve the resolution.

    A stage puts out the sum of its last block, before the next batch norm and ReLU, as in the
    published comparison. Convolutions start from N(0, 2 / fan-out), the classifier from PyTorch's
    default with a bias of zero.

    Args:
        depth: 6n + 4, n blocks a stage.
        width: the factor on 16, 32, 64 channels.
        classes: number of outputs.
        channels: of the images, (B, channels, H, W).

    Example:
        >>> import torch
        >>> WideResNet(10, 1, classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    stages = ("stage1", "stage2", "stage3")

    def __init__(self, depth: int, width: int, classes: int, channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.stage1 = _stage(16, 16 * width, 1, blocks)
        self.stage2 = _stage(16 * width, 32 * width, 2, blocks)
        self.stage3 = _stage(32 * width, 64 * width, 2, blocks)
        self.bn = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64 * width, classes)
        fan_out_normal(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.fc(self.relu(self.bn(x)).mean((2, 3)))  # type: ignore[no-any-return]


def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
    rest = (PreactivationBlock(outputs, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(PreactivationBlock(inputs, outputs, stride), *rest)
