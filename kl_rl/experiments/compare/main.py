"""From rows on disk to answers: tables at matched reward and KL, checks, figures, report.

Works on unfinished runs too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kl_rl.experiments.compare.matched import matched, summary
from kl_rl.methods import laws
from kl_rl.report.figures import draw
from kl_rl.report.html import html_report
from kl_rl.storage.folder import Session, clean, write_atomically

__all__ = ["collect", "finish", "frame", "frontier_of", "price_along", "seed_means"]

Row = dict[str, Any]


def frontier_of(log_base: np.ndarray, reward: np.ndarray) -> list[list[float]]:
    """(KL, mean reward) along the tilts of p0: one temperature for all prompts, each with a law of its own.

    ``KL = mean_x {lambda mu_x - log E_{p0} [e^{lambda r} | x]}``, nats: the least that buys the mean reward.

    Args:
      log_base: of strings or of samples (``-log N``); [P, N].
      reward: [P, N].

    Returns:
      Points of ascending reward, p0 first.
    """
    mass, value = laws.by_level(log_base, reward)
    points = [[0.0, laws.mean_reward(laws.normalized(mass), value)]]
    with np.errstate(invalid="ignore"):
        for tilt in np.geomspace(1e-3, 300.0, 1000) / np.ptp(reward):
            log_q = laws.tilt(mass, value, 1.0 / tilt)
            kl = np.where(np.isneginf(log_q), 0.0, np.exp(log_q) * (log_q - mass)).sum(-1).mean()
            points.append([float(kl), laws.mean_reward(log_q, value)])
    return points


def seed_means(rows: list[Row]) -> list[Row]:
    """Seed means of every numeric field at each knob."""
    out = []
    for key in dict.fromkeys((r["method"], r["knob_value"]) for r in rows):
        group = [r for r in rows if (r["method"], r["knob_value"]) == key]
        entry: Row = {"method": key[0], "family": group[0]["family"], "knob_value": key[1]}
        for name, value in group[0].items():
            if name in entry or isinstance(value, bool) or not isinstance(value, int | float | None):
                continue
            found = [r[name] for r in group if r.get(name) is not None]
            entry[name] = float(np.mean(found)) if len(found) == len(group) else None
        out.append(entry)
    return out


def _checks(rows: list[Row]) -> list[str]:
    """What the run says about the instrument itself."""
    lines = []
    sampler = [r for r in rows if r["method"] == "exact-posterior"]
    if sampler:
        worst = max(abs(r["C"]) for r in sampler)
        lines.append(
            f"Exact sampler of p*: C = {worst:.1e} nats at most by enumeration; from "
            f"{sampler[0]['interval_samples']} samples the 95 % intervals are "
            + ", ".join(f"[{r['C_lower']:.2g}, {r['C_upper']:.2g}]" for r in sampler)
            + "."
        )
    for r in (r for r in rows if r["method"] == "control"):
        lines.append(
            f"Positive control at beta {r['knob_value']:.3g}: C known in closed form "
            f"{r['known_C']:.6f}, by enumeration {r['C']:.6f} "
            f"(difference {abs(r['C'] - r['known_C']):.1e}), 95 % interval from samples "
            f"[{r['C_lower']:.4f}, {r['C_upper']:.4f}]."
        )
    told = [r["C_in_interval"] for r in rows if r.get("C_in_interval") is not None]
    if told:
        lines.append(
            f"The sampled 95 % interval holds the exact C in {sum(told)} of {len(told)} rows "
            f"({100 * np.mean(told):.1f} %)."
        )
    split = [
        abs(r["kl"] - r["P"] - r["S"] - r["C"]) for r in rows if None not in (r["kl"], r["P"], r["S"], r["C"])
    ]
    if split:
        lines.append(f"KL = P + S + C holds to {max(split):.1e} nats in every row.")
    return lines


def price_along(frontier: list[list[float]]) -> Callable[[float], float]:
    """P as a function of the mean reward, by interpolation along the frontier."""
    kl, reward = np.array(frontier).T
    return lambda mean: float(np.interp(mean, reward, kl))


def frame(rows: list[Row], world: Row) -> Row:
    """Title, subtitle and footer, the same for every kind of run."""
    about = rows[0] if rows else {}
    versions = ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items())
    return {
        "title": f"What fine-tuning did: {world['name']}",
        "subtitle": world["subtitle"],
        "footer": f"{versions}; commit {about.get('commit')}; device {about.get('device')}. "
        "Data: results.jsonl (one line per method, knob, seed), curves.jsonl, summary.json.",
    }


def collect(folder: Path, rows: list[Row], curves: list[Row], world: Row) -> Row:
    """Everything the report shows of a run on an enumerable world, as plain JSON values.

    Args:
      folder: of the run.
      rows: results.jsonl.
      curves: curves.jsonl.
      world: ``{name, subtitle, question, law: [[r, prob], ...], targets}``.

    Returns:
      A dict for ``html_report`` and ``summary.json``.
    """
    value, mass = np.array(world["law"]).T
    base_reward = float(value @ mass)
    targets, kl_targets = world["targets"], [0.5, 1.0]
    curves = list({(c["method"], c["knob_value"], c["seed"], c["step"]): c for c in curves}.values())
    # Early stopping sweeps the step: its path is the whole curve, not three stops.
    stepped = {r["method"] for r in rows if r["knob"] == "steps"}
    families = {r["method"]: r["family"] for r in rows}
    path = [
        r for r in rows if r["method"] not in stepped and r["knob"] != "none" and r["method"] != "control"
    ]
    path += [c | {"family": families[c["method"]]} for c in curves if c["method"] in stepped]
    frontier = frontier_of(np.log(mass)[None], value[None])
    matched_reward = matched(path, "reward", targets, base_reward, price_along(frontier))
    return frame(rows, world) | {
        "question": world["question"],
        "answer": summary(matched_reward, targets),
        "targets": targets,
        "main_target": targets[0],
        "kl_targets": kl_targets,
        "matched_reward": matched_reward,
        "matched_kl": matched(path, "kl", kl_targets, base_reward),
        "means": seed_means(rows),
        "checks": _checks(rows),
        "frontier": frontier,
        "base_reward": base_reward,
        "rows": rows,
        "curves": curves,
    }


def finish(session: Session, world: Row, collect_fn: Callable[..., Row] = collect) -> Row:
    """Write ``report.html``, the figures and ``summary.json`` from what is on disk.

    Returns:
      The collected data.
    """
    data = collect_fn(session.folder, session.rows("results.jsonl"), session.rows("curves.jsonl"), world)
    figures = draw(data)
    for name, (png, _) in figures.items():
        write_atomically(session.folder / f"{name}.png", png)
    kept = {k: v for k, v in data.items() if k not in ("rows", "curves")}
    write_atomically(
        session.folder / "summary.json", json.dumps(clean(kept), indent=1, allow_nan=False) + "\n"
    )
    write_atomically(session.folder / "report.html", html_report(data, figures))
    return data
