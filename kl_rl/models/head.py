"""From hidden states to log-probabilities of given tokens, without ever holding all logits.

``log p(y) = z_y - logsumexp(z)`` with ``z = head(h)``. Positions go through in chunks over T, vocabularies in chunks
over V with a running logsumexp; each chunk is recomputed in the backward pass, so memory is one chunk of logits.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kl_rl.models.activations import local_rows, vocabulary_is_split
from kl_rl.models.config import DecoderConfig, Execution

__all__ = ["logits_of", "token_log_probs_of"]


def _matrix(config: DecoderConfig, weights: Any) -> tuple[jax.Array, int]:
    """The output matrix and which of its axes is the vocabulary."""
    if config.tied:
        return weights["embed"]["table"], 0
    return weights["head"]["kernel"], 1


def _product(config: DecoderConfig, hidden: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    """Logits [..., v] of some rows or columns of the output matrix, in float32 or better."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    contract = (((hidden.ndim - 1,), (1 - axis,)), ((), ()))
    logits = jax.lax.dot_general(hidden, matrix.astype(hidden.dtype), contract, preferred_element_type=wide)
    return logits if config.softcap is None else config.softcap * jnp.tanh(logits / config.softcap)


def logits_of(config: DecoderConfig, weights: Any, hidden: jax.Array) -> jax.Array:
    """All logits; hidden [..., d] -> [..., V], float32 or better."""
    matrix, axis = _matrix(config, weights)
    return _product(config, hidden, jax.lax.slice_in_dim(matrix, 0, config.vocab, axis=axis), axis)


def _log_probs(
    config: DecoderConfig, execution: Execution, weights: Any, hidden: jax.Array, target: jax.Array
):
    """Log-probabilities of one chunk of positions; hidden [B, t, d], target [B, t] -> [B, t]."""
    matrix, axis = _matrix(config, weights)
    size = execution.chunk_vocab
    if config.vocab <= size or vocabulary_is_split():
        logits = logits_of(config, weights, hidden)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    @jax.checkpoint
    def block(carry, start):
        total, chosen = carry
        first = jnp.minimum(start, config.vocab - size)  # the last block overlaps the one before it
        part = jax.lax.dynamic_slice_in_dim(matrix, first, size, axis=axis)
        logits = _product(config, hidden, part, axis)
        fresh = first + jnp.arange(size).reshape((1,) * target.ndim + (-1,)) >= start
        total = jnp.logaddexp(total, jax.nn.logsumexp(jnp.where(fresh, logits, -jnp.inf), axis=-1))
        inside = (target >= start) & (target < first + size)
        found = jnp.take_along_axis(logits, jnp.where(inside, target - first, 0)[..., None], axis=-1)[..., 0]
        return (total, jnp.where(inside, found, chosen)), None

    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    nothing = (jnp.full(target.shape, -jnp.inf, dtype), jnp.zeros(target.shape, dtype))
    (total, chosen), _ = jax.lax.scan(block, nothing, jnp.arange(0, config.vocab, size))
    return chosen - total


def token_log_probs_of(
    config: DecoderConfig, execution: Execution, weights: Any, hidden: jax.Array, target: jax.Array
) -> jax.Array:
    """Log-probabilities of given tokens, in nats.

    Args:
      config: vocabulary, soft-cap, tied or not.
      execution: chunk sizes; on each device logits exist for about ``chunk_rows`` positions and ``chunk_vocab`` entries
        (the device's share of them, where the vocabulary is split) at a time.
      weights: of the model.
      hidden: after the final norm; [B, T, d].
      target: token ids; [B, T].

    Returns:
      float32 or better; [B, T].
    """
    rows, length = target.shape
    here = local_rows(rows)
    one = functools.partial(_log_probs, config, execution)
    if here * length * config.vocab <= execution.chunk_rows * execution.chunk_vocab:
        return one(weights, hidden, target)
    size = min(length, max(1, execution.chunk_rows // here))
    padding = -length % size
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    target = jnp.pad(target, ((0, 0), (0, padding)))
    count = (length + padding) // size

    def chunk(_, start):
        part = jax.lax.dynamic_slice_in_dim(hidden, start, size, axis=1)
        return None, one(weights, part, jax.lax.dynamic_slice_in_dim(target, start, size, axis=1))

    _, parts = jax.lax.scan(jax.checkpoint(chunk), None, size * jnp.arange(count))
    return jnp.moveaxis(parts, 0, 1).reshape(rows, -1)[:, :length]
