"""A number with its standard error: what every measurement of the library returns."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

__all__ = ["Estimate", "mean_estimate", "poisson_upper_limit", "student_quantile"]


class Estimate(NamedTuple):
    """A value, its standard error and the number of samples behind it.

    Attributes:
        value: the point estimate (nats for every divergence in this library).
        stderr: its standard error; NaN when one sample cannot tell.
        count: how many independent samples it rests on.
    """

    value: float
    stderr: float
    count: float  # type: ignore[assignment]  # shadows tuple.count, which no one needs here

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Symmetric interval `value -+ t stderr`, with Student's t on `count - 1` degrees of freedom.

        Args:
            level: nominal coverage, between 0 and 1.

        Returns:
            The pair (lower, upper).

        Raises:
            ValueError: if level is not strictly between 0 and 1.
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must be strictly between 0 and 1, got {level}")
        half = student_quantile(0.5 + level / 2, max(self.count - 1, 1.0)) * self.stderr
        return self.value - half, self.value + half


def mean_estimate(x: np.ndarray, weights: np.ndarray | None = None) -> Estimate:
    """Mean of independent samples; with weights the self-normalized mean and its delta-method error.

    `mean = sum w x / sum w`,  `stderr^2 = n/(n-1) sum w^2 (x - mean)^2 / (sum w)^2`; equal weights give the
    textbook `s / sqrt(n)`.

    Args:
        x: samples, shape [n].
        weights: nonnegative weights, shape [n]; None means equal.

    Returns:
        The estimate; its count is the effective sample size `(sum w)^2 / sum w^2`. Its stderr is NaN for n =
        1.

    Raises:
        ValueError: if x is empty, the shapes differ, or no weight is positive.
    """
    x = np.asarray(x, np.float64).ravel()
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64).ravel()
    if x.size == 0:
        raise ValueError("mean_estimate needs at least one sample, got an empty array")
    if w.shape != x.shape:
        raise ValueError(f"weights have shape {w.shape}, samples {x.shape}: they must agree")
    if not (np.all(w >= 0) and w.sum() > 0):
        raise ValueError("weights must be nonnegative with a positive sum")
    w = w / w.sum()
    value = float(w @ x)
    count = 1.0 / float(w @ w)
    if x.size == 1:
        return Estimate(value, math.nan, count)
    variance = float(np.square(w * (x - value)).sum()) * x.size / (x.size - 1)
    return Estimate(value, math.sqrt(variance), count)


def student_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t for any real degrees of freedom >= 1 (Hill's expansion; exact at 1 and 2).

    Args:
        probability: between 0.5 and 1.
        degrees: degrees of freedom.

    Returns:
        The quantile (relative error below 1e-3 for degrees >= 3 and probability <= 0.999).

    Reference: Abramowitz & Stegun 26.7.5.
    """
    if degrees <= 1.0:
        return math.tan(math.pi * (probability - 0.5))
    if degrees <= 2.0:
        p = 2 * probability - 1
        return p * math.sqrt(2.0 / (1.0 - p * p)) * (2.0 / degrees)
    z = NormalDist().inv_cdf(probability)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / degrees + g2 / degrees**2 + g3 / degrees**3 + g4 / degrees**4


def poisson_upper_limit(count: float, probability: float = 0.975) -> float:
    """Upper confidence limit of a Poisson mean after `count` events (Wilson-Hilferty approximation).

    With no event at all and probability 0.975 it is about 3.7: the "rule of three".

    Args:
        count: observed events, >= 0.
        probability: one-sided confidence.

    Returns:
        The limit.

    Reference: Garwood (1936) for the exact limit; Wilson & Hilferty (1931) for the approximation.
    """
    z = NormalDist().inv_cdf(probability)
    n = count + 1.0
    return n * (1.0 - 1.0 / (9.0 * n) + z / (3.0 * math.sqrt(n))) ** 3
