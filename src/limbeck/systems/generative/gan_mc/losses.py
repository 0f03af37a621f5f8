"""What a generator, its judge and the student minimise, MUNGE, and the compression score."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import UserError
from limbeck.systems.classification.ktan import discrimination, fooling
from limbeck.training.task import Terms


def compression(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""The student's distance from the teacher in logits, a scalar at least 0.

    .. math:: \frac{1}{2B} \sum_i \| t(x_i) - s(x_i) \|_2^2

    a sum over the classes and a mean over the batch.

    Args:
        student_logits: (B, C).
        teacher_logits: of the same shape; no gradient flows into it.

    Raises:
        UserError: different shapes.

    >>> compression(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    tensor(1.2500)
    """
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"the student's logits have the shape {tuple(student_logits.shape)}, the teacher's "
            f"{tuple(teacher_logits.shape)}; both must know the same classes"
        )
    ours = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    return (ours - teacher_logits.detach().to(ours)).square().sum(1).mean() / 2


def judge_terms(
    real: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor], labels: Tensor, drawn: Tensor
) -> Terms:
    """-(L_S + L_C), what the discriminator minimises, in nats.

    Args:
        real: its logits for real samples: (B,) that they are real, (B, C) of their class.
        fake: the same for samples of the generator.
        labels: (B,) of the real samples.
        drawn: (B,), the classes that the generator was asked for.

    >>> blank = torch.zeros(3), torch.zeros(3, 2)
    >>> terms = judge_terms(blank, blank, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
    >>> [round(float(term), 4) for term in terms.values()]
    [1.3863, 1.3863]
    """
    classes = F.cross_entropy(real[1], labels) + F.cross_entropy(fake[1], drawn)
    return {"source": discrimination(real[0], fake[0]), "class": classes}


def generator_terms(fake: tuple[Tensor, Tensor], drawn: Tensor) -> Terms:
    """What the generator minimises: L_S in its non-saturating form, and -L_C of its own samples.

    Arguments as for :func:`judge_terms`.

    >>> terms = generator_terms((torch.zeros(3), torch.zeros(3, 2)), torch.tensor([0, 1, 1]))
    >>> [round(float(term), 4) for term in terms.values()]
    [0.6931, 0.6931]
    """
    return {"source": fooling(fake[0]), "class": F.cross_entropy(fake[1], drawn)}


def balanced(number: int, classes: int) -> Tensor:
    """Classes to draw samples of, equally many of each, floor(number / classes): int64.

    >>> balanced(7, 3)
    tensor([0, 1, 2, 0, 1, 2])
    """
    return torch.arange(classes).repeat(number // classes)


def munge(
    rows: Tensor,
    times: int = 9,
    scale: float = 1.5,
    chance: float = 0.1,
    seed: int = 0,
    in_place: bool = False,
) -> Tensor:
    r"""Synthetic rows by MUNGE (Bucila, Caruana, Niculescu-Mizil: Model Compression, KDD 2006).

    Each row meets its nearest other row; each of their cells is exchanged with a chance, drawn from
    a normal distribution around the other's cell with deviation :math:`|x_i - x_j| / s`.

    Args:
        rows: (N, D), standardised, N at least 2.
        times: k, how often this is done, each time from the rows as they were given.
        scale: s, above 0.
        chance: p, in [0, 1].
        seed: of what is drawn.
        in_place: as the paper's published code does, which looks the neighbour up among changed
            rows and draws the second cell around the first one's new value.

    Returns:
        (k N, D).

    >>> pair = torch.tensor([[0.0], [1.0]])
    >>> munge(pair, 1, torch.inf, 1.0).flatten().tolist()
    [0.0, 1.0]
    >>> munge(pair, 1, torch.inf, 1.0, in_place=True).flatten().tolist()
    [1.0, 1.0]
    """
    from sklearn.neighbors import NearestNeighbors

    given = rows.cpu().double().numpy()
    drawing = np.random.default_rng(seed)
    near = NearestNeighbors(n_neighbors=1).fit(given).kneighbors(return_distance=False)[:, 0]
    made = []
    for _ in range(times):
        now = given.copy()
        for i in range(len(now)):
            j = int(near[i])
            if in_place:
                distance = np.square(now - now[i]).sum(1)
                distance[i] = np.inf
                j = int(distance.argmin())
            chosen = drawing.random(now.shape[1]) < chance
            spread = np.abs(now[i] - now[j])[chosen] / scale
            one, other = now[i, chosen], now[j, chosen]
            now[i, chosen] = drawing.normal(other, spread)
            now[j, chosen] = drawing.normal(now[i, chosen] if in_place else one, spread)
        made.append(now)
    return torch.from_numpy(np.concatenate(made)).to(rows)


def compression_score(on_set: Sequence[float], on_real: Sequence[float]) -> tuple[float, float]:
    """The compression score of a set (TSCS) and its standard error.

    Args:
        on_set: test accuracies (0..1) of students that saw the set once, one a seed.
        on_real: those of students that saw as many real samples once.

    Returns:
        The ratio of the means, and the first's deviation over sqrt(seeds), as a ratio too (0 for
        one seed).

    Raises:
        UserError: there is none, or students of real data that get nothing right.

    >>> compression_score([0.3, 0.5], [0.8, 0.8])
    (0.5, 0.125)
    """
    if not on_set or not on_real or sum(on_real) <= 0:
        raise UserError("a compression score wants accuracies of one or more students above 0")
    mean, real = sum(on_set) / len(on_set), sum(on_real) / len(on_real)
    spread = sum((a - mean) ** 2 for a in on_set) / max(len(on_set) - 1, 1)
    return round(mean / real, 12), round(math.sqrt(spread / len(on_set)) / real, 12)
