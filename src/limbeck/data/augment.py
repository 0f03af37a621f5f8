"""Augmentation in batches, a pure function of (seed, sample, view)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from limbeck.training.seeding import derive


class Augment(BaseModel):
    """What is done at random to a training image, in this order.

    ``crop`` pads by so many black pixels and cuts the old size out again (jitter of up to that
    many pixels); ``flip`` mirrors left and right with probability one half; ``zoom`` cuts a square
    whose side is between ``zoom`` and 1 of the image's and resizes it; ``erase`` is the
    probability of a grey box over 2 to 20 % of the area.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    crop: int = Field(default=0, ge=0, description="pixels")
    flip: bool = False
    zoom: Annotated[float, Field(gt=0, le=1)] = 1.0
    erase: Annotated[float, Field(ge=0, le=1)] = 0.0

    def __call__(self, pixels: Tensor, rows: Tensor, seed: int, view: int) -> Tensor:
        """Augment a batch.

        Args:
            pixels: uint8 of shape (B, C, H, W).
            rows: int64 of shape (B,), the samples' identities.
            seed: the run's seed.
            view: which of a sample's views is wanted, the epoch for instance.

        Returns:
            uint8 of shape (B, C, H, W); the same arguments give the same pixels, whatever else
            is in the batch.
        """
        if not (self.crop or self.flip or self.zoom < 1 or self.erase):
            return pixels
        chance = uniforms(rows, 10, seed, view).to(pixels.device)
        if self.crop or self.flip:
            pixels = _shift(pixels, self.crop, self.flip, chance)
        if self.zoom < 1:
            pixels = _zoom(pixels, self.zoom, chance)
        if self.erase:
            pixels = _erase(pixels, self.erase, chance)
        return pixels


def uniforms(rows: Tensor, number: int, seed: int, view: int) -> Tensor:
    """Random numbers in [0, 1) that belong to samples: float64 of shape (B, number).

    SplitMix64 (Steele et al. 2014) over a counter made of sample, view and seed.

    >>> a = uniforms(torch.tensor([3, 5]), 2, seed=0, view=1)
    >>> torch.equal(a[1:], uniforms(torch.tensor([5]), 2, seed=0, view=1))
    True
    """
    base = derive(seed, view)
    lanes = torch.arange(number, dtype=torch.int64)
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


def _shift(pixels: Tensor, padding: int, flip: bool, chance: Tensor) -> Tensor:
    """Crop with padding and flip, as one gather."""
    batch, _, height, width = pixels.shape
    device = pixels.device
    offsets = (chance[:, :2] * (2 * padding + 1)).long()
    padded = F.pad(pixels, (padding,) * 4) if padding else pixels
    rows = offsets[:, :1] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(batch, width)
    if flip:
        columns = torch.where(chance[:, 2:3] < 0.5, columns.flip(1), columns)
    columns = offsets[:, 1:] + columns
    samples = torch.arange(batch, device=device)[:, None, None]
    cut = padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]]
    # In rows of channels again, since a model may look at its input with .view
    return cut.permute(0, 3, 1, 2).contiguous()


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
    y = (torch.arange(height, device=pixels.device) + 0.5) / height
    x = (torch.arange(width, device=pixels.device) + 0.5) / width
    top, left = chance[:, 8] * (1 - side), chance[:, 9] * (1 - side)
    inside_y = (y >= top[:, None]) & (y < (top + side)[:, None])
    inside_x = (x >= left[:, None]) & (x < (left + side)[:, None])
    box = inside_y[:, None, :, None] & inside_x[:, None, None, :]
    chosen = (chance[:, 7] < probability)[:, None, None, None]
    return torch.where(box & chosen, torch.full_like(pixels, 127), pixels)
