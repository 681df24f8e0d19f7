"""Preferences: the evidence is implied by comparisons of two samples; larger ``reward`` marks the preferred one."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from kl_rl import objectives
from kl_rl.core.trajectories import pairs
from kl_rl.methods.algorithm import Algorithm, base_policy, gradient_algorithm

__all__ = ["dpo", "ipo"]


def dpo(*, optimizer: optax.GradientTransformation) -> Algorithm:
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290).

    Fixed point under Bradley-Terry comparisons of r with full coverage: p*_beta. Finite pairs fix l only on
    the components of the comparison graph.

    Args:
      optimizer: for the policy.

    Returns:
      Algorithm; K must be even (pairs), the evidence a Tilt.
    """

    def loss(scored, evidence, extra):
        losses = objectives.direct_preference(scored.log_ratio, scored.reward, beta=evidence.beta)
        return losses, jnp.ones_like(scored.reward)

    return gradient_algorithm(
        loss, optimizer=optimizer, behaviour=base_policy, prepare=pairs, min_samples=2, soft_evidence=True
    )


def ipo(*, optimizer: optax.GradientTransformation) -> Algorithm:
    """Identity preference optimization (Azar et al. 2023, arXiv 2310.12036), sums over tokens.

    Fixed point with full coverage by pairs of p0: ``p0 exp(w / beta)`` with ``w(y) = P(y beats a sample of
      p0)``, a function of r, so C = 0; 1/beta in nats.

    Args:
      optimizer: for the policy.

    Returns:
      Algorithm; K must be even (pairs), the evidence a Tilt.
    """

    def loss(scored, evidence, extra):
        losses = objectives.identity_preference(scored.log_ratio, scored.reward, beta=evidence.beta)
        return losses, jnp.ones_like(scored.reward)

    return gradient_algorithm(
        loss, optimizer=optimizer, behaviour=base_policy, prepare=pairs, min_samples=2, soft_evidence=True
    )
