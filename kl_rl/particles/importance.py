"""Importance sampling with the base as proposal: two-sided log Z, expectations under p*, from samples of p0 alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kl_rl.core.estimate import Estimate, mean_estimate

__all__ = ["LogZ", "log_normalizer", "tilted_expectation"]

_GROUPS = 16


class LogZ(NamedTuple):
    """Stochastic bounds on log Z, averaged over prompts, nats.

    Attributes:
      lower: its expectation is below log Z.
      upper: its expectation is above log Z, if the particle mixed in is a sample of p*.
      particles: how that particle was made: "rejection" (exact), or "resampling" (only nearly so).
    """

    lower: Estimate
    upper: Estimate
    particles: str


def _log_mean(exponent: np.ndarray) -> np.ndarray:
    top = exponent.max(-1, keepdims=True)
    return (top + np.log(np.mean(np.exp(exponent - top), -1, keepdims=True)))[..., 0]


def _softmax(exponent: np.ndarray) -> np.ndarray:
    weight = np.exp(exponent - exponent.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def log_normalizer(reward: np.ndarray, beta: float, rng: np.random.Generator) -> LogZ:
    """Two-sided bounds on ``log E_{p0} e^{r/beta}`` from base samples (Zhao et al. 2024, arXiv 2404.17546).

    The samples of each prompt are cut into 16 groups; the mean over groups of the log of the group's mean
    weight is the lower bound. For the upper bound one member is replaced by a draw from p*, made from the
    other half of the samples: by rejection, with acceptance ``e^{(r - max r)/beta}`` (max: the largest reward
    seen), or by resampling where too few are accepted, which is exact only as the number of samples grows.

    Args:
      reward: of base samples; at least 32 for each prompt; [P, M].
      beta: temperature, reward units per nat.
      rng: for the particles.

    Returns:
      The bounds.
    """
    num_prompts, size = reward.shape
    members = size // _GROUPS
    exponent = reward[:, : members * _GROUPS].reshape(num_prompts, _GROUPS, members) / beta
    halves = exponent.reshape(num_prompts, 2, -1)
    accept = np.log(rng.random(halves.shape)) < halves - exponent.max()
    enough = bool(np.all(accept.sum(-1) >= _GROUPS // 2))
    mixed = exponent.copy()
    for x in range(num_prompts):
        for half in (0, 1):
            pool, kept = halves[x, 1 - half], accept[x, 1 - half]
            weight = kept / kept.sum() if enough else np.exp(pool - pool.max())
            groups = slice(half * _GROUPS // 2, (half + 1) * _GROUPS // 2)
            mixed[x, groups, 0] = rng.choice(pool, _GROUPS // 2, p=weight / weight.sum(), replace=not enough)
    lower, upper = (mean_estimate(_log_mean(e).mean(0)) for e in (exponent, mixed))
    return LogZ(lower, upper, "rejection" if enough else "resampling")


def tilted_expectation(exponent: np.ndarray, value: np.ndarray) -> tuple[Estimate, Estimate]:
    """``E_{p*} value`` and ``E_{p*} value - log Z`` from base samples with weights ``e^exponent``.

    Args:
      exponent: r/beta; [P, M].
      value: [P, M].

    Returns:
      The two estimates, averaged over prompts, with delta-method errors.
    """
    size = exponent.shape[1]
    weight = size * _softmax(exponent)
    mean = (weight * value).mean(1, keepdims=True)
    changes = (weight * (value - mean), weight * (value - mean) - (weight - 1.0))
    values = (mean.mean(), (mean[:, 0] - _log_mean(exponent)).mean())
    count = float(size**2 / np.square(weight).sum(1).mean() * len(exponent))
    return tuple(
        Estimate(float(v), math.sqrt(float(np.square(c).sum())) / c.size, count)
        for v, c in zip(values, changes, strict=True)
    )  # type: ignore[return-value]
