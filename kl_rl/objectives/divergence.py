"""Divergences between forward and reverse KL, as score-function losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kl_rl.objectives.credit import leave_one_out
from kl_rl.objectives.on_policy import score_function

__all__ = ["alpha_divergence"]

stop = jax.lax.stop_gradient


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
