"""Filtered imitation: forward KL to reweighted samples of p0, or of a frozen earlier policy."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kl_rl import objectives
from kl_rl.core.policy import Policy
from kl_rl.core.posterior import NoEvidence, Threshold, Tilt
from kl_rl.core.ranges import check_range
from kl_rl.methods import laws
from kl_rl.methods.algorithm import Algorithm, Extra, State, gradient_algorithm
from kl_rl.methods.card import Method, Paper
from kl_rl.methods.knobs import BETA, DRAWS, LEVEL
from kl_rl.methods.memory import logged
from kl_rl.methods.needs import Needs, base_policy, frozen_policy
from kl_rl.objectives import weights

__all__ = ["METHODS", "best_of_n", "expert_iteration", "filtered", "reward_weighted"]

_IMITATED = Needs(base_policy, samples=1, hard=True, foreign=True, unrecorded=True, parts=True)
_RWR = _IMITATED._replace(
    unrecorded=False, tempered=True, parts=False
)  # weighs by p0 / behaviour, over the batch
_BEST = _IMITATED._replace(samples=2)
_EXPERT = _BEST._replace(behaviour=frozen_policy, foreign=False)
_ROUNDS = 3  # of expert iteration in a run


def filtered(*, optimizer: optax.GradientTransformation) -> Algorithm:
    """Imitate the samples of p0 that pass a threshold (filtered behaviour cloning, rejection fine-tuning).

    Weight ``1[r >= tau]``, not normalized: the expected gradient is ``Z(x)`` times that of ``KL(p0(.|r >=
    tau) || q)``, at any K. Fixed point: p0 conditioned on r >= tau, so C = 0. A batch in which nothing passes
    has zero weights and changes nothing (``Info.ess = 0``).

    Args:
      optimizer: for the policy.

    Returns:
      Algorithm; use it with ``Threshold`` or ``Between`` evidence.
    """

    def loss(scored, evidence, extra):
        weight = jnp.exp(scored.log_evidence)
        return objectives.weighted_likelihood(scored.sequence_log_q, weight), weight

    return gradient_algorithm(loss, optimizer=optimizer, needs=_IMITATED)


FILTER = Method(
    name="filter",
    family="imitation",
    idea="imitate samples of p0 above a threshold",
    function=filtered,
    build=lambda tau, given: filtered(optimizer=given.optimizer()),
    evidence=Threshold,
    knob=LEVEL,
    needs=_IMITATED,
    law=laws.filtered,
    assumes=("samples of p0", "a class of policies that holds the law"),
    theorems=("T2.3",),
)


def reward_weighted(*, optimizer: optax.GradientTransformation, per_prompt: bool = False) -> Algorithm:
    """Reward-weighted regression (Peters and Schaal 2007): imitate p0 with weights ``exp(r/beta) p0 / behaviour``.

    Weights are normalized over the whole batch, or over the K samples of each prompt (``per_prompt``: biased
    at finite K, p* is then not a fixed point, T4.6). Fixed point, as the batch grows: p*_beta.

    Args:
      optimizer: for the policy.
      per_prompt: where the weights are normalized.

    Returns:
      Algorithm, for samples of p0 or of anything whose log-probabilities were recorded.
    """

    def loss(scored, evidence, extra):
        log_weight = scored.log_evidence + scored.log_importance
        if per_prompt:
            weight = weights.self_normalized(log_weight) * log_weight.shape[-1]
        else:
            weight = weights.pooled(log_weight)
        return objectives.weighted_likelihood(scored.sequence_log_q, weight), weight

    return gradient_algorithm(loss, optimizer=optimizer, needs=_RWR._replace(parts=per_prompt))


RWR = Method(
    name="rwr",
    family="imitation",
    idea="reward-weighted imitation of p0",
    function=reward_weighted,
    build=lambda beta, given, **options: reward_weighted(optimizer=given.optimizer(), **options),
    evidence=Tilt,
    knob=BETA,
    needs=_RWR,
    law=laws.tilt,
    assumes=(
        "large batches",
        "samples that cover p*, and who drew them",
        "a class of policies that holds p*",
    ),
    theorems=("T4.6",),
    paper=Paper(
        "Peters and Schaal",
        2007,
        "Reinforcement learning by reward-weighted regression for operational space control",
        venue="International Conference on Machine Learning",
    ),
)
RWR_LOGGED = RWR._replace(
    name="rwr-logged", idea="reward-weighted imitation of a fixed data set", memory=logged()
)


def _draws_needed(n: jax.Array | float) -> int:
    """Smallest K that holds n draws, where n is known while tracing."""
    check_range("n", n, 1)
    return 2 if isinstance(n, jax.core.Tracer) else max(2, math.ceil(np.max(n)))


def _best_of_n_loss(n):
    def loss(scored, evidence, extra):
        weight = weights.best_of_n(scored.reward, n) * scored.reward.shape[-1]
        return objectives.weighted_likelihood(scored.sequence_log_q, weight), weight

    return loss


def best_of_n(n: jax.Array | float, *, optimizer: optax.GradientTransformation) -> Algorithm:
    """Distil best-of-n: imitate the best of n samples of p0, averaged over all n-subsets of the K drawn.

    Unbiased at any K >= n for the exact tie-aware law ``p0(y) (F^n - F-^n) / (F - F-)`` (Beirami et al. 2024,
    arXiv 2401.01879), which is the fixed point; C = 0. The evidence of the posterior is not read.

    Args:
      n: draws per prompt, at least 1; may be traced.
      optimizer: for the policy.

    Returns:
      Algorithm; K must be at least n.

    Raises:
      ValueError: n out of range.
    """
    return gradient_algorithm(
        _best_of_n_loss(n), optimizer=optimizer, needs=_BEST._replace(samples=_draws_needed(n))
    )


BEST_OF_N = Method(
    name="best-of-n",
    family="imitation",
    idea="distil the best of n samples of p0",
    function=best_of_n,
    build=lambda n, given: best_of_n(n, optimizer=given.optimizer()),
    evidence=lambda n: NoEvidence(),
    knob=DRAWS,
    needs=_BEST,
    law=laws.best_of_n,
    assumes=("samples of p0, at least n of each prompt", "a class of policies that holds the law"),
    theorems=("T1.7",),
    paper=Paper(
        "Beirami and others", 2024, "Theoretical guarantees on the best-of-n alignment policy", "2401.01879"
    ),
)


class Frozen(NamedTuple):
    """The earlier policy that samples are drawn from, and when it was last refreshed."""

    policy: Policy
    age: jax.Array


def expert_iteration(
    n: jax.Array | float, *, optimizer: optax.GradientTransformation, refresh: int = 50
) -> Algorithm:
    """Iterated best-of-n distillation (expert iteration; Anthony et al. 2017, arXiv 1705.08439).

    Samples come from a frozen copy of the policy; a new copy is taken every ``refresh`` steps and used from the next
    batch on. Target of round j: best-of-n of round j - 1's policy, hence p0 times a function of r (C = 0) if the
    student starts at p0 and every round is fitted exactly. Errors of the rounds add up and nothing pulls back to p0.

    Args:
      n: draws per prompt; may be traced.
      optimizer: for the policy.
      refresh: steps per round.

    Returns:
      Algorithm; K must be at least n.

    Raises:
      ValueError: an option out of range.
    """
    check_range("refresh", refresh, 1)

    def renew(frozen: Frozen, state: State, scored, batch) -> Frozen:
        due = frozen.age >= refresh
        params = jax.tree.map(
            lambda new, old: jnp.where(due, new, old), state.policy.params, frozen.policy.params
        )
        return Frozen(frozen.policy.with_params(params), jnp.where(due, 0, frozen.age) + 1)

    def first(policy: Policy) -> Frozen:
        # The base under an adapter stays shared.
        own = policy.with_params(jax.tree.map(jnp.copy, policy.params))
        return Frozen(own, jnp.zeros((), jnp.int32))

    return gradient_algorithm(
        _best_of_n_loss(n),
        optimizer=optimizer,
        needs=_EXPERT._replace(samples=_draws_needed(n)),
        extra=Extra(first, renew),
    )


def _thrice(log_base: np.ndarray, reward: np.ndarray, n: float) -> np.ndarray:
    """Best of n^3: ``F^n`` three times over."""
    return laws.best_of_n(log_base, reward, n**_ROUNDS)


EXPERT_ITERATION = Method(
    name="expert-iteration",
    family="imitation",
    idea="best-of-n distilled three times over",
    function=expert_iteration,
    build=lambda n, given, *, refresh=None: expert_iteration(
        n,
        optimizer=given.optimizer(),
        refresh=max(1, given.steps // _ROUNDS) if refresh is None else refresh,
    ),
    evidence=lambda n: NoEvidence(),
    knob=DRAWS,
    needs=_EXPERT,
    law=_thrice,
    assumes=("every round is fitted exactly", "the student starts at p0"),
    theorems=("T1.7",),
    paper=Paper(
        "Anthony and others", 2017, "Thinking fast and slow with deep learning and tree search", "1705.08439"
    ),
)

METHODS = (FILTER, BEST_OF_N, RWR, RWR_LOGGED, EXPERT_ITERATION)
