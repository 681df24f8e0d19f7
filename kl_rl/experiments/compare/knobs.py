"""Where each method's knob must stand to aim at a given mean reward, from the exact law of p0's reward alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kl_rl.experiments.compare.catalogue import Method
from kl_rl.experiments.compare.problem import Problem, mean_at_fraction

__all__ = ["knob_values", "row_beta"]

Law = tuple[np.ndarray, np.ndarray]  # values and probabilities of the reward under p0


def _tilted(law: Law, exponent: np.ndarray) -> np.ndarray:
    weight = law[1] * np.exp(exponent - exponent.max())
    return weight / weight.sum()


def _filter_threshold(law: Law, mean: float) -> float:
    """The reward level at which the filtered base comes closest to a mean reward."""
    value, mass = law
    tail = np.cumsum(mass[::-1])[::-1]
    tail_mean = np.cumsum((mass * value)[::-1])[::-1] / np.where(tail > 0, tail, 1.0)
    return float(value[np.argmin(np.abs(tail_mean - mean))])


def _win_rate_beta(law: Law, mean: float) -> float:
    """IPO's beta at which ``p0 exp(w / beta)``, w the Bradley-Terry win rate against p0, has a mean reward."""
    value, mass = law
    with np.errstate(over="ignore"):
        win = (1.0 / (1.0 + np.exp(value[None, :] - value[:, None]))) @ mass
    low, high = 0.0, 1e3
    for _ in range(100):
        middle = 0.5 * (low + high)
        below = _tilted(law, middle * win) @ value < mean
        low, high = (middle, high) if below else (low, middle)
    return 1.0 / high


def _over_std(law: Law, beta: float) -> float:
    """GRPO's beta: at its fixed point the temperature is beta times the reward's spread there."""
    tilted = _tilted(law, law[0] / beta)
    mean = tilted @ law[0]
    return float(beta / np.sqrt(tilted @ (law[0] - mean) ** 2))


def knob_values(
    method: Method, problem: Problem, fractions: tuple[float, ...], num_samples: int
) -> list[float]:
    """Settings of a method's knob that aim at mean rewards some fractions of the way up.

    Args:
      method: its ``knob`` says what is swept.
      problem: the world.
      fractions: of the way from E_{p0} r to the largest reward.
      num_samples: K, which bounds n.

    Returns:
      One to ``len(fractions)`` values.
    """
    law = (problem.levels.value, np.exp(problem.log_level))
    means, betas = zip(*(mean_at_fraction(problem, f) for f in fractions), strict=True)
    thresholds = list(dict.fromkeys(_filter_threshold(law, mean) for mean in means))
    choices: dict[str, Callable[[], list[float]]] = {
        "beta": lambda: list(betas),
        "beta_over_std": lambda: [_over_std(law, beta) for beta in betas],
        "beta_win_rate": lambda: [_win_rate_beta(law, mean) for mean in means],
        "threshold": lambda: thresholds,
        "fraction": lambda: [float(law[1][law[0] >= t].sum()) for t in thresholds],
        "n": lambda: sorted({float(min(num_samples // 2, n)) for n in (3, 8, 32)}),
        "steps": lambda: [betas[len(betas) // 2]],
        "greatest": lambda: [betas[len(betas) // 2]],
    }
    return choices[method.knob]()


def row_beta(method_knob: str, knob_value: float) -> float | None:
    """The temperature a row's posterior is defined by, or None where it has to be fitted to the mean reward."""
    return knob_value if method_knob == "beta" else None
