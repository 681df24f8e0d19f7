"""The calibration budget of a fine-tune, `KL(q || p0) = P + S + C`, from rewards and log-probabilities alone.

P is the price of the mean reward, S what the shape of the reward marginal costs beyond it, C the calibration loss
`E_{r~q} KL(q(y|r) || p0(y|r))`: zero exactly when q is p0 tilted by some function of the reward. Needs no model and
no normalizing constant: samples of the tuned policy, better also of the base policy, each scored under both.
"""

from __future__ import annotations

import math

import numpy as np

from kl_rl.core.estimate import Estimate
from kl_rl.measure.calibration.balance import Balance, balance, calibration_terms, within_level_loss
from kl_rl.measure.calibration.bounds import (
    Unreached,
    lower_bound,
    merged_plug_in,
    unreached_levels,
    unseen_mass,
    upper_bound,
)
from kl_rl.measure.calibration.jackknife import Jackknife, jackknife, prompt_left_out
from kl_rl.measure.calibration.levels import Cells, build_cells
from kl_rl.measure.calibration.price import Price, fit_tilts, log_moments, price, tilt_spread
from kl_rl.measure.calibration.types import Bounded, SampledBudget
from kl_rl.measure.calibration.warnings import find_warnings
from kl_rl.measure.samples import Samples

__all__ = ["Bounded", "SampledBudget", "sampled_budget"]


def sampled_budget(
    tuned: Samples, base: Samples | None = None, *, bins: int | str = "auto", beta: float | None = None
) -> SampledBudget:
    """Measure KL, P, S, C, C_fwd and C_JS with standard errors, bounds and 95 % limits.

    Both sample sets are pooled and weighted by the balance heuristic (`calibration.balance`). Bias and
    standard error are the delete-one jackknife's (`calibration.jackknife`), with prompts as strata: the
    numbers are about *these* prompts. Limits are `value -+ (|bias|/2 + t stderr + skewness term)`,
    clipped at 0, padded by rounding. They are wider where levels that one set cannot reach leave room
    (`unreached_levels`), and where over 5 % of the samples are alone in their cell: then they take in
    the stochastic bounds too. Without base samples C has a lower limit only and C_fwd, P, S have none.

    P + S + C is the KL of the two pooled, weighted samples. It differs from the plain mean of l by
    sampling noise, of which C and S have much less than that mean.

    Args:
        tuned: samples of the tuned policy q, scored under q and p0.
        base: samples of the base policy p0, scored under both; None if there are none.
        bins: "exact" (levels are the distinct rewards), a number of equal-mass bins, or "auto".
        beta: temperature for the correction of binned rewards; None: the fitted one.

    Returns:
        The budget.

    Raises:
        ValueError: for inconsistent arrays, fewer than two samples, or beta <= 0.

    Reference: the split is the chain rule of KL (Kullback & Leibler 1951) with the reward as statistic.
    """
    if beta is not None and not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    cells = build_cells(tuned, base, bins)
    weights = balance(cells)
    h, k = _plain(weights)
    paid = price(cells, h, k)
    unreached = unreached_levels(cells, weights) if base is not None else None
    used_beta = beta if beta is not None else _fitted_beta(paid)
    parts, symmetric = _divergences(cells, weights, paid, unreached)
    spread = tilt_spread(cells, h, k) if base is not None else None
    corrected, bound = _binning(cells, weights, used_beta)
    n = int(cells.n.sum())
    budget = SampledBudget(
        **parts,
        C_JS=symmetric,
        beta_fit=_beta(cells, paid, base is not None),
        C_corrected=corrected,
        binning_bound=bound,
        beta=used_beta,
        lambda_spread=None if spread is None else spread[0],
        mean_reward=(
            paid.mean_reward,
            float(cells.weight @ (cells.per_prompt(k * cells.reward) / cells.per_prompt(k))),
        ),
        n_tuned=n,
        n_base=int(cells.m.sum()),
        num_prompts=len(cells.n),
        ess_tuned=_effective_size(-cells.log_ratio[:n]),
        ess_base=None if base is None else _effective_size(cells.log_ratio[n:]),
        bins=cells.binning.kind,
        num_levels=cells.binning.levels,
        unreached=0.0 if unreached is None else unreached.mass,
        warnings=[],
    )
    return budget._replace(warnings=find_warnings(cells, budget, base is not None))


def _plain(weights: Balance) -> tuple[np.ndarray, np.ndarray]:
    """Weights for q and for p0 themselves (not their logs), safe from overflow."""
    return np.exp(np.minimum(weights.log_h, 600.0)), np.exp(np.minimum(weights.log_k, 600.0))


