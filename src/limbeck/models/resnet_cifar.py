"""Residual networks for small images.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2. As in the
CIFAR-100 comparison of Tian, Krishnan, Isola (Contrastive Representation Distillation, ICLR 2020),
a shortcut that changes shape is a 1x1 convolution with batch norm, not padding with zeros.
"""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.models.initialise import fan_out_normal


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; ``relu2:input`` is the block before activation.

    >>> import torch
    >>> BasicBlock(8, 16, stride=2)(torch.zeros(1, 8, 6, 6)).shape
    torch.Size([1, 16, 3, 3])
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(residual + self.shortcut(x))  # type: ignore[no-any-return]


class SmallResNet(nn.Module):
    """A residual network of 6n + 2 layers in three stages that keep, halve, halve the resolution.

    Convolutions start from N(0, 2 / fan-out), the classifier from PyTorch's default.

    Args:
        depth: 6n + 2, n blocks a stage: 8, 14, 20, 32, 44, 56, 110.
        widths: channels of the stem and of the three stages.
        classes: number of outputs.
        channels: of the images, (B, channels, H, W).

    Example:
        >>> import torch
        >>> SmallResNet(8, (16, 16, 32, 64), classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    stages = ("stage1", "stage2", "stage3")

    def __init__(
        self, depth: int, widths: tuple[int, int, int, int], classes: int, channels: int = 3
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        self.stage1 = _stage(widths[0], widths[1], 1, blocks)
        self.stage2 = _stage(widths[1], widths[2], 2, blocks)
        self.stage3 = _stage(widths[2], widths[3], 2, blocks)
        self.fc = nn.Linear(widths[3], classes)
        fan_out_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
    rest = (BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)
