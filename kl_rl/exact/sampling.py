"""Exact samplers from p* and from p0 given the reward, by ancestral sampling with exact twists.

`p*(z', v | z, q)` is proportional to `B(v|z) e^{w(q, v) / beta} A(z'|z) psi(z', next(q, v))` (T1.3).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kl_rl.core import numerics
from kl_rl.core.policy import sequence_log_prob
from kl_rl.core.trajectories import completion_mask
from kl_rl.exact.automaton import Automaton, automaton_reward
from kl_rl.exact.hidden_markov import HiddenMarkov, hidden_markov_policy
from kl_rl.exact.lattice import Lattice
from kl_rl.exact.messages import Graph, backward, counting_graph, log_evidence, start, tilted_graph
from kl_rl.exact.policies import posterior_policy

__all__ = ["sample_given_reward", "sample_posterior", "sampled_entropies"]

Samples = tuple[jax.Array, jax.Array, jax.Array]
_jit = functools.partial(jax.jit, static_argnames=("num_samples", "horizon", "end"))


def _draw(
    key: jax.Array,
    process: HiddenMarkov,
    graph: Graph,
    belief: jax.Array,
    state: jax.Array,
    horizon: int,
    num_samples: int,
) -> tuple[jax.Array, jax.Array]:
    """Ancestral samples from a belief [S] and a graph state []: tokens [K, T] and log-evidence []."""
    messages = backward(process, graph, horizon)

    def body(carry, inputs):
        hidden, state = carry
        key, twist, ahead = inputs
        emit_key, move_key = jax.random.split(key)
        score = process.log_emission[hidden] + graph.log_weight[state]  # [K, V]
        token = jax.random.categorical(emit_key, score + ahead[hidden[:, None], graph.next[state]])
        state = graph.next[state, token]
        hidden = jax.random.categorical(move_key, process.log_transition[hidden] + twist.T[state])
        return (hidden, state), token

    first_key, scan_key = jax.random.split(key)
    first = belief + messages.twist[0][:, state]
    hidden = jax.random.categorical(first_key, first, shape=(num_samples,))
    states = jnp.full(num_samples, state)
    keys = jax.random.split(scan_key, horizon)
    _, tokens = jax.lax.scan(body, (hidden, states), (keys, messages.twist[1:], messages.ahead))
    return tokens.T.astype(jnp.int32), log_evidence(messages.twist[0], belief, state)


def _finish(process: HiddenMarkov, prompt: jax.Array, tokens: jax.Array, end: int | None) -> Samples:
    """Cut strings at their end token and score them under the base: tokens, mask, log p0."""
    mask = completion_mask(tokens, end)
    tokens = tokens if end is None else jnp.where(mask > 0, tokens, end)
    prompts = jnp.broadcast_to(prompt, (tokens.shape[0], prompt.shape[0]))
    return tokens, mask, sequence_log_prob(hidden_markov_policy(process), prompts, tokens, mask)


@_jit
def sample_posterior(
    key: jax.Array,
    process: HiddenMarkov,
    automaton: Automaton,
    prompt: jax.Array,
    horizon: int,
    beta: jax.Array | float,
    num_samples: int,
    end: int | None = None,
) -> Samples:
    """Independent exact samples of `p*(y | x) = p0(y | x) e^{r / beta} / Z`.

    Args:
      key: PRNG key.
      process: the base.
      automaton: the reward.
      prompt: one prompt; [L].
      horizon: T.
      beta: temperature, reward units per nat; inf samples p0.
      num_samples: K.
      end: end token, or None.

    Returns:
      tokens [K, T] (`end` behind the mask), mask [K, T], and `log p*(y) = log p0(y) + r / beta - log Z` in
      nats [K].
    """
    belief, state = start(process, automaton, prompt)
    graph = tilted_graph(automaton, 1.0 / beta, end)
    tokens, log_z = _draw(key, process, graph, belief, state, horizon, num_samples)
    tokens, mask, log_base = _finish(process, prompt, tokens, end)
    return tokens, mask, log_base + automaton_reward(automaton, prompt, tokens, mask) / beta - log_z


@_jit
def sample_given_reward(
    key: jax.Array,
    process: HiddenMarkov,
    automaton: Automaton,
    prompt: jax.Array,
    horizon: int,
    lattice: Lattice,
    level: jax.Array | int,
    num_samples: int,
    end: int | None = None,
) -> Samples:
    """Independent exact samples of `p0(y | x, r = lattice.values[level])`.

    Args:
      key: PRNG key.
      process: the base.
      automaton: the reward.
      prompt: one prompt; [L].
      horizon: T.
      lattice: from `score_lattice(automaton, horizon, end)`.
      level: index of a level that has mass under p0; traced.
      num_samples: K.
      end: end token, or None.

    Returns:
      tokens [K, T], mask [K, T], and `log p0(y | r) = log p0(y) - log p0(r)` in nats [K]; NaN if the level
      has no mass.
    """
    belief, state = start(process, automaton, prompt)
    graph = counting_graph(automaton, lattice, end)
    state = state * lattice.values.shape[0] + level
    tokens, log_level = _draw(key, process, graph, belief, state, horizon, num_samples)
    tokens, mask, log_base = _finish(process, prompt, tokens, end)
    return tokens, mask, jnp.where(log_level > -jnp.inf, log_base - log_level, jnp.nan)


@_jit
def sampled_entropies(
    key: jax.Array,
    process: HiddenMarkov,
    automaton: Automaton,
    prompt: jax.Array,
    horizon: int,
    beta: jax.Array | float,
    num_samples: int,
    end: int | None = None,
) -> jax.Array:
    """Unbiased estimates of the entropy of p*: `sum_t H(p*(. | y_<t))` along exact samples, in nats.

    The string entropy of a hidden Markov process has no polynomial formula; where the string determines the
    hidden path, `path_entropy` is exact.

    Args:
      key: PRNG key.
      process: the base.
      automaton: the reward.
      prompt: one prompt; [L].
      horizon: T.
      beta: temperature; inf for p0.
      num_samples: K.
      end: end token, or None.

    Returns:
      [K]; their mean estimates the entropy, with the standard error of a mean.
    """
    tokens, mask, _ = sample_posterior(key, process, automaton, prompt, horizon, beta, num_samples, end)
    logits = posterior_policy(process, automaton, horizon, beta, end).logits(prompt, tokens)
    log_probs = numerics.safe_log_softmax(logits)
    entropy = -jnp.sum(numerics.multiply_no_nan(log_probs, jnp.exp(log_probs)), axis=-1)
    return numerics.masked_sum(entropy, mask)
