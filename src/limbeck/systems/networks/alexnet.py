"""ImageNet classification with deep convolutional neural networks. Krizhevsky, Sutskever, Hinton,
2012 (NeurIPS).

Five convolutions and three fully connected layers, with rectified units throughout. The 60 million
parameters would learn their training images by heart, so the images are varied (random crops,
mirror images, a tint along the principal components of their colours) and half of the units of the
hidden fully connected layers are dropped in each step. A unit's response is divided by those of
its neighbours among the channels, pools overlap, and a test image is judged by the mean over ten
of its crops.

A network here takes images at least as large as its crop and looks at their middle. So
``data.augment.crop: n``, which shifts an image by up to n pixels, followed by the network's own
crop is a random crop: each of (2n + 1)^2 positions is equally likely, and as long as n is at most
the margin, no padding is seen. The margin is 14 pixels for ``alexnet`` on images of 256 (of 30^2
positions the last row and column are then left out), and 4 for ``alexnet-small`` on images of 32.
Mirror images are ``data.augment.flip``, the tint is ``data.augment.colour``.

Needs: images of at least 227 pixels a side for ``alexnet`` and ``alexnet-one``, 224 for
``alexnet-torchvision``, 10 for ``alexnet-small``; as a teacher it answers in eval mode, as any.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.catalogue import system
from limbeck.data.colour import colour_offsets, pca_colours
from limbeck.data.data import Split
from limbeck.data.splits import sample
from limbeck.errors import UserError, did_you_mean
from limbeck.models.initialise import fan_out_normal
from limbeck.training.bench import Bench
from limbeck.training.finding import Finding
from limbeck.training.method import Supervised
from limbeck.training.network import Network

__all__ = [
    "AlexNet",
    "LocalResponseNorm",
    "TenCrop",
    "TenCropEvaluation",
    "centre_crop",
    "colour_offsets",
    "local_response_norm",
    "network",
    "pca_colours",
    "ten_crop_predict",
    "ten_crops",
]


def local_response_norm(
    activity: Tensor, n: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75
) -> Tensor:
    r"""Responses divided by those of their neighbours among the channels (section 3.3).

    .. math::
        b^i = a^i \Big/ \Big(k + \alpha \sum_{j = \max(0, i - (n - 1) / 2)}
        ^{\min(N - 1, i + (n - 1) / 2)} (a^j)^2\Big)^\beta

    The sum is not divided by n. In ``torch.nn.functional.local_response_norm`` it is, so alpha
    there is n times alpha here. At the first and the last channels the window is cut off.

    Args:
        activity: (B, N, ...), N channels.
        n: channels in a window, odd, at least 1.
        k: at least 0; with 0 a position without any activity is 0 / 0.
        alpha, beta: at least 0.

    Returns:
        Of the shape and type of ``activity``; half precision is left in between.

    Raises:
        UserError: no channels, or a constant out of range.

    >>> local_response_norm(torch.full((1, 4, 1), 10.0), alpha=1e-4).flatten()
    tensor([5.8800, 5.8584, 5.8584, 5.8800])
    """
    if activity.ndim < 2:
        raise UserError(
            f"responses are normalised over channels, (B, N, ...), not in the shape "
            f"{tuple(activity.shape)}"
        )
    if not isinstance(n, int) or n < 1 or n % 2 == 0:
        raise UserError(f"a window has its channel in the middle, so n is odd, not {n}")
    if not all(0 <= number < math.inf for number in (k, alpha, beta)):
        raise UserError(f"k, alpha and beta are at least 0, not {k}, {alpha} and {beta}")
    # A response of 256 has a square that float16 cannot hold.
    wide = activity.to(torch.promote_types(activity.dtype, torch.float32))
    scale: Tensor = k + alpha * _Neighbours.apply(wide.square(), n // 2)
    if beta == 0.75:
        # Roots are several times as fast as a power.
        root = scale.rsqrt()
        factor = root * root.sqrt()
    else:
        factor = scale.pow(-beta)
    return (wide * factor).to(activity.dtype)


def _sum_of_neighbours(x: Tensor, reach: int) -> Tensor:
    """Each channel's sum with those at most ``reach`` before and behind it."""
    total = x.clone()
    for shift in range(1, min(reach, x.shape[1] - 1) + 1):
        total[:, shift:] += x[:, :-shift]
        total[:, :-shift] += x[:, shift:]
    return total


