"""Methods side by side at the same mean reward, or the same KL.

Interpolation along each method's knob, seed by seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["MEASURES", "grid", "matched", "summary"]

MEASURES = ("reward", "kl", "P", "S", "C", "C_fwd", "C_JS", "entropy_gap", "kl_pstar_q", "kl_q_law")
LINEAR = ("reward", "entropy_gap")
WIDEST_GAP = 1.5  # between two points interpolated, in units of the distance from the base
Row = dict[str, Any]


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def grid(law: list[list[float]], fractions: tuple[float, ...]) -> list[float]:
    """Mean rewards at fractions of the way from the base to the best string; law is [[reward, probability], ...]."""
    value, mass = np.array(law).T
    start, best = float(value @ mass), float(value.max())
    return [start + f * (best - start) for f in fractions]


def _along(points: list[Row], axis: str, target: float, origin: float) -> dict[str, float] | None:
    """All measures that there are, at ``axis = target``; the base itself is the first point of every path.

    Divergences grow quadratically away from the base, so their square roots are interpolated linearly (and
    the KL axis likewise). Points too far apart are not bridged.
    """
    start = dict.fromkeys(MEASURES, 0.0) | {"reward": origin}
    path = sorted([start, *points], key=lambda row: _number(row[axis]))
    along = np.array([_number(row[axis]) for row in path])
    if not (along[0] <= target <= along[-1]):
        return None
    scale = (lambda x: np.sqrt(np.maximum(x, 0.0))) if axis == "kl" else (lambda x: x)
    x, aim = scale(along), float(scale(target))
    right = int(np.searchsorted(x, aim))
    if right > 0 and x[right] - x[right - 1] > WIDEST_GAP * (aim - x[0]):
        return None

    def at(name: str) -> float:
        y = np.array([_number(row.get(name)) for row in path])
        if name in LINEAR:
            return float(np.interp(aim, x, y))
        return float(np.interp(aim, x, np.sqrt(np.maximum(y, 0.0))) ** 2)

    lawful = any(row.get("law_C") is not None for row in points)  # null is infinite, except without a law
    known = lambda name: lawful if name == "kl_q_law" else name in points[0]
    return {name: at(name) for name in MEASURES if known(name)}


def matched(
    rows: list[Row],
    axis: str,
    targets: list[float],
    base_reward: float,
    price: Callable[[float], float] | None = None,
) -> list[Row]:
    """Every method at every target of ``axis`` ("reward" or "kl"): mean and standard error over seeds.

    Args:
      rows: one per method, knob and seed.
      axis: what is held equal.
      targets: its values.
      base_reward: E_{p0} r.
      price: mean reward -> P, exact; at matched reward P is common to all methods and KL is P + S + C.

    Returns:
      Rows ``{method, family, target, seeds, <measure>, <measure>_stderr}``; methods that did not reach a
      target in any seed have
      ``seeds = 0`` and no measures.
    """
    out = []
    methods = dict.fromkeys((row["method"], row["family"]) for row in rows)
    for method, family in methods:
        mine = [row for row in rows if row["method"] == method]
        for target in targets:
            found = [
                value
                for seed in sorted({row["seed"] for row in mine})
                if (value := _along([r for r in mine if r["seed"] == seed], axis, target, base_reward))
            ]
            if axis == "reward" and price is not None:
                found = [v | {"P": price(target), "kl": price(target) + v["S"] + v["C"]} for v in found]
            entry: Row = {"method": method, "family": family, "target": target, "seeds": len(found)}
            for name in found[0] if found else ():
                values = np.array([value.get(name, np.nan) for value in found])
                entry[name] = float(values.mean())
                known = len(values) > 1 and np.isfinite(values).all()
                entry[f"{name}_stderr"] = float(values.std(ddof=1) / np.sqrt(len(values))) if known else None
            out.append(entry)
    return out


def summary(table: list[Row], target: float, unit: str = "nats") -> str:
    """The answer in two sentences: who loses least calibration at this reward, and what the exact posterior loses."""
    trained = [r for r in table if r["target"] == target and r["seeds"] and r["family"] != "reference"]
    if not trained:
        return "No trained method reached the first reward of the grid: train longer or aim lower."
    primary = sorted((r for r in trained if np.isfinite(r["C_fwd"])), key=lambda r: r["C_fwd"])
    best, worst = primary[0], primary[-1]
    first = (
        f"At a mean reward of {target:.2f}, {best['method']} ({best['family']}) loses least of the "
        "base model's conditional inference, "
        f"C_fwd = {best['C_fwd']:.3g} {unit}, and {worst['method']} ({worst['family']}) most, "
        f"{worst['C_fwd']:.3g} {unit}."
    )
    paid = best["P"]
    waste: dict[str, list[float]] = {r["family"]: [] for r in trained}
    for r in trained:
        waste[r["family"]].append(r["C"] / r["kl"])
    shares = ", ".join(f"{family} {100 * np.mean(values):.0f} %" for family, values in waste.items())
    second = (
        f"The exact posterior buys this reward for {paid:.3g} {unit} with C = 0; of the KL that each family spends, "
        f"the share that is calibration loss is on average: {shares}."
    )
    return f"{first} {second}"
