"""Dual Policy Distillation. Lai, Zha, Li, Hu, IJCAI 2020 (arXiv 2006.04061).

A policy is usually distilled from an expert that had to be trained first. Here two learners that
begin differently explore copies of one environment and each imitates the other, weighted by how
much better the other believes a state to be than it does itself. In the ideal that leads both
towards the policy that follows the better of the two everywhere, which is as good as either.

``distillation`` holds the paper: the losses and the method. ``learners`` holds PPO and DDPG by
Stable-Baselines3 and where distillation joins them.

Needs: an environment of Gymnasium (the task ``control``); the extra ``rl``.
"""

from limbeck.systems.reinforcement.dual_policy.distillation import (
    DualPolicy,
    choice_distance,
    dual_policy,
    hybrid_policy,
    peer_weights,
    squared_distance,
)

__all__ = [
    "DualPolicy",
    "choice_distance",
    "dual_policy",
    "hybrid_policy",
    "peer_weights",
    "squared_distance",
]
