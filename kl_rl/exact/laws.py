"""Exact laws of the product of hidden state and automaton state: twists, log Z, moments, reward and token laws."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.exact.automaton import Automaton
from kl_rl.exact.hidden_markov import HiddenMarkov
from kl_rl.exact.lattice import Lattice
from kl_rl.exact.messages import backward, counting_graph, log_evidence, start, tilted_graph

__all__ = [
    "Moments",
    "is_unifilar",
    "lattice_log_partition",
    "log_twists",
    "path_entropy",
    "posterior_moments",
    "reward_distribution",
    "token_marginals",
    "token_marginals_given_reward",
]

_jit = functools.partial(jax.jit, static_argnames=("horizon", "end"))


class Moments(NamedTuple):
    """Exact `log Z`, `E_{p*} r`, `Var_{p*} r` (reward units) and `KL(p* || p0)`; logs in nats; each [...]."""

    log_z: jax.Array
    reward_mean: jax.Array
    reward_variance: jax.Array
    kl: jax.Array


@_jit
def log_twists(
    process: HiddenMarkov, automaton: Automaton, horizon: int, beta: jax.Array | float, end: int | None = None
) -> jax.Array:
    """Soft values / beta: `log psi_t(z, q) = log E[exp(sum_{s >= t} w_s / beta) | z_t = z, q_t = q]` (T1.3).

    `psi_t(z, q) = sum_v B(v|z) e^{w(q, v) / beta} sum_z' A(z'|z) psi_{t+1}(z', next(q, v))`, `psi_T = 1`.

    Args:
      process: the base, S states.
      automaton: the reward, Q states.
      horizon: T.
      beta: temperature, reward units per nat; traced.
      end: end token, or None.

    Returns:
      [T + 1, S, Q], nats.
    """
    graph = tilted_graph(automaton, 1.0 / beta, end)
    return backward(process, graph, horizon).twist[..., : automaton.next.shape[0]]


@_jit
def lattice_log_partition(
    process: HiddenMarkov,
    automaton: Automaton,
    prompt: jax.Array,
    horizon: int,
    beta: jax.Array | float,
    end: int | None = None,
) -> jax.Array:
    """`log Z(x) = log E_{p0} exp(r / beta)`, in nats (T1.1); prompt [..., L] -> [...]."""
    twist = backward(process, tilted_graph(automaton, 1.0 / beta, end), horizon).twist[0]
    return log_evidence(twist, *start(process, automaton, prompt))


@_jit
def posterior_moments(
    process: HiddenMarkov,
    automaton: Automaton,
    prompt: jax.Array,
    horizon: int,
    beta: jax.Array | float,
    end: int | None = None,
) -> Moments:
    """Derivatives of `Lambda(lambda) = log E_{p0} e^{lambda r}` at `lambda = 1 / beta` (T1.2).

    `E_{p*} r = Lambda'`, `Var_{p*} r = Lambda''`, `KL(p* || p0) = lambda Lambda' - Lambda`. `beta = inf`
    gives p0.

    Args:
      process: the base.
      automaton: the reward.
      prompt: [..., L].
      horizon: T.
      beta: temperature, reward units per nat.
      end: end token, or None.

    Returns:
      Moments, each [...].
    """
    belief, state = start(process, automaton, prompt)

    def cumulant(scale):
        graph = tilted_graph(automaton, scale, end)
        return log_evidence(backward(process, graph, horizon).twist[0], belief, state)

    scale = jnp.asarray(1.0 / beta, automaton.weight.dtype)
    slope = lambda x: jax.jvp(cumulant, (x,), (jnp.ones_like(x),))
    (log_z, mean), (_, variance) = jax.jvp(slope, (scale,), (jnp.ones_like(scale),))
    return Moments(log_z, mean, variance, scale * mean - log_z)


def is_unifilar(process: HiddenMarkov) -> bool:
    """Whether strings determine hidden paths: no token leads from one state, or the start, to two.

    Args:
      process: concrete arrays; this runs on the host.

    Returns:
      True for Markov chains and n-grams; then `path_entropy` is the entropy of the strings.
    """
    initial, transition, emission = (np.asarray(table) > -np.inf for table in process)
    moves = np.concatenate([initial[None], transition]).astype(int)  # [S + 1, S]
    return bool(np.all(moves @ emission.astype(int) <= 1))


@_jit
def path_entropy(
    process: HiddenMarkov,
    automaton: Automaton,
    prompt: jax.Array,
    horizon: int,
    beta: jax.Array | float,
    end: int | None = None,
) -> jax.Array:
    """Entropy of p* over pairs (string, hidden path): `log Z - E_{p*}[r / beta + log p0(z, y)]`, in nats.

    The expected log-probability is the derivative of log Z along the log-parameters. Where the string
    determines the path (Markov chains, n-grams) this *is* the entropy of the strings; otherwise it is an
    upper bound of it.

    Args:
      process: the base.
      automaton: the reward.
      prompt: [..., L].
      horizon: T.
      beta: temperature; inf for the entropy of p0.
      end: end token, or None.

    Returns:
      [...].
    """
    belief, state = start(process, automaton, prompt)

    def evidence(belief, process):
        graph = tilted_graph(automaton, 1.0 / beta, end)
        return log_evidence(backward(process, graph, horizon).twist[0], belief, state)

    finite = lambda x: jnp.where(jnp.isfinite(x), x, 0.0)
    log_z, log_path = jax.jvp(evidence, (belief, process), jax.tree.map(finite, (belief, process)))
    mean = posterior_moments(process, automaton, prompt, horizon, beta, end).reward_mean
    return log_z - mean / beta - log_path


@_jit
def reward_distribution(
    process: HiddenMarkov,
    automaton: Automaton,
    prompt: jax.Array,
    horizon: int,
    lattice: Lattice,
    end: int | None = None,
) -> jax.Array:
    """Exact log-law of the score under p0 on `lattice.values`; its tilt by `r / beta` is that of p*.

    Args:
      process: the base.
      automaton: the reward.
      prompt: [..., L].
      horizon: T.
      lattice: from `score_lattice(automaton, horizon, end)`.
      end: end token, or None.

    Returns:
      Log-probabilities in nats, -inf for unreachable points; [..., K].
    """
    twist = backward(process, counting_graph(automaton, lattice, end), horizon).twist[0]
    belief, state = start(process, automaton, prompt)
    size = lattice.values.shape[0]
    states = state[..., None] * size + jnp.arange(size).reshape((1,) * state.ndim + (size,))
    return log_evidence(twist, belief[..., None, :], states)


@_jit
def token_marginals(
    process: HiddenMarkov,
    automaton: Automaton,
    prompt: jax.Array,
    horizon: int,
    beta: jax.Array | float,
    end: int | None = None,
) -> jax.Array:
    """`p*(y_t = v)` for tokens inside the mask: the derivative of log Z in evidence on y_t; [..., T, V]."""
    belief, state = start(process, automaton, prompt)
    graph = tilted_graph(automaton, 1.0 / beta, end)
    evidence = lambda bias: log_evidence(backward(process, graph, horizon, bias).twist[0], belief, state)
    return jax.jacrev(evidence)(jnp.zeros((horizon, automaton.next.shape[1]), automaton.weight.dtype))


@_jit
def token_marginals_given_reward(
    process: HiddenMarkov,
    automaton: Automaton,
    prompt: jax.Array,
    horizon: int,
    lattice: Lattice,
    level: jax.Array | int,
    end: int | None = None,
) -> jax.Array:
    """`p0(y_t = v | r = lattice.values[level])` for tokens inside the mask; 0 for an unreachable level."""
    belief, state = start(process, automaton, prompt)
    graph = counting_graph(automaton, lattice, end)
    state = state * lattice.values.shape[0] + level
    evidence = lambda bias: log_evidence(backward(process, graph, horizon, bias).twist[0], belief, state)
    return jax.jacrev(evidence)(jnp.zeros((horizon, automaton.next.shape[1]), automaton.weight.dtype))
