"""`kl-rl compare --base`: every family on one checkpoint, lane by lane, measured on held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kl_rl.experiments.compare.model.further import references
from kl_rl.experiments.compare.model.ground import Comparison, ModelGround, check_methods, open_ground
from kl_rl.experiments.compare.model.lanes import Clock, Lane, clear, lanes_of, run_lane, stopped_by
from kl_rl.methods.card import Method
from kl_rl.rewards.host import HostReward
from kl_rl.storage.errors import Stopped
from kl_rl.storage.folder import Session, provenance, write_atomically

__all__ = ["Comparison", "Outcome", "compare_on_model"]

Progress = Callable[[float, str], None]
_RESULTS = "results.jsonl"


class Outcome(NamedTuple):
    """How a comparison ended.

    Attributes:
      missing: lanes that did not fit into the time, or were not reached.
      stopped: why it was stopped before its end, in words; None: it was not.
      code: exit status.
    """

    missing: tuple[str, ...] = ()
    stopped: str | None = None
    code: int = 0


def _done(rows: list[dict[str, Any]]) -> set[str]:
    """Lanes all of whose rows are there."""
    count: dict[str, int] = {}
    for row in rows:
        count[row["lane"]] = count.get(row["lane"], 0) + 1
    return {row["lane"] for row in rows if count[row["lane"]] >= row["rows"]}


def _facts(ground: ModelGround, about: dict[str, Any]) -> dict[str, Any]:
    """What the report says about the question."""
    value, count = np.unique(ground.reward, return_counts=True)
    comparison = ground.comparison
    return {
        "name": comparison.question.base,
        "reward_name": ground.inputs.reward.name,
        "base_reward_mean": float(ground.reward.mean()),
        "base_reward_sd": float(ground.reward.std()),
        "targets": list(ground.targets),
        "law": [[float(v), float(c) / ground.reward.size] for v, c in zip(value, count, strict=True)],
        "prompts_trained": len(ground.inputs.train.texts),
        "prompts_measured": len(ground.inputs.held_out.texts),
        "samples": ground.reward.size,
        "steps": comparison.sizes.steps,
        "per_step": comparison.sizes.batch * comparison.sizes.num_samples,
        "horizon": comparison.sizes.horizon,
        "lora": comparison.learning.lora,
        **about,
    }


def compare_on_model(
    comparison: Comparison,
    methods: tuple[Method, ...],
    session: Session,
    clock: Clock,
    progress: Progress,
    *,
    reward: HostReward | None = None,
    about: dict[str, Any] | None = None,
) -> Outcome:
    """Run the comparison; rows go to the session as lanes end, finished lanes found there are not repeated.

    Args:
      comparison: what is asked.
      methods: their cards.
      session: the output folder.
      clock: of the budget; a context that hears signals.
      progress: called with the fraction done and a message.
      reward: what scores, if it is not named in the question.
      about: further facts for the report.

    Returns:
      How it ended.

    Raises:
      RunError, DataError: naming what cannot be used.
    """

    def between() -> None:
        if clock.asked():
            raise Stopped(0, str(clock.signal), clock.code)

    check_methods(methods, comparison)
    lanes: list[Lane] = []
    try:
        progress(0.0, "opening the base model")
        ground = open_ground(comparison, session.folder / "base", between, reward)
        facts = json.dumps(_facts(ground, about or {}), indent=1)
        write_atomically(session.folder / "world.json", facts + "\n")
        lanes = lanes_of(methods, ground)
        done = _done(session.rows(_RESULTS))
        named = provenance()
        session.append(_RESULTS, [row | named for row in references(ground) if row["lane"] not in done])
        return _train(lanes, ground, session, clock, progress, done, named)
    except Stopped as stop:
        done = _done(session.rows(_RESULTS))
        missing = tuple(lane.name for lane in lanes if lane.name not in done)
        return Outcome(missing, stopped_by(clock, stop), 0 if clock.over else stop.code)


def _train(
    lanes: list[Lane],
    ground: ModelGround,
    session: Session,
    clock: Clock,
    progress: Progress,
    done: set[str],
    named: dict[str, Any],
) -> Outcome:
    """The lanes that are not done, one after the other, those of one method sharing their compiled programs."""
    missing = []
    for index, lane in enumerate(lanes):
        folder = session.folder / "lanes" / lane.name
        if lane.name not in done:
            if not clock.fits(lane.method.name):
                missing.append(lane.name)
                continue
            share = lambda fraction, message, index=index, lane=lane: progress(
                (index + fraction) / len(lanes), f"{lane.name}: {message}"
            )
            rows = run_lane(lane, ground, folder, clock, share)
            session.append(_RESULTS, [row | named for row in rows])
        clear(folder)
    progress(1.0, "done")
    return Outcome(tuple(missing))
