"""A twist head on a language model: log of the expected future evidence, for the empty prefix and after each token.

One object with many names: critic (soft value / beta), state flow, twist, log Z at position 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kl_rl.core.twist import Twist
from kl_rl.models.cache import Cache
from kl_rl.models.config import DecoderConfig, Execution
from kl_rl.models.shared import completion_hidden

__all__ = ["decoder_twist"]


def _read(head: Any, hidden: jax.Array) -> jax.Array:
    """The head on hidden states, in float32 or better; [..., d] -> [...], with actions [..., V]."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return hidden.astype(wide) @ head["kernel"].astype(wide) + head["bias"].astype(wide)


def _values(config: DecoderConfig, execution: Execution, weights: Any, prompt: jax.Array, tokens: jax.Array):
    """[P, L], [P, K, T] -> [P, K, T + 1], with actions [P, K, T, V]."""
    trunk, head = weights
    if head["kernel"].ndim > 1:
        return _read(head, completion_hidden(config, execution, trunk, prompt, tokens))
    padded = jnp.concatenate([tokens, tokens[..., -1:]], axis=-1)
    return _read(head, completion_hidden(config, execution, trunk, prompt, padded))


def _pair(weights: Any) -> tuple[Any, Any]:
    """Trunk and head, whether the trunk is shared (first) or trained (in one dict with the head)."""
    return weights if isinstance(weights, tuple) else (weights["trunk"], weights["head"])


@dataclasses.dataclass(frozen=True)
class _Apply:
    """``(weights, prompt [..., L], tokens [..., T]) -> log_twist [..., T + 1]``, or with actions ``[..., T, V]``."""

    config: DecoderConfig
    execution: Execution

    def __call__(self, weights: Any, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        rows = tokens.reshape(-1, 1, tokens.shape[-1])
        prompts = jnp.broadcast_to(prompt, (*tokens.shape[:-1], prompt.shape[-1])).reshape(
            -1, prompt.shape[-1]
        )
        values = _values(self.config, self.execution, _pair(weights), prompts, rows)
        return values.reshape(*tokens.shape[:-1], *values.shape[2:])


@dataclasses.dataclass(frozen=True)
class _Grouped:
    """``(weights, prompt [P, L], tokens [P, K, T]) -> log_twist [P, K, T + 1]``, each prompt computed once."""

    config: DecoderConfig
    execution: Execution

    def __call__(self, weights: Any, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        return _values(self.config, self.execution, _pair(weights), prompt, tokens)


@dataclasses.dataclass(frozen=True)
class _Beside:
    """``(weights, cache) -> log_twist [P * K]`` on the hidden states of a decoder that has the same trunk."""

    def __call__(self, weights: Any, cache: Cache) -> jax.Array:
        return _read(_pair(weights)[1], cache.hidden)


def decoder_twist(
    config: DecoderConfig,
    weights: Any,
    execution: Execution | None = None,
    *,
    train_trunk: bool = False,
    actions: bool = False,
) -> Twist:
    """A twist head that starts at zero, on the hidden states of a decoder.

    Args:
      config: the architecture of the trunk.
      weights: of the trunk.
      execution: how it is run.
      train_trunk: False: the trunk is somebody else's (the base's) and stays frozen, no second copy in memory; True:
        trunk and head are trained, as critics usually are.
      actions: one value for each token that may follow.

    Returns:
      The twist; on a frozen trunk it can be read beside the decoder of the policy with these weights.
    """
    how = (config, execution or Execution())
    dtype = weights["final_norm"]["scale"].dtype
    outputs = (config.vocab,) if actions else ()
    head = {"kernel": jnp.zeros((config.width, *outputs), dtype), "bias": jnp.zeros(outputs, dtype)}
    if train_trunk:
        return Twist({"trunk": weights, "head": head}, _Apply(*how), _Grouped(*how))
    return Twist(head, _Apply(*how), _Grouped(*how), _Beside(), shared=weights)
