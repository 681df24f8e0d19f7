"""``kl-rl compare`` on an enumerable world: train, measure exactly, and keep every row as soon as it exists."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from kl_rl.experiments.compare.ground import Ground, make_ground, mean_at_fraction
from kl_rl.experiments.compare.matched import grid
from kl_rl.experiments.compare.reference import flow_curves, reference_laws
from kl_rl.experiments.compare.rows import against_law, exact_budgets, sampled_interval, target_law
from kl_rl.experiments.compare.runner import Scale, Trained, train
from kl_rl.experiments.parallel import Board, in_parallel
from kl_rl.methods import laws
from kl_rl.methods.card import Method
from kl_rl.methods.knobs import BETA, aim
from kl_rl.storage.folder import Session, provenance, write_atomically
from kl_rl.worlds import World

__all__ = ["describe", "run_tabular"]

Progress = Callable[[float, str], None]
SAMPLED = 2000
CURVE_FIELDS = ("reward", "kl", "P", "S", "C", "C_fwd", "C_JS", "entropy_gap", "kl_pstar_q")


def _interval(ground: Ground, law: np.ndarray, row: dict[str, Any], tag: int) -> dict[str, Any]:
    """The sampled interval, and whether it holds the exact value: the instrument checks itself on every row."""
    measured = sampled_interval(ground, law, np.random.default_rng(tag), SAMPLED)
    low, high = measured["C_lower"], measured["C_upper"]
    exact = max(row["C"], 0.0)  # rounding may leave -1e-17
    inside = None if low is None or high is None else bool(low <= exact <= high)
    return measured | {"C_in_interval": inside, "interval_samples": SAMPLED}


def _reference_rows(ground: Ground, sizes: Scale, extras: Any) -> list[dict[str, Any]]:
    references = reference_laws(ground, sizes)
    betas = [r.knob_value if r.knob is BETA else None for r in references]
    budgets = exact_budgets(ground, np.stack([r.log_q for r in references]), betas)
    rows = []
    for number, (law, measured) in enumerate(zip(references, budgets, strict=True)):
        row = {
            "method": law.method,
            "family": "reference",
            "knob": law.knob.option,
            "knob_value": law.knob_value,
            "seed": 0,
        }
        row |= measured | {"known_C": law.known_C} | extras(law.log_q, measured)
        rows.append(row | _interval(ground, law.log_q, measured, number))
    return rows


def _curve_rows(method: str, knob: float, seed: int, steps: np.ndarray, budgets: list[dict[str, float]]):
    return [
        {"method": method, "knob_value": knob, "seed": seed, "step": int(step)}
        | {name: b[name] for name in CURVE_FIELDS}
        for step, b in zip(steps, budgets, strict=True)
    ]


def _stops(budgets: list[dict[str, float]], means: list[float]) -> list[int]:
    """Checkpoints of an early-stopped run that come closest to the rewards aimed at."""
    rewards = np.array([b["reward"] for b in budgets])
    return list(dict.fromkeys(int(np.argmin(np.abs(rewards - mean))) for mean in means))


def _method_rows(
    method: Method, trained: Trained, ground: Ground, sizes: Scale, extras: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    means = [mean_at_fraction(ground, f) for f in sizes.fractions]
    stopped = method.knob is not None and method.knob.stops
    option = "none" if method.knob is None else "steps" if stopped else method.knob.option
    targets = {knob: target_law(method, ground, float(knob)) for knob in np.unique(trained.knob)}
    rows, curves = [], []
    for lane, (knob, seed) in enumerate(zip(trained.knob, trained.seed, strict=True)):
        beta = float(knob) if method.knob is BETA else None
        learned = trained.log_q[:, lane]
        budgets = exact_budgets(ground, learned, [beta] * len(learned))
        curves += _curve_rows(method.name, float(knob), int(seed), trained.steps, budgets)
        stops = _stops(budgets, means) if stopped else [len(learned) - 1]
        for stop in stops:
            value = float(trained.steps[stop]) if stopped else float(knob)
            row = {
                "method": method.name,
                "family": method.family,
                "knob": option,
                "knob_value": value,
                "seed": int(seed),
                "steps": int(trained.steps[stop]),
            }
            row |= budgets[stop] | extras(learned[stop], budgets[stop])
            row |= against_law(ground, targets[knob], learned[stop])
            row |= _interval(ground, learned[stop], budgets[stop], 1000 * lane + stop)
            row |= {"ess": float(trained.ess[lane]), "lanes": len(trained.knob)}
            rows.append(row | {"wall_s": trained.wall, "compile_s": trained.compile})
    return rows, curves


def _flow_rows(ground: Ground, beta: float) -> list[dict[str, Any]]:
    rows = []
    for name, path in flow_curves(ground, beta).items():
        prompts = len(ground.log_base)
        along = np.repeat(path[:, None], prompts, axis=1)
        rows += _curve_rows(
            name, beta, 0, np.arange(len(path)), exact_budgets(ground, along, [beta] * len(along))
        )
    return rows


def _middle_beta(ground: Ground, sizes: Scale) -> float:
    mean = mean_at_fraction(ground, sizes.fractions[len(sizes.fractions) // 2])
    return aim(laws.tilt, ground.log_base, ground.reward, mean, BETA)


def run_tabular(
    world: World,
    methods: tuple[Method, ...],
    sizes: Scale,
    session: Session,
    progress: Progress,
    extras: Callable[[Ground], Callable[[np.ndarray, dict[str, float]], dict[str, Any]]],
) -> None:
    """Run the comparison; rows go to the session, finished methods found there are skipped.

    Args:
      world: enumerable.
      methods: their cards.
      sizes: sizes.
      session: the output folder.
      progress: called with the fraction done and a message.
      extras: ``ground -> (law, budget) -> dict``, further measurements of every row (queries, scores).
    """
    total = len(methods) + 2
    progress(0.0, f"base model by maximum likelihood on {world.name}")
    ground = make_ground(world, base_steps=sizes.base_steps)
    write_atomically(
        session.folder / "world.json", json.dumps(describe(world, sizes, ground), indent=1) + "\n"
    )
    done = {row["method"] for row in session.rows("results.jsonl")}
    measure, about = extras(ground), provenance()
    if "exact-posterior" not in done:
        progress(1 / total, "exact reference laws")
        rows = _reference_rows(ground, sizes, measure)
        if len(ground.log_base) == 1:
            session.append("curves.jsonl", _flow_rows(ground, _middle_beta(ground, sizes)))
        session.append("results.jsonl", [row | about for row in rows])
    waiting = [method for method in methods if method.name not in done]
    board = Board(progress, offset=2 + len(methods) - len(waiting), total=total)

    def work(method: Method) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        trained = train(
            method, ground, sizes, list(range(sizes.seeds)), functools.partial(board.tell, method.name)
        )
        return _method_rows(method, trained, ground, sizes, measure)

    for method, (rows, curves) in in_parallel(work, waiting, board.stop):
        session.append("curves.jsonl", curves)
        session.append("results.jsonl", [row | about for row in rows])
        board.tell(method.name, 1.0, f"{method.name}: {len(rows)} rows done")


def describe(world: World, sizes: Scale, ground: Ground) -> dict[str, Any]:
    """What the report says about the question.

    Kept as ``world.json``, so that an interrupted run can be reported too.
    """
    law = [
        [float(v), float(m)]
        for v, m in zip(ground.levels.value, np.exp(ground.log_level), strict=True)
        if m > 0
    ]
    loss, entropy = ground.base_loss
    return {
        "name": world.name,
        "law": law,
        "targets": grid(law, (sizes.fractions[0] + 0.05, sizes.fractions[1])),
        "subtitle": f"{world.vocab}^{world.horizon} = {world.num_strings} strings, {len(law)} reward "
        f"levels, {sizes.seeds} seeds, "
        f"{sizes.steps} steps of {sizes.num_samples} samples; every number below is exact for the "
        "policies trained, by enumeration.",
        "question": "A small transformer was trained by maximum likelihood on a hidden Markov "
        f"process (held-out loss {loss:.4f} nats per token, "
        f"entropy of the process {entropy:.4f}) and frozen as p0. From it, each method fine-tuned the "
        "same network towards more reward. "
        "How much of p0's calibrated conditional inference did each destroy, beyond the Bayesian "
        "update the reward asked for?",
    }
