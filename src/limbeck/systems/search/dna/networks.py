"""The networks that are searched among: cells of inverted residuals, each network by its name."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Self

from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.initialise import fan_out_normal

PUBLISHED = {
    "dna-a": "dna-32s2.16-24s2.53.33.36-40s2.33.33.53.36-80s2.76.33.53.36-96.56.53.53.56"
    "-160s2.56.53.53.53.56-320.36-1280",
    "dna-b": "dna-32s2.16-24s2.33.53.76-40s2.76.53.76-80s2.56.53.53.36-96.56.53.53.56"
    "-192s2.76.53.53.53.76-320.36-1280",
    "dna-c": "dna-32s2.16-24s2.56.36-40s2.56.56.36.56-80s2.56.36.56.56-112.36.56.56.53"
    "-192s2.56.53.56.56-320.36-1280",
    "dna-d": "dna-32s2.16-24s2.76.56.76-40s2.76.76.76.76-80s2.76.56.56.76-112.76.56.76.56"
    "-192s2.76.56.56.56.76-320.36-1280",
}
"""The networks that the paper found on ImageNet."""

_STEM = re.compile(r"([1-9]\d*)(s2)?(?:\.([1-9]\d*))?")
_STAGE = re.compile(r"([1-9]\d*)(s2)?((?:\.[3579][1-9])+)")
_HEAD = re.compile(r"[1-9]\d*")


class Operation(NamedTuple):
    """An inverted residual's kernel, and its inner channels over those it takes in.

    >>> str(Operation(5, 3))
    '53'
    """

    kernel: int
    expansion: int

    def __str__(self) -> str:
        return f"{self.kernel}{self.expansion}"


class Gate(nn.Module):
    """Squeeze and excitation: each channel is weighed by what all of them are like on average.

    >>> import torch
    >>> Gate(8, 2)(torch.zeros(1, 8, 4, 4)).shape
    torch.Size([1, 8, 4, 4])
    """

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W), the same."""
        squeezed = nn.functional.silu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * self.expand(squeezed).sigmoid()  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """Expand, filter each channel, gate, project; with a shortcut where the shape stays.

    The gate's inner width is a quarter of the channels that are taken in. Without expansion (1)
    the first convolution is left out.

    >>> sum(p.numel() for p in InvertedResidual(192, 192, Operation(3, 6)).parameters())
    569520
    """

    def __init__(self, inputs: int, outputs: int, operation: Operation, stride: int = 1) -> None:
        super().__init__()
        kernel, expansion = operation
        inner = inputs * expansion
        self.expand: nn.Module = nn.Identity()
        if expansion > 1:
            self.expand = _convolution(inputs, inner, 1)
        self.depthwise = _convolution(inner, inner, kernel, stride, groups=inner)
        self.gate = Gate(inner, max(1, inputs // 4))
        self.project = nn.Sequential(
            nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        found: Tensor = self.project(self.gate(self.depthwise(self.expand(x))))
        return x + found if self.shortcut else found


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())


@dataclass(frozen=True)
class Stage:
    """Layers of one width, of which the first has the stride."""

    width: int
    stride: int
    operations: tuple[Operation, ...]

    def __str__(self) -> str:
        stride = "s2" if self.stride == 2 else ""
        return ".".join([f"{self.width}{stride}", *map(str, self.operations)])


@dataclass(frozen=True)
class Plan:
    """What a network is made of.

    Attributes:
        stem: channels of the first 3x3 convolution.
        stem_stride: its stride.
        first: channels of a depthwise-separable convolution behind it; 0 for none.
        stages: the searched part.
        head: channels of a 1x1 convolution before the classifier; 0 for none.

    >>> plan = Plan.parse("dna-16s2-24.33.56-40s2.33-128")
    >>> plan.stages[1], plan.head, plan.name
    (Stage(width=40, stride=2, operations=(Operation(kernel=3, expansion=3),)), 128, \
'dna-16s2-24.33.56-40s2.33-128')
    """

    stem: int
    stem_stride: int
    first: int
    stages: tuple[Stage, ...]
    head: int

    @classmethod
    def parse(cls, name: str) -> Self:
        """The plan of a network's name, one of :data:`PUBLISHED` or its own.

        Raises:
            UserError: the name is none.
        """
        slug, *parts = PUBLISHED.get(name, name).split("-")
        head = parts.pop() if len(parts) > 2 and _HEAD.fullmatch(parts[-1]) else "0"
        stem = _STEM.fullmatch(parts[0]) if parts else None
        stages = [_STAGE.fullmatch(part) for part in parts[1:]]
        if slug != "dna" or stem is None or not stages or None in stages:
            raise UserError(
                f"there is no network named {name!r}; one is {', '.join(PUBLISHED)}, or "
                "dna-STEM-STAGE-STAGE..., as in dna-16-24.33.56-48s2.33.33: the stem's channels, "
                "each stage's channels with kernel and expansion of each of its layers, s2 behind "
                "channels where the resolution is halved, and last the channels of a 1x1 "
                "convolution, if any"
            )
        return cls(
            stem=int(stem[1]),
            stem_stride=2 if stem[2] else 1,
            first=int(stem[3] or 0),
            stages=tuple(
                Stage(
                    int(found[1]),
                    2 if found[2] else 1,
                    tuple(Operation(int(o[0]), int(o[1])) for o in found[3].split(".")[1:]),
                )
                for found in stages
                if found is not None
            ),
            head=int(head),
        )

    @property
    def name(self) -> str:
        """What the network is built by."""
        stem = f"{self.stem}{'s2' if self.stem_stride == 2 else ''}"
        parts = [f"{stem}.{self.first}" if self.first else stem, *map(str, self.stages)]
        return "-".join(["dna", *parts, *([str(self.head)] if self.head else [])])

    @property
    def stem_width(self) -> int:
        """The channels that the first stage takes in."""
        return self.first or self.stem

    def sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of what each stage takes in, for images of this size.

        >>> Plan.parse("dna-16s2-24.33-48s2.33").sizes((9, 8))
        [(5, 4), (5, 4)]
        """
        found = []
        strides = [self.stem_stride, *(stage.stride for stage in self.stages)]
        for stride in strides[:-1]:
            size = math.ceil(size[0] / stride), math.ceil(size[1] / stride)
            found.append(size)
        return found


def stem_of(plan: Plan, channels: int) -> nn.Sequential:
    """A plan's first convolution, and the separable one behind it."""
    parts = OrderedDict[str, nn.Module](conv=_convolution(channels, plan.stem, 3, plan.stem_stride))
    if plan.first:
        parts["separable"] = InvertedResidual(plan.stem, plan.first, Operation(3, 1))
    return nn.Sequential(parts)


class DNANet(nn.Module):
    """A network by its plan: stem, stages, head, mean, classifier.

    Convolutions start from N(0, 2 / fan-out), the classifier from PyTorch's default.

    >>> import torch
    >>> DNANet(Plan.parse("dna-8-8.32-16s2.32.54"), classes=10)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, plan: Plan, classes: int, channels: int = 3) -> None:
        super().__init__()
        self.plan, self.classes, self.channels = plan, classes, channels
        self.stages = tuple(f"stage{n}" for n, _ in enumerate(plan.stages, start=1))
        self.stem = stem_of(plan, channels)
        width = plan.stem_width
        for path, stage in zip(self.stages, plan.stages, strict=True):
            widths = pairwise([width, *[stage.width] * len(stage.operations)])
            made = [
                InvertedResidual(a, b, operation, stage.stride if number == 0 else 1)
                for number, (operation, (a, b)) in enumerate(
                    zip(stage.operations, widths, strict=True)
                )
            ]
            self.add_module(path, nn.Sequential(*made))
            width = stage.width
        self.head: nn.Module = nn.Identity()
        if plan.head:
            self.head, width = _convolution(width, plan.head, 1), plan.head
        self.fc = nn.Linear(width, classes)
        fan_out_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        x = self.stem(x)
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.fc(self.head(x).mean((2, 3)))  # type: ignore[no-any-return]


def network(name: str, classes: int, channels: int, size: tuple[int, int]) -> DNANet:
    """A network that was found, or any other of the space, by its name; see :class:`Plan`.

    Args:
        name: ``dna-a`` to ``dna-d``, or ``dna-STEM-STAGE-...-HEAD``.
        classes: number of outputs.
        channels: of the images.
        size: height and width of the images in pixels.

    Raises:
        UserError: a name that is none, or images that are too small.

    >>> sum(p.numel() for p in network("dna-a", 1000, 3, (224, 224)).parameters())
    4243318
    """
    plan = Plan.parse(name)
    least = math.prod([plan.stem_stride, *(stage.stride for stage in plan.stages)])
    if min(size) < least:
        raise UserError(
            f"{name} needs images of at least {least} x {least} pixels, not {size[0]} x {size[1]}"
        )
    return DNANet(plan, classes, channels)
