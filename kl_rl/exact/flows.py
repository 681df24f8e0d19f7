"""Reference flows: exact policy gradient over the full table of strings, vanilla and natural, without sampling noise.

The natural flow from p0 is the tilt at ``lambda = t`` (T2.6), so stopping it early is exact inference at beta
= 1/t; the vanilla flow is not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kl_rl.core import numerics
from kl_rl.exact.enumeration import expectation

__all__ = ["natural_gradient_flow", "vanilla_gradient_flow"]


def natural_gradient_flow(log_base: jax.Array, reward: jax.Array, times: jax.Array) -> jax.Array:
    """Replicator flow ``d log q / dt = r - E_q r`` from p0, in closed form ``q_t = p0 e^{t r} / Z_t`` (T2.6).

    Args:
      log_base: [N].
      reward: [N].
      times: [M].

    Returns:
      log q_t; [M, N].
    """
    return numerics.safe_log_softmax(log_base[None] + times[:, None] * reward[None])


def vanilla_gradient_flow(
    log_base: jax.Array,
    reward: jax.Array,
    *,
    step_size: float,
    num_steps: int,
    inverse_kl_weight: jax.Array | float = jnp.inf,
) -> jax.Array:
    """Softmax policy gradient on string logits: ``d theta_y / dt = q_y (A_y - E_q A)``, classical Runge-Kutta.

    ``A = r - beta log(q / p0)`` with ``beta = 1 / inverse_kl_weight``: infinity means no KL term.

    Args:
      log_base: start, and reference of the KL term; [N].
      reward: [N].
      step_size: time per recorded step.
      num_steps: M recorded steps.
      inverse_kl_weight: 1 / beta.

    Returns:
      log q at times ``0, step_size, ...``; [M + 1, N].
    """
    beta = 1.0 / jnp.asarray(inverse_kl_weight, log_base.dtype)

    def slope(theta):
        log_q = jax.nn.log_softmax(theta)
        advantage = reward - beta * (log_q - log_base)
        return jnp.exp(log_q) * (advantage - expectation(log_q, advantage))

    def advance(theta, _):
        a = slope(theta)
        b = slope(theta + 0.5 * step_size * a)
        c = slope(theta + 0.5 * step_size * b)
        d = slope(theta + step_size * c)
        theta = theta + step_size / 6.0 * (a + 2 * b + 2 * c + d)
        return theta, jax.nn.log_softmax(theta)

    _, path = jax.lax.scan(advance, log_base, None, length=num_steps)
    return jnp.concatenate([log_base[None], path])
