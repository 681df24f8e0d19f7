"""A number with its standard error: what every measurement of the library returns."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.special import gammaincinv, stdtrit

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
    """Quantile of Student's t for any real degrees of freedom >= 1.

    Args:
        probability: between 0 and 1.
        degrees: degrees of freedom.

    Returns:
        The quantile.
    """
    return float(stdtrit(max(degrees, 1.0), probability))


def poisson_upper_limit(count: float, probability: float = 0.975) -> float:
    """Upper confidence limit of a Poisson mean after `count` events (Garwood 1936).

    With no event at all and probability 0.975 it is about 3.7: the "rule of three".

    Args:
        count: observed events, >= 0.
        probability: one-sided confidence.

    Returns:
        The limit.
    """
    return float(gammaincinv(count + 1.0, probability))
