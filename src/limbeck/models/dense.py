"""Networks that answer for every pixel, by name, and what they are fed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torchvision
from torch import nn
from torchvision.models import get_model, list_models

from limbeck.errors import UserError, did_you_mean
from limbeck.models.dilated_resnet import DEPTHS, DilatedResNet
from limbeck.models.enet import WIDTH, ENet
from limbeck.models.input import Input, check_logits
from limbeck.models.libraries import Offer, Order, Way

NAMES = {
    "enet": "ENet as published, three encoder blocks",
    "enet-sad": "ENet with a fourth encoder block, as in self attention distillation",
    **{
        f"dilated-resnet{depth}": f"ResNet-{depth} that keeps an eighth of the resolution"
        for depth in (18, 34, 101)
    },
    "dilated-resnet10-16": "with 16 channels in the first stage (any dilated-resnetD-WIDTH)",
}
"""Name -> one line about it."""

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation that torchvision's backbones were trained with."""


class Existence(nn.Sequential):
    """Which lanes there are, from a network's last features (branch P1 of ENet-SAD).

    A 1x1 convolution with an output a class, softmax over them, means over 2x2, two linear layers.

    Args:
        inputs: channels of the features, (B, inputs, ceil(H / 8), ceil(W / 8)).
        lanes: number of outputs, (B, lanes), logits.
        size: H and W of the images, 9 or more.

    >>> import torch
    >>> Existence(8, 4, (32, 48))(torch.zeros(2, 8, 4, 6)).shape
    torch.Size([2, 4])
    """

    def __init__(self, inputs: int, lanes: int, size: tuple[int, int]) -> None:
        pixels = (-(-size[0] // 8) // 2) * (-(-size[1] // 8) // 2)
        super().__init__(
            nn.Conv2d(inputs, lanes + 1, 1),
            nn.Softmax(1),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear((lanes + 1) * pixels, 128),
            nn.ReLU(),
            nn.Linear(128, lanes),
        )


@dataclass(frozen=True)
class SceneInput(Input):
    """What a network wants to be fed that has a class for every pixel of an image."""

    kind = "scenes"

    def offers(self) -> Mapping[str, Callable[[Order], Offer]]:
        return {"": _own, "torchvision": _torchvision}

    def check(self, output: Any, classes: int) -> None:
        check_logits(output, classes, *self.size)


@dataclass(frozen=True)
class LaneInput(SceneInput):
    """What a network wants to be fed that also says which lanes there are."""

    kind = "lanes"

    def describe(self) -> str:
        return f"{super().describe()} to find lanes in"

    def offers(self) -> Mapping[str, Callable[[Order], Offer]]:
        return {"": _own}

    def check(self, output: Any, classes: int) -> None:
        logits, there = output
        super().check(logits, classes)
        if there.shape != (1, classes - 1):
            raise ValueError(f"it puts out {tuple(there.shape)} instead of {(1, classes - 1)}")


def make(
    name: str, classes: int, channels: int, size: tuple[int, int], existence: bool = False
) -> nn.Module:
    """Make one of Limbeck's own networks for scenes with fresh weights.

    Args:
        name: one of :data:`NAMES`, or dilated-resnetD-WIDTH.
        classes: outputs a pixel.
        channels, size: of the images, (B, channels, H, W).
        existence: also say which of the classes but the first there are.

    Raises:
        UserError: there is no such network, or it cannot be made for such images.

    >>> import torch
    >>> make("enet", 5, 3, (32, 32))(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 5, 32, 32])
    """
    if min(size) < 16:
        raise UserError(
            f"{name} needs images of at least 16 x 16 pixels, not {size[0]} x {size[1]}"
        )

    def head(inputs: int) -> nn.Module:
        return Existence(inputs, classes - 1, size)

    if name in ("enet", "enet-sad"):
        own = head(WIDTH) if existence else None
        return ENet(classes, channels, 3 if name == "enet" else 4, own)
    found = re.fullmatch(r"dilated-resnet(\d+)(?:-(\d+))?", name)
    if found is None or int(found[1]) not in DEPTHS or found[2] == "0":
        raise UserError(
            f"there is no network for scenes named {name!r}; {did_you_mean(name, NAMES)}"
        )
    width = int(found[2] or 64)
    return DilatedResNet(int(found[1]), classes, channels, width, head if existence else None)


def _own(order: Order) -> Offer:
    if order.pretrained:
        raise UserError(
            f"Limbeck ships no weights for {order.name}; train it, or take "
            "torchvision:deeplabv3_resnet50@pretrained"
        )
    input = order.input
    lanes = isinstance(input, LaneInput)
    return Offer(
        [
            Way(
                lambda: make(order.name, len(order.classes), input.channels, input.size, lanes),
                input,
            )
        ]
    )


def _torchvision(order: Order) -> Offer:
    names = list_models(module=torchvision.models.segmentation)
    if order.name not in names:
        raise UserError(
            f"torchvision has no model for scenes named {order.name!r}; "
            + did_you_mean(order.name, names)
        )
    backbone = "DEFAULT" if order.pretrained else None

    def make_library() -> nn.Module:
        model: nn.Module = get_model(
            order.name, weights=None, weights_backbone=backbone, num_classes=len(order.classes)
        )
        model.register_forward_hook(_logits)
        return model

    mean, std = IMAGENET if order.pretrained else (order.input.mean, order.input.std)
    input = replace(order.input, mean=mean, std=std)
    return Offer([Way(make_library, input)], loaded=order.pretrained)


def _logits(_: nn.Module, __: Any, output: Any) -> Any:
    return output["out"]
