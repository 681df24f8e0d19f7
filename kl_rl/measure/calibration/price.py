"""Price of the reward: P = sup_lambda {lambda mu - Lambda(lambda)}, and the tilt that attains it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kl_rl.measure.calibration.jackknife import prompt_left_out
from kl_rl.measure.calibration.levels import Cells

__all__ = ["Price", "fit_tilts", "log_moments", "price", "tilt_spread"]


class Price(NamedTuple):
    """The price of the mean reward and the common tilt, with leave-one-out changes.

    Attributes:
        value: P in nats.  tilt: lambda = 1/beta (per unit of reward).  mean_reward: mu under q.
        value_change, tilt_change: what leaving each sample out does to them, [N].
        identified: False when the reward is constant, or its mean is at the end of the range (tilt infinite).
    """

    value: float
    tilt: float
    mean_reward: float
    value_change: np.ndarray
    tilt_change: np.ndarray
    identified: bool


def log_moments(
    tilt: np.ndarray, reward: np.ndarray, weight: np.ndarray, group: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`Lambda(lambda) = log E e^{lambda r}` of each group with its first two derivatives.

    Args:
        tilt: lambda of each group, [X].
        reward: values, [N].
        weight: positive weights, [N].
        group: group index of each value, [N].
        count: number of groups X.

    Returns:
        Lambda, tilted mean, tilted variance, each [X].
    """
    exponent = tilt[group] * reward
    top = np.full(count, -np.inf)
    np.maximum.at(top, group, exponent)
    e = weight * np.exp(exponent - top[group])
    total = np.bincount(group, e, minlength=count)
    mean = np.bincount(group, e * reward, minlength=count) / total
    variance = np.bincount(group, e * (reward - mean[group]) ** 2, minlength=count) / total
    norm = np.bincount(group, weight, minlength=count)
    return top + np.log(total / norm), mean, variance


def fit_tilts(
    mean: np.ndarray,
    share: np.ndarray,
    owner: np.ndarray,
    reward: np.ndarray,
    weight: np.ndarray,
    group: np.ndarray,
    iterations: int = 60,
) -> np.ndarray:
    """Solve `sum_x share_x (mean_x - Lambda_x'(lambda)) = 0` by Newton inside a bracket.

    Args:
        mean: target mean reward of each group, [X].
        share: weight of each group in its owner's equation, [X].
        owner: which equation a group belongs to (all 0: one common tilt; arange: one each), [X].
        reward: values, [N].
        weight: their weights under the base law, [N].
        group: group index of each value, [N].
        iterations: upper limit.

    Returns:
        Tilts per owner. Where the mean is at the end of the range, the cap `500 / range` with its sign.
    """
    count, problems = len(mean), int(owner.max()) + 1
    spread = max(float(reward.max() - reward.min()), 1e-300)
    cap = 500.0 / spread
    low, high = np.full(problems, -cap), np.full(problems, cap)
    tilt = np.zeros(problems)
    for _ in range(iterations):
        _, tilted, variance = log_moments(tilt[owner], reward, weight, group, count)
        slope = np.bincount(owner, share * (mean - tilted), minlength=problems)
        curve = np.bincount(owner, share * variance, minlength=problems)
        low, high = np.where(slope >= 0, tilt, low), np.where(slope <= 0, tilt, high)
        reach = 2.0 * np.maximum(np.abs(tilt), 1.0 / spread)
        with np.errstate(divide="ignore", invalid="ignore"):
            step = np.where(slope == 0.0, 0.0, np.clip(slope / curve, -reach, reach))
        new = tilt + np.where(np.isfinite(step), step, 0.0)
        new = np.where((new <= low) | (new >= high), (low + high) / 2, new)
        new = np.where(slope == 0.0, tilt, new)
        if np.all(np.abs(new - tilt) <= 1e-12 * cap + 1e-13 * np.abs(new)):
            return new
        tilt = new
    return tilt