class _Neighbours(torch.autograd.Function):
    """The sum is its own adjoint; left to find that out by itself, torch copies every slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reach: int) -> Tensor:
        ctx.reach = reach
        return _sum_of_neighbours(x, reach)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum_of_neighbours(gradient, ctx.reach), None


class LocalResponseNorm(nn.Module):
    """:func:`local_response_norm` with the paper's constants, as a layer.

    >>> LocalResponseNorm()(torch.full((1, 1, 1, 1), 10.0)).item()
    5.9238...
    """

    def __init__(self, n: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75) -> None:
        super().__init__()
        self.n, self.k, self.alpha, self.beta = n, k, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, H, W) -> (B, N, H, W)."""
        return local_response_norm(x, self.n, self.k, self.alpha, self.beta)

    def extra_repr(self) -> str:
        return f"n={self.n}, k={self.k}, alpha={self.alpha}, beta={self.beta}"


def centre_crop(images: Tensor, size: int) -> Tensor:
    """The square of ``size`` pixels in the middle; an odd margin is larger below and at the right.

    Raises:
        UserError: the images are smaller than that.

    >>> centre_crop(torch.arange(16).view(1, 1, 4, 4), 2)
    tensor([[[[ 5,  6],
              [ 9, 10]]]])
    """
    top, left = _margins(images, size)
    return images[..., top // 2 : top // 2 + size, left // 2 : left // 2 + size]


def ten_crops(images: Tensor, size: int) -> Tensor:
    """The crops by which an image is judged (section 4.1): corners, centre, and those mirrored.

    Args:
        images: (B, C, H, W), H and W at least ``size``.
        size: of the crops in pixels.

    Returns:
        (B, 10, C, size, size): top left, top right, bottom left, bottom right, centre, and the
        same five of the mirror image, as ``torchvision.transforms.functional.ten_crop`` has them.

    Raises:
        UserError: the images are smaller than the crops.

    >>> ten_crops(torch.arange(9).view(1, 1, 3, 3), 2)[0, [0, 5]].flatten(1)
    tensor([[0, 1, 3, 4],
            [2, 1, 5, 4]])
    """
    return torch.stack(list(_crops(images, size)), 1)


def ten_crop_predict(model: nn.Module, images: Tensor, size: int) -> Tensor:
    """Class probabilities of images, the mean of the softmax outputs for their ten crops.

    Args:
        model: (B, C, size, size) to logits (B, classes); in eval mode, or units are dropped.
        images: (B, C, H, W), prepared as the model is fed.
        size: of the crops in pixels.

    Returns:
        (B, classes) in float32 or better; rows sum to 1.
    """
    answers = torch.stack([model(crop) for crop in _crops(images, size)])
    return answers.to(torch.promote_types(answers.dtype, torch.float32)).softmax(-1).mean(0)


def _crops(images: Tensor, size: int) -> Iterator[Tensor]:
    bottom, right = _margins(images, size)
    for turned in (images, images.flip(-1)):
        for top in (0, bottom):
            for left in (0, right):
                yield turned[..., top : top + size, left : left + size]
        yield centre_crop(turned, size)


def _margins(images: Tensor, size: int) -> tuple[int, int]:
    """By how much images are higher and wider than a crop."""
    height, width = images.shape[-2:]
    if not 1 <= size <= min(height, width):
        raise UserError(
            f"a crop of {size} x {size} pixels cannot be cut out of images of {height} x {width}; "
            "give larger images, with data.size for instance"
        )
    return height - size, width - size


@dataclass(frozen=True)
class Conv:
    """A convolution with its ReLU, and what follows it.

    ``bias`` is what the paper starts the biases from (section 5).
    """

    filters: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    normalised: bool = False
    pooled: bool = False
    bias: float = 0.0


PAPER = (
    Conv(96, 11, stride=4, normalised=True, pooled=True),
    Conv(256, 5, padding=2, groups=2, normalised=True, pooled=True, bias=1.0),
    Conv(384, 3, padding=1),
    Conv(384, 3, padding=1, groups=2, bias=1.0),
    Conv(256, 3, padding=1, groups=2, pooled=True, bias=1.0),
)
"""Two groups are the two GPUs of the paper; the third convolution reads both halves."""

TORCHVISION = (
    Conv(64, 11, stride=4, padding=2, pooled=True),
    Conv(192, 5, padding=2, pooled=True),
    Conv(384, 3, padding=1),
    Conv(256, 3, padding=1),
    Conv(256, 3, padding=1, pooled=True),
)

SMALL = (
    Conv(16, 5, padding=2, normalised=True, pooled=True),
    Conv(32, 3, padding=1, normalised=True, pooled=True),
    Conv(64, 3, padding=1),
)


class AlexNet(nn.Module):
    """Convolutions in ``stages``, each with ReLU, normalisation and pool, and a ``head``.

    The layers of the head are numbered on: ``head.fc6``, ``head.fc7`` and ``head.fc8`` behind five
    convolutions. Larger images are cut to their middle. Weights start from PyTorch's defaults;
    :meth:`start_as_published` draws the paper's.

    Args:
        convs: the convolutions.
        hidden: units of the hidden fully connected layers.
        classes: number of outputs.
        channels: of the images, (B, channels, H, W).
        crop: the side of what is looked at, in pixels.
        dropout: share of the hidden units that a training step drops; the others are scaled up.
        early: drop what goes into the hidden layers, as torchvision does, not what comes out.
        lrn: normalise where ``convs`` say so.
        overlap: pools of 3 x 3 with stride 2, not of 2 x 2.

    Raises:
        UserError: the crop is too small for the pools.

    Example:
        >>> AlexNet(SMALL, (8,), classes=10, crop=24)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        convs: Sequence[Conv],
        hidden: Sequence[int],
        classes: int,
        channels: int = 3,
        *,
        crop: int,
        dropout: float = 0.5,
        early: bool = False,
        lrn: bool = True,
        overlap: bool = True,
    ) -> None:
        super().__init__()
        self.convs = tuple(convs)
        self.crop = crop
        self.stages = tuple(f"stage{number}" for number in range(1, len(convs) + 1))
        pool = 3 if overlap else 2
        inputs, side = channels, crop
        for name, conv in zip(self.stages, convs, strict=True):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            layers["conv"] = nn.Conv2d(
                inputs, conv.filters, conv.kernel, conv.stride, conv.padding, groups=conv.groups
            )
            layers["relu"] = nn.ReLU()
            side = (side + 2 * conv.padding - conv.kernel) // conv.stride + 1
            if conv.normalised and lrn:
                layers["lrn"] = LocalResponseNorm()
            if conv.pooled:
                layers["pool"] = nn.MaxPool2d(pool, 2)
                side = (side - pool) // 2 + 1
            if side < 1:
                raise UserError(f"a crop of {crop} pixels is too small: nothing is left of it")
            self.add_module(name, nn.Sequential(layers))
            inputs = conv.filters
        self.head = _head(inputs * side**2, hidden, classes, len(convs) + 1, dropout, early)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W), H and W at least ``crop``, -> (B, classes)."""
        x = centre_crop(x, self.crop)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.head(x.flatten(1))  # type: ignore[no-any-return]

    @torch.no_grad()
    def start_as_published(self) -> AlexNet:
        """Draw weights from N(0, 0.01^2); biases are 1 in convolutions that say so and in hidden
        layers, which gives their ReLUs something positive to begin with, and 0 elsewhere.
        """
        layers = [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        hidden = len(layers) - len(self.convs) - 1
        biases = [*(conv.bias for conv in self.convs), *[1.0] * hidden, 0.0]
        for layer, bias in zip(layers, biases, strict=True):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, bias)  # type: ignore[arg-type]
        return self


def _head(
    inputs: int, hidden: Sequence[int], classes: int, first: int, dropout: float, early: bool
) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, units in enumerate(hidden, first):
        drop = {f"drop{number}": nn.Dropout(dropout)} if dropout else {}
        if early:
            layers.update(drop)
        layers[f"fc{number}"] = nn.Linear(inputs, units)
        layers[f"relu{number}"] = nn.ReLU()
        if not early:
            layers.update(drop)
        inputs = units
    layers[f"fc{first + len(hidden)}"] = nn.Linear(inputs, classes)
    return nn.Sequential(layers)


SWITCHES: Mapping[str, Mapping[str, Any]] = {
    "nodrop": {"dropout": 0.0},
    "nolrn": {"lrn": False},
    "nooverlap": {"overlap": False},
}
"""What may stand behind a network's name, to leave a part out."""

LEAST = 10
"""The least side of the images of ``alexnet-small``, which looks at three quarters of it."""


def network(name: str, classes: int, channels: int, size: tuple[int, int]) -> AlexNet:
    """One of the paper's networks: a name of the catalogue, and what is left out behind it.

    Args:
        name: ``alexnet``, ``alexnet-one``, ``alexnet-torchvision`` or ``alexnet-small``, then any
            of ``-nodrop``, ``-nolrn`` and ``-nooverlap``.
        classes: number of outputs.
        channels: of the images.
        size: height and width of the images in pixels.

    Raises:
        UserError: there is no such network, or the images are too small for it.

    >>> network("alexnet-small-nodrop", 10, 3, (32, 32)).crop
    24
    """
    words = name.split("-")[1:]
    variant = words.pop(0) if words and words[0] in ("one", "torchvision", "small") else ""
    switches = {key: value for word in words for key, value in SWITCHES.get(word, {}).items()}
    pointless = variant == "torchvision" and "nolrn" in words
    if len(switches) < len(words) or pointless or not name.startswith("alexnet"):
        known = system("alexnet").networks
        raise UserError(f"there is no network named {name!r}; {did_you_mean(name, known)}")
    convs: tuple[Conv, ...] = PAPER
    hidden: tuple[int, ...] = (4096, 4096)
    least = 227
    if variant == "one":
        convs = tuple(replace(conv, groups=1) for conv in PAPER)
    elif variant == "torchvision":
        convs, least = TORCHVISION, 224
    elif variant == "small":
        convs, hidden, least = SMALL, (256,), LEAST
    if min(size) < least:
        raise UserError(
            f"{name} needs images of at least {least} x {least} pixels, not {size[0]} x {size[1]}; "
            f"give larger ones with data.size"
            + ("" if variant == "small" else ", or take alexnet-small")
        )
    crop = 3 * min(size) // 4 if variant == "small" else least
    early = variant == "torchvision"
    made = AlexNet(convs, hidden, classes, channels, crop=crop, early=early, **switches)
    if variant in ("", "one"):
        made.start_as_published()
    elif variant == "small":
        # N(0, 0.01^2) is made for layers of thousands of inputs; so few would hardly answer.
        fan_out_normal(made)
    return made


class TenCrop(nn.Module):
    """A model that is asked about ten crops of each image.

    Args:
        model: (B, C, size, size) to logits (B, classes).
        size: of the crops in pixels.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> TenCrop(model, 2)(torch.zeros(5, 1, 3, 3)).exp().sum(1).allclose(torch.ones(5))
    True
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model = model
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logarithms of the mean probabilities, (B, classes)."""
        predicted = ten_crop_predict(self.model, images, self.size)
        return predicted.clamp(min=torch.finfo(predicted.dtype).tiny).log()


class TenCropEvaluation(Supervised):
    """Labels alone; then how much of what was learned is only remembered, and what ten crops add.

    Args:
        crops: measure by ten crops too, which takes ten times as long.
        samples: at most so many training images are measured.
    """

    tasks = ("classification",)

    def __init__(self, crops: bool = True, samples: Annotated[int, Field(ge=1)] = 2000) -> None:
        super().__init__()
        self.crops = crops
        self.samples = samples

    def rehearse(self, bench: Bench) -> None:
        super().rehearse(bench)
        if self.crops:
            makers = [bench.make_student, *([bench.rival.make] if bench.rival else [])]
            for make in makers:
                in_ten_crops(make(bench.seeds[0]))

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """One table: accuracy on training and test images by the centre crop, and by ten crops."""
        rows = []
        for role in bench.delivered(bench.seeds[0]):
            networks = [bench.delivered(seed)[role] for seed in bench.seeds]
            measured = [self.accuracies(bench, n) for n in networks if isinstance(n, Network)]
            columns = list(zip(*measured, strict=True))
            called = "rival" if role == "baseline" else role
            name = getattr(networks[0], "name", "")
            rows.append([f"{called} {name}".strip(), *map(_percent, columns)])
        heads = ["", "training", "test", "gap", *(["test, ten crops"] if self.crops else [])]
        seeds = len(bench.seeds)
        return [
            Finding(
                "Learned and remembered",
                f"Accuracy in per cent, mean of {seeds} seed{'' if seeds == 1 else 's'} (and its "
                "standard deviation). The gap is the accuracy on training images as they are, less "
                "that on test images, both by the crop in the middle: what was only remembered. "
                "Ten crops: the mean of the softmax outputs for corners, centre and their mirror "
                "images.",
                table=[heads, *rows],
            )
        ]

    def accuracies(self, bench: Bench, network: Network) -> list[float]:
        """In 0..1: training, test, their difference, and if asked for test by ten crops."""
        split = bench.transfer
        if isinstance(split, Split):
            split = sample(bench.train if split.labels is None else split, self.samples)
        training, test = (self._accuracy(bench, network, s) for s in (split, bench.test))
        found = [training, test, training - test]
        if self.crops:
            found.append(self._accuracy(bench, in_ten_crops(network), bench.test))
        return found

    def _accuracy(self, bench: Bench, network: Network, split: Any) -> float:
        return bench.task.measure(network, split)[bench.task.metric]


def in_ten_crops(network: Network) -> Network:
    """The same network, asked about ten crops of its own size; it must have a ``crop``.

    Raises:
        UserError: the model does not say what size it looks at.
    """
    size = getattr(network.model, "crop", None)
    if not isinstance(size, int):
        raise UserError(
            f"{network.name or type(network.model).__name__} has no crop of its own, so ten crops "
            "cannot be taken for it; set method.crops=false, or take a network such as "
            "alexnet-small"
        )
    wrapped = Network(TenCrop(network.model, size), network.input, network.name, network.classes)
    wrapped.memory_format, wrapped.dtype = network.memory_format, network.dtype
    return wrapped.train(network.training)


def _percent(values: Sequence[float]) -> str:
    """Mean and deviation of accuracies.

    >>> _percent([0.5, 0.6]), _percent([0.5])
    ('55.00 +- 7.07', '50.00')
    """
    found = 100 * torch.tensor(values, dtype=torch.float64)
    if len(values) == 1:
        return f"{float(found):.2f}"
    return f"{float(found.mean()):.2f} +- {float(found.std()):.2f}"
