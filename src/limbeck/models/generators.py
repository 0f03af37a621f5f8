"""Networks that make an image of an image, by name, and what they are fed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from limbeck.errors import UserError, did_you_mean
from limbeck.models.input import Input, check_logits
from limbeck.models.libraries import Offer, Order, Way

NAMES = {
    f"resnet-generator-{width}-9": f"nine residual blocks, {width} channels at full size "
    "(any resnet-generator-WIDTH-BLOCKS)"
    for width in (8, 16, 32, 64)
}


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance norm, added to what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            nn.InstanceNorm2d(width),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            nn.InstanceNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        summed: Tensor = x + self.body(x)
        return summed


class ResNetGenerator(nn.Sequential):
    """The generator of Johnson et al. (2016) as CycleGAN and pix2pix have it.

    A 7x7 convolution, two that halve the size, residual blocks, two transposed ones that double it,
    a 7x7 convolution and tanh. Instance norm has no weights of its own, so all have biases.

    Args:
        width: channels at full size; the residual blocks have four times as many.
        blocks: residual blocks.
        channels: of the condition, (B, channels, H, W), H and W multiples of 4, at least 8.
        outputs: channels of what is made, (B, outputs, H, W) in [-1, 1].

    >>> generator = ResNetGenerator(64, 9, 3, 3)
    >>> sum(p.numel() for p in generator.parameters())
    11378179
    """

    def __init__(self, width: int, blocks: int, channels: int, outputs: int) -> None:
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(channels, width, 7)]
        layers += [nn.InstanceNorm2d(width), nn.ReLU()]
        for inner in (width, 2 * width):
            layers += [nn.Conv2d(inner, 2 * inner, 3, 2, 1)]
            layers += [nn.InstanceNorm2d(2 * inner), nn.ReLU()]
        layers += [ResidualBlock(4 * width) for _ in range(blocks)]
        for inner in (4 * width, 2 * width):
            layers += [nn.ConvTranspose2d(inner, inner // 2, 3, 2, 1, 1)]
            layers += [nn.InstanceNorm2d(inner // 2), nn.ReLU()]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, outputs, 7), nn.Tanh()]
        super().__init__(*layers)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, 0.0, 0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class ConditionInput(Input):
    """What a network wants to be fed that makes an image of an image."""

    kind = "conditions"

    def describe(self) -> str:
        return f"{super().describe()} to make others of"

    def offers(self) -> Mapping[str, Callable[[Order], Offer]]:
        return {"": _own}

    def check(self, output: Any, classes: int) -> None:
        check_logits(output, classes, *self.size)


def make(name: str, channels: int, outputs: int, size: tuple[int, int]) -> nn.Module:
    """Make one of Limbeck's own generators with fresh weights.

    Args:
        name: one of :data:`NAMES`, or resnet-generator-WIDTH-BLOCKS.
        channels: of the condition.
        outputs: channels of what is made.
        size: height and width of both.

    Raises:
        UserError: there is no such generator, or none for such images.

    >>> import torch
    >>> make("resnet-generator-4-1", 1, 3, (16, 16))(torch.zeros(2, 1, 16, 16)).shape
    torch.Size([2, 3, 16, 16])
    """
    found = re.fullmatch(r"resnet-generator-([1-9]\d{0,3})-([1-9]\d{0,2})", name)
    if found is None:
        raise UserError(f"there is no generator named {name!r}; {did_you_mean(name, NAMES)}")
    if min(size) < 8 or size[0] % 4 or size[1] % 4:
        raise UserError(
            f"{name} needs images whose sides are multiples of 4 from 8 pixels on, not "
            f"{size[0]} x {size[1]}; --set 'data.size=[64, 64]' stretches them"
        )
    return ResNetGenerator(int(found[1]), int(found[2]), channels, outputs)


def _own(order: Order) -> Offer:
    if order.pretrained:
        raise UserError(f"Limbeck ships no weights for {order.name}; train it")
    input = order.input
    assert isinstance(input, Input), "generators are fed images"
    return Offer(
        [Way(lambda: make(order.name, input.channels, len(order.classes), input.size), input)]
    )