def price(cells: Cells, h: np.ndarray, k: np.ndarray) -> Price:
    """P with one tilt common to all prompts, from pooled samples weighted for q (h) and for p0 (k).

    `P = sup_lambda {lambda mu - mean_x Lambda_x(lambda)}`. Leave-one-out values take one Newton step:
    `P_(-i) = lambda mu_(-i) - Lambda_(-i) + (mu_(-i) - Lambda'_(-i))^2 / (2 Lambda'')`.

    Args:
        cells: the pooled samples.
        h: weights for q, [N].
        k: weights for p0, [N].

    Returns:
        The price; zero and not identified when all rewards are equal.
    """
    x, w, r = cells.prompt, cells.weight, cells.reward - cells.reward.mean()
    count = len(w)
    mean = cells.per_prompt(h * r) / cells.per_prompt(h)
    total = float(w @ mean)
    mu = total + float(cells.reward.mean())
    zero = np.zeros(len(r))
    if not cells.reward.max() - cells.reward.min() > 1e-9 * np.abs(cells.reward).max():
        return Price(0.0, 0.0, mu, zero, zero, False)
    tilt = float(fit_tilts(mean, w, np.zeros(count, np.int64), *_compressed(cells, r, k))[0])
    each = np.full(count, tilt)
    log_mgf, tilted, variance = log_moments(each, r, k, x, count)
    value = tilt * total - float(w @ log_mgf)
    curve = float(w @ variance)
    spread = float(r.max() - r.min())
    identified = 1e-9 < abs(tilt) * spread < 400.0 and curve > 1e-12 * spread**2
    d_mean, d_log, d_tilted = _leave_one_out(cells, h, k, r, each, mean, log_mgf, tilted)
    slope = w[x] * (d_mean - d_tilted)
    newton = slope**2 / (2 * curve) if identified else zero
    change = w[x] * (tilt * d_mean - d_log) + newton
    return Price(max(value, 0.0), tilt, mu, change, slope / curve if identified else zero, identified)


def _compressed(cells: Cells, r: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(reward, weight, prompt): one row a cell where levels are exact, else the samples themselves."""
    if cells.binning.kind != "exact":
        return r, k, cells.prompt
    reward = cells.per_cell(r) / cells.per_cell()
    return reward, cells.per_cell(k), cells.prompt_of_cell


def _leave_one_out(
    cells: Cells,
    h: np.ndarray,
    k: np.ndarray,
    r: np.ndarray,
    tilt: np.ndarray,
    mean: np.ndarray,
    log_mgf: np.ndarray,
    tilted: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Changes of the mean under q, of Lambda and of Lambda' when one sample is left out, each [N]."""
    x = cells.prompt
    e = k * np.exp(tilt[x] * r - log_mgf[x])  # weights of the tilted base law, total = total of k
    size = np.where(cells.is_base == 1, cells.m[x], cells.n[x]).astype(np.float64)
    scale = size / np.maximum(size - 1.0, 1.0)
    parts = []
    for f in (h, h * (r - mean[x]), k, e, e * (r - tilted[x])):
        tuned, base = cells.per_prompt(f, False), cells.per_prompt(f, True)
        own, other = (
            np.where(cells.is_base == 1, base[x], tuned[x]),
            np.where(cells.is_base == 1, tuned[x], base[x]),
        )
        rest = (own - f) * scale + other
        parts.append(rest if f.min() < 0 else np.maximum(rest, 1e-12 * (own + other)))
    changes = (parts[1] / parts[0], np.log(parts[3] / parts[2]), parts[4] / parts[3])
    alone = (prompt_left_out(cells, v)[x] for v in (mean, log_mgf, tilted))
    kept = [np.where(size > 1.0, c, a) for c, a in zip(changes, alone, strict=True)]
    return kept[0], kept[1], kept[2]


def tilt_spread(cells: Cells, h: np.ndarray, k: np.ndarray, least: int = 10) -> tuple[float, int] | None:
    """Standard deviation over prompts of the tilt fitted to each prompt alone.

    Only prompts with at least `least` samples of both sets and a mean inside the reward range take part;
    weights are the prompts' shares of the tuned samples. Sampling noise of the fits is included: compare with
    other runs of the same size, or read it as an upper bound of the real spread.

    Args:
        cells: the pooled samples.
        h: weights for q, [N].
        k: weights for p0, [N].
        least: samples needed.

    Returns:
        (spread, number of prompts), or None when fewer than two prompts qualify.
    """
    count = len(cells.n)
    if count < 2:
        return None
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, cells.prompt, cells.reward)
    np.maximum.at(high, cells.prompt, cells.reward)
    mean = cells.per_prompt(h * cells.reward) / cells.per_prompt(h)
    width = high - low
    good = (cells.n >= least) & (cells.m >= least) & (width > 0)
    good &= (mean > low + 1e-6 * width) & (mean < high - 1e-6 * width)
    if good.sum() < 2:
        return None
    tilts = fit_tilts(mean, np.ones(count), np.arange(count), *_compressed(cells, cells.reward, k))[good]
    share = cells.weight[good] / cells.weight[good].sum()
    return float(np.sqrt(share @ (tilts - share @ tilts) ** 2)), int(good.sum())
