"""A measured budget as one flat row of plain numbers, for files of results."""

from __future__ import annotations

from typing import Any

from kl_rl.measure.calibration.types import Bounded, SampledBudget

__all__ = ["budget_row"]

_QUANTITIES = ("kl", "P", "S", "C", "C_fwd", "C_JS", "beta_fit")


def budget_row(budget: SampledBudget) -> dict[str, Any]:
    """``C``, ``C_stderr``, ``C_lower``, ``C_upper`` and so on, in nats; None where there is no such number.

    Args:
      budget: from ``sampled_budget``.

    Returns:
      The fields, with the sizes they rest on and the warnings.
    """
    row: dict[str, Any] = {}
    for name in _QUANTITIES:
        entry = getattr(budget, name) or Bounded(None)
        row |= {name: entry.value}
        row |= {f"{name}_{part}": getattr(entry, part) for part in ("stderr", "lower", "upper")}
    return row | {
        "levels": budget.num_levels,
        "bins": budget.bins,
        "unreached": budget.unreached,
        "samples": budget.n_tuned,
        "ess_tuned": budget.ess_tuned,
        "ess_base": budget.ess_base,
        "warnings": list(budget.warnings),
    }
