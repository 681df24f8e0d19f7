"""Maximum likelihood of weighted samples: forward KL to the law that the weights describe."""

from __future__ import annotations

import jax

from kl_rl.core import numerics

__all__ = ["weighted_likelihood"]

stop = jax.lax.stop_gradient


def weighted_likelihood(log_q: jax.Array, weight: jax.Array) -> jax.Array:
    """``-w_k log q(y_k)``: forward KL to the law that the weights describe; zero weights are safe with log q = -inf.

    Args:
      log_q: [P, K].
      weight: [P, K].

    Returns:
      [P, K].
    """
    return -numerics.multiply_no_nan(log_q, stop(weight))
