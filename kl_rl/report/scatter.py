"""Log-ratios against rewards: what `kl-rl measure --plot` draws."""

from __future__ import annotations

import numpy as np

from kl_rl.measure.calibration.levels import build_cells
from kl_rl.measure.samples import Samples

__all__ = ["scatter"]


def scatter(tuned: Samples, base: Samples | None, bins: int | str, path: str) -> None:
    """Write a scatter of l = log q/p0 against the reward, with the best function of the reward and its R^2.

    Args:
      tuned: samples of the tuned model.
      base: samples of the base, or None.
      bins: reward levels, as for ``sampled_budget``.
      path: of the PNG file.

    Raises:
      ValueError: if the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = build_cells(tuned, base, bins)
    n = int(cells.n.sum())
    level, l = cells.level_of_cell[cells.cell[:n]], cells.log_ratio[:n]
    count = np.maximum(np.bincount(level), 1)
    fit, at = np.bincount(level, l) / count, np.bincount(level, cells.reward[:n]) / count
    used = np.bincount(level) > 0
    spread = float(np.var(l))
    explained = 1.0 - float(np.mean((l - fit[level]) ** 2)) / spread if spread > 0 else 1.0
    figure, axes = plt.subplots(figsize=(6.0, 4.2), layout="constrained")
    for name, part, color in (("base", slice(n, None), "tab:gray"), ("tuned", slice(0, n), "tab:blue")):
        r, y = cells.reward[part], cells.log_ratio[part]
        step = max(1, len(r) // 5000)
        if len(r):
            axes.scatter(r[::step], y[::step], s=6, alpha=0.4, color=color, label=name, linewidths=0)
    axes.plot(
        at[used], fit[used], color="tab:red", marker="o", markersize=3, label="best function of the reward"
    )
    axes.set(
        xlabel="reward",
        ylabel="log q/p0 (nats)",
        title=f"R$^2$ of the best function of the reward: {explained:.3f}",
    )
    axes.legend(frameon=False)
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise ValueError(f"--plot {path}: cannot be written ({error.strerror or error})") from None
    finally:
        plt.close(figure)
