"""Lane detection: a mask of lanes told apart by their places, and which of them there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.data.scenes import Lanes, Scenes
from limbeck.errors import UserError
from limbeck.tasks.segmentation import Segmentation, iou
from limbeck.training.task import Answer, Batch

PIXELS, MATCHED, MOST = 20.0, 0.85, 4
"""The challenge's constants: pixels of tolerance across a lane, the share of points that makes a
match, and the number of true lanes beyond which one may be missed."""
LEAST, CERTAIN = 2, 0.3
"""A lane has so many points, each of such a probability."""
BACKGROUND = 0.4
"""The weight of background pixels beside a lane's of 1 (Hou et al. 2019)."""
EXISTENCE = 0.1
"""The weight of the loss of which lanes there are (Hou et al. 2019)."""


class LaneDetection(Segmentation):
    """``label`` (B, H, W), 0 background, and ``there`` (B, L) in a batch.

    Answers have ``logits`` (B, H, W, 1 + L), and ``existence`` (B, L), logits as well.
    Lanes that a network holds to exist are read off its probabilities row by row and compared with
    the true ones as in the TuSimple challenge.
    """

    name: ClassVar[str] = "lanes"
    metric: ClassVar[str] = "lane accuracy"

    def more(self, labels: Tensor) -> Batch:
        pixels = labels.flatten(1)
        there = [(pixels == lane).any(1) for lane in self.objects]
        return {"there": torch.stack(there, 1).float()}

    def outputs(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        if not isinstance(output, tuple) or len(output) != 2:
            raise UserError(
                "a model for lanes puts out two tensors, logits (B, classes, H, W) and which lanes "
                f"there are (B, lanes), not {type(output).__name__}"
            )
        return {**super().outputs(output[0], batch), "existence": output[1]}

    def loss(self, answer: Answer, batch: Batch) -> Tensor:
        """The pixels' cross-entropy, and 0.1 times the binary one of which lanes there are."""
        there = F.binary_cross_entropy_with_logits(answer["existence"].float(), batch["there"])
        return super().loss(answer, batch) + EXISTENCE * there

    def kept(self, answer: Answer, batch: Batch, split: Scenes) -> dict[str, Tensor]:
        probabilities = answer["logits"].float().softmax(-1).cpu()
        there = answer["existence"].sigmoid().cpu() > 0.5
        lanes = [split.lanes[int(row)] for row in batch["row"]]
        columns = [read_off(*given) for given in zip(probabilities, there, lanes, strict=True)]
        most = max(c.shape[1] for c in columns)
        # Images may be labelled at different rows.
        return {
            "columns": torch.stack([F.pad(c, (0, most - c.shape[1]), value=-2.0) for c in columns])
        }

    def measures(self, found: Sequence[tuple[Answer, Batch]], split: Scenes) -> dict[str, float]:
        """The challenge's accuracy, false positives and negatives, and the lanes' IoU (0..1)."""
        scores = [
            tusimple_scores(columns[:, : len(lanes.rows)], lanes)
            for answer, batch in found
            for columns, row in zip(answer["columns"], batch["row"], strict=True)
            for lanes in (split.lanes[int(row)],)
        ]
        accuracy, false, missed = (sum(s) / len(scores) for s in zip(*scores, strict=True))
        seen = iou(self.confusion(found))[list(self.objects)]
        return {
            "lane accuracy": accuracy,
            "false positives": false,
            "false negatives": missed,
            "lane IoU": float(seen.mean()),
        }


def read_off(probabilities: Tensor, there: Tensor, lanes: Lanes) -> Tensor:
    """Where a network sees its lanes, at the rows at which an image is labelled.

    In each row a lane lies where it is most probable, or nowhere if it is nowhere probable enough.

    Args:
        probabilities: (H, W, 1 + L), of the background first.
        there: bool (L,), the lanes that exist.
        lanes: says which rows, and how large the original image is.

    Returns:
        Columns (L, P) in pixels of the original image, -2 where there is no point.

    >>> found = torch.zeros(2, 4, 2)
    >>> found[:, 1, 1] = 0.9
    >>> lanes = Lanes(torch.zeros(0, 2), torch.tensor([1, 3]), (4, 8))
    >>> read_off(found, torch.tensor([True]), lanes).tolist()
    [[2.5, 2.5]]
    """
    height, width, _ = probabilities.shape
    rows = ((lanes.rows.double() + 0.5) * height / lanes.size[0]).long().clamp(0, height - 1)
    best = probabilities[rows, :, 1:].max(1)  # (P, L)
    columns = (best.indices.double() + 0.5) * lanes.size[1] / width - 0.5
    points = (best.values >= CERTAIN) & there
    points &= points.sum(0) >= LEAST
    return columns.where(points, -2.0).T.float()


def tusimple_scores(columns: Tensor, lanes: Lanes) -> tuple[float, float, float]:
    """The challenge's accuracy, false positives and false negatives of one image (0..1).

    A point is right where it lies within 20 pixels of the true one, measured across the lane:
    within 20 / cos of its angle to the vertical along the row. That no lane has a point in a row
    is right as well. A true lane counts with the share of right points of the predicted lane that
    fits it best, and is missed below 0.85. Of more than four true lanes the worst is left out, and
    one may be missed.

    Args:
        columns: (N, P) of the predicted lanes, negative where there is no point; a lane without
            any is none.
        lanes: the true ones.

    >>> true = Lanes(torch.tensor([[100.0, 100.0]]), torch.tensor([10, 20]), (720, 1280))
    >>> tusimple_scores(torch.tensor([[110.0, 125.0]]), true)
    (0.5, 1.0, 1.0)
    """
    said = columns[(columns >= 0).any(1)].double()
    true = lanes.x.double()
    number, counted = len(true), min(MOST, len(true))
    if number + 2 < len(said):
        return 0.0, 0.0, 1.0
    best = torch.zeros(number, dtype=torch.float64)
    if len(said):
        limits = torch.stack([_limit(x, lanes.rows) for x in true]) if number else best
        off = (said.where(said >= 0, -100.0)[:, None] - true.where(true >= 0, -100.0)).abs()
        best = (off < limits[:, None]).double().mean(2).amax(0)
    missed = int((best < MATCHED).sum())
    false = len(said) - (number - missed)
    total = float(best.sum())
    if number > MOST:
        total -= float(best.min())
        missed -= bool(missed)
    return (
        total / max(counted, 1),
        false / len(said) if len(said) else 0.0,
        missed / max(counted, 1),
    )


def _limit(x: Tensor, rows: Tensor) -> Tensor:
    """How far off along a row a point may be, from the line that fits a lane's points best."""
    there = x >= 0
    if int(there.sum()) < 2:
        return torch.tensor(PIXELS, dtype=torch.float64)
    xs, ys = x[there], rows[there].double()
    slope = ((ys - ys.mean()) * (xs - xs.mean())).sum() / (ys - ys.mean()).square().sum()
    return PIXELS * (1 + slope.square()).sqrt()
