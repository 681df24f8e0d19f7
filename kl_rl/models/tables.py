"""Tables of logits: exact policies for tiny worlds, from a bigram (context 1) to the full table (context T)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kl_rl.policy import Decoder, Policy

__all__ = ["constant_twist", "table_policy", "table_twist"]


@dataclasses.dataclass(frozen=True)
class _Context:
    """Rows of the table: the last ``context`` tokens, begin mark V included; [..., T] -> [..., T (+1)]."""

    vocab: int
    context: int

    def start(self, prompt: jax.Array) -> jax.Array:
        base, row = self.vocab + 1, jnp.zeros(prompt.shape[:-1], jnp.int32)
        for _ in range(self.context):
            row = row * base + self.vocab
        for column in range(prompt.shape[-1]):
            row = self.push(row, jnp.minimum(prompt[..., column], self.vocab))
        return row

    def push(self, row: jax.Array, token: jax.Array) -> jax.Array:
        return (row * (self.vocab + 1) + token.astype(jnp.int32)) % (self.vocab + 1) ** self.context

    def rows(self, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        start = jnp.broadcast_to(self.start(prompt), tokens.shape[:-1])
        step = lambda row, token: (self.push(row, token), row)  # noqa: E731
        last, rows = jax.lax.scan(step, start, jnp.moveaxis(tokens, -1, 0))
        return jnp.concatenate([jnp.moveaxis(rows, 0, -1), last[..., None]], axis=-1)


@dataclasses.dataclass(frozen=True)
class _TableApply:
    context: _Context

    def __call__(self, params: jax.Array, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        return params[self.context.rows(prompt, tokens)[..., :-1]]


@dataclasses.dataclass(frozen=True)
class _TableInit:
    context: _Context

    def __call__(self, params: jax.Array, prompt: jax.Array, horizon: int) -> Any:
        row = self.context.start(prompt)
        return params[row], row


@dataclasses.dataclass(frozen=True)
class _TableStep:
    context: _Context

    def __call__(self, params: jax.Array, row: jax.Array, token: jax.Array) -> Any:
        row = self.context.push(row, token)
        return params[row], row


@dataclasses.dataclass(frozen=True)
class _TwistApply:
    context: _Context

    def __call__(self, params: jax.Array, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        return params[self.context.rows(prompt, tokens)]


def table_policy(key: jax.Array, vocab: int, context: int, *, scale: float = 0.0) -> Policy:
    """Logits looked up by the last ``context`` tokens; ``context = T`` is the full table, 1 a bigram.

    Args:
      key: PRNG key for the initial logits.
      vocab: V.
      context: tokens of memory; the table has (V + 1)**context rows.
      scale: standard deviation of the initial logits.

    Returns:
      Policy with ``params [(V + 1)**context, V]``; prompt ids >= V all count as the begin mark.
    """
    rows = _Context(vocab, context)
    params = scale * jax.random.normal(key, ((vocab + 1) ** context, vocab), jnp.result_type(float))
    return Policy(params, _TableApply(rows), Decoder(_TableInit(rows), _TableStep(rows)))


def table_twist(vocab: int, context: int) -> Policy:
    """A table of log-twists by the last ``context`` tokens, initially 0: ``apply -> [..., T + 1]``, in nats.

    Positions are not told apart unless the context is at least T (begin marks then show how much has been read).
    """
    return Policy(jnp.zeros((vocab + 1) ** context, jnp.result_type(float)), _TwistApply(_Context(vocab, context)))


def _constant(params: jax.Array, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.broadcast_to(params, (*tokens.shape[:-1], tokens.shape[-1] + 1))


def constant_twist() -> Policy:
    """One learned number, the log Z of trajectory balance for worlds with a single prompt."""
    return Policy(jnp.zeros((), jnp.result_type(float)), _constant)
