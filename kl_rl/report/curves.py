"""The curves of a run as one figure, from the files it has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["draw_curves"]

PANELS = (
    ("reward", "mean reward of the samples drawn"),
    ("log_ratio", "log q - log p0 of the samples drawn (nats)"),
    ("entropy", "entropy of the sampler (nats per token)"),
    ("ess", "effective sample size (share)"),
    ("loss", "loss"),
)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def draw_curves(folder: Path) -> Path:
    """Draw ``metrics.jsonl`` and ``evaluations.jsonl``.

    Args:
      folder: of the run.

    Returns:
      The path of ``curves.png``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics, measured = _rows(folder / "metrics.jsonl"), _rows(folder / "evaluations.jsonl")
    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).ravel()
    for axis, (name, title) in zip(axes, PANELS, strict=False):
        points = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
        axis.plot(*zip(*points, strict=True), lw=1) if points else axis.set_axis_off()
        axis.set_title(title, fontsize=9)
    steps = [row["step"] for row in measured]
    axes[0].plot(steps, [row["reward"] for row in measured], "k.", label="policy, on held-out prompts")
    axes[0].legend(fontsize=8)
    for name, colour in (("C", "tab:red"), ("P", "tab:blue"), ("S", "tab:green")):
        low, high = ([row[f"{name}_{side}"] for row in measured] for side in ("lower", "upper"))
        axes[-1].plot(steps, [row[name] for row in measured], color=colour, marker=".", label=name)
        axes[-1].fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    axes[-1].set_title("on held-out prompts: C, P, S (nats, 95 %)", fontsize=9)
    axes[-1].legend(fontsize=8)
    for axis in axes:
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    return path
