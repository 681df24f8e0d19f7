"""Fixed points as functions: what each method would learn with unlimited data and capacity.

A law is ``(log_base [P, N], reward [P, N], value) -> log q* [P, N]``, in nats: from a base over N strings of each
prompt, or over N samples of it (``log_base = -log N``), and the setting of the method's knob. One prompt may be given
without its axis. Everything is numpy in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

__all__ = [
    "Law",
    "NoFixedPoint",
    "best_of_n",
    "by_level",
    "filtered",
    "greatest_return",
    "mean_reward",
    "normalized",
    "standardized_tilt",
    "tilt",
    "tilted_returns",
    "top_quantile",
    "win_rate_tilt",
]

Law = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


class NoFixedPoint(ValueError):
    """The method has no fixed point at this setting of its knob."""


def normalized(log_q: np.ndarray) -> np.ndarray:
    """Log-probabilities that sum to one, in float64; [..., N].

    Raises:
      NoFixedPoint: a row has no mass at all.
    """
    log_q = np.asarray(log_q, np.float64)
    top = log_q.max(-1, keepdims=True)
    if np.isneginf(top).any():
        raise NoFixedPoint("a law without any mass")
    return log_q - top - np.log(np.exp(log_q - top).sum(-1, keepdims=True))


def mean_reward(log_q: np.ndarray, reward: np.ndarray) -> float:
    """``E_q r``, averaged over prompts; [P, N] or [N]."""
    return float(np.mean(np.sum(np.exp(log_q) * reward, axis=-1)))


def _each_prompt(law: Law) -> Law:
    """A law that looks at one prompt at a time."""

    @functools.wraps(law)
    def of_prompts(log_base: np.ndarray, reward: np.ndarray, value: float) -> np.ndarray:
        log_base, reward = np.broadcast_arrays(log_base, reward)
        if log_base.ndim == 1:
            return law(log_base, reward, value)
        return np.stack([law(b, r, value) for b, r in zip(log_base, reward, strict=True)])

    return of_prompts


def tilt(log_base: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """``p*_beta``: p0 exp(r / beta) / Z, the posterior itself."""
    return normalized(log_base + reward / beta)


def _spread(log_q: np.ndarray, reward: np.ndarray) -> float:
    """Standard deviation of the reward."""
    q = np.exp(log_q)
    return float(np.sqrt(max(q @ (reward - q @ reward) ** 2, 0.0)))


def _standardized(log_base: np.ndarray, reward: np.ndarray, beta: float) -> tuple[np.ndarray | None, float]:
    """The law of one prompt, None if it has none; and the critical value of beta."""
    scale = float(np.ptp(reward[np.isfinite(log_base)]))
    if scale == 0.0:
        return normalized(log_base), 0.0
    effort = lambda lam: lam * _spread(tilt(log_base, reward, 1.0 / lam), reward)
    grid = np.geomspace(1e-4, 1e4, 400) / scale
    efforts = np.array([effort(lam) for lam in grid])
    enough = np.flatnonzero(efforts >= 1.0 / beta)
    if not len(enough):
        return None, 1.0 / efforts.max()
    low, high = (grid[enough[0] - 1] if enough[0] else 0.0), grid[enough[0]]
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if effort(middle) < 1.0 / beta else (low, middle)
    return tilt(log_base, reward, 1.0 / high), 1.0 / efforts.max()


def standardized_tilt(log_base: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """``p0 exp(lambda r) / Z`` with ``lambda std_lambda(r) = 1 / beta``: rewards divided by their spread under q.

    ``lambda std_lambda`` rises from 0 and falls again once q settles on the best strings; a fixed point that training
    can stay at lies where it rises. The least lambda is taken. Where all rewards are the same there is no advantage:
    p0. A prompt with ``beta`` below its critical value, ``1 / max_lambda {lambda std_lambda(r)}``, has no fixed point:
    q runs off to its best strings, p0 among which stands for the law.

    Args:
      log_base: [P, N] or [N].
      reward: the same.
      beta: KL weight beside standardized rewards.

    Returns:
      The same.

    Raises:
      NoFixedPoint: no prompt has one.
    """
    log_base, reward = np.broadcast_arrays(log_base, reward)
    prompts = list(zip(np.atleast_2d(log_base), np.atleast_2d(reward), strict=True))
    rows = [_standardized(base, r, beta) for base, r in prompts]
    if all(law is None for law, _ in rows):
        least = min(critical for _, critical in rows)
        raise NoFixedPoint(
            f"rewards divided by their spread have no fixed point below beta = {least:.3g}; got {beta:g}"
        )
    found = []
    for (law, _), (base, r) in zip(rows, prompts, strict=True):
        best = r == r[np.isfinite(base)].max()
        found.append(normalized(np.where(best, base, -np.inf)) if law is None else law)
    return np.stack(found).reshape(log_base.shape)


def _levels(log_base: np.ndarray, reward: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct rewards, their probabilities, and the level of each string."""
    value, index = np.unique(reward, return_inverse=True)
    return value, np.bincount(index, np.exp(log_base), len(value)), index


