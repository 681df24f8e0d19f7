"""Losses on pairs of samples of which one is preferred; sequence-level log-ratios in nats."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["direct_preference", "identity_preference"]


def _margin(log_ratio: jax.Array, chosen: jax.Array) -> jax.Array:
    sign = jnp.where(chosen[..., 0] >= chosen[..., 1], 1.0, -1.0).astype(log_ratio.dtype)
    return sign * (log_ratio[..., 0] - log_ratio[..., 1])


def direct_preference(log_ratio: jax.Array, chosen: jax.Array, *, beta: jax.Array | float) -> jax.Array:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290): ``-log sigmoid(beta (l_chosen - l_rejected))``.

    Population optimum under Bradley-Terry comparisons with full coverage: q = p*_beta.

    Args:
      log_ratio: sequence-level log q - log p0; [P, 2].
      chosen: larger for the preferred sample; [P, 2].
      beta: temperature, reward units per nat.

    Returns:
      [P].
    """
    return -jax.nn.log_sigmoid(beta * _margin(log_ratio, chosen))


def identity_preference(log_ratio: jax.Array, chosen: jax.Array, *, beta: jax.Array | float) -> jax.Array:
    """IPO: ``(l_chosen - l_rejected - 1/(2 beta))^2``, sums over tokens, not means.

    Azar et al. 2023, arXiv 2310.12036.

    Population optimum with full coverage: q proportional to ``p0 exp(P(y beats a random sample) / beta)``.

    Args:
      log_ratio: [P, 2].
      chosen: larger for the preferred sample; [P, 2].
      beta: regularization strength; 1/beta is in nats.

    Returns:
      [P].
    """
    return (_margin(log_ratio, chosen) - 1.0 / (2.0 * beta)) ** 2
