"""Generators and judges of rows and of images, and the paper's classifiers of images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.table import TableInput

SLOPE = 0.2


class Generator(nn.Module):
    """Makes samples of wanted classes from noise, in the form that its judge is shown.

    ``deviation`` is that of the noise, ``latent`` how many numbers it is.
    """

    latent: int
    deviation: float
    classes: int

    @abstractmethod
    def forward(self, noise: Tensor, classes: Tensor) -> Tensor:
        """Noise (B, latent) and classes (B,) to samples as the judge is shown them."""

    @abstractmethod
    def shown(self, view: Tensor) -> Tensor:
        """Samples as a batch holds them in the form that the judge is shown."""

    @abstractmethod
    def view(self, shown: Tensor) -> Tensor:
        """The inverse: samples as a batch holds them."""

    def noise(self, number: int, drawing: torch.Generator | None = None) -> Tensor:
        """(number, latent) from N(0, deviation^2), drawn on the CPU, where all machines agree."""
        return self.deviation * torch.randn(number, self.latent, generator=drawing)

    @torch.no_grad()
    def draw(self, classes: Tensor, seed: int) -> Tensor:
        """Samples of these classes (B,) as a batch holds them, a function of the seed."""
        self.eval()
        device = next(self.parameters()).device
        noise = self.noise(len(classes), torch.Generator().manual_seed(seed))
        return self.view(self(noise.to(device), classes.to(device)))


class RowGenerator(Generator):
    """Standardised rows: noise times an embedding of the class, and two linear layers.

    >>> from limbeck.models.table import Column
    >>> magic = TableInput(tuple(Column(str(n)) for n in range(10)))
    >>> sum(p.numel() for p in RowGenerator(magic, classes=2).parameters())
    5760
    """

    def __init__(self, input: TableInput, classes: int, latent: int = 100, units: int = 50) -> None:
        super().__init__()
        self.input, self.classes, self.latent, self.deviation = input, classes, latent, 0.5
        self.embedding = nn.Embedding(classes, latent)
        self.layers = nn.Sequential(
            nn.Linear(latent, units), nn.ReLU(), nn.Linear(units, input.width)
        )

    def forward(self, noise: Tensor, classes: Tensor) -> Tensor:
        numbers = self.layers(noise * self.embedding(classes))
        parts = numbers.split([column.width for column in self.input.columns], 1)
        return torch.cat(
            [
                _chosen(part) if column.categories else part
                for column, part in zip(self.input.columns, parts, strict=True)
            ],
            1,
        )

    def shown(self, view: Tensor) -> Tensor:
        return self.input(view)

    def view(self, shown: Tensor) -> Tensor:
        return self.input.restored(shown)


def _chosen(logits: Tensor) -> Tensor:
    """One category as 1 and the others as 0, with the gradient of their probabilities."""
    soft = logits.softmax(1)
    hard = F.one_hot(soft.argmax(1), soft.shape[1]).to(soft)
    return hard + soft - soft.detach()


class ImageGenerator(Generator):
    """Images in [-1, 1]: a linear layer, then transposed convolutions that double the side.

    The first entries of the noise are replaced by the class, one for each. Sides that are no power
    of two are cut out of the next one.

    Args:
        size: height and width.
        channels: of the images.
        classes: C.
        width: channels of the last layer but one; before it they double.

    >>> made = ImageGenerator((32, 32), 3, 10)
    >>> sum(p.numel() for p in made.parameters())
    1593888
    >>> made(made.noise(2), torch.tensor([0, 9])).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(self, size: tuple[int, int], channels: int, classes: int, width: int = 48) -> None:
        super().__init__()
        self.size, self.classes, self.latent, self.deviation = size, classes, 100 + classes, 1.0
        doublings = max(1, (-(-max(size) // 4) - 1).bit_length())
        widths = [width * 2**n for n in range(doublings, -1, -1)]
        self.first = nn.Linear(self.latent, widths[0])
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(pairwise(widths)):
            layers += [_up(inputs, outputs, first=number == 0), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, _up(width, channels), nn.Tanh())

    def forward(self, noise: Tensor, classes: Tensor) -> Tensor:
        hot = F.one_hot(classes, self.classes).to(noise)
        code = torch.cat([hot, noise[:, self.classes :]], 1)
        images: Tensor = self.layers(self.first(code)[:, :, None, None])
        height, width = self.size
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        return images[:, :, top : top + height, left : left + width]

    def shown(self, view: Tensor) -> Tensor:
        return 2 * view - 1

    def view(self, shown: Tensor) -> Tensor:
        # Whole levels, as a stored image has.
        return (127.5 * shown + 127.5).round().clamp(0, 255) / 255


def _up(inputs: int, outputs: int, first: bool = False) -> nn.ConvTranspose2d:
    stride, padding = (1, 0) if first else (2, 1)
    return nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False)


class Judge(nn.Module):
    """Tells real samples from made ones, and classes apart: (B, ...) -> logits (B,), (B, C)."""

    def __init__(self, layers: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.layers = layers
        self.source = nn.Linear(features, 1)
        self.kind = nn.Linear(features, classes)

    def forward(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(samples)
        return self.source(features).squeeze(1), self.kind(features)


def judge_of_rows(inputs: int, classes: int, units: int = 100) -> Judge:
    """Two hidden layers."""
    layers = nn.Sequential(
        nn.Linear(inputs, units),
        nn.LeakyReLU(SLOPE),
        nn.Linear(units, units),
        nn.LeakyReLU(SLOPE),
    )
    return Judge(layers, units, classes)


def judge_of_images(
    size: tuple[int, int], channels: int, classes: int, width: int = 48, dropout: float = 0.5
) -> Judge:
    """Convolutions that halve the side down to 4 and less, with dropout."""
    layers: list[nn.Module] = []
    height, side = size
    inputs, outputs = channels, width
    while max(height, side) > 4:
        convolution = nn.Conv2d(inputs, outputs, 3, 2, padding=1)
        layers += [convolution, nn.LeakyReLU(SLOPE), nn.Dropout(dropout)]
        height, side = -(-height // 2), -(-side // 2)
        inputs, outputs = outputs, 2 * outputs
    return Judge(nn.Sequential(*layers, nn.Flatten()), inputs * height * side, classes)


class LeNet(nn.Sequential):
    """The paper's student: convolutions without ReLU, weights by Xavier, biases from N(0, 0.5^2).

    >>> sum(p.numel() for p in LeNet(10, 3, (32, 32)).parameters())
    3497866
    """

    def __init__(self, classes: int, channels: int, size: tuple[int, int]) -> None:
        height, width = (((side - 4) // 2 - 4) // 2 for side in size)
        super().__init__(
            nn.Conv2d(channels, 64, 5),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 5),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128 * height * width, 1024),
            nn.ReLU(),
            nn.Linear(1024, classes),
        )
        for layer in self:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                assert layer.bias is not None
                nn.init.normal_(layer.bias, std=0.5)


class NetworkInNetwork(nn.Sequential):
    """The paper's teacher (Lin, Chen, Yan: Network In Network, 2014) with a linear classifier."""

    def __init__(self, classes: int, channels: int, size: tuple[int, int]) -> None:
        height, width = (((side - 3) // 2 + 1 - 3) // 2 + 1 for side in size)
        super().__init__(
            *_block(channels, (192, 160, 96), 5),
            nn.MaxPool2d(3, 2),
            nn.Dropout(0.5),
            *_block(96, (192, 192, 192), 5),
            nn.AvgPool2d(3, 2),
            nn.Dropout(0.5),
            *_block(192, (192, 192), 3),
            nn.Flatten(),
            nn.Linear(192 * height * width, 256),
            nn.ReLU(),
            nn.Linear(256, classes),
        )


def _block(channels: int, widths: Sequence[int], side: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for number, width in enumerate(widths):
        kernel = side if number == 0 else 1
        layers += [nn.Conv2d(channels, width, kernel, padding=kernel // 2), nn.ReLU()]
        channels = width
    return layers


NETWORKS: dict[str, tuple[type[LeNet] | type[NetworkInNetwork], int]] = {
    "gan-mc-lenet": (LeNet, 16),
    "gan-mc-nin": (NetworkInNetwork, 7),
}
"""The paper's classifiers by name, and the least side of an image that they take."""


def network(name: str, classes: int, channels: int, size: tuple[int, int]) -> nn.Module:
    """``gan-mc-lenet`` or ``gan-mc-nin``.

    Raises:
        UserError: another name, or images that are too small.

    >>> network("gan-mc-lenet", 10, 1, (28, 28))[5]
    Linear(in_features=2048, out_features=1024, bias=True)
    """
    if name not in NETWORKS:
        raise UserError(f"there is no network named {name!r}; known: {', '.join(NETWORKS)}")
    kind, least = NETWORKS[name]
    if min(size) < least:
        raise UserError(
            f"{name} needs images of at least {least} x {least} pixels, not {size[0]} x {size[1]}"
        )
    return kind(classes, channels, size)
