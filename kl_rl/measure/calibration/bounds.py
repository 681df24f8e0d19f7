"""Bounds on the calibration loss whatever the policies are: stochastic ones, and one for unseen levels."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kl_rl.core.estimate import Estimate, poisson_upper_limit
from kl_rl.measure.calibration.balance import Balance
from kl_rl.measure.calibration.levels import Cells

__all__ = ["Unreached", "lower_bound", "merged_plug_in", "unreached_levels", "unseen_mass", "upper_bound"]


def lower_bound(cells: Cells, forward: bool = False) -> Estimate:
    """Stochastic lower bound from one sample set: `C = E_q[l + log E_q(e^{-l} | r)]`, plug-in biased down.

    Forward twin: `C_fwd = E_p0[-l + log E_p0(e^{l} | r)]`. Delta-method stderr; prompts are strata.

    Args:
        cells: the pooled samples.
        forward: bound C_fwd, from the base samples, instead of C from the tuned ones.

    Returns:
        The bound in nats.
    """
    part, l, share = _outer(cells, forward)
    g = cells.cell[part]
    log_mean = _log_mean(-l, g, len(cells.prompt_of_cell))[g]
    terms = l + log_mean
    influence = share * (terms + np.expm1(-l - log_mean))
    return Estimate(float(share @ terms), _stratified(influence, cells.prompt[part]), float(len(l)))


def upper_bound(cells: Cells, forward: bool = False) -> Estimate:
    """Stochastic upper bound from both sets: `C = E_q[l - log E_p0(e^{l} | r)]`, plug-in biased up (T4.2).

    Forward twin: `C_fwd = E_p0[-l - log E_q(e^{-l} | r)]`. Infinite if the first set visits a level that the second
    never reaches: nothing is known of the second law there, and merging such a level with a neighbour would not
    give a bound (C4.1).

    Args:
        cells: the pooled samples, both sets.
        forward: bound C_fwd instead of C.

    Returns:
        The bound in nats.
    """
    size = len(cells.prompt_of_cell)
    part, other = (_outer(cells, side)[0] for side in (forward, not forward))
    visits = (np.bincount(cells.cell[side], minlength=size) > 0 for side in (part, other))
    if np.any(next(visits) & ~next(visits)):
        return Estimate(math.inf, math.inf, float(min(len(cells.cell[part]), len(cells.cell[other]))))
    return merged_plug_in(cells, forward)


def merged_plug_in(cells: Cells, forward: bool = False) -> Estimate:
    """The plug-in of `upper_bound`, unreached levels merged with the nearest reached one of their prompt.

    Biased up wherever nothing had to be merged; with merging a guide to how wide an interval should be, not a bound.

    Args:
        cells: the pooled samples, both sets.
        forward: for C_fwd instead of C.

    Returns:
        The plug-in in nats.
    """
    part, l, share = _outer(cells, forward)
    other, minus, _ = _outer(cells, not forward)
    size = len(cells.prompt_of_cell)
    merged = _merge_empty(cells, np.bincount(cells.cell[other], minlength=size) > 0)
    g, inner = merged[cells.cell[part]], merged[cells.cell[other]]
    log_mean = _log_mean(-minus, inner, size)
    terms = l - log_mean[g]
    mass = np.bincount(g, share, minlength=size) / np.maximum(np.bincount(inner, minlength=size), 1)
    first = _stratified(share * terms, cells.prompt[part])
    with np.errstate(over="ignore"):
        second = _stratified(-mass[inner] * np.expm1(-minus - log_mean[inner]), cells.prompt[other])
    return Estimate(float(share @ terms), math.hypot(first, second), float(min(len(l), len(minus))))


def _outer(cells: Cells, forward: bool) -> tuple[slice, np.ndarray, np.ndarray]:
    """The samples averaged over: their slice, log(own density / other density), weights of sum 1."""
    n = int(cells.n.sum())
    part = slice(n, None) if forward else slice(0, n)
    count = (cells.m if forward else cells.n).astype(np.float64)
    x = cells.prompt[part]
    return (
        part,
        (-1.0 if forward else 1.0) * cells.log_ratio[part],
        (cells.weight / np.maximum(count, 1.0))[x],
    )


def _log_mean(values: np.ndarray, group: np.ndarray, size: int) -> np.ndarray:
    """Log of the mean of e^values in each group; -inf for an empty one, [size]."""
    top = np.full(size, -np.inf)
    np.maximum.at(top, group, values)
    total = np.bincount(group, np.exp(values - top[group]), minlength=size)
    with np.errstate(divide="ignore"):
        return top + np.log(total) - np.log(np.maximum(np.bincount(group, minlength=size), 1))


def _stratified(influence: np.ndarray, stratum: np.ndarray) -> float:
    """Standard error of a sum of influences, centred inside each stratum."""
    size = np.maximum(np.bincount(stratum), 1).astype(np.float64)
    centred = influence - (np.bincount(stratum, influence) / size)[stratum]
    factor = size / np.maximum(size - 1.0, 1.0)
    return math.sqrt(float(np.sum(centred**2 * factor[stratum])))


def _merge_empty(cells: Cells, filled: np.ndarray) -> np.ndarray:
    """Map each cell to itself if filled, else to the nearest filled cell of its prompt, [G]."""
    size = len(filled)
    position = np.arange(size)
    before = np.maximum.accumulate(np.where(filled, position, -1))
    after = np.minimum.accumulate(np.where(filled, position, size)[::-1])[::-1]
    x = cells.prompt_of_cell
    has_before = (before >= 0) & (x[np.maximum(before, 0)] == x)
    has_after = (after < size) & (x[np.minimum(after, size - 1)] == x)
    near_before = has_before & (~has_after | (position - before <= after - position))
    return np.where(near_before, before, np.where(has_after, after, position))


class Unreached(NamedTuple):
    """Levels that one sample set is not expected to reach, and how much hangs on them.

    Attributes:
        mass: share of the other policy in such levels.
        room: how far C (forward: C_fwd) may exceed its estimate, and the KL of the marginals fall short,
            nats.
        log_p: log of the largest probability of each cell under the unseen policy that fits the counts, [G].
    """

    mass: float
    room: float
    log_p: np.ndarray


def unreached_levels(cells: Cells, weights: Balance, forward: bool = False, least: float = 3.0) -> Unreached:
    """Room left by levels whose base probability rests on importance weights of the tuned samples alone.

    Such weights cannot see base strings that the tuned policy no longer produces. The base samples can: they
    bound the total probability of the chosen levels by `Lambda_U`, the upper Poisson limit of their count
    there. Among all base probabilities `p_g` with `sum_g m_x p_g <= Lambda_U` the largest `sum_g v_g log p_g`
    has `m_x p_g = v_g Lambda_U / V` (v_g: probability of the level under q, V their sum), so C may exceed its
    estimate by at most

        room = sum_g v_g log( v_g Lambda_U / (V m_x p^_g) ).

    Chosen are the levels with the fewest base samples as predicted from the tuned ones, as many as add up to
    less than `least`; base counts play no part in the choice, hence no selection effect. Where more base
    samples are expected, what they show is in the jackknife.

    Args:
        cells: the pooled samples, both sets.
        weights: from `balance`.
        forward: exchange the roles of tuned and base samples (for C_fwd).
        least: predicted total number of samples in the chosen levels.

    Returns:
        The room (0 when no level is chosen) and the probabilities that attain it.
    """
    part, l, _ = _outer(cells, forward)
    log_v, log_p = (weights.log_p, weights.log_q) if forward else (weights.log_q, weights.log_p)
    own, other = (cells.m, cells.n) if forward else (cells.n, cells.m)
    size, x = len(cells.prompt_of_cell), cells.prompt_of_cell
    count = cells.per_cell(None, forward)
    with np.errstate(divide="ignore"):
        predicted = _log_mean(-l, cells.cell[part], size) + np.log(count) + np.log(other[x] / own[x])
    chosen = _thinnest(predicted, count > 0, least)
    v = (cells.weight[x] * np.exp(log_v))[chosen]
    total = float(v.sum())
    if not total > 0.0:
        return Unreached(0.0, 0.0, log_p)
    limit = poisson_upper_limit(float(cells.per_cell(None, not forward)[chosen].sum()))
    largest = np.minimum(np.log(v / total * limit / other[x][chosen]), 0.0)
    room = max(float(v @ (largest - log_p[chosen])), 0.0)
    full = log_p.copy()
    full[chosen] = np.maximum(largest, full[chosen]) if room > 0.0 else full[chosen]
    return Unreached(min(total, 1.0), room, full)


def _thinnest(log_predicted: np.ndarray, allowed: np.ndarray, total: float) -> np.ndarray:
    """Mask of the cells with the smallest predictions that together stay below the total, [G]."""
    order = np.argsort(np.where(allowed, log_predicted, np.inf), kind="stable")
    running = np.cumsum(np.exp(np.minimum(np.where(allowed, log_predicted, np.inf)[order], 50.0)))
    chosen = np.zeros(len(allowed), bool)
    chosen[order[running < total]] = True
    return chosen & allowed


def unseen_mass(cells: Cells, residual: np.ndarray, forward: bool = False) -> tuple[float, float]:
    """How far strings too rare to be sampled may move a mean log-ratio down and up (rule of three).

    A policy may hold `eps = 3.7 / n` of its mass in strings none of its n samples shows. Their log-ratios are
    taken to lie in the range seen in either set; below, also above `log eps`, for the other policy cannot
    give them more than probability 1.

    Args:
        cells: the pooled samples.
        residual: log-ratio (own density over the other) whose mean over the tuned samples is wanted, nats,
            [N].
        forward: the mean is over the base samples instead.

    Returns:
        (down, up) in nats.
    """
    part, _, share = _outer(cells, forward)
    eps = min(poisson_upper_limit(0.0) / len(share), 1.0)
    mean = float(share @ residual[part])
    lowest = max(float(residual.min()), math.log(eps))
    return eps * max(mean - lowest, 0.0), eps * max(float(residual.max()) - mean, 0.0)
