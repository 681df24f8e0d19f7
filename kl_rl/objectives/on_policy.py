"""Losses on the policy's own samples: score function and clipped surrogate. Their evidence is in the advantage."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kl_rl.core import numerics

__all__ = ["clipped_surrogate", "score_function"]

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
