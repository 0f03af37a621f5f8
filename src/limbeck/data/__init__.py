"""Data sets: sources, splits, augmentation, batches."""

from limbeck.data.data import Data, ResidentImages, Split
from limbeck.data.sources import kind_of, load, read_image, unlabelled
from limbeck.data.splits import transfer

__all__ = [
    "Data",
    "ResidentImages",
    "Split",
    "kind_of",
    "load",
    "read_image",
    "transfer",
    "unlabelled",
]
