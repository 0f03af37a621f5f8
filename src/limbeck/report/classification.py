"""The parts of the report that only classification has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from limbeck.files import regular
from limbeck.report.figures import (
    COLOURS,
    INK,
    LESS,
    MORE,
    OTHER,
    Figure,
    Gallery,
    Panel,
    Picture,
    Section,
    embedded,
    grid,
    panel,
    plain,
)
from limbeck.report.table import ROLES, names, roles
from limbeck.training.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS, MOST_CLASSES, MOST_PICTURES = 15, 20, 12
_WIDEST = 160


@dataclass(frozen=True)
class Predictions:
    """What ``predictions.safetensors`` holds.

    Labels (N,) int; probabilities (N, C) by role; the images (M, H, W) or (M, H, W, 3)
    uint8 of the samples at ``positions`` (M,).
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    probabilities: dict[str, NDArray[np.floating[Any]]]
    positions: NDArray[np.int64]
    images: NDArray[np.uint8]


def sections(run: Run) -> list[Section]:
    """Calibration, confusions and examples, as far as the run recorded them."""
    result = run.result()
    found = read_predictions(run, [*ROLES, *roles(result)])
    if found is None:
        return []
    called = names(result)
    return [*_calibration(found, result), *_confusion(found, called), *_examples(found, called)]


def read_predictions(run: Run, known: Sequence[str]) -> Predictions | None:
    """What a run recorded of these roles; ``None`` where it recorded nothing."""
    from safetensors import SafetensorError, safe_open

    path = run.path / "predictions.safetensors"
    try:
        with safe_open(regular(path), framework="numpy") as file:
            keys = file.keys()  # the file itself cannot be iterated over
            tensors = {key: file.get_tensor(key) for key in keys}
            classes = (file.metadata() or {}).get("classes", "").split("\n")
    except (OSError, SafetensorError):
        return None
    prefix = "probabilities."
    probabilities = {role: tensors[prefix + role] for role in known if prefix + role in tensors}
    if "labels" not in tensors or not probabilities:
        return None
    width = next(iter(probabilities.values())).shape[1]
    images = tensors.get("example_images", np.zeros((0, 1, 1, 1), np.uint8))
    return Predictions(
        classes=tuple(classes if len(classes) == width else map(str, range(width))),
        labels=tensors["labels"].astype(np.int64),
        probabilities=probabilities,
        positions=tensors.get("example_positions", np.zeros(0)).astype(np.int64),
        images=images.transpose(0, 2, 3, 1) if images.shape[1] == 3 else images[:, 0],
    )


# Calibration.


@dataclass(frozen=True)
class Reliability:
    """Of each bin that is not empty: mean confidence, accuracy and share of samples (0..1)."""

    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    share: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The expected calibration error (0..1): mean gap, weighted by the bins' shares."""
        return float((self.share * np.abs(self.confidence - self.accuracy)).sum())


def reliability(
    probabilities: NDArray[np.floating[Any]], labels: NDArray[np.int64], bins: int = BINS
) -> Reliability:
    """Group predictions into bins of equal width by the probability of the predicted class.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2.

    Args:
        probabilities: (N, C), rows sum to 1.
        labels: (N,).
        bins: how many.

    >>> found = reliability(np.array([[0.9, 0.1], [0.9, 0.1]]), np.array([0, 1]))
    >>> float(found.accuracy[0]), round(found.error, 3)
    (0.5, 0.4)
    """
    confidence = probabilities.max(1).astype(np.float64)
    right = (probabilities.argmax(1) == labels).astype(np.float64)
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    counts = np.bincount(place, minlength=bins).astype(np.float64)
    there = counts > 0
    sums = [np.bincount(place, weights=w, minlength=bins)[there] for w in (confidence, right)]
    return Reliability(
        sums[0] / counts[there], sums[1] / counts[there], counts[there] / len(labels)
    )


def _calibration(found: Predictions, result: Mapping[str, Any]) -> list[Section]:
    panels, called, measures = [], names(result), result.get("measures") or {}
    for role, probabilities in found.probabilities.items():
        bins = reliability(probabilities, found.labels)
        # The run measured in full precision; the probabilities kept are halves.
        error = (measures.get(role) or {}).get("calibration_error", bins.error)
        label = f"Reliability of the {called[role]}: expected calibration error {error:.4f}"
        draw = _draw_reliability(bins, role, f"{called[role]}: ECE {error:.4f}")
        panels.append(panel(f"reliability-{role}", label, draw, (3.4, 3.0)))
    if not panels:
        return []
    caption = (
        "Accuracy of the predictions made with a given confidence; larger dots are more samples, "
        "below the diagonal is overconfident. ECE: expected calibration error, lower is better."
    )
    return [Section("calibration", "Calibration", [Figure(panels, caption)])]


def _draw_reliability(bins: Reliability, role: str, title: str) -> Callable[[Axes], None]:
    colour = COLOURS.get(role, OTHER)

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=INK, alpha=0.45, linewidth=0.8, dashes=(4, 3))
        axes.vlines(
            bins.confidence, bins.confidence, bins.accuracy, colour, linewidth=1.2, alpha=0.5
        )
        sizes = 14 + 110 * np.sqrt(bins.share)
        axes.scatter(bins.confidence, bins.accuracy, s=sizes, color=colour, alpha=0.85)
        axes.set_xlim(-0.02, 1.05)
        axes.set_ylim(-0.02, 1.05)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        axes.set_title(title)
        grid(axes)

    return draw


