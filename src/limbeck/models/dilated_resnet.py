"""Residual networks that keep an eighth of the resolution, for a class at every pixel.

He et al., CVPR 2016, of torchvision's blocks; in the last two stages dilation takes the place of
stride (Yu, Koltun, Funkhouser: Dilated Residual Networks, CVPR 2017, arXiv 1705.09914).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from limbeck.models.initialise import fan_out_normal

DEPTHS: dict[int, tuple[type[nn.Module], tuple[int, ...]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}
"""Depth -> the kind of block and how many there are in each stage."""


class DilatedResNet(nn.Module):
    """Stages ``block1`` to ``block4`` at 1/4, 1/8, 1/8 and 1/8 of the resolution, and a 1x1 head.

    The head's logits are upsampled bilinearly to the image's size. At a width of 64 everything
    before the head is torchvision's network of this depth, its weights included; fewer channels
    make a small network.

    Args:
        depth: one of :data:`DEPTHS`.
        classes: number of outputs a pixel.
        channels: of the images, (B, channels, H, W).
        width: channels of the first stage's convolutions; they double from stage to stage.
        existence: makes, for so many channels, what the last stage's output also goes through; its
            answer comes second.

    Example:
        >>> import torch
        >>> DilatedResNet(10, classes=5, width=8)(torch.zeros(2, 3, 32, 48)).shape
        torch.Size([2, 5, 32, 48])
    """

    blocks = ("block1", "block2", "block3", "block4")

    def __init__(
        self,
        depth: int,
        classes: int,
        channels: int = 3,
        width: int = 64,
        existence: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        kind, numbers = DEPTHS[depth]
        self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        strides, dilations = (1, 2, 1, 1), (1, 1, 2, 4)
        for stage, name in enumerate(self.blocks):
            made, inputs = _stage(kind, inputs, width * 2**stage, numbers[stage], strides[stage])
            _dilate(made, dilations[stage])
            self.add_module(name, made)
        self.head = nn.Conv2d(inputs, classes, 1)
        self.existence = None if existence is None else existence(inputs)
        fan_out_normal(self)
        # The loss begins where nothing is known.
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, channels, H, W) -> (B, classes, H, W), and what ``existence`` says."""
        size = x.shape[2:]
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        logits = F.interpolate(self.head(x), size, mode="bilinear", align_corners=False)
        return logits if self.existence is None else (logits, self.existence(x))


def _stage(
    kind: type[nn.Module], inputs: int, width: int, number: int, stride: int
) -> tuple[nn.Sequential, int]:
    """Blocks of one width, the first with the stage's stride; and the channels they put out."""
    outputs = width * int(getattr(kind, "expansion"))  # noqa: B009
    shortcut: nn.Module | None = None
    if stride > 1 or inputs != outputs:
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )
    first = kind(inputs, width, stride, shortcut)
    return nn.Sequential(first, *(kind(outputs, width) for _ in range(number - 1))), outputs


def _dilate(stage: nn.Module, dilation: int) -> None:
    """Spread the 3x3 convolutions of blocks, which torchvision's basic ones do not offer."""
    for module in stage.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation = module.padding = (dilation, dilation)