def _effective_size(log_weight: np.ndarray) -> float:
    """`(sum w)^2 / sum w^2`."""
    w = np.exp(log_weight - log_weight.max())
    return float(w.sum() ** 2 / (w @ w))


def _divergences(
    cells: Cells, weights: Balance, paid: Price, unreached: Unreached | None
) -> tuple[dict[str, Bounded], Bounded | None]:
    """The entries kl, P, S, C, C_fwd, and C_JS (None without base samples)."""
    values, changes = calibration_terms(cells, weights)
    change = {name: cells.weight[cells.prompt] * c for name, c in changes.items()}
    known = {name: jackknife(cells, float(cells.weight @ v), change[name]) for name, v in values.items()}
    room = 0.0 if unreached is None else unreached.room
    cheaper = 0.0 if unreached is None else _cheaper(cells, weights, unreached, paid)
    shape = jackknife(cells, max(known["KL_r"].value - paid.value, 0.0), change["KL_r"] - paid.value_change)
    down, up = unseen_mass(cells, cells.log_ratio)
    entries = {
        "kl": _divergence(cells, down, up),
        "P": _interval(cells, jackknife(cells, paid.value, paid.value_change), below=cheaper),
        "S": _interval(cells, shape, above=cheaper, below=room),
    }
    if unreached is None:
        return entries | _one_sided(cells, entries, known), None
    conditional, symmetric = _two_sided(cells, weights, known, unreached)
    return entries | conditional, symmetric


def _one_sided(cells: Cells, entries: dict[str, Bounded], known: dict[str, Jackknife]) -> dict[str, Bounded]:
    """Without base samples: C from its stochastic lower bound; P, S and C_fwd without limits."""
    low = lower_bound(cells)
    c = _interval(cells, known["C"])
    value = max(low.value, 0.0)
    least = max(min(c.lower or 0.0, low.interval()[0]), 0.0)
    free = {"P": entries["P"], "S": entries["S"], "C_fwd": _interval(cells, known["C_fwd"])}
    return {name: entry._replace(lower=None, upper=None) for name, entry in free.items()} | {
        "C": Bounded(value, low.stderr, least, None, low, None)
    }


def _two_sided(
    cells: Cells, weights: Balance, known: dict[str, Jackknife], unreached: Unreached
) -> tuple[dict[str, Bounded], Bounded]:
    """C, C_fwd and C_JS from both sample sets."""
    back = unreached_levels(cells, weights, forward=True)
    within = (weights.log_q - weights.log_p)[cells.cell] - cells.log_ratio
    down, up = unseen_mass(cells, within, forward=True)
    c = _interval(cells, known["C"], above=unreached.room)
    forward = _interval(cells, known["C_fwd"], below=down, above=math.hypot(back.room, up))
    sides = math.hypot(*(min(u.room, u.mass * math.log(2.0)) / 2 for u in (unreached, back)))
    symmetric = _interval(cells, known["C_JS"], above=sides, below=sides)
    bounds = [(lower_bound(cells, side), upper_bound(cells, side)) for side in (False, True)]
    if _thin(cells):
        c = _widened(c, bounds[0][0], merged_plug_in(cells))
        forward = _widened(forward, bounds[1][0], merged_plug_in(cells, True))
        symmetric = symmetric._replace(lower=0.0, upper=math.log(2.0))
    return {
        "C": c._replace(lower_bound=bounds[0][0], upper_bound=bounds[0][1]),
        "C_fwd": forward._replace(lower_bound=bounds[1][0], upper_bound=bounds[1][1]),
    }, _at_most(symmetric, math.log(2.0))


def _divergence(cells: Cells, down: float, up: float) -> Bounded:
    """KL(q || p0): the mean log-ratio itself, be it negative by chance."""
    mean = _mean_log_ratio(cells)
    entry = _interval(cells, mean, below=down, above=up)
    return entry._replace(value=mean.value, lower=min(entry.lower or 0.0, mean.value))


def _thin(cells: Cells) -> bool:
    """Whether more than 5 % of the samples are alone in their cell, which carry no sign of C at all."""
    return float(np.mean((cells.per_cell() < 2)[cells.cell])) > 0.05


def _widened(entry: Bounded, low: Estimate, high: Estimate) -> Bounded:
    """Limits that also contain those of the two stochastic bounds."""
    lower = min(entry.lower or 0.0, max(low.interval(0.98)[0], 0.0))
    return entry._replace(lower=lower, upper=max(entry.upper or 0.0, high.interval(0.98)[1]))


