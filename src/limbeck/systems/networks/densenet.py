"""Densely Connected Convolutional Networks. Huang, Liu, van der Maaten, Weinberger, CVPR 2017
(arXiv 1608.06993).

Within a block every layer reads the maps of all layers before it and adds a few of its own, so
that L layers have L (L + 1) / 2 connections. Nothing has to be learned again or carried along, so
layers are narrow and parameters few, and the loss reaches every layer over a short path.

As a teacher such a network costs little, and as either it offers block ends of three or four
resolutions, before activation: ``stage1``, ``transition1``, ``stage2``, ....

Needs: images of at least 4 x 4 pixels, of 29 x 29 in the form for ImageNet.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from limbeck.catalogue import system
from limbeck.errors import UserError, did_you_mean
from limbeck.models.initialise import fan_out_normal

IMAGENET = {
    "121": (32, (6, 12, 24, 16)),
    "169": (32, (6, 12, 32, 32)),
    "201": (32, (6, 12, 48, 32)),
    "161": (48, (6, 12, 36, 24)),
    "264": (32, (6, 12, 64, 48)),
}
"""Table 1, and the wider 161 of the first version: growth rate and layers of the four blocks. The
names are depths, but for 264, whose blocks make it 265 layers deep."""
DROPOUT = 0.2
"""Of the networks whose training images are not augmented (section 4.2)."""
LEAST, LEAST_IMAGENET = 4, 29
"""Pixels a side that leave one for the last block."""


class DenseLayer(nn.Module):
    r"""The new maps that a layer makes of all maps before it, :math:`H_\ell` of Eq. 2.

    .. math:: x_\ell = H_\ell([x_0, x_1, \dots, x_{\ell - 1}])

    H is batch norm, ReLU and a 3x3 convolution; with a bottleneck (section 3, DenseNet-B) batch
    norm, ReLU and a 1x1 convolution to four times the growth rate come before these.

    Args:
        inputs: channels of all maps before it, k_0 + k (l - 1).
        growth: how many maps it adds, k.
        bottleneck: whether it has the 1x1 convolution.
        dropout: chance of a zero behind each convolution.
        lean: while training, keep neither the concatenated nor the normalised maps, and make them
            again in the backward pass.

    >>> DenseLayer(8, 4)(torch.zeros(1, 6, 5, 5), torch.zeros(1, 2, 5, 5)).shape
    torch.Size([1, 4, 5, 5])
    """

    def __init__(
        self,
        inputs: int,
        growth: int,
        bottleneck: bool = True,
        dropout: float = 0.0,
        lean: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.lean = lean
        self.bottleneck = bottleneck
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        if bottleneck:
            self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(4 * growth)
            self.relu2 = nn.ReLU()
            self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, *earlier: Tensor) -> Tensor:
        """Maps (B, C_i, H, W) whose channels add up to ``inputs`` -> (B, growth, H, W)."""
        again = self.lean and self.training and torch.is_grad_enabled()
        # A compiler chooses for itself what is kept, and cannot follow the second pass.
        if again and not torch.compiler.is_compiling():
            x: Tensor = checkpoint(
                self._squeezed,
                *earlier,
                use_reentrant=False,
                context_fn=self._contexts,
                preserve_rng_state=False,  # nothing in it is random
            )
        else:
            x = self._squeezed(*earlier)
        x = _dropped(x, self)
        if self.bottleneck:
            x = _dropped(self.conv2(self.relu2(self.norm2(x))), self)
        return x

    def _squeezed(self, *earlier: Tensor) -> Tensor:
        """What is wide and cheap to make again, and the convolution that reads it."""
        return self.conv1(self.relu1(self.norm1(torch.cat(earlier, 1))))  # type: ignore[no-any-return]

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _StatisticsKept(self.norm1)


class _StatisticsKept(AbstractContextManager[None]):
    """Puts a batch norm back into the mode of its first pass, with copies of its running
    statistics to have what the same batch would add a second time.

    It can be entered again: whoever goes backward through a pass twice makes the maps twice.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        self.norm = norm
        self.buffers = dict(norm.named_buffers())
        self.mode = self.mode_now = norm.training

    def __enter__(self) -> None:
        self.mode_now, self.norm.training = self.norm.training, self.mode
        for name, buffer in self.buffers.items():
            setattr(self.norm, name, buffer.clone())

    def __exit__(self, *_: object) -> None:
        self.norm.training = self.mode_now
        for name, buffer in self.buffers.items():
            setattr(self.norm, name, buffer)


