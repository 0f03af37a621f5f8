"""ENet: A Deep Neural Network Architecture for Real-Time Semantic Segmentation. Paszke, Chaurasia,
Kim, Culurciello, 2016 (arXiv 1606.02147); with the fourth encoder of ENet-SAD (Hou et al. 2019)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Middle = Literal["plain", "asymmetric"]

WIDTH = 128
"""Channels of the blocks at an eighth of the resolution."""

GROUP: tuple[tuple[Middle, int], ...] = (
    ("plain", 1),
    ("plain", 2),
    ("asymmetric", 1),
    ("plain", 4),
    ("plain", 1),
    ("plain", 8),
    ("asymmetric", 1),
    ("plain", 16),
)
"""Table 1: the middle convolutions of bottlenecks 2.1 to 2.8, with their dilations."""


class ENet(nn.Module):
    """Table 1: a large encoder of bottlenecks at an eighth of the resolution, a small decoder.

    ``block1`` puts out 64 channels at a quarter of the resolution, ``block2`` and those after it
    128 at an eighth. In the encoder a PReLU has a slope for each channel, the decoder has ReLU.
    Images of any size.

    Args:
        classes: number of outputs a pixel.
        channels: of the images, (B, channels, H, W).
        blocks: 3 as published; 4 puts the group of eight bottlenecks once more behind, of which
            the decoder then sees both (ENet-SAD).
        existence: what the last block's output also goes through; its answer comes second.

    Example:
        >>> ENet(5)(torch.zeros(2, 3, 32, 48)).shape
        torch.Size([2, 5, 32, 48])
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        blocks: Literal[3, 4] = 3,
        existence: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.initial = Initial(channels, 16)
        self.down1, self.down2 = Down(16, 64, dropout=0.01), Down(64, WIDTH, dropout=0.1)
        self.block1 = nn.Sequential(*(Bottleneck(64, dropout=0.01) for _ in range(4)))
        self.blocks = tuple(f"block{number}" for number in range(1, blocks + 1))
        for name in self.blocks[1:]:
            group = (Bottleneck(WIDTH, middle, dilation, 0.1) for middle, dilation in GROUP)
            self.add_module(name, nn.Sequential(*group))
        self.up1 = Up(WIDTH * max(1, blocks - 2), 64)
        self.decoder1 = nn.Sequential(*(Bottleneck(64, dropout=0.1, relu=True) for _ in range(2)))
        self.up2 = Up(64, 16)
        self.decoder2 = Bottleneck(16, dropout=0.1, relu=True)
        self.last = nn.ConvTranspose2d(16, classes, 3, 2, 1, bias=False)
        self.existence = existence

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, channels, H, W) -> (B, classes, H, W), and what ``existence`` says."""
        x, pooled = self.encode(x)
        logits = self.decode(x, pooled)
        return logits if self.existence is None else (logits, self.existence(x[:, -WIDTH:]))

    def encode(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, torch.Size]]]:
        """The last block's output, and for each pooling its indices and the shape before it."""
        pooled = [(x, x.shape)]  # of the first, which is undone by the last convolution, the shape
        x = self.initial(x)
        for down, names in ((self.down1, self.blocks[:1]), (self.down2, self.blocks[1:])):
            before = x.shape
            x, indices = down(x)
            pooled.append((indices, before))
            found = []
            for name in names:
                x = self.get_submodule(name)(x)
                found.append(x)
        return (torch.cat(found[1:], 1) if len(found) == 3 else x), pooled

    def decode(self, x: Tensor, pooled: Sequence[tuple[Tensor, torch.Size]]) -> Tensor:
        """Logits (B, classes, H, W) from what :meth:`encode` gives."""
        (_, whole), first, second = pooled
        x = self.decoder1(self.up1(x, *second))
        x = self.decoder2(self.up2(x, *first))
        found: Tensor = self.last(x, output_size=whole[2:])
        return found


