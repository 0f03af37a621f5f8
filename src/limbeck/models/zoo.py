"""Limbeck's own networks by name. Names are known without torch; making one imports it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from limbeck import memory
from limbeck.catalogue import systems
from limbeck.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

NAMES: dict[str, str] = {
    **{
        f"resnet{depth}": f"ResNet of depth {depth} for small images, 16 to 64 channels"
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    **{
        f"resnet{depth}x4": f"ResNet of depth {depth} for small images, 64 to 256 channels"
        for depth in (8, 32)
    },
    "resnet50-cifar": "ResNet-50 with a stem for small images",
    **{
        f"wrn-{depth}-{width}": f"wide ResNet of depth {depth} and width {width} (any wrn-D-W)"
        for depth, width in ((16, 1), (16, 2), (40, 1), (40, 2))
    },
    **{
        f"vgg{depth}": f"VGG of depth {depth} with batch norm for small images"
        for depth in (8, 11, 13, 16, 19)
    },
    "mobilenetv2": "MobileNetV2 of half width for small images",
    "shufflenetv1": "ShuffleNet V1 (3 groups) for small images",
    "shufflenetv2": "ShuffleNet V2 for small images",
    **{
        f"mlp-{units}-{units}": f"two hidden layers of {units} units (any mlp-H1-H2-...)"
        for units in (800, 1200)
    },
    "mlp-1200-1200-drop": "with dropout, 0.2 on inputs and 0.5 on hidden units (any mlp-...-drop)",
    "cnn-16-32": "plain convolutions of 16 and 32 channels (any cnn-W1-W2-...)",
}
"""Name -> one line about it. Each can be made as it stands; patterns are named in the line."""


DEEPEST, WIDEST = 2000, 10**5


def names() -> dict[str, str]:
    """All networks: :data:`NAMES` and those that the systems bring, which begin with their slug."""
    brought = (system.networks for system in systems().values())
    return {name: line for networks in (NAMES, *brought) for name, line in networks.items()}


def make(name: str, classes: int, channels: int, size: tuple[int, int]) -> nn.Module:
    """Make one of Limbeck's own networks with fresh weights.

    Args:
        name: one of :func:`names`, or wrn-D-W, mlp-H1-H2-..., mlp-...-drop, cnn-W1-W2-....
        classes: number of outputs.
        channels: of the images, (B, channels, H, W).
        size: height and width of the images in pixels.

    Raises:
        UserError: there is no such network, or it cannot be made for such images.

    Example:
        >>> make("resnet8", 10, 3, (32, 32)).stages
        ('stage1', 'stage2', 'stage3')
    """
    import torch

    for owner in systems().values():
        if owner.networks and f"{name}-".startswith(f"{owner.slug}-"):
            return owner.network(name, classes, channels, size)
    least, maker = _maker(name, classes, channels, size)
    with torch.device("meta"):
        counted = sum(parameter.numel() for parameter in maker().parameters())
    memory.check(f"the network {name}", 4 * counted)
    if min(size) < least:
        raise UserError(
            f"{name} needs images of at least {least} x {least} pixels, not {size[0]} x {size[1]}"
        )
    return maker()


def _maker(
    name: str, classes: int, channels: int, size: tuple[int, int]
) -> tuple[int, Callable[[], nn.Module]]:
    """The fewest pixels a side that a network takes, and what makes it."""
    plain = name.removesuffix("-drop") if name.startswith("mlp-") else name
    family, *numbers = plain.split("-")
    if family in ("wrn", "mlp", "cnn") and numbers and all(map(str.isdecimal, numbers)):
        return _patterned(name, family, [int(n) for n in numbers], classes, channels, size)
    if name not in NAMES:
        near = did_you_mean(name, names())
        if not near.startswith("did you"):  # of all there are the general ones say most
            near = did_you_mean(name, NAMES)
        raise UserError(f"there is no network named {name!r}; {near}")
    if name == "resnet50-cifar":
        from limbeck.models.resnet50_cifar import SmallResNet50

        return 1, lambda: SmallResNet50(classes, channels)
    if match := re.fullmatch(r"resnet(\d+)(x4)?", name):
        from limbeck.models.resnet_cifar import SmallResNet

        widths = (32, 64, 128, 256) if match[2] else (16, 16, 32, 64)
        return 1, lambda: SmallResNet(int(match[1]), widths, classes, channels)
    if name.startswith("vgg"):
        from limbeck.models.vgg import VGG

        return 8, lambda: VGG(int(name[3:]), classes, channels, size)
    if name == "mobilenetv2":
        from limbeck.models.mobilenet_v2 import MobileNetV2

        return 1, lambda: MobileNetV2(classes, channels)
    from limbeck.models.shufflenet import ShuffleNetV1, ShuffleNetV2

    network = ShuffleNetV1 if name == "shufflenetv1" else ShuffleNetV2
    return 1, lambda: network(classes, channels)


def _patterned(
    name: str, family: str, numbers: list[int], classes: int, channels: int, size: tuple[int, int]
) -> tuple[int, Callable[[], nn.Module]]:
    if 0 in numbers:
        raise UserError(f"{name}: a width of 0 leaves nothing; {did_you_mean(name, NAMES)}")
    if max(numbers) > WIDEST:
        raise UserError(f"{name}: no network has a layer of more than {WIDEST:,} units")
    if family == "wrn":
        if len(numbers) != 2 or not 10 <= numbers[0] < DEEPEST or numbers[0] % 6 != 4:
            raise UserError(
                f"{name}: a wide ResNet is wrn-DEPTH-WIDTH with a depth of 10, 16, 22, 28, 34, 40 "
                f"and so on in sixes; {did_you_mean(name, NAMES)}"
            )
        from limbeck.models.wide_resnet import WideResNet

        return 1, lambda: WideResNet(numbers[0], numbers[1], classes, channels)
    from limbeck.models.plain import CNN, MLP

    if family == "mlp":
        hidden, first = (0.5, 0.2) if name.endswith("-drop") else (0.0, 0.0)
        return 1, lambda: MLP(channels * size[0] * size[1], numbers, classes, hidden, first)
    return 2 ** len(numbers), lambda: CNN(numbers, classes, channels)