def by_level(log_base: np.ndarray, reward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same base with one entry for each distinct reward, which is all that a law looks at.

    Args:
      log_base: [P, N] or [N].
      reward: the same.

    Returns:
      Log-probabilities (-inf where a prompt lacks a reward) and rewards, [P, G] each; as they were, if G > N.
    """
    log_base, reward = np.atleast_2d(*np.broadcast_arrays(log_base, reward))
    value, index = np.unique(reward, return_inverse=True)
    if len(value) > reward.shape[1]:
        return log_base, reward
    index = index.reshape(reward.shape)
    mass = [np.bincount(i, np.exp(b), len(value)) for i, b in zip(index, log_base, strict=True)]
    with np.errstate(divide="ignore"):
        return np.log(np.stack(mass)), np.broadcast_to(value, (len(mass), len(value)))


@_each_prompt
def win_rate_tilt(log_base: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """``p0 exp(w / beta) / Z``, w the probability that Bradley-Terry raters prefer y to a sample of p0."""
    value, mass, index = _levels(log_base, reward)
    win = 0.5 * (1.0 + np.tanh(0.5 * (value[:, None] - value[None, :]))) @ (mass / mass.sum())
    return normalized(log_base + win[index] / beta)


def filtered(log_base: np.ndarray, reward: np.ndarray, tau: float) -> np.ndarray:
    """``p0(y | r >= tau)``.

    A prompt for which nothing passes is never learned from: p0 there.

    Raises:
      NoFixedPoint: nothing passes, for any prompt.
    """
    log_base, reward = np.broadcast_arrays(log_base, reward)
    passing = np.where(reward >= tau, log_base, -np.inf)
    some = np.isfinite(passing).any(-1, keepdims=True)
    if not some.any():
        raise NoFixedPoint(f"no reward reaches the threshold {tau:g}")
    return normalized(np.where(some, passing, log_base))


@_each_prompt
def best_of_n(log_base: np.ndarray, reward: np.ndarray, n: float) -> np.ndarray:
    """``p0 (F^n - F-^n) / (F - F-)``, F(r) = P(r' <= r), F-(r) = P(r' < r): ties are broken at random.

    Beirami et al. 2024 (arXiv 2401.01879).
    """
    _, mass, index = _levels(log_base, reward)
    upper = np.cumsum(mass)
    upper = np.minimum(upper / upper[-1], 1.0)
    lower = np.concatenate([[0.0], upper[:-1]])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(mass > 0, (upper**n - lower**n) / np.where(mass > 0, mass, 1.0), 0.0)
        return normalized(log_base + np.log(ratio)[index])


def _conditioned(
    log_base: np.ndarray, reward: np.ndarray, prior: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """``sum_R pi(R) p0(y | x, R)``: p0 given its return, under a return prior made from all prompts together.

    Args:
      log_base: [P, N] or [N].
      reward: the same.
      prior: ``(distinct rewards [G], their probabilities under p0, pooled over prompts [G]) -> weights [G]``.

    Returns:
      As ``log_base``. Where a prompt never earns a return, there is nothing to imitate: its share goes to the others;
      where it earns none of those asked for, p0 stands for what no data say.
    """
    shape, rows = log_base.shape, np.atleast_2d(log_base)
    value, index = np.unique(reward, return_inverse=True)
    index = index.reshape(rows.shape)
    mass = np.stack([np.bincount(i, np.exp(b), len(value)) for i, b in zip(index, rows, strict=True)])
    weight = prior(value, mass.mean(0))
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.log(weight) - np.log(mass)  # [P, G]
    change = np.where(mass > 0, change, -np.inf)
    change = np.where(np.isneginf(change).all(1, keepdims=True), 0.0, change)
    return normalized(rows + np.take_along_axis(change, index, axis=1)).reshape(shape)


def tilted_returns(log_base: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """p0 given its return R, which is drawn from ``p0(R) e^{R/beta}``, p0(R) pooled over prompts.

    With one prompt p*_beta; with several, each has C = 0 and a reward law of its own.
    """
    return _conditioned(log_base, reward, lambda r, mass: np.exp(normalized(r / beta)) * mass)


def top_quantile(log_base: np.ndarray, reward: np.ndarray, fraction: float) -> np.ndarray:
    """p0 given its return, among the upper ``fraction`` of p0's, pooled over prompts; the boundary return in part.

    With one prompt the quantilizer (Taylor 2016).
    """

    def prior(value: np.ndarray, mass: np.ndarray) -> np.ndarray:
        above = np.cumsum(mass[::-1])[::-1] - mass
        return np.clip(fraction - above, 0.0, mass)

    return _conditioned(log_base, reward, prior)


def greatest_return(log_base: np.ndarray, reward: np.ndarray, value: float = 0.0) -> np.ndarray:
    """p0 given the greatest return that it earns for any prompt; there is no knob."""
    return _conditioned(
        log_base, reward, lambda r, mass: 1.0 * (np.arange(len(r)) == np.flatnonzero(mass)[-1])
    )
