"""Distilling the Knowledge in a Neural Network. Hinton, Vinyals, Dean, 2015 (arXiv 1503.02531).

``soft_targets`` holds sections 2 and 3: a student learns a teacher's softened probabilities.
"""

from limbeck.systems.classification.kd.soft_targets import (
    ENTRIES,
    KD,
    ensemble_targets,
    kd,
    match_logits,
    missing_class_bias,
    soft_targets,
    soften,
)

__all__ = [
    "ENTRIES",
    "KD",
    "ensemble_targets",
    "kd",
    "match_logits",
    "missing_class_bias",
    "soft_targets",
    "soften",
]
