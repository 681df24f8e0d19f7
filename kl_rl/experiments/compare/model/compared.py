"""`kl-rl compare --base`: every family on one checkpoint, lane by lane, measured on held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from kl_rl.experiments.compare.main import frontier_of
from kl_rl.experiments.compare.model.further import references
from kl_rl.experiments.compare.model.ground import Comparison, ModelGround, check_methods, open_ground
from kl_rl.experiments.compare.model.lanes import Clock, Lane, clear, lanes_of, run_lane, stopped_by
from kl_rl.methods.card import Method
from kl_rl.rewards.host import HostReward
from kl_rl.storage.errors import BadRewardValue, Stopped
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
    comparison = ground.comparison
    return {
        "name": comparison.question.base,
        "reward_name": ground.inputs.reward.name,
        "base_reward_mean": float(ground.reward.mean()),
        "base_reward_sd": float(ground.reward.std()),
        "targets": list(ground.targets),
        "frontier": frontier_of(ground.log_base, ground.reward),
        "prompts_trained": len(ground.inputs.train.texts),
        "held_out": not set(ground.inputs.train.texts) & set(ground.inputs.held_out.texts),
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
      Stopped, BadRewardValue: before there is any row; it goes on from where it was.
    """

    def between() -> None:
        if clock.asked():
            raise Stopped(0, str(clock.signal), clock.code)

    check_methods(methods, comparison.sizes, comparison.learning)
    lanes: list[Lane] = []
    try:
        progress(0.0, "opening the base model")
        ground = open_ground(comparison, session.folder / "base", between, reward)
        lanes, unaimed = lanes_of(methods, ground)
        facts = _facts(ground, (about or {}) | {"unaimed": unaimed})
        write_atomically(session.folder / "world.json", json.dumps(facts, indent=1) + "\n")
        done = _done(session.rows(_RESULTS))
        named = provenance()
        session.append(_RESULTS, [row | named for row in references(ground) if row["lane"] not in done])
        return _train(lanes, ground, session, clock, progress, done, named)
    except (Stopped, BadRewardValue) as error:
        done = _done(session.rows(_RESULTS))
        if not done and not clock.over:
            raise
        missing = tuple(lane.name for lane in lanes if lane.name not in done)
        if isinstance(error, BadRewardValue):
            return Outcome(missing, str(error), 2)
        return Outcome(
            missing, stopped_by(clock, error), 0 if clock.over and clock.signal is None else error.code
        )


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