def _dropped(x: Tensor, module: DenseLayer | Transition | PlainLayer) -> Tensor:
    """Dropout that leaves no trace in eval mode, where it would part a convolution from the norm
    that is folded into it.
    """
    return F.dropout(x, module.dropout) if module.training and module.dropout else x


class DenseBlock(nn.ModuleList):
    """Layers of which each reads the block's input and what all layers before it added.

    It puts out all of them: first the input as it is, then the new maps, layer by layer.

    Args:
        layers: how many there are, n.
        inputs: channels of the input, m.
        growth, bottleneck, dropout, lean: see :class:`DenseLayer`.

    >>> DenseBlock(3, 8, 4)(torch.zeros(1, 8, 5, 5)).shape
    torch.Size([1, 20, 5, 5])
    """

    def __init__(
        self,
        layers: int,
        inputs: int,
        growth: int,
        bottleneck: bool = True,
        dropout: float = 0.0,
        lean: bool = False,
    ) -> None:
        super().__init__(
            DenseLayer(inputs + growth * number, growth, bottleneck, dropout, lean)
            for number in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, m, H, W) -> (B, m + n k, H, W)."""
        maps = [x]
        for layer in self:
            maps.append(layer(*maps))
        return torch.cat(maps, 1)


class Transition(nn.Module):
    """Between two blocks: fewer channels (section 3, compression), then half the resolution.

    The convolution reads what batch norm and ReLU make of the block, as in the published code.

    Args:
        inputs: channels of the block before it, m.
        outputs: channels that it leaves, floor(theta m).
        dropout: chance of a zero behind the convolution.

    >>> Transition(8, 4)(torch.zeros(1, 8, 6, 6)).shape
    torch.Size([1, 4, 3, 3])
    """

    def __init__(self, inputs: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / 2, W / 2)."""
        return self.pool(_dropped(self.conv(self.relu(self.norm(x))), self))  # type: ignore[no-any-return]


class Average(nn.Module):
    """The mean over all positions.

    >>> Average()(torch.ones(1, 3, 2, 2)).tolist()
    [[1.0, 1.0, 1.0]]
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C)."""
        return x.mean((2, 3))


