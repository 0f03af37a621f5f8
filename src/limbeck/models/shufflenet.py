"""ShuffleNet V1 and V2 for small images.

Zhang, Zhou, Lin, Sun: ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile
Devices, CVPR 2018. Ma, Zhang, Zheng, Sun: ShuffleNet V2: Practical Guidelines for Efficient CNN
Architecture Design, ECCV 2018. The stem is a 1x1 convolution without stride, as in the CIFAR-100
comparison of Tian, Krishnan, Isola (2020).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEM = 24


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Deal the channels of each group out over all groups: (B, C, H, W) -> (B, C, H, W).

    >>> shuffle(torch.arange(6).view(1, 6, 1, 1), 2).flatten().tolist()
    [0, 3, 1, 4, 2, 5]
    """
    batch, channels, height, width = x.shape
    dealt = x.view(batch, groups, channels // groups, height, width).transpose(1, 2)
    return dealt.reshape(x.shape)


class GroupedBlock(nn.Module):
    """V1: grouped 1x1, shuffle, 3x3 on each channel, grouped 1x1, shortcut.

    With stride 2 the shortcut is average pooling and is appended as channels, not added.

    >>> GroupedBlock(24, 240, stride=2)(torch.zeros(1, 24, 8, 8)).shape
    torch.Size([1, 240, 4, 4])
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 3) -> None:
        super().__init__()
        own = outputs - inputs if stride == 2 else outputs
        hidden = own // 4
        # The stem's channels are too few to be split among groups (section 3.2).
        self.groups = 1 if inputs == STEM else groups
        self.conv1 = nn.Conv2d(inputs, hidden, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(hidden, own, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(own)
        self.pool = nn.AvgPool2d(3, 2, padding=1) if stride == 2 else None
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        out = shuffle(self.relu1(self.bn1(self.conv1(x))), self.groups)
        # The published comparison keeps a ReLU here that the paper's figure leaves out.
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = out + x if self.pool is None else torch.cat([out, self.pool(x)], 1)
        return self.relu3(out)  # type: ignore[no-any-return]


class SplitBlock(nn.Module):
    """V2, same resolution: half of the channels pass untouched beside three convolutions.

    >>> SplitBlock(8)(torch.zeros(1, 8, 4, 4)).shape
    torch.Size([1, 8, 4, 4])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = _branch(width // 2, width // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, width, H, W)."""
        kept, worked = x.chunk(2, 1)
        return shuffle(torch.cat([kept, self.branch(worked)], 1), 2)


class DownBlock(nn.Module):
    """V2, half the resolution: two branches of convolutions see all channels.

    >>> DownBlock(4, 8)(torch.zeros(1, 4, 4, 4)).shape
    torch.Size([1, 8, 2, 2])
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, 2, 1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
        )
        self.right = _branch(inputs, half, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / 2, W / 2)."""
        return shuffle(torch.cat([self.left(x), self.right(x)], 1), 2)


class ShuffleNetV1(nn.Module):
    """Three stages of grouped blocks, each at half the resolution of the one before.

    PyTorch's default initialisation.

    Args:
        classes: number of outputs.
        channels: of the images, (B, channels, H, W).

    Example:
        >>> ShuffleNetV1(classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    stages = ("stage1", "stage2", "stage3")

    def __init__(self, classes: int, channels: int = 3) -> None:
        super().__init__()
        self.stem = _stem(channels)
        self.stage1 = _grouped(STEM, 240, 4)
        self.stage2 = _grouped(240, 480, 8)
        self.stage3 = _grouped(480, 960, 4)
        self.fc = nn.Linear(960, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class ShuffleNetV2(nn.Module):
    """Three stages, each at half the resolution of the one before, and a last 1x1 convolution.

    PyTorch's default initialisation.

    Args:
        classes: number of outputs.
        channels: of the images, (B, channels, H, W).

    Example:
        >>> ShuffleNetV2(classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    stages = ("stage1", "stage2", "stage3")

    def __init__(self, classes: int, channels: int = 3) -> None:
        super().__init__()
        self.stem = _stem(channels)
        self.stage1 = _split(STEM, 116, 3)
        self.stage2 = _split(116, 232, 7)
        self.stage3 = _split(232, 464, 3)
        self.last = nn.Sequential(
            nn.Conv2d(464, 1024, 1, bias=False), nn.BatchNorm2d(1024), nn.ReLU()
        )
        self.fc = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.fc(self.last(x).mean((2, 3)))  # type: ignore[no-any-return]


def _stem(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, STEM, 1, bias=False), nn.BatchNorm2d(STEM), nn.ReLU())


def _grouped(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    rest = (GroupedBlock(outputs, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(GroupedBlock(inputs, outputs, 2), *rest)


def _split(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(DownBlock(inputs, outputs), *(SplitBlock(outputs) for _ in range(blocks)))


def _branch(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, stride, 1, groups=outputs, bias=False),
        nn.BatchNorm2d(outputs),
        nn.Conv2d(outputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
