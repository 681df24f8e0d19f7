"""Conditioning on the return: one conditional policy for every return at once, and a return prior at test time.

Exact conditioning with any return prior has C = 0; with the exponentially tilted prior ``pi(R) ~ p0(R)
e^{R/beta}`` it is p*_beta itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kl_rl import objectives
from kl_rl.core import numerics
from kl_rl.core.mixtures import mixture
from kl_rl.core.policy import Policy
from kl_rl.core.posterior import Evidence, NoEvidence, Posterior, Tilt
from kl_rl.core.ranges import check_range
from kl_rl.core.trajectories import Trajectories
from kl_rl.methods import laws
from kl_rl.methods.algorithm import Algorithm, Extra, State, gradient_algorithm
from kl_rl.methods.card import Given, Method, Paper
from kl_rl.methods.knobs import BETA, SHARE
from kl_rl.methods.needs import Needs, base_policy
from kl_rl.methods.scored import Scored

__all__ = [
    "METHODS",
    "ReturnCounts",
    "decision_transformer",
    "greatest_return",
    "return_edges",
    "tilted_returns",
    "top_quantile",
]

_RETURNS = Needs(base_policy, samples=1, returns=True, hard=True, foreign=True, unrecorded=True, parts=True)


class ReturnCounts(NamedTuple):
    """How often each return token was seen in samples of p0, and the log of its summed evidence; [R] each."""

    count: jax.Array  # type: ignore[assignment]
    log_evidence: jax.Array


ReturnPrior = Callable[[ReturnCounts, Evidence], jax.Array]


def tilted_returns(counts: ReturnCounts, evidence: Evidence) -> jax.Array:
    """``log pi(R) = log E_{p0}[l 1[R]] + const``: p0(R) e^{R/beta} when each token stands for one return; [R]."""
    return numerics.safe_log_softmax(counts.log_evidence)


def greatest_return(counts: ReturnCounts, evidence: Evidence) -> jax.Array:
    """All mass on the largest return seen (decision transformer with maximal target return); [R]."""
    seen = counts.count > 0
    best = jnp.max(jnp.where(seen, jnp.arange(seen.shape[0]), -1))
    return jnp.where(jnp.arange(seen.shape[0]) == best, 0.0, -jnp.inf).astype(counts.log_evidence.dtype)


def top_quantile(fraction: jax.Array | float) -> ReturnPrior:
    """The base's own returns, restricted to their upper ``fraction`` (the boundary token in part).

    Quantile tokens as in
    Quark (Lu et al. 2022, arXiv 2205.13636). Equals the quantilizer of Taylor 2015: KL(q || p0) = log
    1/fraction.

    Raises:
      ValueError: a fraction out of range.
    """
    check_range("fraction", fraction, 0, 1, above=True)

    def prior(counts: ReturnCounts, evidence: Evidence) -> jax.Array:
        share = counts.count / jnp.maximum(jnp.sum(counts.count), 1.0)
        above = jnp.cumsum(share[::-1])[::-1] - share
        kept = jnp.clip(fraction - above, 0.0, share)
        return numerics.safe_log(kept / jnp.maximum(jnp.sum(kept), 1e-30))

    return prior


def return_edges(reward: np.ndarray, weight: np.ndarray | None = None, *, tokens: int) -> np.ndarray:
    """Boundaries between return tokens, each half-way between two rewards that occur.

    A token for each distinct reward if there are enough of them, else finer towards high rewards: the uppermost token
    holds about a hundredth of the mass.

    Args:
      reward: of strings or samples; [N].
      weight: their probabilities, or None for samples; [N].
      tokens: R, at least 2.

    Returns:
      Ascending; at most [R - 1].
    """
    value, index = np.unique(reward, return_inverse=True)
    middles = 0.5 * (value[1:] + value[:-1])
    if len(value) <= tokens:
        return middles
    mass = np.bincount(index, weight, len(value))
    below = np.cumsum(mass)[:-1] / mass.sum()
    wanted = 1.0 - np.geomspace(0.8, 0.01, tokens - 1)
    return np.unique(middles[[int(np.argmin(np.abs(below - share))) for share in wanted]])


def _relabel(batch: Trajectories, edges: jax.Array, first_token: int) -> tuple[Trajectories, jax.Array]:
    """Each sample becomes its own prompt, whose first token says which return it got; and the prompts as they were."""
    num_prompts, num_samples, _ = batch.tokens.shape
    label = first_token + jnp.searchsorted(edges, batch.reward, side="right")
    plain = jnp.repeat(batch.prompt, num_samples, axis=0)
    prompt = plain.at[:, 0].set(label.reshape(-1).astype(plain.dtype))
    flat = lambda x: x.reshape(num_prompts * num_samples, 1, *x.shape[2:])
    return batch.map_samples(flat, prompt=prompt), plain


def decision_transformer(
    *,
    optimizer: optax.GradientTransformation,
    edges: jax.Array,
    first_token: int,
    return_prior: ReturnPrior = tilted_returns,
) -> Algorithm:
    """Return-conditioned imitation (Chen et al. 2021, arXiv 2106.01345; Kumar et al. 2019, arXiv 1912.13465).

    Hindsight relabelling: every sample of p0 is evidence for its own return. Fixed point of the conditional model:
    p0(y | R). The deployed policy is the mixture over return tokens under the return prior, one policy with an exact
    log-probability. A return token takes column 0 of the prompt: the place of the begin mark, or padding that was put
    there for it. Pad prompts on the right, as ``kl_rl.core.pad_prompts`` and ``data`` do.

    Return frequencies are pooled over prompts. With one prompt the tilted prior gives p*_beta; with several, p* would
    need ``p0(R | x)`` for each: the deployed policy then still has C = 0, but its temperature differs between prompts.

    Args:
      optimizer: for the policy.
      edges: ascending boundaries between return tokens; token i covers ``edges[i-1] <= r < edges[i]``; [R -
        1].
      first_token: id of return token 0; the network must embed ids up to ``first_token + R - 1``.
      return_prior: ``tilted_returns``, ``greatest_return`` or ``top_quantile(fraction)``.

    Returns:
      Algorithm.
    """
    size = edges.shape[0] + 1
    tokens = first_token + np.arange(size)  # no device yet: a run may still choose its own

    def loss(scored, evidence, extra):
        weight = jnp.ones_like(scored.reward)
        return objectives.weighted_likelihood(scored.sequence_log_q, weight), weight

    def count(counts: ReturnCounts, state: State, scored: Scored, batch: Trajectories) -> ReturnCounts:
        label = jax.nn.one_hot(jnp.searchsorted(edges, batch.reward, side="right"), size, axis=-1)
        evidence = jnp.where(label > 0, scored.log_evidence[..., None], -jnp.inf).reshape(-1, size)
        fresh = jax.nn.logsumexp(evidence, axis=0).astype(counts.log_evidence.dtype)
        return ReturnCounts(
            counts.count + label.sum((0, 1)).astype(counts.count.dtype),
            jnp.logaddexp(counts.log_evidence, fresh),
        )

    def empty(policy: Policy) -> ReturnCounts:
        dtype = jnp.result_type(float)
        return ReturnCounts(jnp.zeros(size, dtype), jnp.full(size, -jnp.inf, dtype))

    def deploy(state: State, posterior: Posterior) -> Policy:
        log_prior = return_prior(state.extra, posterior.evidence)
        uniform = jnp.full_like(log_prior, -jnp.log(size))  # before any data
        return mixture(
            state.policy, jnp.asarray(tokens), jnp.where(jnp.any(log_prior > -jnp.inf), log_prior, uniform)
        )

    return gradient_algorithm(
        loss,
        optimizer=optimizer,
        needs=_RETURNS,
        deploy=deploy,
        prepare=lambda batch: _relabel(batch, edges, first_token),
        extra=Extra(empty, count),
    )


def _conditioned(given: Given, prior: ReturnPrior) -> Algorithm:
    assert given.edges is not None, "a conditional model needs return tokens"
    return decision_transformer(
        optimizer=given.optimizer(), edges=given.edges, first_token=given.first_token, return_prior=prior
    )


_CHEN = Paper(
    "Chen and others",
    2021,
    "Decision transformer: Reinforcement learning via sequence modeling",
    "2106.01345",
)

DT_TILTED = Method(
    name="dt-tilted",
    family="conditioning",
    idea="return tokens, tilted return prior",
    function=decision_transformer,
    build=lambda beta, given: _conditioned(given, tilted_returns),
    evidence=Tilt,
    knob=BETA,
    needs=_RETURNS,
    law=laws.tilted_returns,
    assumes=(
        "a token for each return",
        "every return seen with every prompt",
        "tokens of the agent only (no luck)",
        "a class of policies that holds all conditionals",
    ),
    theorems=("T2.3",),
    paper=_CHEN,
)
DT_MAX = DT_TILTED._replace(
    name="dt-max",
    idea="return tokens, greatest return",
    build=lambda nothing, given: _conditioned(given, greatest_return),
    evidence=lambda nothing: NoEvidence(),
    knob=None,
    law=laws.greatest_return,
)
DT_QUANTILE = DT_TILTED._replace(
    name="dt-quantile",
    idea="return tokens, top quantile",
    build=lambda fraction, given: _conditioned(given, top_quantile(fraction)),
    evidence=lambda fraction: NoEvidence(),
    knob=SHARE,
    law=laws.top_quantile,
    paper=Paper(
        "Lu and others", 2022, "Quark: Controllable text generation with reinforced unlearning", "2205.13636"
    ),
)

METHODS = (DT_TILTED, DT_MAX, DT_QUANTILE)
