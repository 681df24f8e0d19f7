"""Where each method's knob must stand to aim at a mean reward, from samples of the base's reward alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kl_rl.experiments.compare.catalogue import Method

__all__ = ["sampled_knobs", "targets", "tilt_to_mean"]


def targets(reward: np.ndarray, shifts: tuple[float, ...]) -> tuple[float, ...]:
    """Mean rewards some standard deviations above the base's, at most 0.9 of the way to the largest seen.

    Args:
      reward: samples of the base; [P, M].
      shifts: in standard deviations.

    Returns:
      One mean for each shift.
    """
    top = reward.max(1).mean() - reward.mean()
    return tuple(float(reward.mean() + min(s * reward.std(), 0.9 * top)) for s in shifts)


def _rounded(x: float) -> float:
    """Six significant digits: knob values must survive a round trip through text."""
    return float(f"{x:.6g}")


def _tilted_mean(reward: np.ndarray, exponent: np.ndarray) -> float:
    """Mean reward under weights `e^exponent`, averaged over prompts; both [P, M]."""
    weight = np.exp(exponent - exponent.max(1, keepdims=True))
    return float(np.mean((weight * reward).sum(1) / weight.sum(1)))


def tilt_to_mean(reward: np.ndarray, mean: float, direction: np.ndarray | None = None) -> float:
    """The lambda at which the samples, weighted by `e^(lambda direction)`, have a given mean reward.

    Args:
      reward: samples of the base; [P, M].
      mean: between the base's mean and the largest rewards.
      direction: what is tilted by, an increasing function of the reward; None: the reward itself; [P, M].

    Returns:
      lambda, in nats per unit of the direction.
    """
    direction = reward if direction is None else direction
    low, high = 0.0, 1.0 / float(direction.std())
    while _tilted_mean(reward, high * direction) < mean and high < 1e6:
        high *= 2.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _tilted_mean(reward, middle * direction) < mean else (low, middle)
    return 0.5 * (low + high)


def _beta(reward: np.ndarray, mean: float) -> float:
    return _rounded(1.0 / tilt_to_mean(reward, mean))


def _beta_over_std(reward: np.ndarray, mean: float) -> float:
    """GRPO's beta: at its fixed point the temperature is beta times the reward's spread there."""
    beta = 1.0 / tilt_to_mean(reward, mean)
    square = _tilted_mean((reward - mean) ** 2, reward / beta)
    return _rounded(beta / np.sqrt(square))


def _beta_win_rate(reward: np.ndarray, mean: float) -> float:
    """IPO's beta at which `p0 e^(w / beta)`, w the Bradley-Terry win rate against p0, has a mean reward."""
    values, index, count = np.unique(reward, return_inverse=True, return_counts=True)
    win = 0.5 * (1.0 + np.tanh(0.5 * (values[:, None] - values[None, :]))) @ (count / count.sum())
    return _rounded(1.0 / tilt_to_mean(reward, mean, win[index].reshape(reward.shape)))


def _threshold(reward: np.ndarray, mean: float, rarest: float) -> float:
    """The level whose tail has the closest mean, among those that a share `rarest` of the samples reach."""
    values = np.unique(reward)
    values = values[[np.mean(reward >= v) >= rarest for v in values]]
    tail = np.array([reward[reward >= v].mean() for v in values])
    return float(values[np.argmin(np.abs(tail - mean))])


def _draws(reward: np.ndarray, mean: float, most: int) -> float:
    """The n whose best-of-n has the closest mean, by the empirical law of each prompt's rewards."""
    ordered = np.sort(reward, axis=1)
    share = np.arange(1, ordered.shape[1] + 1) / ordered.shape[1]
    sizes = np.arange(2, max(2, most) + 1)
    means = [np.mean(ordered @ np.diff(share**n, prepend=0.0)) for n in sizes]
    return float(sizes[np.argmin(np.abs(np.array(means) - mean))])


def sampled_knobs(
    method: Method, reward: np.ndarray, means: tuple[float, ...], *, num_samples: int
) -> list[float]:
    """The settings of a method's knob that aim at given mean rewards.

    Args:
      method: its `knob` says what is swept; not "steps", which training itself finds.
      reward: samples of the base; [P, M].
      means: mean rewards to aim at, ascending.
      num_samples: K; n is at most K / 2, and a threshold must let one sample in K pass.

    Returns:
      Knob values, without repetitions.
    """
    rarest = 1.0 / num_samples
    choices: dict[str, Callable[[float], float]] = {
        "beta": lambda mean: _beta(reward, mean),
        "beta_over_std": lambda mean: _beta_over_std(reward, mean),
        "beta_win_rate": lambda mean: _beta_win_rate(reward, mean),
        "threshold": lambda mean: _threshold(reward, mean, rarest),
        "fraction": lambda mean: _rounded(float(np.mean(reward >= _threshold(reward, mean, rarest)))),
        "n": lambda mean: _draws(reward, mean, num_samples // 2),
        "greatest": lambda mean: _beta(reward, means[-1]),
    }
    return list(dict.fromkeys(choices[method.knob](mean) for mean in means))