class Initial(nn.Module):
    """Fig. 2a: a convolution next to max pooling, both of stride 2, concatenated."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs - inputs, 3, 2, 1, bias=False)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.norm, self.act = nn.BatchNorm2d(outputs), nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.norm(torch.cat([self.conv(x), self.pool(x)], 1)))
        return found


class Bottleneck(nn.Module):
    """Fig. 2b: 1x1 to a quarter of the channels, a middle convolution, 1x1 back, beside a shortcut.

    Args:
        channels: that come in and go out.
        middle: a 3x3 convolution, or a 5x1 and a 1x5 one after the other.
        dilation: of the 3x3 convolution.
        dropout: the probability that a channel is dropped before the sum.
        relu: ReLU in place of PReLU.
    """

    def __init__(
        self,
        channels: int,
        middle: Middle = "plain",
        dilation: int = 1,
        dropout: float = 0.1,
        relu: bool = False,
    ) -> None:
        super().__init__()
        width = channels // 4
        convolutions: nn.Module = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        if middle == "asymmetric":
            convolutions = nn.Sequential(
                _normed(nn.Conv2d(width, width, (5, 1), padding=(2, 0), bias=False), relu),
                nn.Conv2d(width, width, (1, 5), padding=(0, 2), bias=False),
            )
        self.branch = _branch(channels, convolutions, width, channels, dropout, relu)
        self.act = _act(channels, relu)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(x + self.branch(x))
        return found


class Down(nn.Module):
    """Fig. 2b with stride 2: 2x2 in place of the first 1x1, max pooling with zeros beside it."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        width = inputs // 4
        middle = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.branch = _branch(inputs, middle, width, outputs, dropout, False, first=(2, 2))
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True, return_indices=True)
        self.more = outputs - inputs
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smaller map, and where in ``x`` each maximum lay."""
        pooled, indices = self.pool(x)
        kept = F.pad(pooled, (0, 0, 0, 0, 0, self.more))
        even = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.act(kept + self.branch(even)), indices


class Up(nn.Module):
    """Fig. 2b for the decoder: a transposed convolution, maxima put back where they lay."""

    def __init__(self, inputs: int, outputs: int, dropout: float = 0.1) -> None:
        super().__init__()
        width = inputs // 4
        self.keep = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.pool = nn.MaxUnpool2d(2, 2)
        self.reduce = _normed(nn.Conv2d(inputs, width, 1, bias=False), True)
        self.middle = nn.ConvTranspose2d(width, width, 3, 2, 1, bias=False)
        self.expand = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.Dropout2d(dropout),
        )
        self.act = nn.ReLU()

    def forward(self, x: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
        """To a shape's height and width, with the indices of the pooling that came from it."""
        size = list(shape[2:])
        kept = self.pool(self.keep(x), indices, output_size=size)
        found: Tensor = self.act(kept + self.expand(self.middle(self.reduce(x), output_size=size)))
        return found


def _branch(
    inputs: int,
    middle: nn.Module,
    width: int,
    outputs: int,
    dropout: float,
    relu: bool,
    first: tuple[int, int] = (1, 1),
) -> nn.Sequential:
    """Fig. 2b, right: three convolutions with batch norm, then dropout."""
    reduce = nn.Conv2d(inputs, width, first, first, bias=False)
    return nn.Sequential(
        OrderedDict(
            reduce=_normed(reduce, relu),
            middle=nn.Sequential(middle, nn.BatchNorm2d(width), _act(width, relu)),
            expand=nn.Sequential(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
            dropout=nn.Dropout2d(dropout),
        )
    )


def _normed(conv: nn.Conv2d, relu: bool) -> nn.Sequential:
    width = conv.out_channels
    return nn.Sequential(conv, nn.BatchNorm2d(width), _act(width, relu))


def _act(channels: int, relu: bool) -> nn.Module:
    return nn.ReLU() if relu else nn.PReLU(channels)
