"""RandAugment does what torchvision's does, to every image on its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from limbeck.data.randaugment import rand_augment

# One draw for each operation in each direction, in the middle of what falls to it.
EVERY = (torch.arange(28, dtype=torch.float64)[:, None] + 0.5) / 28


def noise(number: int, channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    shape = (number, channels, height, width)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def chances(number: int, operations: int) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.rand(number, operations, generator=generator, dtype=torch.float64)


def pictures(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


@pytest.mark.parametrize("magnitude", [0, 1, 9, 17, 30])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_can_become_of_an_image_is_what_torchvision_makes_of_it(
    magnitude: int, channels: int
) -> None:
    image = noise(1, channels, 24, 33)
    one = v2.RandAugment(num_ops=1, magnitude=magnitude)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = pictures(torch.cat([one(image) for _ in range(600)]))
    assert pictures(rand_augment(image.expand(28, -1, -1, -1), EVERY, magnitude)) == expected


@pytest.mark.parametrize("shape", [(3, 7, 9), (1, 5, 11), (3, 33, 31)], ids=str)
def test_an_image_looks_the_same_in_batches_of_any_size(shape: tuple[int, int, int]) -> None:
    number = 57
    images, draws = noise(number, *shape), chances(number, 3)
    # Colours that come to lie on the edge between two levels.
    images[:20] = images[:20] // 60 * 60
    together = rand_augment(images, draws, 10)
    for size in (1, 2, 3, 7, 16, 29):
        parts = zip(images.split(size), draws.split(size), strict=True)
        assert torch.equal(torch.cat([rand_augment(i, d, 10) for i, d in parts]), together)


def test_each_operation_is_drawn_about_equally_often_and_so_are_its_directions() -> None:
    # Without black and white, so that more contrast is something else than nothing.
    image = noise(1, 3, 16, 16) // 2 + 40
    outcomes = rand_augment(image.expand(14_000, -1, -1, -1), chances(14_000, 1), 15)
    which = outcomes.flatten(1).unique(dim=0, return_inverse=True)[1]
    counts = torch.bincount(which).sort().values
    # Nine operations have two directions.
    expected = torch.tensor([500] * 18 + [1000] * 5)
    assert len(counts) == 23
    # 99.99 % of a chi squared variable with 22 degrees of freedom lie below 55.5.
    assert float(((counts - expected) ** 2 / expected).sum()) < 55.5


def test_operations_follow_one_another() -> None:
    images, draws = noise(30, 3, 12, 12), chances(30, 2)
    twice = rand_augment(rand_augment(images, draws[:, :1], 9), draws[:, 1:], 9)
    assert torch.equal(rand_augment(images, draws, 9), twice)
    assert not torch.equal(rand_augment(images, draws.flip(1), 9), twice)


def test_the_input_is_left_alone() -> None:
    images = noise(28, 3, 8, 8)
    before = images.clone()
    rand_augment(images, EVERY, 30)
    assert torch.equal(images, before)


def test_no_images_stay_none() -> None:
    assert rand_augment(noise(0, 3, 8, 8), chances(0, 2), 9).shape == (0, 3, 8, 8)


def test_torchvision_is_imported_only_when_there_is_something_to_do() -> None:
    found = "import limbeck.data.augment, sys; print('torchvision' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
