"""Augmentation in batches, a pure function of (seed, sample, view)."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from limbeck.data.colour import colour_offsets
from limbeck.data.randaugment import rand_augment
from limbeck.training.seeding import derive

# The first of a sample's uniforms that each of these draws; crop, flip, zoom and erase have 0 to 9.
# Operations come last, as there is no end to them.
_PARTNER, _MIX, _COLOUR, _OPERATIONS = 10, 11, 16, 32

_Alpha = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Augment(BaseModel):
    """What is done at random to a training image, in this order.

    ``colour`` adds one tint to all pixels of an image, along the principal components p_i of the
    training set's pixels (Krizhevsky et al. 2012): the sum of a_i l_i p_i with eigenvalues l_i on
    the scale where white is 1, and a_i from a normal distribution of deviation ``colour`` (0.1 in
    the paper); ``colour_scale: sqrt`` takes the roots of the l_i, the components' deviations. The
    tint is rounded to whole levels of 255 before it is added, so that all pixels get the same; what
    leaves 0 to 255 is cut off. Grey images have a single component.

    ``crop`` pads by so many black pixels and cuts the old size out again (jitter of up to that
    many pixels); ``flip`` mirrors left and right with probability one half; ``zoom`` cuts a square
    whose side is between ``zoom`` and 1 of the image's and resizes it; ``rand_ops`` of the 14
    operations of RandAugment follow, at strength ``rand_magnitude`` of 30; ``erase`` is the
    probability of a grey box over 2 to 20 % of the area.

    ``mixup`` and ``cutmix`` then show every sample together with a partner from its split: blended
    (Zhang et al. 2018, arXiv 1710.09412) or with a box of the partner's pixels in it (Yun et al.
    2019, arXiv 1905.04899). The sample's own share is drawn from Beta(alpha, alpha)
    with ``mixup`` and ``cutmix`` as alpha; where both are given, either has probability one half.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    colour: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="deviation of the tint's draws"
    )
    colour_scale: Literal["eigenvalue", "sqrt"] = "eigenvalue"
    crop: int = Field(default=0, ge=0, le=1024, description="pixels")
    flip: bool = False
    zoom: Annotated[float, Field(gt=0, le=1)] = 1.0
    erase: Annotated[float, Field(ge=0, le=1)] = 0.0
    rand_ops: int = Field(default=0, ge=0, le=100, description="operations an image")
    rand_magnitude: int = Field(default=9, ge=0, le=30)
    mixup: _Alpha = 0.0
    cutmix: _Alpha = 0.0
    views: int | None = Field(
        default=None,
        ge=1,
        description="so many views of each sample: epoch e shows view e mod views, the same for "
        "every seed; a fresh one each epoch if not given",
    )

    @property
    def mixes(self) -> bool:
        """Whether a sample is shown together with a partner."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def distinct(self) -> int | None:
        """How many views of a sample there are: one if nothing is random, ``None`` if no end."""
        return self.views if self._changes or self.mixes else 1

    @property
    def _changes(self) -> bool:
        """Whether an image changes by itself."""
        places = self.crop or self.flip or self.zoom < 1
        return bool(self.colour or places or self.rand_ops or self.erase)

    def shown(self, seed: int, epoch: int) -> tuple[int, int]:
        """The seed and the view by which an epoch of a run with ``seed`` shows its samples.

        >>> Augment(flip=True).shown(seed=3, epoch=7)
        (3, 7)
        >>> Augment(flip=True, views=5).shown(seed=3, epoch=7)
        (0, 2)
        """
        return (seed, epoch) if self.distinct is None else (0, epoch % self.distinct)

    def __call__(
        self,
        pixels: Tensor,
        rows: Tensor,
        seed: int,
        view: int,
        colours: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Augment a batch, each image by itself; :meth:`mix` does the rest.

        Args:
            pixels: uint8 of shape (B, C, H, W).
            rows: int64 of shape (B,), the samples' identities.
            seed: the run's seed.
            view: which of a sample's views is wanted, the epoch for instance.
            colours: eigenvalues and eigenvectors of the training set's colours
                (:func:`limbeck.data.colour.pca_colours`), which ``colour`` needs.

        Returns:
            uint8 of shape (B, C, H, W); the same arguments give the same pixels, whatever else
            is in the batch.
        """
        if not self._changes:
            return pixels
        if self.colour:
            if colours is None:
                raise ValueError("a tint needs the colours of the training set")
            # Before the crop, so that what it pads stays black.
            pixels = _tint(pixels, self.tints(rows, seed, view, colours))
        chance = uniforms(rows, 10, seed, view).to(pixels.device)
        if self.crop or self.flip:
            pixels = _shift(pixels, self.crop, self.flip, chance)
        if self.zoom < 1:
            pixels = _zoom(pixels, self.zoom, chance)
        if self.rand_ops:
            # Left on the CPU, where the batch is sorted by what was drawn.
            draws = uniforms(rows, self.rand_ops, seed, view, first=_OPERATIONS)
            pixels = rand_augment(pixels, draws, self.rand_magnitude)
        if self.erase:
            pixels = _erase(pixels, self.erase, chance)
        return pixels

    def tints(self, rows: Tensor, seed: int, view: int, colours: tuple[Tensor, Tensor]) -> Tensor:
        """What ``colour`` adds to each sample's pixels, before rounding.

        Returns:
            float64 of shape (B, C), on the CPU, on the scale where white is 1.
        """
        values, vectors = colours
        chance = uniforms(rows, len(values), seed, view, first=_COLOUR)
        # A uniform may be 0, below which no share of a normal distribution lies.
        draws = self.colour * torch.special.ndtri(chance.clamp(min=2.0**-54))
        return colour_offsets(
            draws, values.sqrt() if self.colour_scale == "sqrt" else values, vectors
        )

    def partners(self, rows: Tensor, number: int, seed: int, view: int) -> Tensor:
        """Which of a split's ``number`` positions each sample is mixed with, int64 (B,).

        Never the neighbour in the batch: what is remembered of a view must be true of it in
        every batch.
        """
        return (uniforms(rows, 1, seed, view, first=_PARTNER)[:, 0] * number).long()

    def mix(
        self, images: Tensor, partners: Tensor, rows: Tensor, seed: int, view: int
    ) -> tuple[Tensor, Tensor]:
        """Mix each image with its partner's.

        Args:
            images: float of shape (B, C, H, W), augmented.
            partners: the partners' images, likewise.
            rows: int64 of shape (B,), the identities of the samples and not of their partners.
            seed: the run's seed.
            view: which of a sample's views is wanted.

        Returns:
            The mixed images, and each image's share of its mixture, float of shape (B,).
        """
        chance = uniforms(rows, 4, seed, view, first=_MIX)
        cut = chance[:, 0] < (self.cutmix > 0) / (1 + (self.mixup > 0))
        share = _beta(chance[:, 1], np.where(cut.numpy(), self.cutmix, self.mixup))
        # A blend is a cut without a box.
        side = cut * (1 - share).sqrt()
        height, width = images.shape[2:]
        inside_y = _span(chance[:, 2] - side / 2, side, height)
        inside_x = _span(chance[:, 3] - side / 2, side, width)
        kept = height * width - inside_y.sum(1) * inside_x.sum(1)
        share = torch.where(cut, kept / (height * width), share.float())
        outside = torch.where(cut, 1.0, share)
        inside_y, inside_x, outside = (t.to(images.device) for t in (inside_y, inside_x, outside))
        box = inside_y[:, None, :, None] & inside_x[:, None, None, :]
        weight = torch.where(box, 0.0, outside[:, None, None, None])
        return images * weight + partners * (1 - weight), share


