"""Maximum likelihood: make a base model from samples of a process or from text."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from kl_rl.core.policy import Policy, sequence_log_prob

__all__ = ["fit_likelihood"]

Batch = Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def fit_likelihood(
    policy: Policy,
    batch: Batch,
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    state: optax.OptState | None = None,
) -> tuple[Policy, optax.OptState, jax.Array]:
    """Minimize ``-log q(y | x)`` per token on fresh batches, as one compiled scan; call again to go on.

    Args:
      policy: initial policy.
      batch: ``key -> (prompt [B, L], tokens [B, T], mask [B, T])``, jittable.
      key: PRNG key.
      optimizer: an optax transformation.
      num_steps: gradient steps.
      state: optimizer state of an earlier call.

    Returns:
      The policy, the optimizer state, and the loss in nats per token [num_steps].
    """
    state = optimizer.init(policy.params) if state is None else state

    def loss(params, prompt, tokens, mask):
        log_q = sequence_log_prob(policy.with_params(params), prompt, tokens, mask)
        return -jnp.sum(log_q) / jnp.sum(mask)

    def body(carry, key):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, *batch(key))
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, state), losses = jax.lax.scan(body, (policy.params, state), jax.random.split(key, num_steps))
    return policy.with_params(params), state, losses
