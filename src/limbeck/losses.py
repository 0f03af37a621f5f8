"""Every paper's losses as pure functions: tensors in, a scalar out."""

from limbeck.systems.classification.factor_transfer import factor_transfer
from limbeck.systems.classification.kd import (
    ensemble_targets,
    kd,
    match_logits,
    soft_targets,
    soften,
)
from limbeck.systems.classification.nst import nst

__all__ = [
    "ensemble_targets",
    "factor_transfer",
    "kd",
    "match_logits",
    "nst",
    "soft_targets",
    "soften",
]
