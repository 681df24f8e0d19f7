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
LIMITED = ("S", "C", "C_fwd", "C_JS")
LIMITS = tuple(f"{name}_{side}" for name in LIMITED for side in ("lower", "upper"))
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
    start = dict.fromkeys((*MEASURES, *LIMITS), 0.0) | {"reward": origin}
    path = sorted([start, *points], key=lambda row: _number(row[axis]))
    along = np.array([_number(row[axis]) for row in path])
    rounding = 1e-5 * (along[-1] - along[0])
    if not (along[0] <= target <= along[-1] + rounding):
        return None
    scale = (lambda x: np.sqrt(np.maximum(x, 0.0))) if axis == "kl" else (lambda x: x)
    x, aim = scale(along), float(scale(target))
    right = min(int(np.searchsorted(x, aim)), len(x) - 1)
    measured = np.abs(along - target).min() <= rounding
    if right > 0 and not measured and x[right] - x[right - 1] > WIDEST_GAP * (aim - x[0]):
        return None

    def at(name: str) -> float:
        y = np.array([_number(row.get(name)) for row in path])
        if name in LINEAR:
            return float(np.interp(aim, x, y))
        return float(np.interp(aim, x, np.sqrt(np.maximum(y, 0.0))) ** 2)

    # null is infinite, except without a law
    lawful = any(row.get("law_C") is not None or row.get("kl_q_law") is not None for row in points)
    known = lambda name: lawful if name == "kl_q_law" else name in points[0]
    return {name: at(name) for name in (*MEASURES, *LIMITS) if known(name)}


def matched(
    rows: list[Row],
    axis: str,
    targets: list[float],
    base_reward: float,
    price: Callable[[float], float] | None = None,
    limits: bool = False,
) -> list[Row]:
    """Every method at every target of ``axis`` ("reward" or "kl"): mean and standard error over seeds.

    Seeds share the base and what they are measured with: their standard error holds the noise of training alone.

    Args:
      rows: one per method, knob and seed.
      axis: what is held equal.
      targets: its values.
      base_reward: E_{p0} r.
      price: mean reward -> P; at matched reward P is common to all methods and KL is P + S + C.
      limits: whether values are estimates, whose 95 % limits are carried along (their means over seeds).

    Returns:
      Rows ``{method, family, target, seeds, passed, <measure>, <measure>_stderr, <measure>_lower, ...}``; a method that
      has no points around a target in any seed has ``seeds = 0`` and no measures; ``passed`` says that it went further.
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
            passed = any(_number(row[axis]) >= target for row in mine)
            entry: Row = {"method": method, "family": family, "target": target}
            entry |= {"seeds": len(found), "passed": passed}
            for name in (n for n in (found[0] if found else ()) if limits or n not in LIMITS):
                values = np.array([value.get(name, np.nan) for value in found])
                entry[name] = float(values.mean())
                if name in LIMITS:
                    continue
                known = len(values) > 1 and np.isfinite(values).all()
                entry[f"{name}_stderr"] = float(values.std(ddof=1) / np.sqrt(len(values))) if known else None
            out.append(entry)
    return out


def summary(table: list[Row], targets: list[float], unit: str = "nats") -> str:
    """The answer in a few sentences: who loses least and most calibration at one reward, and what p* pays for it.

    Args:
      table: from ``matched`` along the reward.
      targets: its rewards, the most important first; the first that somebody has is spoken of.
      unit: of divergences.

    Returns:
      Sentences. Where values are estimates, methods are ranked only if their intervals are disjoint.
    """
    trained = [r for r in table if r["family"] != "reference"]
    reached = [t for t in targets if any(r["seeds"] and r["target"] == t for r in trained)]
    if not reached:
        if any(r["passed"] for r in trained):
            return (
                "No method has measured points close enough around these rewards: all went further at once; "
                "train with more settings or aim higher."
            )
        return "No trained method reached the rewards aimed at: train longer or aim lower."
    target = reached[0]
    trained = [r for r in trained if r["target"] == target and r["seeds"]]
    losses = _ranked(trained, target, unit)
    waste: dict[str, list[float]] = {r["family"]: [] for r in trained}
    for r in trained:
        waste[r["family"]].append(r["C"] / r["kl"] if r["kl"] > 0 else 0.0)
    shares = ", ".join(f"{family} {100 * np.mean(values):.0f} %" for family, values in waste.items())
    average = "on average, in point estimates" if "C_fwd_lower" in trained[0] else "on average"
    return (
        f"{losses} The exact posterior buys this reward for {trained[0]['P']:.3g} {unit} with C = 0; of the KL that "
        f"each family spends, the share that is calibration loss is {average}: {shares}."
    )


def _ranked(trained: list[Row], target: float, unit: str) -> str:
    """Who loses least and who most, if that can be told."""
    order = sorted((r for r in trained if np.isfinite(r["C_fwd"])), key=lambda r: r["C_fwd"])
    if not order:
        return f"At a mean reward of {target:.2f}, all methods have lost strings of the base for good (C_fwd infinite)."
    estimated = "C_fwd_lower" in order[0]
    said = lambda r: f"{r['C_fwd']:.3g}" + (
        f" [{r['C_fwd_lower']:.3g}, {_limit(r['C_fwd_upper'])}]" if estimated else ""
    )
    best, worst, where = order[0], order[-1], f"At a mean reward of {target:.2f}, "
    if len(order) == 1:
        return f"{where}{best['method']} ({best['family']}) has C_fwd = {said(best)} {unit}."
    if estimated:
        ceiling = best["C_fwd_upper"]
        more = [r for r in order[1:] if np.isfinite(ceiling) and r["C_fwd_lower"] > ceiling]
        if not more:
            listed = ", ".join(f"{r['method']} {said(r)}" for r in order)
            return (
                f"{where}the methods cannot be told apart by what they lose of the base model's conditional inference: "
                f"their 95 % intervals of C_fwd overlap ({listed}; {unit})."
            )
        level = ", ".join(f"{r['method']} {said(r)}" for r in order if r not in more and r is not best)
        tied = f"; not told apart from it: {level}" if level else ""
        lost = ", ".join(f"{r['method']} {said(r)}" for r in more)
        return (
            f"{where}{best['method']} ({best['family']}) loses less of the base model's conditional inference, C_fwd = "
            f"{said(best)} {unit}, than {lost} (95 % intervals){tied}."
        )
    return (
        f"{where}{best['method']} ({best['family']}) loses least of the base model's conditional inference, "
        f"C_fwd = {said(best)} {unit}, and {worst['method']} ({worst['family']}) most, {said(worst)} {unit}."
    )


def _limit(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "unknown"
