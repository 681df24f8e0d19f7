"""Knobs: the one number that says how far a method goes, and where it must stand to reach a mean reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kl_rl.methods.laws import Law, NoFixedPoint, by_level, mean_reward

__all__ = ["BETA", "BETA_OVER_STD", "BETA_WIN_RATE", "DRAWS", "LEVEL", "SHARE", "STOP", "Knob", "aim"]

Candidates = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


class Knob(NamedTuple):
    """A knob.

    Attributes:
      option: its name, on the command line and in rows of results.
      unit: of its numbers, in words.
      default: where it stands if nobody says; None: it must be said.
      low: least value, itself admissible only if ``closed``.
      high: greatest value, admissible.
      closed: whether ``low`` itself may be taken.
      candidates: ``(log_base [P, N], reward [P, N], K) -> values``: the values that differ from each other, where not
        every number does; None: any number.
      stops: training itself finds it: the run is stopped when it has gone far enough.
    """

    option: str
    unit: str
    default: float | None
    low: float = 0.0
    high: float = np.inf
    closed: bool = False
    candidates: Candidates | None = None
    stops: bool = False

    def admits(self, value: float) -> bool:
        """Whether a number may be taken."""
        return (
            bool(np.isfinite(value))
            and (self.low <= value if self.closed else self.low < value)
            and value <= self.high
        )

    @property
    def range(self) -> str:
        """The admissible numbers, in words."""
        if np.isinf(self.low):
            return "finite"
        if np.isinf(self.high):
            words = (
                f"at least {self.low:g}" if self.closed else f"above {self.low:g}" if self.low else "positive"
            )
            return f"{words} and finite"
        return f"{'at least' if self.closed else 'above'} {self.low:g} and at most {self.high:g}"


def _whole(log_base: np.ndarray, reward: np.ndarray, samples: int) -> np.ndarray:
    """Up to half of the samples: with fewer left to choose from, the weights are noise."""
    return np.arange(2.0, max(2, samples // 2) + 1)


def _reached(log_base: np.ndarray, reward: np.ndarray, samples: int) -> np.ndarray:
    """Rewards that one sample in K reaches at least."""
    values, mass = np.unique(reward), np.exp(log_base) / len(reward)
    tail = np.array([mass[reward >= v].sum() for v in values])
    return values[tail >= 1.0 / samples] if np.any(tail >= 1.0 / samples) else values[:1]


BETA = Knob("beta", "KL temperature, reward units per nat", 1.0)
BETA_OVER_STD = Knob("beta", "KL weight beside rewards in units of their spread", 1.0)
BETA_WIN_RATE = Knob("beta", "KL temperature of win rates, 1 / nats", 1.0)
DRAWS = Knob("n", "draws of which the best is kept", 4.0, 1.0, closed=True, candidates=_whole)
LEVEL = Knob("threshold", "least reward that is imitated", None, -np.inf, candidates=_reached)
SHARE = Knob("fraction", "upper share of the rewards that is imitated", 0.1, 0.0, 1.0)
STOP = Knob("beta", "scale of the reward; the run is stopped, nothing holds it to p0", 1.0, stops=True)

_HALVINGS = 60


def aim(
    law: Law, log_base: np.ndarray, reward: np.ndarray, mean: float, knob: Knob, *, samples: int = 64
) -> float:
    """The setting of a knob whose law has a mean reward, or comes closest to it.

    Works on the exact law of a base and on samples of it alike.

    Args:
      law: the method's fixed point.
      log_base: of N strings for each of P prompts, or ``-log N`` for N samples each; [P, N] or [N].
      reward: the same.
      mean: averaged over prompts; between p0's and the greatest.
      knob: the method's.
      samples: K: what a step of training sees of each prompt.

    Returns:
      The value, to six significant digits where any number would do (it must survive a round trip through text).

    Raises:
      NoFixedPoint: the law exists nowhere.
    """
    log_base, reward = np.atleast_2d(*np.broadcast_arrays(log_base, reward))
    mass, level = by_level(log_base, reward)

    def reached(value: float) -> float:
        try:
            return mean_reward(law(mass, level, value), level)
        except NoFixedPoint:
            return np.nan

    if knob.candidates is not None:
        values = knob.candidates(log_base, reward, samples)
        found = np.array([reached(float(v)) for v in values])
        if np.isnan(found).all():
            raise NoFixedPoint(f"no {knob.option} has a fixed point")
        return float(values[np.nanargmin(np.abs(found - mean))])
    with np.errstate(divide="ignore"):
        return _bisected(reached, mean, knob, float(np.ptp(reward)) or 1.0)


def _bisected(reached: Callable[[float], float], mean: float, knob: Knob, scale: float) -> float:
    """Halve the range of a knob of which less means more reward; where there is no law, it was turned too far."""
    if np.isfinite(knob.high):
        low, high = np.log(1e-6), np.log(knob.high)
    else:
        low, high = np.log(1e-5 * scale), np.log(1e6 * scale)
    if np.isnan(reached(float(np.exp(high)))):
        raise NoFixedPoint(f"no {knob.option} has a fixed point")
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        found = reached(float(np.exp(middle)))
        low, high = (middle, high) if not found <= mean else (low, middle)
    value = float(f"{np.exp(high):.6g}")
    return value if not np.isnan(reached(value)) else float(f"{np.exp(high) * (1 + 1e-5):.6g}")
