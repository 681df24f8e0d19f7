"""The three-way budget of a fine-tune, exact: KL(q || p0) = P + S + C.

    P = sup_lambda {lambda mu - Lambda(lambda)}     price of the mean reward mu = E_q r
    S = KL(q(r) || p*_{lambda_mu}(r))               shape of the reward marginal
    C = E_{r~q} KL(q(y|r) || p0(y|r))               calibration loss

with Lambda(lambda) = log E_{p0} e^{lambda r}. C is zero exactly when q is p0 times some function of the
reward (T2.3). Everything is in nats and works on the enumerated strings of one prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kl_rl.core import numerics
from kl_rl.exact.enumeration import Levels, expectation, kl_divergence, level_log_prob

__all__ = ["Budget", "exact_budget", "conditional_js", "conditional_kl", "fit_tilt", "price", "undo_reward"]

_LAMBDA_LIMIT = 1e4


class Budget(NamedTuple):
    """Exact measurements of a policy q against its base p0 and posterior p*; all scalars, in nats unless said.

    Attributes:
      reward: E_q r, in reward units.
      kl: KL(q || p0).
      P: price of the reward.
      S: shape inefficiency of the reward marginal.
      C: calibration loss.
      C_fwd: E_{r~p0} KL(p0(y|r) || q(y|r)), what is lost even after undoing the reward.
      C_JS: E_{r~(q+p0)/2} JS(q(y|r), p0(y|r)).
      beta_fit: 1 / lambda_mu, the temperature whose exact posterior has the same mean reward.
      kl_q_pstar: KL(q || p*_beta).
      kl_pstar_q: KL(p*_beta || q).
      entropy: H(q).
      entropy_gap: H(p*_{lambda_mu}) - H(q), positive when q is less diverse than the posterior of equal
        reward.
      log_z: log E_{p0} e^{r / beta}.
    """

    reward: jax.Array
    kl: jax.Array
    P: jax.Array
    S: jax.Array
    C: jax.Array
    C_fwd: jax.Array
    C_JS: jax.Array
    beta_fit: jax.Array
    kl_q_pstar: jax.Array
    kl_pstar_q: jax.Array
    entropy: jax.Array
    entropy_gap: jax.Array
    log_z: jax.Array


def fit_tilt(log_p: jax.Array, value: jax.Array, mean: jax.Array, *, iterations: int = 120) -> jax.Array:
    """The lambda at which the tilt ``p e^{lambda v} / Z`` has the given mean, by bisection.

    Args:
      log_p: log-probabilities of the levels, nats; [G].
      value: their rewards; [G].
      mean: target mean, clipped to the reachable range; [].
      iterations: halvings of the bracket; 120 exhausts double precision.

    Returns:
      lambda (inverse temperature, nats per reward unit), clipped to about 1e4 over the reward's range.
    """
    present = jnp.isfinite(log_p)
    high_value = jnp.max(jnp.where(present, value, -jnp.inf))
    low_value = jnp.min(jnp.where(present, value, jnp.inf))
    spread = jnp.maximum(high_value - low_value, 1e-12)
    centred = (value - low_value) / spread
    target = (mean - low_value) / spread

    def tilted_mean(lam):
        return jnp.sum(numerics.safe_softmax(log_p + lam * centred) * centred)

    def halve(_, bracket):
        low, high = bracket
        middle = 0.5 * (low + high)
        below = tilted_mean(middle) < target
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    limit = jnp.asarray(_LAMBDA_LIMIT, centred.dtype)
    low, high = jax.lax.fori_loop(0, iterations, halve, (-limit, limit))
    return jnp.where(high_value > low_value, 0.5 * (low + high) / spread, 0.0)


def price(log_p: jax.Array, value: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``P(mu) = sup_lambda {lambda mu - Lambda(lambda)}``, the least KL that buys a mean reward (T2.1).

    Args:
      log_p: log-probabilities of the reward levels under p0; [G].
      value: rewards; [G].
      mean: mu; [].

    Returns:
      P in nats and the maximizing lambda.
    """
    lam = fit_tilt(log_p, value, mean)
    return lam * mean - jax.nn.logsumexp(log_p + lam * value), lam


