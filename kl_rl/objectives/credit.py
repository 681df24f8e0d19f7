"""Baselines and credit assignment: leave-one-out, group normalization, generalized advantage estimation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["generalized_advantage", "group_normalized", "leave_one_out", "terminal_twist"]


def leave_one_out(value: jax.Array) -> jax.Array:
    """Each sample's value minus the mean of the others (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740).

    ``a_k = v_k - 1/(K-1) sum_{j != k} v_j = K/(K-1) (v_k - mean v)``: an unbiased baseline without
    parameters.

    Args:
      value: K >= 2 samples of each prompt; [..., K].

    Returns:
      [..., K].
    """
    size = value.shape[-1]
    if size < 2:
        raise ValueError(f"a leave-one-out baseline needs K >= 2 samples per prompt; got K = {size}")
    value = value - value[..., :1]  # of equal values exactly 0
    return (value - jnp.mean(value, axis=-1, keepdims=True)) * (size / (size - 1))


def group_normalized(value: jax.Array, *, epsilon: float = 1e-6) -> jax.Array:
    """``(v_k - mean v) / (std v + epsilon)`` within each group (Shao et al. 2024, arXiv 2402.03300).

    Divides the reward by its spread under the current policy, so the temperature becomes ``beta * std(r |
    x)``: different for each prompt.

    Args:
      value: [..., K].
      epsilon: added to the standard deviation; a constant group gets 0.

    Returns:
      [..., K].
    """
    if value.shape[-1] < 2:
        raise ValueError(f"group normalization needs K >= 2 samples per prompt; got K = {value.shape[-1]}")
    value = value - value[..., :1]  # of equal values exactly 0: their mean need not equal them
    centred = value - jnp.mean(value, axis=-1, keepdims=True)
    return centred / (jnp.std(value, axis=-1, keepdims=True) + epsilon)


def terminal_twist(log_twist: jax.Array, log_evidence: jax.Array, mask: jax.Array) -> jax.Array:
    """The twist with its known boundary value: at the end of a string it is the evidence itself.

    Args:
      log_twist: nats; [..., T + 1].
      log_evidence: nats; [...].
      mask: [..., T].

    Returns:
      ``log_twist`` where at least one token is still to come, ``log_evidence`` from the end of the string on;
      [..., T + 1].
    """
    alive = jnp.concatenate([mask, jnp.zeros_like(mask[..., :1])], axis=-1)
    return jnp.where(alive > 0, log_twist, log_evidence[..., None])


def generalized_advantage(reward: jax.Array, value: jax.Array, mask: jax.Array, *, decay: float) -> jax.Array:
    """GAE without discounting (Schulman et al. 2016, arXiv 1506.02438): ``A_t = sum_l decay^l delta_{t+l}``.

    ``delta_t = reward_t + value_{t+1} - value_t``; decay 1 is Monte Carlo minus the value, 0 is one-step
    bootstrapping.

    Args:
      reward: per-token reward in nats, terminal evidence not included (it is the last value); [..., T].
      value: values with their boundary, see ``terminal_twist``; [..., T + 1].
      mask: real tokens, those of the environment included (the value changes there too); [..., T].
      decay: lambda of GAE, in [0, 1].

    Returns:
      Advantages, 0 behind the mask; [..., T].
    """
    delta = jnp.where(mask > 0, reward + value[..., 1:] - value[..., :-1], 0.0)

    def body(carry, delta_t):
        carry = delta_t + decay * carry
        return carry, carry

    advantage = jax.lax.scan(body, jnp.zeros_like(delta[..., 0]), jnp.moveaxis(delta, -1, 0), reverse=True)[1]
    return jnp.where(mask > 0, jnp.moveaxis(advantage, 0, -1), 0.0)
