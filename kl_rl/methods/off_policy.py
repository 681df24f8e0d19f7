"""Off-policy RL: squared residuals that vanish at p* whatever the samples' law, so replay and logged data are sound.

One residual generates the family: ``Delta_ij = log_twist_i + sum_{i<=t<j} (log q - log p0)_t - log_twist_j``,
with the evidence as last twist.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from kl_rl import objectives
from kl_rl.core.policy import Policy
from kl_rl.methods.algorithm import Algorithm, gradient_algorithm

__all__ = ["path_consistency", "subtrajectory_balance", "trajectory_balance", "vargrad"]


def vargrad(*, optimizer: optax.GradientTransformation) -> Algorithm:
    """Log-variance loss (Richter et al. 2020, arXiv 2010.10436): no log Z, no critic.

    Fixed point: p*_beta, from any covering samples.

    Args:
      optimizer: for the policy.

    Returns:
      Algorithm; needs K >= 2 and soft evidence.
    """

    def loss(scored, evidence, extra):
        losses = objectives.log_variance(scored.delta)
        return losses, jnp.ones_like(losses)

    return gradient_algorithm(loss, optimizer=optimizer, min_samples=2, soft_evidence=True)


def trajectory_balance(
    *,
    optimizer: optax.GradientTransformation,
    twist: Policy,
    twist_optimizer: optax.GradientTransformation | None = None,
) -> Algorithm:
    """Trajectory balance with learned log Z, relative to p0 (= Trust-PCL on full paths).

    Malkin et al. 2022, arXiv 2201.13259.
    The learned log Z is the twist of the empty prefix: one number (``kl_rl.models.constant_twist``) or a function
      of the prompt. Fixed point: p*_beta.

    Args:
      optimizer: for the policy.
      twist: its value at position 0 is log Z.
      twist_optimizer: usually with a larger learning rate.

    Returns:
      Algorithm; needs soft evidence.
    """

    def loss(scored, evidence, extra):
        losses = objectives.trajectory_balance(scored.delta, scored.log_twist[..., 0])
        return losses, jnp.ones_like(losses)

    return gradient_algorithm(
        loss, optimizer=optimizer, twist=twist, twist_optimizer=twist_optimizer, soft_evidence=True
    )


def subtrajectory_balance(
    *,
    optimizer: optax.GradientTransformation,
    twist: Policy,
    decay: jax.Array | float = 1.0,
    twist_optimizer: optax.GradientTransformation | None = None,
) -> Algorithm:
    """Sub-trajectory balance (lambda) (Madan et al. 2023, arXiv 2209.12782).

    All sub-paths, weighted ``decay**length``. Fixed point: p*_beta.

    Args:
      optimizer: for the policy.
      twist: head over prefixes.
      decay: lambda; small is one-step bootstrapping, large is trajectory balance.
      twist_optimizer: for the head.

    Returns:
      Algorithm; needs soft evidence.
    """

    def loss(scored, evidence, extra):
        losses = objectives.subtrajectory_balance(
            scored.log_q - scored.log_base, scored.log_twist, scored.mask, decay=decay
        )
        return losses, jnp.ones_like(losses)

    return gradient_algorithm(
        loss, optimizer=optimizer, twist=twist, twist_optimizer=twist_optimizer, soft_evidence=True
    )


def path_consistency(
    *,
    optimizer: optax.GradientTransformation,
    twist: Policy,
    window: int = 1,
    twist_optimizer: optax.GradientTransformation | None = None,
) -> Algorithm:
    """Path consistency learning (Nachum et al. 2017, arXiv 1702.08892; window 1 is soft Q-learning's residual).

    Fixed point: p*_beta.

    Args:
      optimizer: for the policy.
      twist: head over prefixes, soft value / beta.
      window: steps between the two ends of a path.
      twist_optimizer: for the head.

    Returns:
      Algorithm; needs soft evidence.
    """

    def loss(scored, evidence, extra):
        losses = objectives.path_consistency(
            scored.log_q - scored.log_base, scored.log_twist, scored.mask, window=window
        )
        return losses, jnp.ones_like(losses)

    return gradient_algorithm(
        loss, optimizer=optimizer, twist=twist, twist_optimizer=twist_optimizer, soft_evidence=True
    )