# Confusions.


def confusion(
    predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int
) -> NDArray[np.float64]:
    """Shares (0..1) of each true class (rows) by predicted class; a class without samples is 0.

    >>> confusion(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """
    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels, predicted), 1)
    totals = counts.sum(1, keepdims=True)
    return counts / np.where(totals > 0, totals, 1)


def most_changed(difference: NDArray[np.float64], most: int = MOST_CLASSES) -> NDArray[np.int64]:
    """The classes whose rows and columns changed most, at most ``most``, in their own order."""
    change = np.abs(difference)
    order = np.argsort(-(change.sum(0) + change.sum(1)), kind="stable")[:most]
    return np.sort(order).astype(np.int64)


def _confusion(found: Predictions, called: Mapping[str, str]) -> list[Section]:
    if not {"baseline", "student"} <= found.probabilities.keys():
        return []
    tables = [
        confusion(found.probabilities[role].argmax(1), found.labels, len(found.classes))
        for role in ("student", "baseline")
    ]
    difference = tables[0] - tables[1]
    if not difference.any():
        return []
    kept = most_changed(difference)
    drawn = _heat_map(difference[np.ix_(kept, kept)], [found.classes[i] for i in kept])
    caption = (
        f"Percentage points of a true class (row) that the {called['student']} puts into a class "
        f"(column) more often (blue, +) or less often (orange, −) than the {called['baseline']}; "
        "blue on the diagonal and orange beside it are gains."
    )
    if len(kept) < len(found.classes):
        caption += f" The {len(kept)} most changed of {len(found.classes)} classes."
    return [Section("confusion", "What is confused less, and more", [Figure([drawn], caption)])]


def _heat_map(difference: NDArray[np.float64], classes: Sequence[str]) -> Panel:
    from matplotlib.patches import Rectangle

    number, largest = len(classes), float(np.abs(difference).max())
    size = max(3.6, 0.27 * number + 1.6)

    def draw(axes: Axes) -> None:
        for (row, column), value in np.ndenumerate(difference):
            strength = abs(value) / largest
            cell = Rectangle(
                (column - 0.46, row - 0.46),
                0.92,
                0.92,
                color=INK if not value else MORE if value > 0 else LESS,
                alpha=0.05 if not value else 0.12 + 0.4 * strength,
                linewidth=0,
            )
            axes.add_patch(cell)
            if abs(100 * value) >= 0.5 and number <= MOST_CLASSES:
                # A minus sign of the width of the plus keeps the columns of numbers even.
                said = f"{100 * value:+.0f}".replace("-", "\N{MINUS SIGN}")
                axes.text(
                    column,
                    row,
                    said,
                    ha="center",
                    va="center",
                    fontsize=6.5 if number > 12 else 7.5,
                )
        axes.set_xlim(-0.5, number - 0.5)
        axes.set_ylim(number - 0.5, -0.5)
        axes.set_aspect("equal")
        short = [plain(name, 16) for name in classes]
        long = max(map(len, short)) > 2
        axes.set_xticks(range(number), short, rotation=90 if long else 0)
        axes.set_yticks(range(number), short)
        axes.tick_params(length=0)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        for side in axes.spines.values():
            side.set_visible(False)

    row, column = divmod(int(np.abs(difference).argmax()), number)
    label = (
        f"Differences of the two students' confusions in {number} classes; the largest is "
        f"{100 * difference[row, column]:+.1f} percentage points of {classes[row]} "
        f"predicted as {classes[column]}"
    )
    return panel("confusion", label, draw, (size, size))


# Examples.


def _examples(found: Predictions, called: Mapping[str, str]) -> list[Section]:
    if not {"baseline", "student"} <= found.probabilities.keys() or not len(found.positions):
        return []
    labels = found.labels[found.positions]
    answers = {
        role: probabilities.argmax(1)[found.positions]
        for role, probabilities in found.probabilities.items()
    }
    right = {role: answer == labels for role, answer in answers.items()}
    galleries = []
    for title, chosen, meaning in (
        (
            f"Put right by the {called['student']}",
            ~right["baseline"] & right["student"],
            "wrong",
        ),
        (f"Broken by the {called['student']}", right["baseline"] & ~right["student"], "right"),
    ):
        places = np.flatnonzero(chosen)
        if not len(places):
            continue
        pictures = [
            _picture(found, answers, called, int(place)) for place in places[:MOST_PICTURES]
        ]
        other = "right" if meaning == "wrong" else "wrong"
        caption = f"Test images that the {called['baseline']} gets {meaning} and the "
        caption += f"{called['student']} {other}"
        caption += f"; {len(pictures)} of {len(places)}." if len(places) > len(pictures) else "."
        galleries.append(Gallery(title, pictures, caption))
    return [Section("examples", "Examples", galleries=galleries)] if galleries else []


def _picture(
    found: Predictions,
    answers: Mapping[str, NDArray[np.int64]],
    called: Mapping[str, str],
    place: int,
) -> Picture:
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(found.images[place]))
    small = max(image.size) <= 64
    image.thumbnail((_WIDEST, _WIDEST))
    true = found.classes[found.labels[found.positions[place]]]
    said = [
        (called[role].removesuffix(" student"), found.classes[answers[role][place]])
        for role in dict.fromkeys(("baseline", "student", "teacher", *answers))
        if role in answers
    ]
    return Picture(
        source=embedded(image),
        alt=f"A test image of class {true}",
        lines=[("true", true), *said],
        small=small,
    )
