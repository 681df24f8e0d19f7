"""Figures of a comparison, drawn from the rows on disk and from nothing else; returned as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["FIGURES", "draw"]

Row = dict[str, Any]
FAMILY_COLOUR = {
    "rlhf": "#c44e52",
    "imitation": "#4c72b0",
    "conditioning": "#8172b3",
    "off-policy": "#55a868",
    "between": "#ccb974",
    "preference": "#64b5cd",
    "reference": "#444444",
}
MARKERS = "osD^vP*X<>hp"


def _axes(width: float = 8.0, height: float = 4.6):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _plain(name: str) -> str:
    """A name as it is: no mathematics between dollar signs."""
    return name.replace("$", r"\$")


def _styles(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """One colour per family, one marker per method inside it."""
    styles: dict[str, dict[str, Any]] = {}
    count: dict[str, int] = {}
    for row in rows:
        if row["method"] in styles:
            continue
        family = row["family"]
        number = count.setdefault(family, 0)
        count[family] += 1
        colour = FAMILY_COLOUR.get(family, "#999999")
        styles[row["method"]] = {"color": colour, "marker": MARKERS[number % len(MARKERS)]}
    return styles


def _mean_by(rows: list[Row], x: str, y: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per method: seed means of x and y at each knob, in order of x."""
    out = {}
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method and r.get(x) is not None and r.get(y) is not None]
        knobs = sorted({r["knob_value"] for r in mine})
        points = [
            (
                np.mean([r[x] for r in mine if r["knob_value"] == k]),
                np.mean([r[y] for r in mine if r["knob_value"] == k]),
            )
            for k in knobs
        ]
        if points:
            order = sorted(points)
            out[method] = (np.array([p[0] for p in order]), np.array([p[1] for p in order]))
    return out


def budget_bars(data: dict[str, Any]) -> bytes:
    """Stacked P, S, C at matched reward, one bar per method, with the standard error of the sum."""
    target = data["main_target"]
    table = [r for r in data["matched_reward"] if r["target"] == target and r["seeds"]]
    table.sort(key=lambda r: (r["family"] != "reference", r["C"]))
    figure, axes = _axes(8.6, 0.9 + 0.3 * max(4, len(table)))
    position = np.arange(len(table))[::-1]
    left = np.zeros(len(table))
    colours = {"P": "#b8c4d0", "S": "#e0a458", "C": "#c44e52"}
    labels = {"P": "P  price of the reward", "S": "S  shape of its marginal", "C": "C  calibration loss"}
    for name in ("P", "S", "C"):
        width = np.array([max(0.0, r[name]) for r in table])
        axes.barh(position, width, left=left, color=colours[name], label=labels[name], height=0.72)
        left += width
    error = [r.get("kl_stderr") or 0.0 for r in table]
    axes.errorbar(left, position, xerr=error, fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
    axes.set_yticks(position, [_plain(r["method"]) for r in table])
    axes.set_xlabel(f"KL(q || p0) = P + S + C at mean reward {target:.2f}   [nats]")
    axes.grid(axis="y", visible=False)
    figure.legend(frameon=False, loc="outside upper center", ncol=3)
    return _png(figure)


def frontier(data: dict[str, Any]) -> bytes:
    """Mean reward against KL, with the least KL that buys each reward."""
    figure, axes = _axes(8.6, 5.2)
    limit = np.array(data["frontier"])
    if len(limit):
        axes.fill_betweenx(limit[:, 1], 0, limit[:, 0], color="#eeeeee", label="out of reach")
        axes.plot(limit[:, 0], limit[:, 1], color="#444444", linewidth=1.5)
    rows = data["rows"]
    styles = _styles(rows)
    for method, (x, y) in _mean_by(rows, "kl", "reward").items():
        axes.plot(x, y, linewidth=0.8, markersize=5, label=_plain(method), **styles[method])
    axes.set_xlabel("KL(q || p0)   [nats]")
    axes.set_ylabel("mean reward")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=7.5, ncol=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def along_training(data: dict[str, Any]) -> bytes:
    """C against the reward reached along training.

    A KL term against early stopping, exact flows and sampled learners.
    """
    figure, axes = _axes(8.6, 4.8)
    wanted = {"exact flow without KL": ("#444444", "--"), "exact flow with KL": ("#444444", "-")}
    on_policy = {r["method"]: r["knob"] == "steps" for r in data["rows"] if r["family"] == "rlhf"}
    colours = iter(("#c44e52", "#dd8452", "#937860", "#da8bc3"))
    for method, stopped in on_policy.items():
        wanted[method] = (next(colours, "#999999"), "--" if stopped else "-")
    for method, (colour, style) in wanted.items():
        curves = [c for c in data["curves"] if c["method"] == method]
        for knob in sorted({c["knob_value"] for c in curves}):
            mine = [c for c in curves if c["knob_value"] == knob]
            steps = sorted({c["step"] for c in mine})
            x = [data["base_reward"]] + [
                np.mean([c["reward"] for c in mine if c["step"] == s]) for s in steps
            ]
            y = [0.0] + [np.mean([c["C"] for c in mine if c["step"] == s]) for s in steps]
            label = _plain(method) if knob == min(c["knob_value"] for c in curves) else None
            axes.plot(x, y, style, color=colour, label=label, linewidth=1.3, marker=".", markersize=4)
            axes.plot(x[-1], y[-1], "o", color=colour, markersize=6, markerfacecolor="none")
    axes.set_xlabel("mean reward reached")
    axes.set_ylabel("calibration loss C   [nats]")
    axes.legend(frameon=False)
    return _png(figure)


def forward_against_reverse(data: dict[str, Any]) -> bytes:
    """C against C_fwd: losing conditionals where the policy goes, and where the base was."""
    figure, axes = _axes(8.6, 5.2)
    rows = [r for r in data["rows"] if r["family"] != "reference" or r["method"] == "control"]
    styles = _styles(data["rows"])
    smallest = 1e-4
    for method, (x, y) in _mean_by(rows, "C", "C_fwd").items():
        axes.plot(
            np.maximum(x, smallest),
            np.maximum(y, smallest),
            linewidth=0.8,
            markersize=5,
            label=_plain(method),
            **styles[method],
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlabel("C   [nats]")
    axes.set_ylabel("C_fwd   [nats]")
    axes.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


FIGURES: dict[str, tuple[Callable[[dict[str, Any]], bytes], str]] = {
    "budget": (budget_bars, "Where the KL went, at matched reward. A perfect Bayesian update is all grey."),
    "frontier": (
        frontier,
        "Reward against KL. The edge of the grey area is the least KL that buys a reward; only p* lies on it.",
    ),
    "training": (
        along_training,
        "Calibration loss along training, against the reward reached so far; circles mark the last "
        "checkpoint. With a KL term the exact flow's loss "
        "rises and then anneals away; without one it only rises.",
    ),
    "forward": (
        forward_against_reverse,
        "Loss where the policy goes (C) against loss where the base was (C_fwd); dotted: equality; "
        "values below 1e-4 are drawn at 1e-4.",
    ),
}


def draw(data: dict[str, Any], names: tuple[str, ...] = tuple(FIGURES)) -> dict[str, tuple[bytes, str]]:
    """All figures that the data can carry: name -> (PNG bytes, caption)."""
    out = {}
    for name in names:
        function, caption = FIGURES[name]
        if name == "budget" and not any(
            r["seeds"] and r["target"] == data["main_target"] for r in data["matched_reward"]
        ):
            continue
        if name == "training" and not data["curves"]:
            continue
        out[name] = (function(data), caption)
    return out
