"""What is known of CIFAR-10 and CIFAR-100 beyond their files: names, superclasses, checksums.

Krizhevsky: Learning multiple layers of features from tiny images, 2009.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from limbeck.errors import UserError


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CIFAR10 = _words("airplane automobile bird cat deer dog frog horse ship truck")
"""The class names of CIFAR-10 by label."""

FINE = _words(
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle
    bowl boy bridge bus butterfly camel can castle caterpillar cattle
    chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
    dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
    lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
    plain plate poppy porcupine possum rabbit raccoon ray road rocket
    rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm"""
)
"""The class names of CIFAR-100 by fine label."""

COARSE = _words(
    """aquatic_mammals fish flowers food_containers fruit_and_vegetables
    household_electrical_devices household_furniture insects large_carnivores
    large_man-made_outdoor_things large_natural_outdoor_scenes large_omnivores_and_herbivores
    medium_mammals non-insect_invertebrates people reptiles small_mammals trees
    vehicles_1 vehicles_2"""
)
"""The superclass names of CIFAR-100 by coarse label."""

FINE_TO_COARSE = tuple(
    int(number)
    for number in _words(
        """
    4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11
    6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5
    5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17
    10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 15 13
    16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13"""
    )
)
"""The coarse label of each fine one; each occurs five times."""

IMAGES = {
    **{f"data_batch_{number}": 10_000 for number in range(1, 6)},
    "test_batch": 10_000,
    "train": 50_000,
    "test": 10_000,
    "cifar-10-python.tar.gz": 60_000,
    "cifar-100-python.tar.gz": 60_000,
    "cifar-10-binary.tar.gz": 60_000,
    "cifar-100-binary.tar.gz": 60_000,
}
"""How many images the official files and archives hold."""

MD5 = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}
"""MD5 of the official archives, and of the files of the Python version."""


def coarse_labels(fine: Tensor) -> Tensor:
    """The superclass of each fine label of CIFAR-100, int64.

    Raises:
        UserError: a label that is none of CIFAR-100.

    >>> coarse_labels(torch.tensor([0, 1, 99]))
    tensor([ 4,  1, 13])
    """
    if len(fine) and not 0 <= int(fine.min()) <= int(fine.max()) < len(FINE):
        raise UserError(
            f"fine labels of CIFAR-100 run from 0 to {len(FINE) - 1}, but there are some from "
            f"{int(fine.min())} to {int(fine.max())}"
        )
    return torch.tensor(FINE_TO_COARSE)[fine.long()]


def altered(name: str, images: int, content: bytes | Path) -> bool:
    """Whether a file has the name and number of images of an official one, but not its MD5.

    Subsets under an official name are somebody's choice and no damage.

    Args:
        name: of the file, without its folder.
        images: that were found in it.
        content: its bytes, or where they lie.
    """
    if name not in MD5 or images != IMAGES[name]:
        return False
    if isinstance(content, bytes):
        found = hashlib.md5(content, usedforsecurity=False)
    else:
        with content.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    return found.hexdigest() != MD5[name]
