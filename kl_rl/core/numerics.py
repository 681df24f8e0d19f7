"""Zero-probability care in one place: sums, products and normalizations that survive -inf and empty masks.

Units: log-quantities are in nats. Shape letters everywhere in the library: P prompts, K samples per prompt, T
tokens, V vocabulary, L prompt length, N strings of an enumerated world, R return tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = [
    "masked_mean",
    "masked_sum",
    "multiply_no_nan",
    "safe_log",
    "safe_log_softmax",
    "safe_softmax",
    "xlogy_difference",
]


def multiply_no_nan(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x * y`` that is 0 wherever ``y == 0``, whatever ``x`` is (also inf or NaN), with matching gradients.

    Args:
      x: any values, e.g. log-probabilities that may be -inf; [...].
      y: weights; [...], broadcastable against ``x``.

    Returns:
      The product, exactly 0 where ``y`` is 0.
    """
    zero = y == 0
    return jnp.where(zero, 0.0, jnp.where(zero, 0.0, x) * y)


def masked_sum(x: jax.Array, mask: jax.Array, axis: int = -1) -> jax.Array:
    """Sum of ``x`` where ``mask`` is nonzero; an empty mask gives 0, and -inf outside the mask is ignored."""
    return jnp.sum(multiply_no_nan(x, mask.astype(x.dtype)), axis=axis)


def masked_mean(x: jax.Array, mask: jax.Array, axis: int = -1) -> jax.Array:
    """Mean of ``x`` over a mask; an empty mask gives 0."""
    count = jnp.sum(mask.astype(x.dtype), axis=axis)
    return masked_sum(x, mask, axis) / jnp.maximum(count, 1.0)


def safe_log(x: jax.Array) -> jax.Array:
    """``log x`` with ``log 0 = -inf`` and a zero (not NaN) gradient there."""
    positive = x > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, x, 1.0)), -jnp.inf)


def _finite_max(x: jax.Array, axis: int) -> jax.Array:
    top = jnp.max(x, axis=axis, keepdims=True)
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))


def safe_softmax(log_weights: jax.Array, axis: int = -1) -> jax.Array:
    """Softmax that is all zeros, not NaN, where every entry is -inf (for example: a filter that passes nothing)."""
    weights = jnp.exp(log_weights - _finite_max(log_weights, axis))
    total = jnp.sum(weights, axis=axis, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)


def safe_log_softmax(logits: jax.Array, axis: int = -1) -> jax.Array:
    """Log-softmax that is -inf, not NaN, where every entry is -inf."""
    shifted = logits - _finite_max(logits, axis)
    total = jnp.sum(jnp.exp(shifted), axis=axis, keepdims=True)
    return shifted - jnp.log(jnp.where(total == 0, 1.0, total))


def xlogy_difference(p: jax.Array, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """``p (log p - log q)`` elementwise with ``0 log 0 = 0``: the summand of a KL divergence, in nats.

    Gives +inf where ``p > 0`` and ``q = 0``, and 0 where ``p = 0`` (also if both logs are -inf).
    """
    present = p > 0
    difference = jnp.where(present, log_p, 0.0) - jnp.where(present, log_q, 0.0)
    return jnp.where(present, p * difference, 0.0)
