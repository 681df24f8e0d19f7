"""Every string of a small world with its exact log-probability and score, on the host in float64.

A prefix tree is walked breadth-first in blocks; prefixes of probability zero are cut off, so structural zeros
cost nothing and never meet a logarithm. Each prefix carries the filtered belief over hidden states.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kl_rl.worlds.world import World

__all__ = ["Leaves", "walk_strings"]

_BLOCK = 2**16


class Leaves(NamedTuple):
    """The strings of positive probability.

    Attributes:
      log_prob: log p0(y | x), nats; [N].
      score: reward; [N].
    """

    log_prob: np.ndarray
    score: np.ndarray


class _Tables(NamedTuple):
    initial: np.ndarray  # [S]
    transition: np.ndarray  # [S, S]
    emission: np.ndarray  # [S, V]
    next: np.ndarray  # [Q, V]
    weight: np.ndarray  # [Q, V]


class _Prefixes(NamedTuple):
    log_prob: np.ndarray  # [n]
    belief: np.ndarray  # [n, S]
    state: np.ndarray  # [n]
    score: np.ndarray  # [n]


def walk_strings(world: World, prompt: np.ndarray) -> Leaves:
    """Log-probability under the base and score of every possible completion of a prompt.

    Args:
      world: the world; `world.num_strings` should be a few million at most.
      prompt: one row of `world.prompts`; [L].

    Returns:
      The leaves, in no particular order.
    """
    tables = _host_tables(world)
    stack, leaves = [(0, _root(world, tables, prompt))], []
    while stack:
        depth, prefixes = stack.pop()
        if depth == world.horizon:
            leaves.append(Leaves(prefixes.log_prob, prefixes.score))
            continue
        token, children = _expand(tables, prefixes)
        if world.end is not None:
            ended = token == world.end
            leaves.append(Leaves(children.log_prob[ended], children.score[ended]))
            children = _Prefixes(*(x[~ended] for x in children))
        for first in range(0, len(children.score), _BLOCK):
            stack.append((depth + 1, _Prefixes(*(x[first : first + _BLOCK] for x in children))))
    return Leaves(*(np.concatenate(column) for column in zip(*leaves, strict=True)))


def _host_tables(world: World) -> _Tables:
    initial, transition, emission = (np.exp(np.asarray(table, np.float64)) for table in world.process)
    following, weight = np.asarray(world.automaton.next), np.asarray(world.automaton.weight, np.float64)
    return _Tables(initial, transition, emission, following, weight)


def _root(world: World, tables: _Tables, prompt: np.ndarray) -> _Prefixes:
    """The empty completion: belief and automaton state behind the prompt."""
    belief, state = tables.initial, int(world.automaton.start)
    for token in prompt[prompt < world.vocab].tolist():
        belief = belief * tables.emission[:, token]
        belief = (belief / belief.sum()) @ tables.transition
        state = int(tables.next[state, token])
    return _Prefixes(np.zeros(1), belief[None], np.array([state]), np.zeros(1))


def _expand(tables: _Tables, prefixes: _Prefixes) -> tuple[np.ndarray, _Prefixes]:
    """All one-token extensions of positive probability, with their last tokens."""
    probability = prefixes.belief @ tables.emission  # [n, V]
    parent, token = np.nonzero(probability)
    chosen = probability[parent, token]
    belief = prefixes.belief[parent] * tables.emission.T[token] / chosen[:, None]
    state = prefixes.state[parent]
    log_prob = prefixes.log_prob[parent] + np.log(chosen)
    score = prefixes.score[parent] + tables.weight[state, token]
    return token, _Prefixes(log_prob, belief @ tables.transition, tables.next[state, token], score)
