"""Lanes: one run for each method, knob and seed, in an order that makes an early end useful, within a time."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kl_rl.experiments.compare.model.further import further
from kl_rl.experiments.compare.model.ground import ModelGround
from kl_rl.methods.card import Method
from kl_rl.methods.laws import NoFixedPoint
from kl_rl.runs.choice import Choice
from kl_rl.runs.step import Diverged
from kl_rl.runs.train import Files, train
from kl_rl.storage.errors import Stopped
from kl_rl.storage.preemption import Preemption

__all__ = ["Clock", "Lane", "clear", "lanes_of", "run_lane", "stopped_by"]

_LOOKS = 8  # at an early-stopped run: its path is its knob
_OVER = 1.1  # of the budget, at which the last lane is stopped: what follows takes some time too


class Lane(NamedTuple):
    """One training run: a method at one setting of its knob, with one seed."""

    method: Method
    value: float
    seed: int

    @property
    def stopped(self) -> bool:
        """Whether training itself finds the knob."""
        return self.method.knob is not None and self.method.knob.stops

    @property
    def name(self) -> str:
        """Of its folder and of its rows."""
        return f"{self.method.name}-{self.value:g}-{self.seed}"


def lanes_of(methods: tuple[Method, ...], ground: ModelGround) -> tuple[list[Lane], dict[str, str]]:
    """All lanes: every method at its first aim, then at the next, then the same with another seed.

    Returns:
      The lanes; and of methods that cannot be aimed at these rewards, why not.
    """
    values: dict[str, list[float]] = {}
    unaimed = {}
    for method in methods:
        try:
            values[method.name] = ground.values(method)
        except NoFixedPoint as error:
            values[method.name], unaimed[method.name] = [], str(error)
    most = max(map(len, values.values()))
    lanes = [
        Lane(method, values[method.name][index], ground.comparison.learning.seed + seed)
        for seed in range(ground.comparison.seeds)
        for index in range(most)
        for method in methods
        if index < len(values[method.name])
    ]
    return lanes, unaimed


class Clock(Preemption):
    """Asks a run to stop when somebody wants it, or when the time is over.

    Args:
      minutes: of the budget; None: no limit.
    """

    def __init__(self, minutes: float | None):
        super().__init__()
        self._began, self._budget = time.monotonic(), None if minutes is None else 60.0 * minutes
        self._took: dict[str, float] = {}
        self.over = False

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def asked(self) -> bool:
        """Whether to stop."""
        self.over = self._budget is not None and self.elapsed > _OVER * self._budget
        return super().asked() or self.over

    def note(self, method: str, seconds: float) -> None:
        """What the last lane of a method took."""
        self._took[method] = seconds

    def fits(self, method: str) -> bool:
        """Whether another lane of a method is likely to end in time; an unknown one is tried while there is some."""
        if self._budget is None:
            return True
        others = float(np.mean(list(self._took.values()))) if self._took else 0.0
        return self.elapsed + self._took.get(method, others) <= _OVER * self._budget


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def _kept(lane: Lane, measured: list[dict[str, Any]], targets: tuple[float, ...]) -> list[dict[str, Any]]:
    """The last measurement; of an early-stopped run those that come closest to the rewards aimed at."""
    if not lane.stopped:
        return measured[-1:]
    reward = np.array([row["reward"] for row in measured])
    closest = dict.fromkeys(int(np.argmin(np.abs(reward - target))) for target in targets)
    return [measured[index] for index in closest]


def _row(lane: Lane, measured: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """A measurement joined with who was measured."""
    knob = lane.method.knob
    option = "none" if knob is None else "steps" if lane.stopped else knob.option
    value = float(measured["step"]) if lane.stopped else lane.value
    named = {"method": lane.method.name, "family": lane.method.family, "knob": option, "knob_value": value}
    row = {**named, "seed": lane.seed, "lane": lane.name, **measured}
    row["steps"] = row.pop("step")
    return row | about


def run_lane(
    lane: Lane, ground: ModelGround, folder: Path, clock: Clock, progress: Callable[[float, str], None]
) -> list[dict[str, Any]]:
    """Train a lane to its end, from where it was left.

    Args:
      lane: what is trained.
      ground: on what.
      folder: of the lane.
      clock: asked whether to stop.
      progress: called with a fraction and a message.

    Returns:
      The rows of the lane.

    Raises:
      Stopped: asked for; the lane goes on from its checkpoint.
    """
    started, sizes = time.perf_counter(), ground.comparison.sizes
    job = ground.job(Choice(lane.method, lane.value), lane.seed)
    every = max(1, sizes.steps // _LOOKS) if lane.stopped else 0
    job = job._replace(
        sizes=dataclasses.replace(sizes, eval_every=every),
        extras=functools.partial(further, job.inputs.model.tokenizer, job.choice),
    )
    files = Files(folder, max(1, sizes.steps // 4), export=False, measure_first=False)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        train(job, files, clock, progress=progress, say=lambda message: None)
    except Diverged as error:
        return [_row(lane, {"step": sizes.steps, "failed": str(error), "reward": None}, {"rows": 1})]
    seconds = time.perf_counter() - started
    clock.note(lane.method.name, seconds)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = _kept(lane, _evaluations(folder), ground.targets)
    about = {"ess": float(np.mean([row["ess"] for row in metrics])), "seconds": seconds, "rows": len(kept)}
    return [_row(lane, measured, about) for measured in kept]


def clear(folder: Path) -> None:
    """Take out the checkpoints of a lane whose rows are kept: they are the largest files of a comparison."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def stopped_by(clock: Clock, stop: Stopped) -> str:
    """Why a lane was stopped, in words: the budget of time, or whoever asked for it."""
    return "the time is over" if clock.over and clock.signal is None else stop.signal
