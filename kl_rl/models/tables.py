"""Tables of logits: exact policies for tiny worlds, from a bigram (context 1) to the full table (context T)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kl_rl.core import numerics
from kl_rl.core.policy import Decoder, Policy
from kl_rl.core.twist import Twist

__all__ = ["constant_twist", "table_from_law", "table_policy", "table_twist"]


@dataclasses.dataclass(frozen=True)
class _Context:
    """Rows of the table: the last ``context`` ids, begin mark V and return tokens included.

    [..., T] -> [..., T (+1)].
    """

    vocab: int
    context: int
    extra: int

    @property
    def symbols(self) -> int:
        return self.vocab + self.extra

    @property
    def size(self) -> int:
        return self.symbols**self.context

    def start(self, prompt: jax.Array) -> jax.Array:
        row = jnp.zeros(prompt.shape[:-1], jnp.int32)
        for _ in range(self.context):
            row = row * self.symbols + self.vocab
        for column in range(prompt.shape[-1]):
            row = self.push(row, prompt[..., column])
        return row

    def push(self, row: jax.Array, token: jax.Array) -> jax.Array:
        return (row * self.symbols + token.astype(jnp.int32)) % self.size

    def rows(self, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        start = jnp.broadcast_to(self.start(prompt), tokens.shape[:-1])
        step = lambda row, token: (self.push(row, token), row)
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
    actions: bool = False

    def __call__(self, params: jax.Array, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        rows = self.context.rows(prompt, tokens)
        return params[rows[..., :-1] if self.actions else rows]


def _beside(params: jax.Array, row: jax.Array) -> jax.Array:
    """The entry of the row that the decoder of a table with the same context stands at."""
    return params[row]


def table_policy(key: jax.Array, vocab: int, context: int, *, extra: int = 1, scale: float = 0.0) -> Policy:
    """Logits looked up by the last ``context`` tokens; ``context = T`` is the full table, 1 a bigram.

    Args:
      key: PRNG key for the initial logits.
      vocab: V.
      context: tokens of memory; the table has (V + extra)**context rows.
      extra: input ids above V - 1: the begin mark V, then return tokens.
      scale: standard deviation of the initial logits.

    Returns:
      Policy with ``params [(V + extra)**context, V]``.
    """
    rows = _Context(vocab, context, extra)
    params = scale * jax.random.normal(key, (rows.size, vocab), jnp.result_type(float))
    return Policy(params, _TableApply(rows), Decoder(_TableInit(rows), _TableStep(rows)))


def table_twist(vocab: int, context: int, *, extra: int = 1, actions: bool = False) -> Twist:
    """A table of log-twists by the last ``context`` tokens, initially 0, in nats.

    Positions are not told apart unless the context is at least T (begin marks then show how much has been
    read).
    """
    rows = _Context(vocab, context, extra)
    shape = (rows.size, vocab) if actions else (rows.size,)
    return Twist(jnp.zeros(shape, jnp.result_type(float)), _TwistApply(rows, actions), beside=_beside)


def _constant(params: jax.Array, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.broadcast_to(params, (*tokens.shape[:-1], tokens.shape[-1] + 1))


def constant_twist() -> Twist:
    """One learned number, the log Z of trajectory balance for worlds with a single prompt."""
    return Twist(jnp.zeros((), jnp.result_type(float)), _constant)


def table_from_law(log_law: jax.Array, prompt: jax.Array, tokens: jax.Array, policy: Policy) -> Policy:
    """The full table whose law over all strings is the given one, for one prompt.

    Args:
      log_law: log-probabilities of the strings, nats; [N].
      prompt: [L].
      tokens: all strings of T tokens; [N, T].
      policy: from ``table_policy`` with context >= T; rows of other prompts are kept.

    Returns:
      The policy with ``log p(v | prefix)`` as logits.
    """
    assert isinstance(policy.apply, _TableApply)
    rows = policy.apply.context.rows(jnp.broadcast_to(prompt, (*tokens.shape[:1], prompt.shape[0])), tokens)
    size, vocab = policy.params.shape
    cell = (rows[:, :-1] * vocab + tokens).reshape(-1)
    mass = jnp.repeat(jnp.exp(log_law), tokens.shape[1])
    joint = jax.ops.segment_sum(mass, cell, size * vocab).reshape(size, vocab)
    total = joint.sum(axis=1, keepdims=True)
    conditional = numerics.safe_log(joint) - numerics.safe_log(jnp.where(total > 0, total, 1.0))
    return policy.with_params(jnp.where(total > 0, conditional, policy.params))
