"""What a comparison on a language model says: intervals of every lane, matched reward, checks, previews."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kl_rl.experiments.compare.main import frame, price_along
from kl_rl.experiments.compare.matched import matched, summary

__all__ = ["collect_model"]

Row = dict[str, Any]
_HELD = {True: " held out of training", False: " that were trained on too (none was held out)"}


def _interval(row: Row, name: str) -> str:
    low, high = row.get(f"{name}_lower"), row.get(f"{name}_upper")
    return f"at least {low or 0.0:.4f}" if high is None else f"[{low or 0.0:.4f}, {high:.4f}]"


def _checks(rows: list[Row], facts: Row) -> list[str]:
    """The instrument: a control with known C, two-sided log Z; and what went wrong."""
    lines = list(facts.get("checks", ()))
    for row in (r for r in rows if r["method"] == "control"):
        lines.append(
            "Control (samples of p0 followed by a coin that is fair under p0 only): C known "
            f"{row['known_C']:.4f} nats, estimated interval {_interval(row, 'C')}."
        )
    for row in (r for r in rows if r.get("log_z_lower") is not None):
        lines.append(
            f"log Z at beta {row['beta']:.3g}: between {row['log_z_lower']:.4f} \u00b1 {row['log_z_lower_stderr']:.4f} "
            f"and {row['log_z_upper']:.4f} \u00b1 {row['log_z_upper_stderr']:.4f} nats (posterior particles by "
            f"{row['particles']})."
        )
    lines += [f"{name} was not trained: {why}." for name, why in facts.get("unaimed", {}).items()]
    return lines + [f"{r['lane']} failed: {r['failed']}" for r in rows if r.get("failed")]


def _previews(folder: Path, rows: list[Row]) -> list[tuple[str, list[str]]]:
    """Completions of the last measurement of each lane."""
    found = []
    for name in dict.fromkeys(row["lane"] for row in rows):
        path = folder / "lanes" / name / "samples.jsonl"
        if path.exists():
            samples = [json.loads(line) for line in path.read_text().splitlines()]
            last = [s for s in samples if s["step"] == samples[-1]["step"]]
            found.append((name, [f"{s['prompt']} \u2192 {s['completion']}" for s in last]))
    return found


def _question(facts: Row) -> str:
    trained = "an adapter was trained" if facts["lora"] else "all weights were trained"
    return (
        f"From {facts['name']} as p0, each method fine-tuned a copy ({trained}; {facts['steps']} steps of "
        f"{facts['per_step']} completions of at most {facts['horizon']} tokens) for the reward {facts['reward_name']}, "
        f"which has mean {facts['base_reward_mean']:.3f} and standard deviation {facts['base_reward_sd']:.3f} under "
        "p0. How much of p0's conditional inference did each method destroy, beyond the Bayesian update that the "
        "reward asked for?"
    )


def collect_model(folder: Path, rows: list[Row], curves: list[Row], facts: Row) -> Row:
    """Everything the report shows, as plain JSON values.

    Args:
      folder: of the comparison.
      rows: of results.jsonl.
      curves: none.
      facts: what the run wrote about its question.

    Returns:
      The data of the report.
    """
    usable = [r for r in rows if r.get("C") is not None and r.get("reward") is not None]
    path = [r for r in usable if r["method"] not in ("base", "control") and r["knob"] != "none"]
    targets = [float(t) for t in facts["targets"]]
    price = price_along(facts["frontier"])
    table = matched(path, "reward", targets, facts["base_reward_mean"], price, limits=True)
    world = facts | {
        "subtitle": f"Measured on {facts['prompts_measured']} prompts{_HELD[facts['held_out']]} with "
        f"{facts['samples']} completions of either model: estimates, with 95 % intervals for these prompts. The knobs "
        "were aimed at the rewards of the same completions of p0 that C is measured with; those of q are fresh."
    }
    return frame(rows, world) | {
        "question": _question(facts),
        "answer": summary(table, targets),
        "targets": targets,
        "main_target": targets[0],
        "matched_reward": table,
        "matched_kl": matched(path, "kl", [0.5, 1.0], facts["base_reward_mean"], limits=True),
        "kl_targets": [0.5, 1.0],
        "means": [],
        "intervals": [r for r in usable if r["method"] != "base"],
        "previews": _previews(folder, [r for r in rows if r["family"] != "reference"]),
        "checks": _checks(rows, facts),
        "warnings": [f"{r['lane']}: {w}" for r in rows for w in r.get("warnings") or ()],
        "frontier": facts["frontier"],
        "base_reward": facts["base_reward_mean"],
        "rows": usable,
        "curves": [],
    }
