"""Twists: the log of the expected future evidence, for every prefix of a completion.

One object with many names: soft value / beta (RL), critic (PPO), state flow (GFlowNets), twist (SMC), implicit value
(ILQL), and log Z at the empty prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kl_rl.core.policy import Weighted
from kl_rl.core.sampler import Progress
from kl_rl.core.trajectories import Trajectories

__all__ = ["Twist", "prefix_twists", "present_twist"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Twist(Weighted):
    """``log psi(x, y_<t)``, in nats, of every prefix; a head with actions has one for each token that may follow.

    Attributes:
      params: pytree of arrays.
      apply: static; ``apply(weights, prompt [..., L], tokens [..., T]) -> log_twist [..., T + 1]``, entry t of the
        prefix ``tokens[..., :t]``; with actions ``[..., T, V]``, entry (t, a) of that prefix followed by a. Hashable
        and equal by value, as a policy's.
      scorer: static; optional, the same for K completions of each prompt, ``(weights, prompt [P, L], tokens [P, K, T])
        -> [P, K, T + 1]``, each prompt computed once.
      beside: static; optional incremental form, ``(weights, cache) -> [B]``: the twist of the prefix that a policy's
        decoder has read, from that decoder's own cache, of whose hidden states it is a head.
      shared: arrays that belong to somebody else and are never trained, see ``kl_rl.Policy``.
    """

    params: Any
    apply: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    scorer: Callable[..., jax.Array] | None = dataclasses.field(default=None, metadata={"static": True})
    beside: Callable[..., jax.Array] | None = dataclasses.field(default=None, metadata={"static": True})
    shared: Any = None

    def alone(self) -> Twist:
        """Without the incremental form."""
        return dataclasses.replace(self, beside=None)


def prefix_twists(twist: Twist, batch: Trajectories) -> jax.Array:
    """A twist of every prefix of every completion, in nats, prompts computed once where the twist can share them.

    Args:
      twist: the head.
      batch: the trajectories.

    Returns:
      [P, K, T + 1]; of a head with actions [P, K, T, V].
    """
    tokens = jnp.where(batch.mask > 0, batch.tokens, 0)  # whatever pads them need not be an id
    if twist.scorer is not None:
        return twist.scorer(twist.weights, batch.prompt, tokens)
    prompt = jnp.broadcast_to(batch.prompt[:, None], (*tokens.shape[:2], batch.prompt.shape[-1]))
    return twist.apply(twist.weights, prompt, tokens)


def present_twist(twist: Twist, prompt: jax.Array, progress: Progress) -> jax.Array:
    """The twist of what a generation's decoder has read: all tokens written but the last, which it has not seen.

    Args:
      twist: of the policy that generates, if it has the form ``beside``; else every prefix is computed again.
      prompt: [P, L].
      progress: of the generation.

    Returns:
      Nats; [P * K]; of a head with actions [P * K, V], for each token that may follow.
    """
    if twist.beside is not None:
        return twist.beside(twist.weights, progress.cache)
    tokens = progress.tokens.T
    prompts = jnp.repeat(prompt, tokens.shape[0] // prompt.shape[0], axis=0)
    log_twist = twist.apply(twist.weights, prompts, tokens)
    return jax.lax.dynamic_index_in_dim(log_twist, progress.position - 1, axis=1, keepdims=False)
