"""Weights of samples: self-normalized evidence, hard filters, best-of-n, and their effective sample size."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kl_rl.core import numerics

__all__ = ["best_of_n", "effective_sample_size", "pooled", "self_normalized"]


def self_normalized(log_weight: jax.Array) -> jax.Array:
    """Weights that sum to one over the K samples of each prompt; all zero where no sample has evidence.

    ``w_k = l_k / sum_j l_j``. With soft evidence this is biased at finite K, and p* is not a fixed point of
    the weighted likelihood (T4.6); with a hard filter the expected gradient is ``1 - (1 - Z)^K`` times the
    true one, so hard prompts count less.

    Args:
      log_weight: log-evidence (plus log p0 - log behaviour if the samples are not from p0), nats; [..., K].

    Returns:
      [..., K].
    """
    return numerics.safe_softmax(log_weight, axis=-1)


def pooled(log_weight: jax.Array) -> jax.Array:
    """Weights normalized over the whole batch to mean one; all zero where nothing has evidence.

    The ratio of the weights of two prompts approaches ``Z(x) / Z(x')`` as the batch grows.

    Args:
      log_weight: nats; [P, K].

    Returns:
      [P, K].
    """
    return numerics.safe_softmax(log_weight.reshape(-1)).reshape(log_weight.shape) * log_weight.size


def best_of_n(reward: jax.Array, n: jax.Array | float) -> jax.Array:
    """Probability that sample k is the best of a random n-subset of the K samples, ties broken at random.

    ``w_k = [C(U_k, n) - C(L_k, n)] / [C(K, n) (U_k - L_k)]`` with ``U_k = #{j: r_j <= r_k}``, ``L_k = #{j:
    r_j < r_k}``. A random n-subset of K independent draws is n independent draws, so ``E sum_k w_k f(y_k) =
    E_{best of n} f`` exactly, at any K >= n. The law itself is in Beirami et al. 2024, arXiv 2401.01879;
    averaging over subsets is Rao-Blackwellization.

    Args:
      reward: [..., K].
      n: number of draws, at most K; may be traced.

    Returns:
      Weights that sum to one over K; [..., K].
    """
    size = reward.shape[-1]
    below_or_equal = jnp.sum(reward[..., None, :] <= reward[..., :, None], axis=-1)
    below = jnp.sum(reward[..., None, :] < reward[..., :, None], axis=-1)

    share = _subset_shares(size, n, jnp.result_type(reward.dtype, jnp.float32))
    return (share[below_or_equal] - share[below]) / (below_or_equal - below)


def _subset_shares(size: int, n: jax.Array | float, dtype: jnp.dtype) -> jax.Array:
    """``C(c, n) / C(K, n) = prod_{j=c+1..K} (1 - n / j)`` for c = 0 ... K, zero where c < n; [K + 1].

    Differences of log-gammas would lose five digits at K = 1000 in float32.
    """
    count = jnp.arange(size + 1, dtype=dtype)
    later = jnp.where(count > n, jnp.log1p(-n / jnp.maximum(count, 1)), 0.0)  # of j = c; [K + 1]
    log_share = jnp.cumsum(later[::-1])[::-1] - later
    return jnp.where(count >= n, jnp.exp(log_share), 0.0)


def effective_sample_size(weight: jax.Array, axis: int = -1) -> jax.Array:
    """``(sum w)^2 / sum w^2`` (Kong 1992); 0 where all weights are 0; [..., K] -> [...]."""
    total = jnp.sum(weight, axis=axis)
    square = jnp.sum(weight**2, axis=axis)
    return jnp.where(square > 0, total**2 / jnp.where(square > 0, square, 1.0), 0.0)
