"""Plain sentences about what can make a calibration budget mean less than it seems."""

from __future__ import annotations

import numpy as np

from kl_rl.core.estimate import mean_estimate
from kl_rl.measure.calibration.levels import Cells
from kl_rl.measure.calibration.types import SampledBudget

__all__ = ["find_warnings"]


def find_warnings(cells: Cells, budget: SampledBudget, with_base: bool) -> list[str]:
    """All warnings that apply to a budget.

    Args:
        cells: the pooled samples it was computed from.
        budget: the budget, warnings not yet filled in.
        with_base: whether there are base samples.

    Returns:
        Sentences, most basic first.
    """
    found = [_identical(cells), _swapped(budget), _single_samples(cells, with_base), _dropped(cells)]
    found += [_constant_reward(cells), _thin_levels(cells, budget)]
    found += [*_coverage(cells, budget)] if with_base else [_without_base()]
    found += [*_normalization(cells, with_base), *_effective(budget), _binning(budget)]
    found += [*_wide(budget)]
    return [sentence for sentence in found if sentence]


def _identical(cells: Cells) -> str:
    if np.abs(cells.log_ratio).max() > 1e-9:
        return ""
    return "Tuned and base look identical: every sample has the same log-probability under both."


def _swapped(budget: SampledBudget) -> str:
    kl = budget.kl.value or 0.0
    if kl >= -3.0 * (budget.kl.stderr or 0.0):
        return ""
    return (
        f"The mean log-ratio of the tuned samples is {kl:.3g} nats; a KL divergence cannot be negative: are "
        "the two files, or the two log-probabilities, swapped?"
    )


def _single_samples(cells: Cells, with_base: bool) -> str:
    alone = int((cells.n == 1).sum() + ((cells.m == 1).sum() if with_base else 0))
    if not alone:
        return ""
    return (
        f"{alone} time(s) a prompt has a single sample of one set, where no calibration loss can show; draw "
        "several samples of both sets on each prompt."
    )


def _dropped(cells: Cells) -> str:
    tuned, base = cells.dropped
    if not tuned + base:
        return ""
    return (
        f"{tuned} tuned and {base} base samples were left out: the other set has no sample of their prompts."
    )


def _constant_reward(cells: Cells) -> str:
    if cells.binning.levels > 1:
        return ""
    return "All rewards are in one level: P and S are 0 and C is the whole KL."


def _thin_levels(cells: Cells, budget: SampledBudget) -> str:
    """Cells with fewer than two samples cannot show a difference inside them."""
    share = float(np.mean((cells.per_cell() < 2)[cells.cell]))
    if share <= 0.01:
        return ""
    return (
        f"{share:.0%} of the samples are alone in their reward level, where no calibration loss can show; "
        "take more samples of each prompt, or fewer reward bins."
    )


def _coverage(cells: Cells, budget: SampledBudget) -> list[str]:
    """Levels of the tuned samples that the base samples miss."""
    found = []
    empty = cells.per_cell(None, True) == 0
    share = float(cells.per_cell(None, False)[empty].sum() / cells.n.sum())
    if share > 0.01:
        found.append(
            f"{share:.1%} of the tuned samples lie in reward levels without base samples: there C rests "
            "on the tuned "
            "samples alone, which cannot see what the tuned policy no longer says."
        )
    base_reward, mean = cells.reward[cells.is_base == 1], budget.mean_reward[0]
    slack = 1e-9 * np.abs(base_reward).max()
    if not base_reward.min() - slack <= mean <= base_reward.max() + slack:
        found.append(
            f"The mean reward of the tuned policy ({mean:.4g}) is outside the range of the base samples' "
            "rewards "
            f"({base_reward.min():.4g} to {base_reward.max():.4g}): P, S and beta_fit rest on importance "
            "weights."
        )
    return found


def _without_base() -> str:
    return (
        "Without base samples C is a lower bound, and P, S and C_fwd are importance-weighted values without limits; "
        "give base samples for two-sided intervals."
    )


def _normalization(cells: Cells, with_base: bool) -> list[str]:
    """`E_q e^{-l} = 1` and `E_p0 e^{l} = 1`: the check that sampler and scorer are the same model."""
    found = []
    for base in (False, True) if with_base else (False,):
        who, weight = ("base", "q/p0") if base else ("tuned", "p0/q")
        own = cells.is_base == base
        count = (cells.m if base else cells.n)[cells.prompt[own]]
        ratio = np.exp(np.minimum(cells.log_ratio[own] * (1 if base else -1), 300.0))
        check = mean_estimate(ratio, cells.weight[cells.prompt[own]] / count)
        if abs(check.value - 1.0) > 5.0 * check.stderr + 0.02:
            other = "base" if who == "tuned" else "tuned"
            found.append(
                f"The mean of {weight} over the {who} samples is {check.value:.3g} -+ {check.stderr:.2g} and "
                f"should be 1: either the scores are not those of the {who} sampler (temperature, top-p or "
                f"top-k, forced tokens, another kernel), or the {who} samples miss part of what the {other} "
                "policy says."
            )
    return found


def _effective(budget: SampledBudget) -> list[str]:
    """Importance weights carried by few samples."""
    found = []
    for who, size, total in (
        ("tuned", budget.ess_tuned, budget.n_tuned),
        ("base", budget.ess_base, budget.n_base),
    ):
        if size is not None and size < max(20.0, 0.01 * total):
            bound = "lower" if who == "tuned" else "upper"
            found.append(
                f"The importance weights of the {who} samples have an effective sample size of {size:.1f} "
                "out of "
                f"{total}: the stochastic {bound} bound of C can be far off."
            )
    return found


def _binning(budget: SampledBudget) -> str:
    c = budget.C.value or 0.0
    if budget.bins == "exact" or not budget.binning_bound > 0.1 * c:
        return ""
    return (
        f"Up to {budget.binning_bound:.3g} nats of C may come from the {budget.num_levels} reward bins "
        "alone (more "
        "than 10 % of C): use more bins, or read C_corrected."
    )


def _wide(budget: SampledBudget) -> list[str]:
    """Intervals that say little: wider than the value and than a tenth of KL."""
    found = []
    scale = abs(budget.kl.value or 0.0)
    for name, entry in (("C", budget.C), ("C_fwd", budget.C_fwd)):
        if entry.lower is None or entry.upper is None or entry.value is None:
            continue
        width = entry.upper - entry.lower
        if width > entry.value and width > 0.1 * scale + 1e-6:
            reason = (
                f"{budget.unreached:.0%} of the tuned policy lies in levels the base samples are not "
                "expected to reach"
                if name == "C" and budget.unreached > 0.01
                else "too few samples, or too little overlap of the two policies"
            )
            found.append(
                f"The interval of {name} means little: it is wider than the value itself ({reason})."
            )
    return found
