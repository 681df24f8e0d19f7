"""Objectives: pure functions from log-probabilities to unreduced losses. No policy, no sampling, no strings.

Sequence-level arguments are masked sums over tokens, [P, K]; ``delta = log q - log p0 - log l`` is the log of
the policy over the unnormalized posterior, constant (equal to -log Z) exactly at q = p*. Losses are minimized
and in nats, or nats squared.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kl_rl.advantages import leave_one_out
from kl_rl.core import numerics

__all__ = [
    "alpha_divergence",
    "clipped_surrogate",
    "direct_preference",
    "identity_preference",
    "log_variance",
    "path_consistency",
    "score_function",
    "subtrajectory_balance",
    "trajectory_balance",
    "weighted_likelihood",
]

stop = jax.lax.stop_gradient


def score_function(log_q: jax.Array, advantage: jax.Array) -> jax.Array:
    """``-A_k log q(y_k)`` with A held fixed: REINFORCE (Williams 1992).

    On-policy with ``A = leave_one_out(log l - (log q - log p0))`` the expected gradient is that of KL(q ||
    p*) (T1.5).

    Args:
      log_q: [P, K].
      advantage: nats; [P, K].

    Returns:
      [P, K].
    """
    return -stop(advantage) * log_q


def clipped_surrogate(
    log_q: jax.Array, log_behaviour: jax.Array, advantage: jax.Array, mask: jax.Array, *, clip: float
) -> jax.Array:
    """PPO (Schulman et al. 2017, arXiv 1707.06347): ``-min(u_t A_t, clip(u_t, 1-c, 1+c) A_t)``, summed over tokens.

    ``u_t = q / behaviour`` per token, from the log-probabilities recorded at sampling. At u = 1 its gradient
    is that of the score function.

    Args:
      log_q: [P, K, T].
      log_behaviour: [P, K, T].
      advantage: [P, K, T].
      mask: [P, K, T].
      clip: c, half-width of the trust interval.

    Returns:
      [P, K].
    """
    log_ratio = numerics.multiply_no_nan(log_q - log_behaviour, mask.astype(log_q.dtype))
    ratio = jnp.exp(log_ratio)
    advantage = stop(advantage)
    surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * advantage)
    return -numerics.masked_sum(surrogate, mask)


def weighted_likelihood(log_q: jax.Array, weight: jax.Array) -> jax.Array:
    """``-w_k log q(y_k)``: forward KL to the law that the weights describe; zero weights are safe with log q = -inf.

    Args:
      log_q: [P, K].
      weight: [P, K].

    Returns:
      [P, K].
    """
    return -numerics.multiply_no_nan(log_q, stop(weight))


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
      log_twist: with its boundary, see ``advantages.terminal_twist``; [..., T + 1].
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


def alpha_divergence(log_q: jax.Array, log_weight: jax.Array, *, alpha: jax.Array | float) -> jax.Array:
    """Score-function form of ``D_alpha(p* || q) = (sum p*^alpha q^(1-alpha) - 1) / (alpha (alpha - 1))``.

    ``-grad D_alpha = (1/alpha) E_q[((p*/q)^alpha - 1) grad log q]``: alpha = 1 is imitation of p* (forward
    KL), alpha -> 0 reverse KL (f-DPG: Go et al. 2023, arXiv 2302.08215; alpha-DPG: arXiv 2512.05962). A
    leave-one-out baseline is subtracted.

    Args:
      log_q: on-policy samples; [P, K].
      log_weight: ``log p*(y) - log q(y) = -delta - log Z``; [P, K].
      alpha: in [0, 1].

    Returns:
      [P, K].
    """
    log_weight = stop(log_weight)
    small = jnp.abs(jnp.asarray(alpha)) < 1e-6
    safe = jnp.where(small, 1.0, alpha)
    coefficient = jnp.where(small, log_weight, jnp.expm1(safe * log_weight) / safe)
    return score_function(log_q, leave_one_out(coefficient))


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
