"""Within-level divergences of two policies from pooled samples, by the balance heuristic.

With `alpha = n/(n+m)` every pooled sample, tuned or base, carries the bounded weights

    h_i = q/(alpha q + (1-alpha) p0) = 1/(alpha + (1-alpha) e^{-l_i}),     k_i = h_i e^{-l_i}

under which averages over the pool are unbiased for q and for p0. Weighted so, the pool is a pair of discrete
measures on the same points, and the split of KL into reward marginal and calibration loss holds for that pair
*exactly*: every term is nonnegative, and C is 0 (to rounding) when l is a function of the reward.

References: Veach & Guibas (1995) for the balance heuristic; Bennett (1976) and Shirts & Chodera (2008) for
    its relatives.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kl_rl.measure.calibration.jackknife import delete_one
from kl_rl.measure.calibration.levels import Cells

__all__ = ["Balance", "balance", "calibration_terms", "within_level_loss"]

_LOG2 = float(np.log(2.0))


class Balance(NamedTuple):
    """Balance-heuristic weights and the level probabilities they give.

    Attributes:
        log_h, log_k: log weights for q and for p0, [N].
        log_q, log_p: log of the estimated probability of each cell given its prompt, [G] (not normalized).
    """

    log_h: np.ndarray
    log_k: np.ndarray
    log_q: np.ndarray
    log_p: np.ndarray


def balance(cells: Cells, log_ratio: np.ndarray | None = None, log_h: np.ndarray | None = None) -> Balance:
    """Weights `h_i`, `k_i = h_i e^{-l_i}` of the pooled samples and their averages per cell.

    Args:
        cells: the pooled samples.
        log_ratio: l_i in nats, [N]; None: that of the cells. Another one describes another second measure.
        log_h: weights to reuse, [N]; None: computed from l.

    Returns:
        The weights. A prompt without base samples gets h = 1 and k = e^{-l} (plain importance weights).
    """
    l = cells.log_ratio if log_ratio is None else log_ratio
    if log_h is None:
        alpha = cells.n / (cells.n + cells.m)
        with np.errstate(divide="ignore"):
            log_alpha, log_rest = np.log(alpha), np.log1p(-alpha)
        log_h = -np.logaddexp(log_alpha[cells.prompt], log_rest[cells.prompt] - l)
    log_k = log_h - l
    size = np.log((cells.n + cells.m).astype(np.float64))[cells.prompt_of_cell]
    return Balance(log_h, log_k, _log_sums(cells, log_h) - size, _log_sums(cells, log_k) - size)


def _log_sums(cells: Cells, log_weight: np.ndarray) -> np.ndarray:
    """Log sum exp over the samples of each cell, [G]."""
    top = np.full(len(cells.prompt_of_cell), -np.inf)
    np.maximum.at(top, cells.cell, log_weight)
    return top + np.log(cells.per_cell(np.exp(log_weight - top[cells.cell])))


def calibration_terms(cells: Cells, weights: Balance) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """C, C_fwd, C_JS and KL(q(r) || p0(r)) of every prompt, with all leave-one-out changes.

    `C = sum_g q_g KL(q(.|g) || p0(.|g))`, `C_fwd = sum_g p_g KL(p0(.|g) || q(.|g))`,
    `C_JS = sum_g (q_g+p_g)/2 JS(q(.|g), p0(.|g))`, `KL_r = sum_g q_g log(q_g/p_g)` with normalized q_g, p_g.

    Args:
        cells: the pooled samples.
        weights: from `balance`.

    Returns:
        values: arrays [X] by name ("C", "C_fwd", "C_JS", "KL_r"), nats.
        changes: arrays [N] by name, what leaving one sample out does to the value of its prompt.
    """
    q, p = np.exp(weights.log_q), np.exp(np.minimum(weights.log_p, 600.0))
    c = weights.log_q - weights.log_p
    h = np.exp(weights.log_h - weights.log_q[cells.cell])
    k = np.exp(weights.log_k - weights.log_p[cells.cell])
    u = cells.log_ratio - c[cells.cell]
    s = np.exp(-np.logaddexp(0.0, -u))
    softplus = np.logaddexp(0.0, u)
    bounded = [h * (u - softplus), -k * softplus, h * (1 - s), k * s, (h + k) * s * (1 - s)]

    def of_cell(sums: list[np.ndarray], g: np.ndarray) -> list[np.ndarray]:
        a, b, hu, ku, fa, fb, da, db, curve = sums
        shift = np.log(
            np.maximum(a, 1e-300) / np.maximum(b, 1e-300)
        )  # of log(q_g/p_g), 0 for the full sample
        jensen = _jensen_shannon(a, b, fa, fb, da, db, curve, np.clip(shift, -1.0, 1.0))
        qa, pb = q[g] * a, p[g] * b
        return [
            q[g] * np.maximum(hu - a * shift, 0.0),
            p[g] * np.maximum(-ku + b * shift, 0.0),
            qa * (shift + c[g]),
            qa,
            pb,
            qa * jensen,
            pb * jensen,
        ]

    def of_prompt(totals: list[np.ndarray]) -> list[np.ndarray]:
        loss, forward, marginal, qt, pt, qjs, pjs = totals
        marginal = marginal / qt - np.log(qt / pt)
        return [loss / qt, forward / pt, (qjs / qt + pjs / pt) / 2, np.maximum(marginal, 0.0)]

    values, changes = delete_one(cells, [h, k, h * u, k * u, *bounded], of_cell, of_prompt)
    names = ("C", "C_fwd", "C_JS", "KL_r")
    return dict(zip(names, values, strict=True)), dict(zip(names, changes, strict=True))


def _jensen_shannon(
    a: np.ndarray,
    b: np.ndarray,
    fa: np.ndarray,
    fb: np.ndarray,
    da: np.ndarray,
    db: np.ndarray,
    curve: np.ndarray,
    shift: np.ndarray,
) -> np.ndarray:
    """JS of a cell to second order in the shift of its log(q_g/p_g); exact at shift 0. In [0, log 2]."""
    a, b = np.maximum(a, 1e-300), np.maximum(b, 1e-300)
    first = (fa - da * shift) / a + (fb + db * shift) / b
    return np.clip(_LOG2 + (first - curve * shift**2 / (a + b)) / 2, 0.0, _LOG2)


def within_level_loss(cells: Cells, weights: Balance, log_ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`sum_g q_g KL(q(.|g) || p(.|g))` for another measure `p = q e^{-log_ratio}`, and its changes.

    With `log_ratio = l - r/beta` it is the calibration loss inside bins against the exact posterior.

    Args:
        cells: the pooled samples.
        weights: from `balance`; its weights for q are reused.
        log_ratio: log q/p up to a constant per cell, nats, [N].

    Returns:
        values: [X].
        changes: [N].
    """
    w = balance(cells, log_ratio, weights.log_h)
    q = np.exp(w.log_q)
    h = np.exp(w.log_h - w.log_q[cells.cell])
    k = np.exp(w.log_k - w.log_p[cells.cell])
    u = log_ratio - (w.log_q - w.log_p)[cells.cell]

    def of_cell(sums: list[np.ndarray], g: np.ndarray) -> list[np.ndarray]:
        a, b, hu = sums
        shift = np.log(np.maximum(a, 1e-300) / np.maximum(b, 1e-300))
        return [q[g] * np.maximum(hu - a * shift, 0.0), q[g] * a]

    values, changes = delete_one(cells, [h, k, h * u], of_cell, lambda t: [t[0] / t[1]])
    return values[0], changes[0]
