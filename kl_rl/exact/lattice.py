"""The lattice of scores that a reward automaton can give: it makes the law of a reward a finite sum."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np

from kl_rl.exact.automaton import Automaton

__all__ = ["Lattice", "NoLattice", "score_lattice"]

_RELATIVE = 1e-9  # weights this close to a multiple of the unit are multiples


class NoLattice(ValueError):
    """The weights of the automaton have no common unit that is coarse enough."""


class Lattice(NamedTuple):
    """Equally spaced scores, and every weight as a number of steps on them.

    Attributes:
      values: possible scores of a completion, ascending, float64 on the host; [K].
      steps: weights in units of the spacing; [Q, V].
      zero: index at which nothing is owed any more.
    """

    values: np.ndarray
    steps: np.ndarray
    zero: int


def score_lattice(
    automaton: Automaton, horizon: int, end: int | None = None, *, limit: int = 4096
) -> Lattice:
    """Find the coarsest lattice that holds every score: integers, halves, multiples of any common unit.

    Without an end token every completion has T tokens, so that only differences of weights need a common
    unit.

    Args:
      automaton: the reward; concrete arrays, this runs on the host.
      horizon: T.
      end: end token, or None.
      limit: largest admissible number of points K.

    Returns:
      The lattice.

    Raises:
      NoLattice: with the number of points needed and the ways out.
    """
    following, weight = np.asarray(automaton.next), np.asarray(automaton.weight, np.float64)
    reachable = _reachable(int(automaton.start), following)
    shift = float(weight[reachable].min()) if end is None else 0.0
    unit = _common_unit(weight[reachable] - shift)
    steps = np.zeros(weight.shape)
    steps[reachable] = np.round((weight[reachable] - shift) / unit)
    low, high = _extremes(following, steps, reachable, horizon, end)
    size = high - low + 1
    error = np.abs(steps * unit + shift - weight)[reachable].max()
    if size > limit or error > _RELATIVE * np.abs(weight).max():
        raise NoLattice(
            "the weights of the reward automaton have no common unit that puts all scores on at most "
            f"{limit} points (the finest, {unit:g}, needs {size:.3g}): round the weights, enumerate the "
            "strings, or use what needs no lattice (lattice_log_partition, posterior_moments, sample_posterior)"
        )
    origin, spacing = _tidy(shift) * horizon, _tidy(unit)
    values = np.array([float(origin + spacing * k) for k in range(int(low), int(high) + 1)])
    return Lattice(values, steps.astype(np.int32), int(-low))


def _reachable(start: int, following: np.ndarray) -> np.ndarray:
    """Mask of the states that can be reached; [Q]."""
    seen, queue = {start}, [start]
    for state in queue:
        for target in following[state].tolist():
            if target not in seen:
                seen.add(target)
                queue.append(target)
    return np.isin(np.arange(len(following)), list(seen))


def _common_unit(values: np.ndarray) -> float:
    """Greatest common divisor of floats, up to 1e-9 of the largest (Euclid); 1 if all are 0."""
    sizes = np.unique(np.abs(values))
    tolerance = _RELATIVE * sizes[-1]
    unit = 0.0
    for size in sizes[sizes > tolerance].tolist():
        a, b = size, unit
        while b > tolerance:
            a, b = b, abs(a - b * round(a / b))
        unit = a
    if unit == 0.0:
        return 1.0
    counts = np.round(sizes / unit)
    return float(sizes @ counts / (counts @ counts))


def _extremes(
    following: np.ndarray, steps: np.ndarray, reachable: np.ndarray, horizon: int, end: int | None
) -> tuple[float, float]:
    """Least and largest number of steps still owed at any time in any reachable state; 0 is among them."""
    low = high = np.zeros(len(following))
    bottom = top = 0.0
    for _ in range(horizon):
        future_low, future_high = low[following], high[following]
        if end is not None:
            future_low[:, end] = future_high[:, end] = 0.0
        low, high = (steps + future_low).min(axis=1), (steps + future_high).max(axis=1)
        bottom, top = min(bottom, low[reachable].min()), max(top, high[reachable].max())
    return bottom, top


def _tidy(x: float) -> Fraction:
    """The short fraction a float was meant to be (0.1 as 1/10), or its exact value if there is none."""
    short = Fraction(x).limit_denominator(10**6)
    return short if abs(float(short) - x) <= 1e-12 * abs(x) else Fraction(x)
