"""Rewards as weighted deterministic automata: the score of a string is the sum of the weights along its run."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Automaton", "automaton_reward", "run"]


class Automaton(NamedTuple):
    """A weighted deterministic finite automaton over tokens.

    Attributes:
      start: start state; int scalar [].
      next: next state for (state, token); [Q, V].
      weight: reward collected on that transition; [Q, V].
    """

    start: jax.Array
    next: jax.Array
    weight: jax.Array


def run(
    automaton: Automaton, state: jax.Array, tokens: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Follow tokens from a state: final state and accumulated weight; masked tokens are skipped.

    Args:
      automaton: the automaton.
      state: [...].
      tokens: [..., T].
      mask: [..., T].

    Returns:
      Final state [...] and score [...].
    """

    def body(carry, inputs):
        state, score = carry
        token, live = inputs
        gained = jnp.where(live, automaton.weight[state, token], 0)
        return (jnp.where(live, automaton.next[state, token], state), score + gained), None

    steps = (jnp.moveaxis(tokens, -1, 0), jnp.moveaxis(mask, -1, 0) > 0)
    state = jnp.broadcast_to(state, tokens.shape[:-1]).astype(automaton.next.dtype)
    score = jnp.zeros(tokens.shape[:-1], automaton.weight.dtype)
    (state, score), _ = jax.lax.scan(body, (state, score), steps)
    return state, score


def automaton_reward(
    automaton: Automaton, prompt: jax.Array, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    """Score of completions. The prompt (ids below V only) moves the state; its own weights are not counted.

    Args:
      automaton: the automaton.
      prompt: ids >= V (begin or return tokens) are skipped; [..., L], broadcastable against tokens.
      tokens: [..., T].
      mask: [..., T].

    Returns:
      [...].
    """
    vocab = automaton.next.shape[1]
    prompt = jnp.broadcast_to(prompt, (*tokens.shape[:-1], prompt.shape[-1]))
    state, _ = run(automaton, automaton.start, jnp.minimum(prompt, vocab - 1), prompt < vocab)
    return run(automaton, state, tokens, mask)[1]
