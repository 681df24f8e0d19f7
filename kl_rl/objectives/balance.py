"""Squared residuals that vanish at p* whatever the samples' law; nats squared.

``delta = log q - log p0 - log l`` is the log of the policy over the unnormalized posterior, constant (equal to -log Z)
exactly at q = p*.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kl_rl.core import numerics
from kl_rl.objectives.credit import leave_one_out

__all__ = ["log_variance", "path_consistency", "subtrajectory_balance", "trajectory_balance"]


def log_variance(delta: jax.Array) -> jax.Array:
    """``(1/2) K/(K-1) (delta_k - mean delta)^2``: half the sample variance of delta, split over samples.

    Whatever the samples' law, the minimum 0 is reached at q = p*, sample by sample. On-policy its expected
    gradient equals that of KL(q || p*) (Richter et al. 2020, arXiv 2010.10436).

    Args:
      delta: K >= 2; [P, K].

    Returns:
      [P, K].
    """
    centred = delta - jnp.mean(delta, axis=-1, keepdims=True)
    return 0.5 * leave_one_out(delta) * centred


def trajectory_balance(delta: jax.Array, log_z: jax.Array) -> jax.Array:
    """``(1/2) (log Z + delta)^2`` with a learned log Z (Malkin et al. 2022, arXiv 2201.13259).

    On-policy with log Z held fixed the expected gradient is that of KL(q || p*) (Malkin et al. 2022, arXiv
    2210.00580).

    Args:
      delta: [P, K].
      log_z: [P, K].

    Returns:
      [P, K].
    """
    return 0.5 * (log_z + delta) ** 2


def _balance(log_ratio: jax.Array, log_twist: jax.Array) -> jax.Array:
    """``u_t = log_twist_t - sum_{s<t} (log q - log p0)_s``: constant in t at the optimum; [..., T+1]."""
    total = jnp.cumsum(log_ratio, axis=-1)
    return log_twist - jnp.concatenate([jnp.zeros_like(total[..., :1]), total], axis=-1)


def subtrajectory_balance(
    log_ratio: jax.Array, log_twist: jax.Array, mask: jax.Array, *, decay: jax.Array | float
) -> jax.Array:
    """``sum_{i<j} decay^{j-i} (1/2) Delta_ij^2 / sum_{i<j} decay^{j-i}``, sub-paths inside the string.

    Sub-trajectory balance (Madan et al. 2023, arXiv 2209.12782).
    ``Delta_ij = log_twist_i + sum_{i<=t<j} (log q - log p0)_t - log_twist_j``; a small decay leaves the single
    steps (its limit), large decay the whole trajectory.

    Args:
      log_ratio: per-token log q - log p0, 0 behind the mask; [..., T].
      log_twist: with its boundary, see ``credit.terminal_twist``; [..., T + 1].
      mask: [..., T].
      decay: lambda > 0; values above 1 favour long sub-paths.

    Returns:
      [...].
    """
    u = _balance(log_ratio, log_twist)
    horizon = mask.shape[-1]
    i, j = jnp.triu_indices(horizon + 1, k=1)
    inside = mask[..., j - 1]
    log_weight = jnp.broadcast_to((j - i - 1) * jnp.log(decay), inside.shape)
    weight = numerics.safe_softmax(jnp.where(inside > 0, log_weight, -jnp.inf))
    return numerics.masked_sum(0.5 * (u[..., i] - u[..., j]) ** 2, weight)


def path_consistency(
    log_ratio: jax.Array, log_twist: jax.Array, mask: jax.Array, *, window: int
) -> jax.Array:
    """Mean of ``(1/2) Delta_{t, t+window}^2`` over the string (Nachum et al. 2017, arXiv 1702.08892).

    Windows that reach over the end stop at the end, where the twist is the evidence.

    Args:
      log_ratio: [..., T].
      log_twist: with its boundary; [..., T + 1].
      mask: [..., T].
      window: steps between the two ends of a path, 1 to T.

    Returns:
      [...].
    """
    u = _balance(log_ratio, log_twist)
    last = jnp.minimum(jnp.arange(mask.shape[-1]) + window, mask.shape[-1])
    return numerics.masked_mean(0.5 * (u[..., :-1] - u[..., last]) ** 2, mask)