def uniforms(rows: Tensor, number: int, seed: int, view: int, first: int = 0) -> Tensor:
    """Random numbers in [0, 1) that belong to samples: float64 of shape (B, number).

    SplitMix64 (Steele et al. 2014) over a counter made of sample, view and seed. Each sample has
    an endless row of them for a view, of which those from ``first`` on are given.

    >>> a = uniforms(torch.tensor([3, 5]), 2, seed=0, view=1)
    >>> torch.equal(a[1:], uniforms(torch.tensor([5]), 2, seed=0, view=1))
    True
    """
    base = derive(seed, view)
    lanes = torch.arange(first, first + number, dtype=torch.int64)
    state = _mix(rows.cpu()[:, None] * _signed(0x9E3779B97F4A7C15) + _signed(base))
    state = _mix(state + (lanes + 1) * _signed(0xD1B54A32D192ED03))
    return (_shift_right(state, 11)).to(torch.float64) * 2.0**-53


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _tint(pixels: Tensor, tints: Tensor) -> Tensor:
    levels = (tints * 255).round().clamp(-255, 255).short().to(pixels.device)
    return (pixels.short() + levels[:, :, None, None]).clamp_(0, 255).to(torch.uint8)


def _shift(pixels: Tensor, padding: int, flip: bool, chance: Tensor) -> Tensor:
    """Crop with padding and flip, as one gather."""
    batch, channels, height, width = pixels.shape
    device = pixels.device
    padded = F.pad(pixels, (padding,) * 4) if padding else pixels
    top, left = (chance[:, :2] * (2 * padding + 1)).long().T
    rows = top[:, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    if flip:
        columns = torch.where(chance[:, 2:3] < 0.5, columns.flip(0), columns)
    columns = left[:, None] + columns
    # Places in the flattened image, one for all channels: several times as fast as an index for
    # each dimension.
    places = (rows * padded.shape[3])[:, :, None] + columns[:, None, :]
    places = places.view(batch, 1, height * width).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, places).view(pixels.shape)


def _zoom(pixels: Tensor, least: float, chance: Tensor) -> Tensor:
    side = (least + (1 - least) * chance[:, 3]).float()
    centre = (chance[:, 4:6].float() * 2 - 1) * (1 - side)[:, None]
    # Not F.affine_grid: its matrix product may round by the size of the batch.
    y, x = (
        centre[:, i, None] + side[:, None] * ((2 * torch.arange(n, device=side.device) + 1) / n - 1)
        for i, n in enumerate(pixels.shape[2:])
    )
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=3)
    zoomed = F.grid_sample(pixels.float(), grid, padding_mode="reflection", align_corners=False)
    return zoomed.round().clamp(0, 255).to(torch.uint8)


def _erase(pixels: Tensor, probability: float, chance: Tensor) -> Tensor:
    _, _, height, width = pixels.shape
    side = (0.02 + 0.18 * chance[:, 6]).sqrt()
    inside_y = _span(chance[:, 8] * (1 - side), side, height)
    inside_x = _span(chance[:, 9] * (1 - side), side, width)
    box = inside_y[:, None, :, None] & inside_x[:, None, None, :]
    chosen = (chance[:, 7] < probability)[:, None, None, None]
    return torch.where(box & chosen, torch.full_like(pixels, 127), pixels)


def _span(start: Tensor, side: Tensor, size: int) -> Tensor:
    """Which of ``size`` pixels in a row have their middle in a span of it, bool (B, size)."""
    middles = (torch.arange(size, device=start.device) + 0.5) / size
    return (middles >= start[:, None]) & (middles < (start + side)[:, None])


def _beta(chance: Tensor, alpha: np.typing.NDArray[np.float64]) -> Tensor:
    """The values of Beta(alpha, alpha) below which lies a share ``chance`` of them."""
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, chance.numpy()))