class DenseNet(nn.Sequential):
    """A stem, dense blocks (the stages) with transitions between them, and a linear classifier.

    Convolutions start from N(0, 2 / fan-out), the classifier from PyTorch's default with a bias of
    zero.

    Args:
        blocks: layers of each block.
        growth: maps that a layer adds, k.
        stem: maps that the first convolution makes, k_0.
        classes: number of outputs.
        channels: of the images, (B, channels, H, W).
        bottleneck: DenseNet-B.
        compression: the share of a block's maps that a transition leaves, theta; below 1 it is
            DenseNet-C.
        imagenet: a stem of stride 4 (7x7 convolution, batch norm, ReLU, max pooling) instead of a
            3x3 convolution.
        dropout: chance of a zero behind every convolution but the first.
        lean: spend time to save memory while training; see :class:`DenseLayer`.

    Example:
        >>> model = DenseNet((2, 2, 2), growth=12, stem=24, classes=10)
        >>> model.stages, model(torch.zeros(2, 3, 32, 32)).shape
        (('stage1', 'stage2', 'stage3'), torch.Size([2, 10]))
    """

    def __init__(
        self,
        blocks: Sequence[int],
        growth: int,
        stem: int,
        classes: int,
        channels: int = 3,
        *,
        bottleneck: bool = True,
        compression: float = 0.5,
        imagenet: bool = False,
        dropout: float = 0.0,
        lean: bool = False,
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["stem"] = _stride4(channels, stem) if imagenet else _conv3x3(channels, stem)
        width = stem
        for number, depth in enumerate(blocks, start=1):
            layers[f"stage{number}"] = DenseBlock(depth, width, growth, bottleneck, dropout, lean)
            width += depth * growth
            if number < len(blocks):
                fewer = int(compression * width)
                layers[f"transition{number}"] = Transition(width, fewer, dropout)
                width = fewer
        super().__init__(layers | _classifier(width, classes))
        self.stages = tuple(name for name in layers if name.startswith("stage"))
        _initialise(self)


def _conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


def _stride4(channels: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, outputs, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    )


def _classifier(width: int, classes: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        norm=nn.BatchNorm2d(width), relu=nn.ReLU(), pool=Average(), fc=nn.Linear(width, classes)
    )


def _initialise(model: nn.Sequential) -> None:
    fan_out_normal(model)
    nn.init.zeros_(model.get_submodule("fc").get_parameter("bias"))


class PlainLayer(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution that hand on nothing but what they made.

    >>> PlainLayer(8, 4)(torch.zeros(1, 8, 5, 5)).shape
    torch.Size([1, 4, 5, 5])
    """

    def __init__(self, inputs: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv = _conv3x3(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        return _dropped(self.conv(self.relu(self.norm(x))), self)


class PlainStack(nn.Sequential):
    """What a DenseNet for small images would be without connections: as many layers in a row.

    Every convolution is a 3x3 one; a transition changes the width and halves the resolution by
    average pooling.

    Args:
        layers: convolutions of each of the three stages.
        widths: maps of the stages; the stem makes as many as the first.
        classes, channels, dropout: see :class:`DenseNet`.

    Example:
        >>> PlainStack(4, (8, 16, 32), classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    stages = ("stage1", "stage2", "stage3")

    def __init__(
        self,
        layers: int,
        widths: tuple[int, int, int],
        classes: int,
        channels: int = 3,
        dropout: float = 0.0,
    ) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict(stem=_conv3x3(channels, widths[0]))
        for number, width in enumerate(widths, start=1):
            parts[f"stage{number}"] = nn.Sequential(
                *(PlainLayer(width, width, dropout) for _ in range(layers))
            )
            if number < len(widths):
                parts[f"transition{number}"] = nn.Sequential(
                    PlainLayer(width, widths[number], dropout), nn.AvgPool2d(2)
                )
        super().__init__(parts | _classifier(widths[-1], classes))
        _initialise(self)


def stack_parameters(layers: int, widths: tuple[int, int, int], classes: int, channels: int) -> int:
    """The parameters of a :class:`PlainStack`.

    >>> stack_parameters(4, (12, 12, 12), 10, 3)
    18958
    """
    a, b, c = widths

    def layer(inputs: int, outputs: int) -> int:
        return 2 * inputs + 9 * inputs * outputs

    stages = layers * (layer(a, a) + layer(b, b) + layer(c, c))
    return 9 * channels * a + stages + layer(a, b) + layer(b, c) + 2 * c + (c + 1) * classes


def stack_widths(
    parameters: int, layers: int, classes: int, channels: int = 3
) -> tuple[int, int, int]:
    """The widths that bring a :class:`PlainStack` nearest to a number of parameters.

    Stages are equally wide up to a map, as in a DenseNet all layers add equally many: so the stack
    also works about as much as the DenseNet-BC of its depth and parameters.

    >>> stack_widths(18958, layers=4, classes=10)
    (12, 12, 12)
    """

    def miss(widths: tuple[int, int, int]) -> int:
        return abs(stack_parameters(layers, widths, classes, channels) - parameters)

    uniform = (stack_parameters(layers, (w, w, w), classes, channels) for w in count(2))
    wide = 1 + next(i for i, found in enumerate(uniform) if found > parameters)
    either = (wide, wide + 1)
    return min(((a, b, c) for a in either for b in either for c in either), key=miss)


def network(name: str, classes: int, channels: int, size: tuple[int, int]) -> nn.Module:
    """One of the paper's networks, or a plain stack of the depth and parameters of one.

    Args:
        name: ``densenet-L-K`` of L layers and growth rate K, ``densenet-bc-L-K`` with bottlenecks
            and compression, ``densenet-stack-L-K`` and ``densenet-stack-bc-L-K`` for their
            stacks, or ``densenet-121`` and the like for ImageNet. Behind it, in any order:
            ``-drop`` for dropout of 0.2, ``-lean`` to save memory while training, and ``-2k``
            for a stem of 2K maps instead of 16 where there are no bottlenecks.
        classes: number of outputs.
        channels: of the images, (B, channels, H, W).
        size: height and width of the images in pixels.

    Raises:
        UserError: there is no such network, or it cannot be made for such images.

    Example:
        >>> sum(p.numel() for p in network("densenet-bc-100-12", 10, 3, (32, 32)).parameters())
        769162
    """
    found = re.fullmatch(
        r"densenet-(?P<stack>stack-)?((?P<bc>bc-)?(?P<depth>\d{1,5})-(?P<growth>\d{1,5})"
        r"|(?P<imagenet>\d{3}))(?P<options>(-2k|-drop|-lean)*)",
        name,
    )
    if found is None or found["imagenet"] not in (None, *IMAGENET):
        known = system("densenet").networks
        raise UserError(f"there is no network named {name!r}; {did_you_mean(name, known)}")
    options = found["options"].split("-")[1:]
    stack, bc, imagenet = bool(found["stack"]), bool(found["bc"]), found["imagenet"] is not None
    _check_options(name, options, stack, bc, imagenet)
    least = LEAST_IMAGENET if imagenet else LEAST
    if min(size) < least:
        raise UserError(
            f"{name} needs images of at least {least} x {least} pixels, not {size[0]} x {size[1]}"
        )
    dropout, lean = (DROPOUT if "drop" in options else 0.0), "lean" in options
    if imagenet:
        growth, blocks = IMAGENET[found["imagenet"]]
        return DenseNet(
            blocks, growth, 2 * growth, classes, channels, imagenet=True, dropout=dropout, lean=lean
        )
    depth, growth = int(found["depth"]), int(found["growth"])
    layers = _layers(name, depth, growth, bc)

    def dense() -> DenseNet:
        return DenseNet(
            (layers,) * 3,
            growth,
            2 * growth if bc or "2k" in options else 16,
            classes,
            channels,
            bottleneck=bc,
            compression=0.5 if bc else 1.0,
            dropout=dropout,
            lean=lean,
        )

    if not stack:
        return dense()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in dense().parameters())
    row = (depth - 4) // 3
    widths = stack_widths(parameters, row, classes, channels)
    return PlainStack(row, widths, classes, channels, dropout)


def _check_options(
    name: str, options: Sequence[str], stack: bool, bc: bool, imagenet: bool
) -> None:
    if imagenet and stack:
        raise UserError(
            f"{name}: plain stacks are made for small images; name one as densenet-stack-bc-40-12"
        )
    if len(set(options)) < len(options):
        raise UserError(f"{name}: an ending is given twice; name each of them once")
    if "2k" in options and (bc or imagenet):
        raise UserError(
            f"{name}: with bottlenecks the stem makes twice the growth rate as it is; leave -2k out"
        )
    if "lean" in options and stack:
        raise UserError(
            f"{name}: a plain stack concatenates nothing that could be made again; leave -lean out"
        )


def _layers(name: str, depth: int, growth: int, bc: bool) -> int:
    """Layers of a block: stem, two transitions and the classifier are the other four."""
    step, kind = (6, "-BC") if bc else (3, "")
    if depth < 4 + step or (depth - 4) % step:
        near = max(1, round((depth - 4) / step)) * step + 4
        raise UserError(
            f"{name}: a DenseNet{kind} has {step}n + 4 layers, three blocks of n and four more; "
            f"a depth of {near} would do"
        )
    if not growth:
        raise UserError(f"{name}: with a growth rate of 0 no layer adds anything; 12 is usual")
    return (depth - 4) // step
