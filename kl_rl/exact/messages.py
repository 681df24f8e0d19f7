"""Backward messages over hidden state times automaton state: the recursion behind `lattice_log_partition`.

The law given a reward level is the same computation on an automaton that also counts down the score still
owed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kl_rl.core import numerics
from kl_rl.exact.automaton import Automaton, run
from kl_rl.exact.hidden_markov import HiddenMarkov, belief_after
from kl_rl.exact.lattice import Lattice

__all__ = [
    "Graph",
    "Messages",
    "backward",
    "counting_graph",
    "log_evidence",
    "log_sum_exp",
    "start",
    "tilted_graph",
]


class Graph(NamedTuple):
    """An automaton with log-evidence on its transitions and on the state in which a string stops.

    Attributes:
      next: [Q, V].
      log_weight: [Q, V], nats.
      log_final: [Q], nats.
      live: False for the states in which the string has ended; [Q].
    """

    next: jax.Array
    log_weight: jax.Array
    log_final: jax.Array
    live: jax.Array


class Messages(NamedTuple):
    """Log of the expected future evidence, in nats.

    Attributes:
      twist: before token t, in hidden state z and automaton state q; [T + 1, S, Q].
      ahead: after token t was emitted from z and led to q; [T, S, Q].
    """

    twist: jax.Array
    ahead: jax.Array


def log_sum_exp(x: jax.Array, axis: int) -> jax.Array:
    """Log-sum-exp whose value and gradient survive slices that are all -inf (gradient 0)."""
    top = jnp.max(x, axis=axis, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    return numerics.safe_log(jnp.sum(jnp.exp(x - top), axis=axis)) + jnp.squeeze(top, axis)


def _absorbing(following: jax.Array, end: int | None) -> jax.Array:
    """Add a state in which ended strings stay; [Q, V] -> [Q + 1, V], or unchanged without an end token."""
    if end is None:
        return following
    size = following.shape[0]
    return jnp.pad(following.at[:, end].set(size), ((0, 1), (0, 0)), constant_values=size)


def tilted_graph(automaton: Automaton, inverse_beta: jax.Array | float, end: int | None) -> Graph:
    """Soft evidence `exp(r / beta)`: `weight / beta` on every transition.

    Args:
      automaton: the reward.
      inverse_beta: 1 / beta, nats per reward unit.
      end: end token, or None.

    Returns:
      A graph over the states of the automaton, and one more for ended strings if there is an end token.
    """
    following = _absorbing(automaton.next, end)
    size, extra = following.shape[0], following.shape[0] - automaton.next.shape[0]
    weight = jnp.pad(automaton.weight * inverse_beta, ((0, extra), (0, 0)))
    return Graph(following, weight, jnp.zeros(size, weight.dtype), jnp.arange(size) < size - extra)


def counting_graph(automaton: Automaton, lattice: Lattice, end: int | None) -> Graph:
    """Hard evidence `1[r = level]`: states (q, k) numbered `q K + k`, with k lattice steps still owed.

    Args:
      automaton: the reward.
      lattice: its K scores.
      end: end token, or None.

    Returns:
      A graph over Q K states (and K more for ended strings) in which debts must be paid when the string
      stops.
    """
    following = _absorbing(automaton.next, end)
    states, vocab = following.shape
    size, extra = lattice.values.shape[0], states - automaton.next.shape[0]
    owed = jnp.arange(size)
    steps = jnp.pad(jnp.asarray(lattice.steps), ((0, extra), (0, 0)))
    left = owed[None, :, None] - steps[:, None, :]  # [Q, K, V]
    flat = following[:, None, :] * size + jnp.clip(left, 0, size - 1)
    log_indicator = lambda x: jnp.where(x, 0.0, -jnp.inf).astype(automaton.weight.dtype)
    weight = log_indicator((left >= 0) & (left < size))
    final = log_indicator(jnp.tile(owed == lattice.zero, states))
    live = jnp.repeat(jnp.arange(states) < states - extra, size)
    following = flat.reshape(-1, vocab).astype(automaton.next.dtype)
    return Graph(following, weight.reshape(-1, vocab), final, live)


def backward(
    process: HiddenMarkov, graph: Graph, horizon: int, log_bias: jax.Array | None = None
) -> Messages:
    """All messages, from the last token to the first.

    `ahead_t(z, q) = log sum_z' A(z'|z) psi_{t+1}(z', q)`,
    `log psi_t(z, q) = log sum_v B(v|z) e^{w(q, v) + ahead_t(z, next(q, v))}`; ended strings keep their final
    evidence.

    Args:
      process: S states, transition A, emission B.
      graph: Q states.
      horizon: T.
      log_bias: extra log-evidence about single tokens, for derivatives; [T, V].

    Returns:
      The messages.
    """
    final = jnp.broadcast_to(graph.log_final[None], (process.log_initial.shape[0], graph.log_final.shape[0]))
    live = jnp.broadcast_to(graph.live[None], final.shape)
    bias = jnp.zeros((horizon, graph.next.shape[1]), final.dtype) if log_bias is None else log_bias

    @jax.checkpoint
    def body(twist, inputs):
        bias, last = inputs
        moved = log_sum_exp(process.log_transition[:, :, None] + twist[None], axis=1)
        ahead = jnp.where(live & ~last, moved, final)
        emitted = process.log_emission[:, None] + (graph.log_weight + bias[None])[None]  # [S, Q, V]
        twist = jnp.where(live, log_sum_exp(emitted + ahead[:, graph.next], axis=-1), final)
        return twist, (twist, ahead)

    last = jnp.arange(horizon) == horizon - 1
    _, (twist, ahead) = jax.lax.scan(body, final, (bias, last), reverse=True)
    return Messages(jnp.concatenate([twist, final[None]]), ahead)


def start(process: HiddenMarkov, automaton: Automaton, prompt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-belief [..., S] and automaton state [...] behind a prompt [..., L]; ids >= V are skipped."""
    vocab = automaton.next.shape[1]
    state, _ = run(automaton, automaton.start, jnp.minimum(prompt, vocab - 1), prompt < vocab)
    return belief_after(process, prompt), state


def log_evidence(twist: jax.Array, belief: jax.Array, state: jax.Array) -> jax.Array:
    """`log sum_z belief(z) twist(z, state)`, in nats; [S, Q], [..., S], [...] -> [...]."""
    return log_sum_exp(belief + twist.T[state], axis=-1)
