"""The principal components of a set's colours, along which images are tinted."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def pca_colours(pixels: Tensor | Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of the covariance of all pixels' values over the channels.

    Sums of whole numbers are exact in float64, so the order in which pixels come, and the number
    of threads, change no bit. Each vector's largest component is positive.

    Args:
        pixels: uint8 of shape (N, C, H, W), where white is 255, or several of these.

    Returns:
        (C,), descending, and (C, C) with a vector a column; float64 on the scale where white is 1.

    Raises:
        ValueError: pixels of another type or shape, or none.

    Example: the pixels lie on the diagonal from black to white.

    >>> values, vectors = pca_colours(torch.tensor([[0] * 3, [255] * 3]).byte().view(2, 3, 1, 1))
    >>> values
    tensor([0.7500, 0.0000, 0.0000], dtype=torch.float64)
    >>> vectors[:, 0]
    tensor([0.5774, 0.5774, 0.5774], dtype=torch.float64)
    """
    number, total, products = 0, torch.zeros(()), torch.zeros(())
    for part in [pixels] if isinstance(pixels, Tensor) else pixels:
        if part.dtype != torch.uint8 or part.ndim != 4:
            raise ValueError(
                f"colours are those of uint8 pixels (N, C, H, W), not {part.dtype} of shape "
                f"{tuple(part.shape)}"
            )
        colours = part.cpu().transpose(0, 1).flatten(1).double()
        number += colours.shape[1]
        total = total + colours.sum(1)
        products = products + colours @ colours.T
    if not number:
        raise ValueError("there are no pixels to find the colours of")
    mean = total / number
    covariance = (products / number - torch.outer(mean, mean)) / 255**2
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * largest.sign()


def colour_offsets(draws: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """What is added to every pixel of an image: the sum over i of a_i l_i p_i.

    Args:
        draws: (B, C), the a_i, one row an image.
        values: (C,), the l_i.
        vectors: (C, C), p_i a column.

    Returns:
        (B, C), on the scale of ``values``; an image's do not depend on its batch.

    >>> colour_offsets(torch.tensor([[0.1, -0.1]]), torch.tensor([4.0, 1.0]), torch.eye(2))
    tensor([[ 0.4000, -0.1000]])
    """
    # Not a matrix product, which may round by the size of the batch.
    scaled = (draws * values).unbind(1)
    offsets = torch.zeros_like(draws)
    for number, along in enumerate(scaled):
        offsets = offsets + along[:, None] * vectors[:, number]
    return offsets
