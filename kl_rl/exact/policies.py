"""p*, and p0 given its reward, as policies: the base process steered by exact twists.

An optimally twisted proposal is the posterior itself (T1.3; Zhao et al. 2024, arXiv 2404.17546).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kl_rl.core.policy import Decoder, Policy
from kl_rl.exact.automaton import Automaton
from kl_rl.exact.hidden_markov import HiddenMarkov, hidden_markov_policy
from kl_rl.exact.lattice import Lattice
from kl_rl.exact.messages import backward, counting_graph, log_sum_exp, start, tilted_graph

__all__ = ["TwistedProcess", "posterior_policy", "reward_conditioned_policy"]

_jit = functools.partial(jax.jit, static_argnames=("horizon", "end"))


class TwistedProcess(NamedTuple):
    """Parameters of a base process steered by exact twists.

    Attributes:
      process: the base.
      automaton: the reward, which the prompt moves.
      next: graph of the completion; [Q', V].
      log_weight: its log-evidence, nats; [Q', V].
      ahead: messages behind each token, nats; [T, S, Q'].
      stride: a prompt that ends in automaton state q starts the completion in graph state `stride q + shift`.
      shift: see stride.
    """

    process: HiddenMarkov
    automaton: Automaton
    next: jax.Array
    log_weight: jax.Array
    ahead: jax.Array
    stride: jax.Array
    shift: jax.Array


def _row(params: TwistedProcess, belief: jax.Array, state: jax.Array, ahead: jax.Array) -> jax.Array:
    """Logits `log sum_z belief(z) B(v|z) e^{w(q, v) + ahead(z, next(q, v))}`; [S], [], [S, Q'] -> [V]."""
    future = params.process.log_emission + ahead[:, params.next[state]]
    row = log_sum_exp(belief[:, None] + future, axis=0) + params.log_weight[state]
    return jnp.where(jnp.max(row) > -jnp.inf, row, 0.0)  # behind an impossible prefix any law will do


def _advance(params: TwistedProcess, belief: jax.Array, state: jax.Array, token: jax.Array) -> Any:
    """Filter the belief and move the graph state; [B, S], [B], [B]."""
    decoder = hidden_markov_policy(params.process).decoder
    assert decoder is not None
    return decoder.step(params.process, belief, token)[1], params.next[state, token]


def _begin(params: TwistedProcess, prompt: jax.Array) -> tuple[jax.Array, jax.Array]:
    belief, state = start(params.process, params.automaton, prompt)
    return belief, state * params.stride + params.shift


_rows = jax.vmap(_row, in_axes=(None, 0, 0, None))


def _apply(params: TwistedProcess, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
    horizon = tokens.shape[-1]
    if horizon > params.ahead.shape[0]:
        raise ValueError(
            f"tokens have length {horizon}, but this posterior was computed for a horizon of "
            f"{params.ahead.shape[0]}: build the policy with a longer horizon"
        )
    batch = jnp.broadcast_shapes(prompt.shape[:-1], tokens.shape[:-1])
    prompt = jnp.broadcast_to(prompt, (*batch, prompt.shape[-1])).reshape(-1, prompt.shape[-1])
    flat = jnp.broadcast_to(tokens, (*batch, horizon)).reshape(-1, horizon)

    def body(carry, inputs):
        belief, state = carry
        token, ahead = inputs
        return _advance(params, belief, state, token), _rows(params, belief, state, ahead)

    _, logits = jax.lax.scan(body, _begin(params, prompt), (flat.T, params.ahead[:horizon]))
    return jnp.moveaxis(logits, 0, 1).reshape(*batch, horizon, -1)


def _init(params: TwistedProcess, prompt: jax.Array, horizon: int) -> Any:
    belief, state = _begin(params, prompt)
    return _rows(params, belief, state, params.ahead[0]), (belief, state, jnp.zeros((), jnp.int32))


def _step(params: TwistedProcess, cache: Any, token: jax.Array) -> Any:
    belief, state, position = cache
    belief, state = _advance(params, belief, state, token)
    position = position + 1
    ahead = jax.lax.dynamic_index_in_dim(params.ahead, position, keepdims=False)
    return _rows(params, belief, state, ahead), (belief, state, position)


@_jit
def posterior_policy(
    process: HiddenMarkov,
    automaton: Automaton,
    horizon: int,
    beta: jax.Array | float,
    end: int | None = None,
) -> Policy:
    """The posterior p* as a policy that can be sampled, scored and measured like any other.

    `p*(y_t = v | y_<t)` is proportional to `e^{w(q, v) / beta} sum_z b_t(z) B(v|z) ahead_t(z, next(q, v))`,
    with `b_t` the filtering belief; the sequence log-probability is `log p0 + r / beta - log Z`.

    Args:
      process: the base.
      automaton: the reward.
      horizon: T, the longest completion.
      beta: temperature, reward units per nat.
      end: end token, or None.

    Returns:
      A Policy over V tokens with `TwistedProcess` parameters and a decoder; the logits are unnormalized.
    """
    graph = tilted_graph(automaton, 1.0 / beta, end)
    ahead = backward(process, graph, horizon).ahead
    one, none = jnp.ones((), jnp.int32), jnp.zeros((), jnp.int32)
    params = TwistedProcess(process, automaton, graph.next, graph.log_weight, ahead, one, none)
    return Policy(params, _apply, Decoder(_init, _step))


@_jit
def reward_conditioned_policy(
    process: HiddenMarkov,
    automaton: Automaton,
    horizon: int,
    lattice: Lattice,
    level: jax.Array | int,
    end: int | None = None,
) -> Policy:
    """The base given its reward, `p0(y | x, r = lattice.values[level])`, as a policy.

    Args:
      process: the base.
      automaton: the reward.
      horizon: T, the exact number of tokens without an end token.
      lattice: from `score_lattice(automaton, horizon, end)`.
      level: index of a level that has mass under p0 for every prompt in use.
      end: end token, or None.

    Returns:
      A Policy as in `posterior_policy`.
    """
    graph = counting_graph(automaton, lattice, end)
    ahead = backward(process, graph, horizon).ahead
    size = jnp.asarray(lattice.values.shape[0], jnp.int32)
    shift = jnp.asarray(level, jnp.int32)
    params = TwistedProcess(process, automaton, graph.next, graph.log_weight, ahead, size, shift)
    return Policy(params, _apply, Decoder(_init, _step))
