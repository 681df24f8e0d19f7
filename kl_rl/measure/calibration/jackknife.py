"""Delete-one jackknife, in closed form, for statistics that are functions of sums over cells.

Tuned and base samples of each prompt are the strata. Leaving out sample i of stratum s changes the sums of
its own cell and rescales the others of that stratum by `n_s / (n_s - 1)`, so all N leave-one-out values cost
O(N) together.

Reference: Efron & Stein (1981); Arvesen (1969) for several samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from kl_rl.core.estimate import student_quantile
from kl_rl.measure.calibration.levels import Cells

__all__ = ["Jackknife", "delete_one", "jackknife", "prompt_left_out"]

_FLOOR = 1e-12  # relative floor for a sum from which its only member was removed

CellFunction = Callable[[list[np.ndarray], np.ndarray], list[np.ndarray]]
PromptFunction = Callable[[list[np.ndarray]], list[np.ndarray]]


class Jackknife(NamedTuple):
    """A statistic with what the jackknife says about it.

    Attributes:
        value: the plug-in value.
        bias: its estimated bias (plug-in minus truth).
        stderr: its standard error.
        lower, upper: limits around the bias-corrected value, see `jackknife`.
    """

    value: float
    bias: float
    stderr: float
    lower: float
    upper: float


def delete_one(
    cells: Cells, features: Sequence[np.ndarray], cell_function: CellFunction, prompt_function: PromptFunction
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per-prompt statistics and how each changes when one sample is left out.

    `T_x = G(sum_{g in x} F(S_g))`, `S_g` = sums of the features over cell g divided by `n_x + m_x`.

    Args:
        cells: the pooled samples.
        features: nonnegative or signed per-sample features, each [N]. Nonnegative ones keep sums above a
            floor.
        cell_function: F, from sums (any shape) and the cell indices they belong to, to a list of arrays.
        prompt_function: G, from the summed F, elementwise, to a list of arrays.

    Returns:
        values: a list of arrays [X], one per statistic.
        changes: a list of arrays [N], `T_x without i - T_x`. A sample that is alone in its stratum is left
            out with its whole prompt, so that the mean over prompts changes as it should.
    """
    size = (cells.n + cells.m).astype(np.float64)
    parts = [[cells.per_cell(f, base) for f in features] for base in (False, True)]
    scale = np.stack([c / np.maximum(c - 1.0, 1.0) for c in (cells.n, cells.m)])  # [2, X]
    everything = np.arange(len(cells.prompt_of_cell))
    x_of_g = cells.prompt_of_cell

    def rescaled(which: int | None) -> list[np.ndarray]:
        factor = [scale[s][x_of_g] if s == which else 1.0 for s in (0, 1)]
        return [(a * factor[0] + b * factor[1]) / size[x_of_g] for a, b in zip(*parts, strict=True)]

    def to_prompt(terms: list[np.ndarray]) -> list[np.ndarray]:
        return [np.bincount(x_of_g, t, minlength=len(size)) for t in terms]

    values = prompt_function(to_prompt(cell_function(rescaled(None), everything)))
    changes = [np.zeros(len(cells.cell)) for _ in values]
    positive = [bool(f.min() >= 0.0) for f in features]
    split = int(cells.n.sum())
    for which, part in ((0, slice(0, split)), (1, slice(split, None))):
        if part.start == len(cells.cell):
            continue
        g, x = cells.cell[part], cells.prompt[part]
        sums = rescaled(which)
        full = cell_function(sums, everything)
        totals = to_prompt(full)
        factor = scale[which][x] / size[x]
        left = [
            _without(s[g], f[part] * factor, pos) for s, f, pos in zip(sums, features, positive, strict=True)
        ]
        terms = cell_function(left, g)
        removed = [t[x] - f[g] + new for t, f, new in zip(totals, full, terms, strict=True)]
        alone = (cells.n, cells.m)[which][x] < 2
        for change, new, old in zip(changes, prompt_function(removed), values, strict=True):
            change[part] = np.where(alone, prompt_left_out(cells, old)[x], new - old[x])
    return values, changes


def prompt_left_out(cells: Cells, values: np.ndarray) -> np.ndarray:
    """Change of a prompt's value that moves the weighted mean as leaving the prompt out does, [X]."""
    return (float(cells.weight @ values) - values) / np.maximum(1.0 - cells.weight, 1e-12)


def _without(total: np.ndarray, part: np.ndarray, positive: bool) -> np.ndarray:
    """`total - part`; a sum of positive terms is kept away from zero and rounding noise."""
    rest = total - part
    return np.maximum(rest, _FLOOR * total) if positive else rest


def jackknife(cells: Cells, value: float, change: np.ndarray, z: float = 2.3) -> Jackknife:
    """Bias, standard error and limits from the leave-one-out changes of a statistic.

    With influences `u_i` (centred in each stratum) and `V = sum u_i^2`: bias `= sum_s (n_s - 1)
    mean_s(change)`, stderr `= sqrt V`, and limits `value - bias -+ sqrt(V) (t + skewness term)`. Student's t
    has `2 V^2 / sum u_i^4` degrees of freedom, few when a few samples carry the variance; the skewness term
    `|g| (2 z^2 + 1) / 6`, `g = sum u_i^3 / V^(3/2)`, is added on the side of the longer tail (Johnson 1978,
    Hall 1992).

    Args:
        cells: the pooled samples.
        value: the statistic.
        change: statistic without sample i minus statistic, [N].
        z: normal quantile of the limits; 2.3 aims at 98 %, so that 95 % are held where the normal law is
            rough.

    Returns:
        The summary.
    """
    stratum = 2 * cells.prompt + cells.is_base
    single = np.bincount(stratum)[stratum] < 2  # samples alone in their stratum form one stratum a set
    stratum = np.where(single, 2 * len(cells.n) + cells.is_base.astype(np.int64), stratum)
    size = np.bincount(stratum)
    mean = np.bincount(stratum, change) / np.maximum(size, 1)
    bias = float(np.sum(((size - 1) * mean)[: 2 * len(cells.n)]))
    factor = np.sqrt(np.maximum(size - 1, 0) / np.maximum(size, 1))
    u = -(change - mean[stratum]) * factor[stratum]
    squares = u * u
    variance = float(squares.sum())
    if not variance > 0.0:
        return Jackknife(value, bias, 0.0, value - bias, value - bias)
    stderr = math.sqrt(variance)
    degrees = min(max(2.0, 2 * variance**2 / max(float(squares @ squares), 1e-300)), len(change))
    skewness = float(squares @ u) / variance**1.5
    t = student_quantile(NormalDist().cdf(z), degrees)
    longer = skewness * (2 * z * z + 1) / 6
    centre = value - bias
    return Jackknife(
        value,
        bias,
        stderr,
        centre - stderr * (t + max(0.0, -longer)),
        centre + stderr * (t + max(0.0, longer)),
    )
