"""Randomness as a pure function of where a run stands, so that there is nothing to restore."""

from __future__ import annotations

import random

import numpy as np
import torch

_MASK = (1 << 64) - 1


def derive(*numbers: int) -> int:
    """A 64-bit seed from several numbers (SplitMix64, Steele et al. 2014, folded over them).

    >>> derive(0, 1) == derive(0, 1), derive(0, 1) == derive(1, 0)
    (True, False)
    """
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def seed_all(*numbers: int) -> None:
    """Seed Python, NumPy and torch (all devices) from these numbers."""
    seed = derive(*numbers)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if torch.accelerator.is_available():
        torch.manual_seed(seed & (_MASK >> 1))
    else:  # which would write down a stack trace for devices that may come later
        torch.default_generator.manual_seed(seed & (_MASK >> 1))
