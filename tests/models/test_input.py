"""A view becomes a model's input: checked against arithmetic done another way."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.errors import UserError
from limbeck.models import Input

GREY = Input(1, (8, 8), (0.25,), (0.5,))
COLOUR = Input(3, (8, 8), (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))


def test_normalisation_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel() -> None:
    view = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    by_hand = np.stack(
        [(view[:, 0] - 0.5) / 0.5, (view[:, 1] - 0.25) / 0.25, view[:, 2] / 2.0], axis=1
    )
    np.testing.assert_allclose(COLOUR(view).numpy(), by_hand)


def test_a_grey_view_is_repeated_for_a_colour_model() -> None:
    view = torch.rand(2, 1, 8, 8)
    out = COLOUR(view)
    assert out.shape == (2, 3, 8, 8)
    torch.testing.assert_close(out[:, 1], (view[:, 0] - 0.25) / 0.25)


def test_a_colour_view_is_averaged_for_a_grey_model() -> None:
    view = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(GREY(view), (view.sum(1, keepdim=True) / 3 - 0.25) / 0.5)


def test_other_numbers_of_channels_are_refused() -> None:
    with pytest.raises(UserError, match="3 channels cannot read images of 4 channels"):
        COLOUR(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("size", [(5, 7), (16, 16), (8, 3)])
def test_resizing_is_the_antialiased_bilinear_one_of_pillow(size: tuple[int, int]) -> None:
    view = torch.rand(1, 1, 8, 8)
    plain = Input(1, size, (0.0,), (1.0,))
    image = Image.fromarray(view[0, 0].numpy(), mode="F")
    expected = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))
    np.testing.assert_allclose(plain(view)[0, 0].numpy(), expected, atol=1e-5)


def test_a_view_of_the_right_size_is_not_resampled() -> None:
    view = torch.rand(1, 1, 8, 8)
    assert torch.equal(Input(1, (8, 8), (0.0,), (1.0,))(view), view)


def test_an_input_survives_json() -> None:
    assert Input.from_json(json.loads(json.dumps(dataclasses.asdict(COLOUR)))) == COLOUR
