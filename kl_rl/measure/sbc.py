"""Simulation-based calibration: ranks of the truth among a model's draws, uniform if the model is right.

Draw y from the truth, reveal part of it, let the model draw L completions of what was revealed, and rank a
statistic of y among theirs. If the model's conditional is the true one, ranks are uniform on {0, ..., L}. One
statistic may miss an error that another shows; those that depend on the data revealed, such as the joint
log-likelihood, see a model that ignores it. Talts et al. 2018 (arXiv 1804.06788); Modrak et al. 2023 (arXiv
2211.02383).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import gammaincc

from kl_rl.exact.enumeration import Enumeration

__all__ = ["SbcResult", "prefix_ranks", "rank_statistics", "sbc_prefix", "uniformity"]


class SbcResult(NamedTuple):
    """How far ranks are from uniform.

    Attributes:
      chi2: ``sum_b (n_b - n / (L + 1))^2 / (n / (L + 1))``, on L degrees of freedom.
      p_value: probability of a larger chi2 under uniform ranks; NaN if the ranks are undefined.
      ecdf_distance: largest distance between the ranks' distribution function and the uniform one.
      histogram: n_b, the count of every rank; [L + 1].
    """

    chi2: float
    p_value: float
    ecdf_distance: float
    histogram: np.ndarray


def rank_statistics(truth: np.ndarray, draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``#{l : draw_l < truth}`` plus a uniform share of the ties: right for discrete laws too.

    Args:
      truth: statistic of the true values; [n].
      draws: statistic of the model's draws; [n, L].
      rng: breaks the ties.

    Returns:
      Integers in 0 .. L; [n].

    Raises:
      ValueError: if the shapes do not fit or a value is NaN.
    """
    truth, draws = np.asarray(truth, np.float64), np.asarray(draws, np.float64)
    if truth.ndim != 1 or draws.ndim != 2 or len(draws) != len(truth) or draws.shape[1] < 1:
        raise ValueError(f"need truth (n,) and draws (n, L) with L >= 1, got {truth.shape} and {draws.shape}")
    if np.isnan(truth).any() or np.isnan(draws).any():
        raise ValueError("a statistic is NaN: ranks need comparable values")
    below = (draws < truth[:, None]).sum(1)
    ties = (draws == truth[:, None]).sum(1)
    return below + rng.integers(0, ties + 1)


def uniformity(ranks: np.ndarray, num_draws: int) -> SbcResult:
    """Pearson's chi-square and the distance of distribution functions, against uniform ranks on {0, ..., L}.

    The p-value ``Gamma(L / 2, chi2 / 2) / Gamma(L / 2)`` is asymptotic: use at least 5 (L + 1) ranks.

    Args:
      ranks: integers; [n].
      num_draws: L.

    Returns:
      SbcResult.

    Raises:
      ValueError: if there are no ranks or one is outside 0 .. L.
    """
    ranks = np.asarray(ranks)
    if not (ranks.size and ranks.min() >= 0 and ranks.max() <= num_draws):
        raise ValueError(f"need at least one rank, all within 0 .. {num_draws}")
    histogram = np.bincount(ranks, minlength=num_draws + 1)
    expected = len(ranks) / (num_draws + 1)
    chi2 = float(np.sum((histogram - expected) ** 2) / expected)
    uniform = np.arange(1, num_draws + 2) / (num_draws + 1)
    distance = float(np.max(np.abs(np.cumsum(histogram) / len(ranks) - uniform)))
    return SbcResult(chi2, float(gammaincc(num_draws / 2, chi2 / 2)), distance, histogram)


def _draw_within(
    log_q: np.ndarray, group: np.ndarray, asked: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Members drawn from q given their group, by inversion; -1 where q gives the group no mass.

    Args:
      log_q: [N].
      group: group of each member, ascending; [N].
      asked: groups to draw from; [n, L].
      rng: numpy generator.
    """
    size = int(group[-1]) + 1
    first = np.searchsorted(group, np.arange(size + 1))
    top = np.maximum.reduceat(log_q, first[:-1])
    weight = np.exp(log_q - np.where(np.isfinite(top), top, 0.0)[group])
    total = np.add.reduceat(weight, first[:-1])
    cumulative = np.concatenate([[0.0], np.cumsum(weight / np.where(total > 0, total, 1.0)[group])])
    low, high = cumulative[first[asked]], cumulative[first[asked + 1]]
    target = np.minimum(low + rng.random(asked.shape) * (high - low), np.nextafter(high, -1.0))
    drawn = np.searchsorted(cumulative, target, side="right") - 1
    return np.where(np.isfinite(top)[asked], drawn, -1)


def prefix_ranks(
    log_pstar: np.ndarray,
    log_q: np.ndarray,
    strings: Enumeration,
    statistic: np.ndarray,
    prefix_length: int,
    num_simulations: int,
    num_draws: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Ranks of a statistic of ``y ~ p*`` among L completions of its prefix drawn from ``q(. | prefix)``.

    Args:
      log_pstar: log-probabilities of the strings under the truth, nats; [N].
      log_q: the same under the model; [N].
      strings: enumeration; N strings.
      statistic: of each string; [N].
      prefix_length: tokens revealed, 0 to T.
      num_simulations: n.
      num_draws: L.
      rng: numpy generator.

    Returns:
      Integers; [n]. Empty if q gives no mass to a prefix that was drawn: its ranks are then undefined.

    Raises:
      ValueError: if the prefix is longer than the strings, or a statistic is NaN.
    """
    tokens = np.asarray(strings.tokens, np.int64)
    if not 0 <= prefix_length <= tokens.shape[1]:
        raise ValueError(f"prefix_length must be between 0 and {tokens.shape[1]}, got {prefix_length}")
    code = tokens[:, :prefix_length] @ (int(tokens.max()) + 1) ** np.arange(prefix_length)
    _, group = np.unique(code, return_inverse=True)
    order = np.argsort(group, kind="stable")
    truth, model, group = log_pstar[order], log_q[order], group[order]
    whole = np.zeros((num_simulations, 1), np.int64)
    drawn = _draw_within(truth, np.zeros(len(truth), np.int64), whole, rng)[:, 0]
    asked = np.broadcast_to(group[drawn, None], (num_simulations, num_draws))
    completed = _draw_within(model, group, asked, rng)
    if (completed < 0).any():
        return np.zeros(0, np.int64)
    value = np.asarray(statistic, np.float64)[order]
    return rank_statistics(value[drawn], value[completed], rng)


def sbc_prefix(
    log_pstar: np.ndarray,
    log_q: np.ndarray,
    strings: Enumeration,
    statistic: np.ndarray,
    prefix_length: int,
    num_simulations: int,
    num_draws: int,
    rng: np.random.Generator,
) -> SbcResult:
    """Simulation-based calibration of ``q(y | prefix)`` on the text of p*; arguments as in ``prefix_ranks``.

    Returns:
      SbcResult; all NaN, with an empty histogram, if q gives no mass to a prefix that occurs.
    """
    ranks = prefix_ranks(log_pstar, log_q, strings, statistic, prefix_length, num_simulations, num_draws, rng)
    if not len(ranks):
        return SbcResult(np.nan, np.nan, np.nan, ranks)
    return uniformity(ranks, num_draws)
