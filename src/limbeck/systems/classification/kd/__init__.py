"""Distilling the Knowledge in a Neural Network. Hinton, Vinyals, Dean, 2015 (arXiv 1503.02531).

``soft_targets`` holds sections 2 and 3: a student learns a teacher's softened probabilities.
``specialists`` holds section 5: copies of one network, each for a few classes that it confuses,
which answer together with it.
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
from limbeck.systems.classification.kd.specialists import (
    SpecialistEnsemble,
    Specialists,
    confusable_classes,
    correct_dustbin,
    merge,
    oversampling,
    specialist,
    specialist_split,
)

__all__ = [
    "ENTRIES",
    "KD",
    "SpecialistEnsemble",
    "Specialists",
    "confusable_classes",
    "correct_dustbin",
    "ensemble_targets",
    "kd",
    "match_logits",
    "merge",
    "missing_class_bias",
    "oversampling",
    "soft_targets",
    "soften",
    "specialist",
    "specialist_split",
]