def _at_most(entry: Bounded, largest: float) -> Bounded:
    """Clip the upper limit of a quantity with a known maximum."""
    return entry._replace(upper=None if entry.upper is None else min(entry.upper, largest))


def _mean_log_ratio(cells: Cells) -> Jackknife:
    """KL(q || p0): the mean of l over the tuned samples."""
    n = cells.n[cells.prompt].astype(np.float64)
    w = cells.weight
    mean = cells.per_prompt(cells.log_ratio, False) / cells.n
    change = (mean[cells.prompt] - cells.log_ratio) / np.maximum(n - 1.0, 1.0)
    change = w[cells.prompt] * np.where(n < 2, prompt_left_out(cells, mean)[cells.prompt], change)
    return jackknife(cells, float(w @ mean), np.where(cells.is_base == 1, 0.0, change))


def _interval(cells: Cells, result: Jackknife, above: float = 0.0, below: float = 0.0) -> Bounded:
    """Bias-corrected value of a nonnegative quantity, and limits.

    A divergence near 0 is a sum of squares `a^2` with `stderr = 2 a sigma`: on the square-root scale its
    upper limit is `(a + z sigma)^2`, which is `z^2 sigma^2` more. Here sigma^2 is `stderr^2 / (4 value)`, at
    most the bias. The limits also cover half of the bias correction (for its own error), rounding, and the
    given room.
    """
    squares = 2.3**2 * min(result.stderr**2 / (4.0 * max(result.value, 1e-300)), abs(result.bias))
    rounding = 1e-9 * (1.0 + float(np.abs(cells.log_ratio).mean()))
    value = max(result.value - result.bias, 0.0)
    upper = result.upper + max(result.bias / 2, 0.0) + squares
    lower = result.lower + min(result.bias / 2, 0.0)
    upper = result.value + math.hypot(max(upper - result.value, 0.0), above) + rounding
    lower = result.value - math.hypot(max(result.value - lower, 0.0), below) - rounding
    return Bounded(value, result.stderr, max(min(lower, value), 0.0), max(upper, value))


def _cheaper(cells: Cells, weights: Balance, unreached: Unreached, paid: Price) -> float:
    """How far P may fall short of its estimate if the unreached levels are as likely as the counts allow."""
    if unreached.room == 0.0:
        return 0.0
    reward = cells.per_cell(cells.reward) / cells.per_cell()
    w, x = cells.weight, cells.prompt_of_cell
    mean = np.bincount(x, np.exp(weights.log_q) * reward) / np.bincount(x, np.exp(weights.log_q))
    worth = []
    for log_p in (weights.log_p, unreached.log_p):
        p = np.exp(log_p)
        tilt = fit_tilts(mean, w, np.zeros(len(w), np.int64), reward, p, x)
        log_mgf, _, _ = log_moments(np.full(len(w), tilt[0]), reward, p, x, len(w))
        worth.append(float(tilt[0] * (w @ mean) - w @ log_mgf))
    return min(max(worth[0] - worth[1], 0.0), paid.value)


def _fitted_beta(paid: Price) -> float | None:
    return 1.0 / paid.tilt if paid.identified else None


def _beta(cells: Cells, paid: Price, with_base: bool) -> Bounded:
    """Beta = 1/lambda with limits from those of lambda; a limit is None where lambda may be 0."""
    if not paid.identified:
        return Bounded(None)
    tilt = jackknife(cells, paid.tilt, paid.tilt_change)
    value, stderr = 1.0 / paid.tilt, tilt.stderr / paid.tilt**2
    if not with_base or tilt.lower <= 0.0 <= tilt.upper:
        return Bounded(value, stderr)
    return Bounded(value, stderr, min(1.0 / tilt.upper, value), max(1.0 / tilt.lower, value))


def _binning(cells: Cells, weights: Balance, beta: float | None) -> tuple[Bounded | None, float]:
    """C inside bins against the exact posterior; the bound `mean (width/beta)^2 / 8` on C of a tilt."""
    if cells.binning.kind == "exact" or beta is None:
        return None, 0.0
    q = cells.weight[cells.prompt_of_cell] * np.exp(weights.log_q)
    bound = float(q @ (cells.binning.width[cells.level_of_cell] / beta) ** 2 / q.sum()) / 8.0
    centre = cells.per_cell(cells.reward) / cells.per_cell()
    log_ratio = cells.log_ratio - (cells.reward - centre[cells.cell]) / beta
    value, change = within_level_loss(cells, weights, log_ratio)
    w = cells.weight
    return _interval(cells, jackknife(cells, float(w @ value), w[cells.prompt] * change)), bound
