"""Estimators of KL(q || p0) from samples of q, as values; what each does inside a loss is stated with it.

With ``d = log p0 - log q``: k1 = -d, k2 = d^2 / 2, k3 = e^d - 1 - d (Schulman 2020). Expected gradients,
on-policy, when the estimator is used *as a loss* on sequence-level samples: k1 gives 0, k2 gives grad
KL(q||p0), k3 gives grad KL(p0||q), the *forward* KL.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kl_rl.core import numerics

__all__ = ["exact_token_kl", "k1", "k2", "k3"]


def k1(log_q: jax.Array, log_p: jax.Array) -> jax.Array:
    """``log q - log p``: unbiased, can be negative; as a *loss* its expected gradient is zero. Nats; [...]."""
    return log_q - log_p


def k2(log_q: jax.Array, log_p: jax.Array) -> jax.Array:
    """``(log q - log p)^2 / 2``: biased in value; as a loss its expected gradient is that of KL(q||p). Nats; [...]."""
    return 0.5 * (log_q - log_p) ** 2


def k3(log_q: jax.Array, log_p: jax.Array) -> jax.Array:
    """``expm1(d) - d``, ``d = log p - log q``: unbiased and nonnegative, also in float32.

    As a loss it follows KL(p||q).

    Below ``|d| = 1e-3`` the difference loses digits, and ``d^2/2 (1 + d/3)`` is used (relative error below
    1e-7). Nats; [...].
    """
    d = log_p - log_q
    small = jnp.abs(d) < 1e-3
    series = 0.5 * d**2 * (1.0 + d / 3.0)
    large = jnp.where(small, 1.0, d)
    return jnp.where(small, series, jnp.expm1(large) - large)


def exact_token_kl(logits_q: jax.Array, logits_p: jax.Array) -> jax.Array:
    """``sum_v q(v) (log q(v) - log p(v))`` over the whole vocabulary, in nats.

    Summed over the prefixes that q visits it is the Rao-Blackwellized estimator of the sequence KL: unbiased,
    with variance never larger than that of k1 (Amini et al. 2025, arXiv 2504.10637).

    Args:
      logits_q: [..., V].
      logits_p: [..., V].

    Returns:
      [...].
    """
    log_q, log_p = numerics.safe_log_softmax(logits_q), numerics.safe_log_softmax(logits_p)
    return jnp.sum(numerics.xlogy_difference(jnp.exp(log_q), log_q, log_p), axis=-1)
