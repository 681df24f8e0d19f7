"""What a comparison on text says: intervals of every run, matched reward, checks against what is known, previews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kl_rl.experiments.compare.main import frame, frontier_price
from kl_rl.experiments.compare.matched import matched, summary

__all__ = ["collect_text"]

Row = dict[str, Any]


def _inside(row: Row, name: str, truth: float) -> str:
    low, high = row.get(f"{name}_lower"), row.get(f"{name}_upper")
    return (
        f"[{low:.4f}, {high:.4f}]" if low is not None and high is not None else f"at least {low or 0.0:.4f}"
    )


def _checks(rows: list[Row], facts: Row) -> list[str]:
    """The instrument on text: a control with known C, two-sided log Z, the base model against unigrams."""
    lines = [
        f"Base model: {facts['base_loss']:.3f} nats per character on held-out text "
        f"(unigram entropy {facts['unigram_entropy']:.3f}), {facts['base_steps']} steps."
    ]
    for row in (r for r in rows if r["method"] == "control"):
        lines.append(
            f"Control: C known {row['known_C']:.4f} nats, estimated interval {_inside(row, 'C', row['known_C'])}."
        )
    for z in facts["log_z"]:
        lines.append(
            f"log Z at beta {z['beta']:.3g}: between {z['log_z_lower']:.4f} \u00b1 {z['log_z_lower_stderr']:.4f} and "
            f"{z['log_z_upper']:.4f} \u00b1 {z['log_z_upper_stderr']:.4f} (posterior particles by {z['particles']})."
        )
    warned = [f"{r['method']} at {r['knob_value']:.3g}: {w}" for r in rows for w in r.get("warnings") or ()]
    failed = [
        f"{r['method']} at {r['knob_value']:.3g} failed: {r['failed']}" for r in rows if r.get("failed")
    ]
    return lines + failed + warned


def collect_text(folder: Path, rows: list[Row], curves: list[Row], facts: Row) -> Row:
    """Everything the report shows of a run on text.

    Args:
      folder: of the run.
      rows: results.jsonl.
      curves: unused; text runs are measured at their ends only.
      facts: of ``run_text``, with ``subtitle``.

    Returns:
      A dict for ``html_report`` and ``summary.json``.
    """
    usable = [r for r in rows if r.get("C") is not None and r.get("reward") is not None]
    frontier, price = frontier_price(facts["law"])
    path = [r for r in usable if r["method"] not in ("base", "control")]
    targets = [float(t) for t in facts["targets"]]
    table = matched(path, "reward", targets, facts["base_reward_mean"], price)
    question = (
        f"A transformer was trained by maximum likelihood on {facts['name']} ({facts['characters']} "
        "characters) and frozen as p0. "
        f"Reward: {facts['reward_name']}, summed over a completion of {facts['plan']['horizon']} "
        "characters; under p0 it has mean "
        f"{facts['base_reward_mean']:.3f} and standard deviation {facts['base_reward_sd']:.3f}. How "
        "much of p0's conditional "
        "inference did each method destroy, beyond the Bayesian update the reward asked for?"
    )
    return frame(rows, facts) | {
        "question": question,
        "answer": summary(table, targets[0])
        + " All of these are estimates: read them with the intervals below.",
        "targets": targets,
        "main_target": targets[0],
        "matched_reward": table,
        "matched_kl": matched(path, "kl", [0.5, 1.0], facts["base_reward_mean"]),
        "kl_targets": [0.5, 1.0],
        "means": [],
        "intervals": [r for r in usable if r["method"] != "base"],
        "previews": [
            (f"{r['method']} {r['knob_value']:.3g}", r["preview"]) for r in rows if r.get("preview")
        ],
        "checks": _checks(rows, facts),
        "frontier": frontier,
        "rows": usable,
        "curves": [],
    }
