"""Filtered imitation: forward KL to reweighted samples of p0, or of a frozen earlier policy."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kl_rl import objectives
from kl_rl.core.policy import Policy
from kl_rl.core.posterior import Posterior
from kl_rl.methods.algorithm import Algorithm, Extra, State, base_policy, gradient_algorithm
from kl_rl.objectives import weights

__all__ = ["best_of_n", "expert_iteration", "filtered", "reward_weighted"]


def filtered(*, optimizer: optax.GradientTransformation) -> Algorithm:
    """Imitate the samples of p0 that pass a threshold (filtered behaviour cloning, rejection fine-tuning).

    Weight ``1[r >= tau]``, not normalized: the expected gradient is ``Z(x)`` times that of ``KL(p0(.|r >=
    tau) || q)``, at any K. Fixed point: p0 conditioned on r >= tau, so C = 0. A batch in which nothing passes
    has zero weights and changes nothing (``Info.ess = 0``).

    Args:
      optimizer: for the policy.

    Returns:
      Algorithm; use it with ``Threshold`` or ``Interval`` evidence.
    """

    def loss(scored, evidence, extra):
        weight = jnp.exp(scored.log_evidence)
        return objectives.weighted_likelihood(scored.sequence_log_q, weight), weight

    return gradient_algorithm(loss, optimizer=optimizer, behaviour=base_policy)


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

    return gradient_algorithm(loss, optimizer=optimizer, behaviour=base_policy)


def _draws_needed(n: jax.Array | float) -> int:
    """Smallest K that holds n draws, where n is known while tracing."""
    return max(2, math.ceil(n)) if isinstance(n, int | float) else 2


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
      n: draws per prompt; may be traced.
      optimizer: for the policy.

    Returns:
      Algorithm; K must be at least n.
    """
    return gradient_algorithm(
        _best_of_n_loss(n), optimizer=optimizer, behaviour=base_policy, min_samples=_draws_needed(n)
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
    """

    def renew(frozen: Frozen, state: State, scored, batch) -> Frozen:
        due = frozen.age >= refresh
        params = jax.tree.map(
            lambda new, old: jnp.where(due, new, old), state.policy.params, frozen.policy.params
        )
        return Frozen(frozen.policy.with_params(params), jnp.where(due, 0, frozen.age) + 1)

    def frozen_policy(state: State, posterior: Posterior) -> Policy:
        return state.extra.policy

    def first(policy: Policy) -> Frozen:
        # The base under an adapter stays shared.
        own = policy.with_params(jax.tree.map(jnp.copy, policy.params))
        return Frozen(own, jnp.zeros((), jnp.int32))

    return gradient_algorithm(
        _best_of_n_loss(n),
        optimizer=optimizer,
        behaviour=frozen_policy,
        extra=Extra(first, renew),
        min_samples=_draws_needed(n),
    )
