"""The principal components of colours are those of numpy, whatever the order of the pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from limbeck.data import load
from limbeck.data.augment import Augment
from limbeck.data.batches import ImageBatches
from limbeck.data.colour import colour_offsets, pca_colours
from limbeck.data.data import ResidentImages, Split


def pixels(number: int = 60, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    grey = torch.rand(number, 1, 5, 7, generator=generator) * 170
    own = torch.rand(number, channels, 5, 7, generator=generator)
    return (grey + own * torch.linspace(80, 20, channels).view(-1, 1, 1)).byte()


@pytest.mark.parametrize("channels", [1, 3])
def test_components_are_those_of_the_covariance_of_all_pixels(channels: int) -> None:
    images = pixels(channels=channels)
    values, vectors = pca_colours(images)
    flat = images.permute(1, 0, 2, 3).reshape(channels, -1).double().numpy() / 255
    covariance = np.atleast_2d(np.cov(flat, bias=True))
    rebuilt = vectors @ values.diag() @ vectors.T
    assert np.allclose(rebuilt.numpy(), covariance, rtol=1e-10, atol=1e-14)
    assert torch.allclose(vectors.T @ vectors, torch.eye(channels, dtype=torch.float64), atol=1e-12)
    assert torch.equal(values, values.sort(descending=True).values)
    assert bool((vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all())


def test_order_and_parts_change_no_bit() -> None:
    images = pixels()
    values, vectors = pca_colours(images)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    for other in (images[order], images.split(7), [images[:1], images[1:]]):
        again = pca_colours(other)
        assert torch.equal(again[0], values)
        assert torch.equal(again[1], vectors)


def test_one_colour_alone_has_no_spread() -> None:
    values, vectors = pca_colours(torch.full((3, 3, 2, 2), 77, dtype=torch.uint8))
    assert torch.equal(values, torch.zeros(3, dtype=torch.float64))
    assert bool(vectors.isfinite().all())


def test_what_has_no_colours_is_refused() -> None:
    for wrong in (torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8 pixels"):
            pca_colours(wrong)
    for nothing in ([], torch.zeros(0, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="no pixels"):
            pca_colours(nothing)


def test_an_offset_is_the_sum_over_the_components() -> None:
    generator = torch.Generator().manual_seed(3)
    draws, vectors = (torch.randn(n, 3, generator=generator).double() for n in (9, 3))
    values = torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64)
    found = colour_offsets(draws, values, vectors)
    expected = torch.einsum("bi,i,ci->bc", draws, values, vectors)
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)


def test_a_split_knows_the_colours_of_its_own_images() -> None:
    images = pixels()
    split = Split("train", ResidentImages(images), None).subset(range(5, 40, 3))
    values, vectors = pca_colours(images[5:40:3])
    assert torch.equal(split.colours[0], values)
    assert torch.equal(split.colours[1], vectors)
    assert split.colours is split.colours


def test_training_batches_are_tinted_by_the_colours_of_their_split() -> None:
    split = Split("train", ResidentImages(pixels()), None).subset(range(0, 60, 2))
    augment = Augment(colour=0.5, colour_scale="sqrt")
    for batch in ImageBatches(split, 8, seed=3, train=True, augment=augment).epoch(1):
        rows = batch["row"]
        expected = augment(split.images.pixels[rows], rows, 3, 1, split.colours)
        assert torch.equal((batch["image"] * 255).round().byte(), expected)
    (plain,) = ImageBatches(split, 30, augment=augment).epoch(0)
    assert torch.equal((plain["image"] * 255).round().byte(), split.images.pixels[split.rows])


def test_a_source_of_views_is_the_colours_that_tint_them_too() -> None:
    def source(split: Split, augment: Augment) -> str:
        batches = ImageBatches(split, 8, train=True, augment=augment)
        return next(batches.epoch(0))["view"].source

    split = Split("train", ResidentImages(pixels()), None)
    tinted, flipped = Augment(colour=0.1, views=2), Augment(flip=True, views=2)
    assert source(split, tinted) == source(split, tinted.model_copy(update={"views": 5}))
    assert source(split, tinted) != source(split.subset(range(30)), tinted)
    assert source(split, flipped) == source(split.subset(range(30)), flipped)
    assert source(split, tinted) != source(split, Augment(colour=0.2, views=2))
    rooted = Augment(colour=0.1, colour_scale="sqrt", views=2)
    assert source(split, tinted) != source(split, rooted)


def test_photographs_differ_most_in_brightness(real_data: Callable[[str], Path]) -> None:
    values, vectors = load(f"cifar10:{real_data('cifar10')}").train.colours
    assert torch.allclose(vectors[:, 0], torch.full((3,), 3**-0.5, dtype=torch.float64), atol=0.05)
    assert float(values[0] / values.sum()) > 0.85
    # Blue against red comes second, green against both last.
    assert bool((vectors[0, 1] * vectors[2, 1] < 0) & (vectors[0, 2] * vectors[1, 2] < 0))
