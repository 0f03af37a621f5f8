"""Every paper's losses as pure functions: tensors in, a scalar out."""

from limbeck.systems.classification.factor_transfer import factor_transfer
from limbeck.systems.classification.ffl import mutual_distillation, ramp_up, shifted_kl
from limbeck.systems.classification.kd import (
    ensemble_targets,
    kd,
    match_logits,
    soft_targets,
    soften,
)
from limbeck.systems.classification.ktan import discrimination, feature_distance, fooling
from limbeck.systems.classification.nst import nst
from limbeck.systems.compression.qkd import quantise_inputs, quantise_weights
from limbeck.systems.continual.lwf import lwf, lwf_multilabel
from limbeck.systems.dense.sad import attention_map, iou_loss, sad
from limbeck.systems.detection.detection_kd import (
    bounded_regression,
    hint,
    weighted_soft_targets,
)
from limbeck.systems.federated.feddf import feddf
from limbeck.systems.generative.gan_mc.losses import (
    compression,
    compression_score,
    generator_terms,
    judge_terms,
    munge,
)
from limbeck.systems.language.seq_kd import word_kd
from limbeck.systems.language.tinybert import (
    attention_distance,
    hidden_distance,
    prediction_distance,
)
from limbeck.systems.networks.mobilenet import attribute_distillation, embedding_distillation
from limbeck.systems.reinforcement.dual_policy import dual_policy, peer_weights
from limbeck.systems.search.dna import relative_l1, similarity_divergence

__all__ = [
    "attention_distance",
    "attention_map",
    "attribute_distillation",
    "bounded_regression",
    "compression",
    "compression_score",
    "discrimination",
    "dual_policy",
    "embedding_distillation",
    "ensemble_targets",
    "factor_transfer",
    "feature_distance",
    "feddf",
    "fooling",
    "generator_terms",
    "hidden_distance",
    "hint",
    "iou_loss",
    "judge_terms",
    "kd",
    "lwf",
    "lwf_multilabel",
    "match_logits",
    "munge",
    "mutual_distillation",
    "nst",
    "peer_weights",
    "prediction_distance",
    "quantise_inputs",
    "quantise_weights",
    "ramp_up",
    "relative_l1",
    "sad",
    "shifted_kl",
    "similarity_divergence",
    "soft_targets",
    "soften",
    "weighted_soft_targets",
    "word_kd",
]
