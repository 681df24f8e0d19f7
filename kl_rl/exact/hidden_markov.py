"""Hidden Markov base processes: the small worlds in which every conditional of the base model is known exactly."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kl_rl.core import numerics
from kl_rl.core.policy import Decoder, Policy

__all__ = ["HiddenMarkov", "belief_after", "hidden_markov_policy"]


class HiddenMarkov(NamedTuple):
    """``z_1 ~ initial, y_t ~ emission[z_t], z_{t+1} ~ transition[z_t]``, all as log-probabilities in nats.

    A Markov chain over tokens is the case S = V with the identity as emission.
    """

    log_initial: jax.Array  # [S]
    log_transition: jax.Array  # [S, S]
    log_emission: jax.Array  # [S, V]


def _predict(process: HiddenMarkov, log_belief: jax.Array) -> jax.Array:
    """Next-token log-probabilities from a predictive belief over states; [..., S] -> [..., V]."""
    single = lambda belief: jax.nn.logsumexp(belief[:, None] + process.log_emission, axis=0)
    return jnp.vectorize(single, signature="(s)->(v)")(log_belief)


def _advance(process: HiddenMarkov, log_belief: jax.Array, token: jax.Array) -> jax.Array:
    """Condition the predictive belief on a token and move one step; tokens >= V (begin marks) change nothing."""
    vocab = process.log_emission.shape[1]

    def single(belief, token):
        seen = belief + process.log_emission[:, jnp.minimum(token, vocab - 1)]
        moved = numerics.safe_log_softmax(jax.nn.logsumexp(seen[:, None] + process.log_transition, axis=0))
        return jnp.where(token < vocab, moved, belief)

    return jnp.vectorize(single, signature="(s),()->(s)")(log_belief, token)


def belief_after(process: HiddenMarkov, prompt: jax.Array) -> jax.Array:
    """Predictive log-belief over the next hidden state after a prompt; [..., L] -> [..., S]."""
    start = jnp.broadcast_to(process.log_initial, (*prompt.shape[:-1], process.log_initial.shape[0]))
    step = lambda belief, token: (_advance(process, belief, token), None)
    return jax.lax.scan(step, start, jnp.moveaxis(prompt, -1, 0))[0]


def _apply(process: HiddenMarkov, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
    batch = jnp.broadcast_shapes(prompt.shape[:-1], tokens.shape[:-1])
    belief = belief_after(process, jnp.broadcast_to(prompt, (*batch, prompt.shape[-1])))
    step = lambda belief, token: (_advance(process, belief, token), _predict(process, belief))
    tokens = jnp.broadcast_to(tokens, (*batch, tokens.shape[-1]))
    logits = jax.lax.scan(step, belief, jnp.moveaxis(tokens, -1, 0))[1]
    return jnp.moveaxis(logits, 0, -2)


def _init(process: HiddenMarkov, prompt: jax.Array, horizon: int) -> Any:
    belief = belief_after(process, prompt)
    return _predict(process, belief), belief


def _step(process: HiddenMarkov, belief: jax.Array, token: jax.Array) -> Any:
    belief = _advance(process, belief, token)
    return _predict(process, belief), belief


def hidden_markov_policy(process: HiddenMarkov) -> Policy:
    """The process as a policy: exact next-token log-probabilities by forward filtering (Rabiner 1989)."""
    return Policy(process, _apply, Decoder(_init, _step))