def _within(log_law: jax.Array, level: jax.Array, levels: Levels) -> jax.Array:
    """``log p(y | r)``, -inf at levels without mass; [N]."""
    own = level[levels.index]
    return jnp.where(jnp.isfinite(own), log_law - jnp.where(jnp.isfinite(own), own, 0.0), -jnp.inf)


def conditional_kl(log_q: jax.Array, log_p: jax.Array, levels: Levels) -> jax.Array:
    """``E_{r~q} KL(q(y|r) || p(y|r)) = KL(q || p) - KL(q(r) || p(r))`` (T2.2), summed term by term; [N] -> [].

    Infinite where q visits a string, or a whole level, that p does not.
    """
    within_q = _within(log_q, level_log_prob(log_q, levels), levels)
    within_p = _within(log_p, level_log_prob(log_p, levels), levels)
    return jnp.sum(numerics.xlogy_difference(jnp.exp(log_q), within_q, within_p))


def conditional_js(log_q: jax.Array, log_p: jax.Array, levels: Levels) -> jax.Array:
    """``E_{r ~ (q+p)/2} JS(q(y|r), p(y|r))``, between 0 and log 2, in nats (T3.5).

    A level that only one of the two visits counts as log 2: the supports are disjoint there.
    """
    level_q, level_p = level_log_prob(log_q, levels), level_log_prob(log_p, levels)
    a, b = _within(log_q, level_q, levels), _within(log_p, level_p, levels)
    middle = jnp.logaddexp(a, b) - jnp.log(2.0)
    terms = numerics.xlogy_difference(jnp.exp(a), a, middle) + numerics.xlogy_difference(
        jnp.exp(b), b, middle
    )
    shared = jnp.isfinite(level_q) & jnp.isfinite(level_p)
    weight = 0.5 * (jnp.exp(level_q) + jnp.exp(level_p)) * jnp.where(shared, 0.5, 1.0)
    return jnp.sum(terms * weight[levels.index])


def undo_reward(log_q: jax.Array, log_base: jax.Array, levels: Levels) -> jax.Array:
    """The policy reweighted by the best function of the reward: ``w(r) q`` with ``w(r) = p0(r) / q(r)`` (T3.3).

    Among all ``w`` this one minimizes ``KL(p0 || w q / Z_w)``, and the minimum is C_fwd.

    Returns:
      Log-probabilities of the reward-undone policy; [N].
    """
    shift = level_log_prob(log_base, levels) - level_log_prob(log_q, levels)
    shift = jnp.where(jnp.isfinite(shift), shift, -jnp.inf)
    return numerics.safe_log_softmax(log_q + shift[levels.index])


def exact_budget(
    log_q: jax.Array, log_base: jax.Array, reward: jax.Array, levels: Levels, beta: jax.Array
) -> Budget:
    """All exact measurements of one policy.

    Args:
      log_q: log-probabilities of all strings under the fine-tuned policy; [N].
      log_base: the same under p0; [N].
      reward: [N].
      levels: the reward's levels.
      beta: temperature of the posterior that q is compared with; [].

    Returns:
      A Budget of scalars.
    """
    level_q, level_p = level_log_prob(log_q, levels), level_log_prob(log_base, levels)
    mean = expectation(log_q, reward)
    paid, lam = price(level_p, levels.value, mean)
    posterior = numerics.safe_log_softmax(log_base + reward / beta)
    matched = numerics.safe_log_softmax(log_base + lam * reward)
    entropy = -expectation(log_q, log_q)
    return Budget(
        reward=mean,
        kl=kl_divergence(log_q, log_base),
        P=paid,
        S=kl_divergence(level_q, level_p) - paid,
        C=conditional_kl(log_q, log_base, levels),
        C_fwd=conditional_kl(log_base, log_q, levels),
        C_JS=conditional_js(log_q, log_base, levels),
        beta_fit=1.0 / lam,
        kl_q_pstar=kl_divergence(log_q, posterior),
        kl_pstar_q=kl_divergence(posterior, log_q),
        entropy=entropy,
        entropy_gap=-expectation(matched, matched) - entropy,
        log_z=jax.nn.logsumexp(log_base + reward / beta),
    )
