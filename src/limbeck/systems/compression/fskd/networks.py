"""Plain networks such as the paper's VGG-16, and any network with fewer filters, by name."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limbeck.catalogue import system
from limbeck.errors import UserError, did_you_mean
from limbeck.models import Input, build
from limbeck.models.initialise import fan_out_normal, small_linear
from limbeck.systems.compression.fskd.pointwise import alike
from limbeck.systems.compression.fskd.pruning import layers, prune, width
from limbeck.training.folding import fold_batch_norm
from limbeck.training.network import Network

_PRUNED = re.compile(r"fskd-(?P<base>.+?)-keep-(?P<widths>\d+(-\d+)*)(?P<folded>-folded)?")
_LIBRARIES = ("torchvision", "timm")
PLAIN: dict[str, tuple[int | str, ...]] = {
    "plain6": (16, 16, "M", 32, 32, "M", 64, 64, "M"),
    "plain6x2": (32, 32, "M", 64, 64, "M", 128, 128, "M"),
    "plain16": (
        *(64, 64, "M", 128, 128, "M", 256, 256, 256, "M"),
        *(512, 512, 512, "M", 512, 512, 512),
    ),
}
"""Channels of 3x3 convolutions, and M for a pooling to half the size."""


class Plain(nn.Module):
    """Convolutions without bias, one after the other, as VGG has them, and one linear layer.

    Convolutions start from N(0, 2 / fan-out), the classifier from N(0, 0.01^2) with bias zero.

    Args:
        plan: as in :data:`PLAIN`.
        classes: number of outputs.
        channels: of the images, (B, channels, H, W).
        norm: a batch norm behind each convolution.

    >>> sum(p.numel() for p in Plain(PLAIN["plain16"], 10).parameters())
    14715594
    """

    def __init__(
        self, plan: Sequence[int | str], classes: int, channels: int = 3, norm: bool = False
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for wide in plan:
            if isinstance(wide, str):
                parts.append(nn.MaxPool2d(2))
                continue
            parts.append(nn.Conv2d(channels, wide, 3, padding=1, bias=False))
            parts += [nn.BatchNorm2d(wide)] if norm else []
            parts.append(nn.ReLU())
            channels = wide
        self.features = nn.Sequential(*parts)
        self.fc = nn.Linear(channels, classes)
        fan_out_normal(self)
        small_linear(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        return self.fc(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


def network(name: str, classes: int, channels: int, size: tuple[int, int]) -> nn.Module:
    """A plain network, or any network with fewer filters.

    Args:
        name: ``fskd-plain6``, ``fskd-plain6x2``, ``fskd-plain16``, each also with ``-bn``; or
            ``fskd-BASE-keep-W1-W2-...`` with the widths that those convolutions of BASE have left
            which can lose filters, in the order in which they run. BASE is a network by its name,
            a plain one without ``fskd-``, a library's with a point in place of the colon. Behind
            it ``-folded``: batch norms are folded into the convolutions.
        classes: number of outputs.
        channels: of the images.
        size: height and width of the images in pixels.

    Raises:
        UserError: there is no such network, widths that it does not have, images too small.

    >>> small = network("fskd-plain6-keep-8-16-32-16-32-32", 10, 1, (28, 28))
    >>> small.features[0].out_channels, small.fc.in_features
    (8, 32)
    """
    found = _PRUNED.fullmatch(name)
    if found is None:
        return _plain(name, classes, channels, size)
    spec = _spec(found["base"])
    names = [str(number) for number in range(classes)]
    model = build(spec, names, Input(channels, size, (0.5,) * channels, (0.5,) * channels)).model
    able = [layer.path for layer in layers(model) if not layer.obstacle]
    widths = [int(w) for w in found["widths"].split("-")]
    whole = [width(model, path) for path in able]
    fits = len(widths) == len(whole) and all(
        1 <= w <= most for w, most in zip(widths, whole, strict=True)
    )
    if not fits:
        raise UserError(
            f"{name}: {spec} has {len(whole)} convolutions that can lose filters, of at most "
            f"{'-'.join(map(str, whole))}; behind keep- comes a width for each, at least 1"
        )
    small = prune(model, {p: torch.arange(w) for p, w in zip(able, widths, strict=True)})
    return fold_batch_norm(small).train() if found["folded"] else small.train()


def _plain(name: str, classes: int, channels: int, size: tuple[int, int]) -> Plain:
    base = name.removeprefix("fskd-").removesuffix("-bn")
    if base not in PLAIN or not name.startswith("fskd-"):
        known = system("fskd").networks
        raise UserError(f"there is no network named {name!r}; {did_you_mean(name, known)}")
    least = 2 ** PLAIN[base].count("M")
    if min(size) < least:
        raise UserError(
            f"{name} needs images of at least {least} x {least} pixels, not {size[0]} x {size[1]}"
        )
    return Plain(PLAIN[base], classes, channels, norm=name.endswith("-bn"))


def _spec(base: str) -> str:
    """The name that ``limbeck.models.build`` knows a base by."""
    if base.removesuffix("-bn") in PLAIN:
        return f"fskd-{base}"
    library, _, rest = base.partition(".")
    return f"{library}:{rest}" if library in _LIBRARIES else base


def name_of(base: str, widths: Sequence[int | str]) -> str:
    """The name of a network with so many filters left, which :func:`network` builds.

    Args:
        base: the whole network's name, or that of one pruned before; "" has none.
        widths: of the convolutions that can lose filters.

    >>> name_of("resnet8", (8, 16, 32)), name_of("torchvision:vgg11", (8,))
    ('fskd-resnet8-keep-8-16-32', 'fskd-torchvision.vgg11-keep-8')
    >>> name_of("fskd-plain6-keep-16-folded", (8,))
    'fskd-plain6-keep-8-folded'
    """
    if not base:
        return ""
    before = _PRUNED.fullmatch(base)
    ending = (before["folded"] or "") if before else ""
    base = before["base"] if before else base.removeprefix("fskd-").replace(":", ".", 1)
    return f"fskd-{base}-keep-{'-'.join(map(str, widths))}{ending}"


def folded(network: Network) -> Network:
    """A copy at rest with its batch norms folded, as far as they can be."""
    model = fold_batch_norm(network.model)
    same = _norms(model) == _norms(network.model)
    told = network.name.endswith("-folded") or same or not network.name
    return alike(model, network, network.name if told else f"{network.name}-folded")


def _norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
