"""Images with a class for every pixel: splits, joint augmentation, batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from limbeck.data.augment import uniforms
from limbeck.data.batches import ImageBatches
from limbeck.data.data import ResidentImages, Split
from limbeck.data.splits import completed
from limbeck.training.task import Batch

IGNORE = 255
"""The value of pixels in a mask that have no class and count nowhere."""

_NONE = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class Lanes:
    """The lanes of one image as TuSimple writes them: where each crosses some rows.

    Attributes:
        x: (L, P), the column in pixels of the original image, negative where there is no point.
        rows: (P,), these rows, in pixels of the original image.
        size: height and width of the original image.
    """

    x: Tensor
    rows: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class Scenes(Split):
    """Some images with a mask each.

    ``masks`` holds those of all images, uint8 (N, H, W), :data:`IGNORE` where a pixel has no
    class; ``lanes``, where the masks show lanes, what they were drawn from. Both are looked up by
    ``rows``.
    """

    masks: Tensor = _NONE
    lanes: tuple[Lanes, ...] = ()

    def fingerprint(self) -> str:
        """A hash of images, masks and choice of samples."""
        digest = hashlib.sha256(super().fingerprint().encode())
        digest.update(self.masks.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Pools:
    """What a source of scenes holds: splits by name, the names of the classes, notes."""

    splits: dict[str, Scenes]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        parts: Mapping[str, tuple[Tensor, Tensor]],
        classes: Sequence[str],
        lanes: Sequence[Lanes] = (),
    ) -> Pools:
        """Splits over one store, so that every scene has an identity of its own.

        Args:
            parts: images, uint8 (N, C, H, W), and masks, uint8 (N, H, W), by the splits' names.
            classes: the names of the masks' values, from 0 on.
            lanes: of all scenes, part after part.
        """
        images = ResidentImages(torch.cat([pixels for pixels, _ in parts.values()]))
        masks = torch.cat([found for _, found in parts.values()])
        splits, begin = {}, 0
        for name, (pixels, _) in parts.items():
            rows = torch.arange(begin, begin + len(pixels))
            splits[name] = Scenes(name, images, None, rows, masks, tuple(lanes))
            begin += len(pixels)
        return cls(splits, tuple(classes))

    def completed(self, validation: float) -> Pools:
        """With ``train``, ``validation`` and ``test``: what is missing is held out of ``train``."""
        splits, notes = completed(self.splits, validation)
        return Pools(splits, self.classes, (*self.notes, *notes))

    def describe(self, source: str) -> str:
        """What was found, in one sentence."""
        counts = ", ".join(f"{len(self.splits[n]):,} {n}" for n in ("train", "validation", "test"))
        height, width = self.splits["train"].masks.shape[1:]
        text = f"{source}: {counts} scenes, {len(self.classes)} classes, {height} x {width}"
        return "; ".join([text, *self.notes])


class Warp(BaseModel):
    """What is done at random to a training image and its mask alike.

    A square of between ``zoom`` and 1 of the image's sides is cut out at a random place, turned by
    up to ``rotate`` degrees to either side and mirrored left and right with probability one half
    (``flip``). Pixels that come from outside are black and have no class.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    flip: bool = False
    zoom: Annotated[float, Field(gt=0, le=1)] = 1.0
    rotate: Annotated[float, Field(ge=0, le=45)] = 0.0

    def __call__(
        self, pixels: Tensor, masks: Tensor, rows: Tensor, seed: int, view: int
    ) -> tuple[Tensor, Tensor]:
        """Warp a batch, each image by itself.

        Args:
            pixels: uint8 (B, C, H, W), interpolated.
            masks: uint8 (B, H, W), of which the nearest is taken.
            rows: int64 (B,), the samples' identities.
            seed, view: the same ones give the same places, whatever else is in the batch.
        """
        if not self.flip and self.zoom == 1 and not self.rotate:
            return pixels, masks
        grid = self._grid(uniforms(rows, 5, seed=seed, view=view).to(pixels.device), pixels)
        warped = F.grid_sample(pixels.float(), grid, align_corners=False)
        # Shifted by one, so that zero stands for what comes from outside.
        shifted = (masks.float() + 1)[:, None]
        found = F.grid_sample(shifted, grid, mode="nearest", align_corners=False)[:, 0]
        found = torch.where(found == 0, float(IGNORE), found - 1)
        return warped.round().clamp(0, 255).to(torch.uint8), found.to(torch.uint8)

    def _grid(self, chance: Tensor, pixels: Tensor) -> Tensor:
        """Where each pixel comes from, (B, H, W, 2) of x and y in [-1, 1]."""
        height, width = pixels.shape[2:]
        side = (self.zoom + (1 - self.zoom) * chance[:, 0]).float()[:, None, None]
        angle = (math.radians(self.rotate) * (2 * chance[:, 1] - 1)).float()[:, None, None]
        places = (2 * chance[:, 2:4].float() - 1)[:, :, None, None] * (1 - side)[:, None]
        # In pixels from the middle; not F.affine_grid, whose product may round by the batch's size.
        y, x = torch.meshgrid(
            *(torch.arange(n, device=pixels.device) + 0.5 - n / 2 for n in (height, width)),
            indexing="ij",
        )
        if self.flip:
            x = torch.where(chance[:, 4, None, None] < 0.5, -x, x)
        cos, sin = angle.cos() * side, angle.sin() * side
        from_x = (cos * x - sin * y) * (2 / width) + places[:, 0]
        from_y = (sin * x + cos * y) * (2 / height) + places[:, 1]
        return torch.stack([from_x, from_y], 3)


class SceneBatches(ImageBatches):
    """Batches of scenes: ``image`` float (B, C, H, W) in [0, 1], ``label`` int64 (B, H, W).

    Args:
        split: the scenes.
        warp: what is done at random to those for training.
        more: what else a batch holds, from its labels.
    """

    def __init__(
        self,
        split: Scenes,
        batch_size: int,
        *,
        warp: Warp,
        more: Callable[[Tensor], Batch] | None = None,
        **given: Any,
    ) -> None:
        super().__init__(split, batch_size, **given)
        self.masks = split.masks
        self.warp = warp
        self.more = more

    def _batch(self, wanted: Tensor, pixels: Tensor, epoch: int) -> Batch:
        rows = self.split.rows[wanted[0]]
        masks = self.masks[rows].to(self.device)
        if self.train:
            pixels, masks = self.warp(pixels, masks, rows, self.seed, epoch)
        labels = masks.long()
        batch: Batch = {"image": pixels.float().div_(255), "label": labels, "row": rows}
        return batch | ({} if self.more is None else self.more(labels))
