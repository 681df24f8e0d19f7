"""Tiny worlds whose every string can be listed."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_rl import exact
from kl_rl.core.policy import Policy
from kl_rl.exact.automaton import Automaton, automaton_reward
from kl_rl.exact.hidden_markov import HiddenMarkov, hidden_markov_policy
from kl_rl.models.tables import table_policy


class Tiny(NamedTuple):
    """A base, a reward with ties, a temperature and a policy of some class; N strings, all listed."""

    process: HiddenMarkov
    automaton: Automaton
    prompt: jax.Array
    horizon: int
    end: int | None
    beta: float
    strings: exact.Enumeration
    policy: Policy
    log_base: jax.Array  # [N]
    reward: jax.Array  # [N]
    levels: exact.Levels
    log_q: jax.Array  # [N]
    log_evidence: jax.Array  # [N]
    log_posterior: jax.Array  # [N]

    def at(self, params: jax.Array) -> Tiny:
        """The same world with another policy of the class."""
        policy = self.policy.with_params(params)
        return self._replace(policy=policy, log_q=score_strings(policy, self.prompt, self.strings))

    def log_prob(self, params: jax.Array) -> jax.Array:
        """log q of every string as a function of the parameters of the policy's class; [N]."""
        return exact.log_law(self.policy.with_params(params), self.prompt, self.strings)

    def reaching(self, log_target: jax.Array) -> jax.Array:
        """Parameters of the full table (context T) whose policy is a given law of strings."""
        prefix, child = prefix_probabilities(self, log_target)
        params = np.zeros(self.policy.params.shape)
        context = getattr(self.policy.apply, "context")  # noqa: B009
        rows = context.rows(self.prompt, self.strings.tokens)[:, :-1]
        live = np.asarray(self.strings.mask) > 0
        params[np.asarray(rows)[live]] = np.log(np.maximum(child / prefix[..., None], 1e-300))[live]
        return jnp.asarray(params)

    def expected_gradient(self, objective, *, num_samples=2, log_sampler=None) -> np.ndarray:
        """Gradient of E[mean_k objective(log_q_k, index_k)], tuple probabilities fixed, over ALL tuples."""
        law = self.log_q if log_sampler is None else log_sampler

        def total(log_q):
            estimator = lambda index: jnp.mean(objective(log_q[index][None], index))
            return exact.expectation_over_tuples(estimator, law, num_samples)

        return self.gradient(total)

    def gradient(self, functional) -> np.ndarray:
        """Gradient of a functional of log q [N] with respect to the parameters, by the chain rule."""
        return np.tensordot(jax.jit(jax.grad(functional))(self.log_q), self.jacobian(), 1)

    def jacobian(self) -> np.ndarray:
        """d log q(y) / d params for every string; [N, rows, V]."""
        return np.asarray(score_jacobian(self.policy, self.prompt, self.strings).params)


def prefix_probabilities(tiny: Tiny, log_p: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """p(y_<t) and p(y_<t, v) for every string and position, by brute summation; [N, T], [N, T, V]."""
    tokens, p = np.asarray(tiny.strings.tokens), np.exp(log_p)
    one_hot = np.eye(tiny.automaton.next.shape[1])
    prefix, child = [], []
    for t in range(tiny.horizon):
        same = np.all(tokens[:, None, :t] == tokens[None, :, :t], axis=-1)
        prefix.append(same @ p)
        child.append(same @ (p[:, None] * one_hot[tokens[:, t]]))
    return np.stack(prefix, axis=1), np.stack(child, axis=1)


score_strings = jax.jit(exact.log_law)
score_jacobian = jax.jit(jax.jacobian(exact.log_law))
score_reward = jax.jit(automaton_reward)


def make_tiny(seed: int, *, vocab=3, horizon=3, end=None, context=None, beta=0.7) -> Tiny:
    rng = np.random.default_rng(seed)
    law = lambda *shape: jnp.asarray(np.log(rng.dirichlet(np.full(shape[-1], 2.0), shape[:-1])))
    process = HiddenMarkov(law(2), law(2, 2), law(2, vocab))
    score, step = np.zeros((2, vocab)), np.zeros((2, vocab), np.int32)
    score[:, 1], step[:, 1] = [1.0, 2.0], 1
    score[1, -1] -= 1.0
    automaton = Automaton(jnp.int32(0), jnp.asarray(step), jnp.asarray(score))
    prompt = jnp.array([vocab])  # a begin mark
    strings = exact.enumerate_strings(vocab, horizon, end=end)
    log_base = score_strings(hidden_markov_policy(process), prompt, strings)
    reward = score_reward(automaton, prompt, strings.tokens, strings.mask)
    policy = table_policy(jax.random.key(0), vocab, context or horizon)
    policy = policy.with_params(jnp.asarray(0.8 * rng.normal(size=policy.params.shape)))
    levels = exact.reward_levels(np.asarray(reward))
    log_q = score_strings(policy, prompt, strings)
    log_evidence = reward / beta
    log_posterior = jax.jit(exact.log_posterior)(log_base, log_evidence)
    problem = (process, automaton, prompt, horizon, end, beta, strings, policy)
    return Tiny(*problem, log_base, reward, levels, log_q, log_evidence, log_posterior)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Tiny programs spend their time in the compiler: switch its optimizations off in this folder."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", params=["table", "bigram with end"])
def tiny(request) -> Tiny:
    """27 strings and every law of them; or 15 strings of different lengths and a class too small for p*."""
    return make_tiny(0) if request.param == "table" else make_tiny(1, end=2, context=1)


@pytest.fixture(scope="module", params=["fixed length", "with end"])
def table(request) -> Tiny:
    """Worlds with the full table as policy class, so that p* can be reached."""
    return make_tiny(2) if request.param == "fixed length" else make_tiny(3, end=2)


@pytest.fixture(scope="module")
def smallest() -> Tiny:
    """8 strings, for sums over all triples."""
    return make_tiny(4, vocab=2)


@pytest.fixture(scope="module")
def prefixes():
    """p(y_<t) and p(y_<t, v) of a law of strings, by brute summation."""
    return prefix_probabilities


@pytest.fixture(params=range(3))
def random_pair(request) -> tuple[jax.Array, jax.Array, jax.Array, exact.Levels]:
    """(log q, log p0, reward, levels): 12 outcomes at 4 levels, laws drawn at random."""
    rng = np.random.default_rng(request.param)
    log_q, log_p = np.log(rng.dirichlet(np.ones(12), 2))
    reward = rng.permutation(np.repeat([-1.0, 0.0, 0.5, 2.0], [2, 3, 3, 4]))
    return jnp.asarray(log_q), jnp.asarray(log_p), jnp.asarray(reward), exact.reward_levels(reward)
