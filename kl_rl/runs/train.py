"""Fine-tuning in a folder: steps, measurements, files, checkpoints, export; picked up where it was left."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kl_rl.runs.evaluate import evaluation
from kl_rl.runs.export import export
from kl_rl.runs.job import Job
from kl_rl.runs.programs import Held
from kl_rl.runs.step import blank, open_run, take_step
from kl_rl.sharding.processes import agreed, is_first
from kl_rl.storage.checkpoint import outline
from kl_rl.storage.errors import RunError
from kl_rl.storage.loop import Kept, Position, pick_up, run_steps, to_stderr
from kl_rl.storage.preemption import Preemption
from kl_rl.storage.trackers import Sink

__all__ = ["FILES", "Files", "train"]

METRICS, EVALUATIONS, SAMPLES = FILES = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")
TIMING = "timing.jsonl"  # seconds differ from run to run: kept apart from what is compared bit for bit

Progress = Callable[[float, str], None]
Say = Callable[[str], None]
_SAMPLES = {
    "policy": "",
    "p0": "samples of p0: ",
    "frozen policy": "samples of a frozen policy: ",
    "data": "data: ",
}
_MEASURED = {"reward": "reward", "kl": "KL", "C": "C"}
MakeSinks = Callable[[int], Sequence[Sink]]


def _silent(fraction: float, message: str) -> None:
    """No progress report."""


class Files(NamedTuple):
    """Where a run writes.

    Attributes:
      folder: of the run; it must be held by this run alone.
      save_every: steps between two checkpoints.
      make_sinks: given the steps done, where else numbers go.
      export: whether the model is written at the end.
      measure_first: whether the policy is measured before the first step, when it is p0.
    """

    folder: Path
    save_every: int
    make_sinks: MakeSinks = lambda step: ()
    export: bool = True
    measure_first: bool = True


def train(
    job: Job, files: Files, preemption: Preemption, *, progress: Progress = _silent, say: Say = to_stderr
) -> dict[str, Any]:
    """Run the method to its last step, from the newest whole checkpoint of the folder if there is one.

    Of several processes (``sharding.processes``), which must see the same folder, the first writes what is not a
    checkpoint. A run that was cut off anywhere and picked up again writes the same bytes into ``metrics.jsonl``,
    ``evaluations.jsonl`` and ``samples.jsonl`` and ends with the same weights.

    Args:
      job: the run's fixed parts.
      files: where it writes.
      preemption: asked after every step whether to stop.
      progress: called with a fraction of the work and a message.
      say: told what a person should know: damaged checkpoints, how the reward was read, that nothing was learned.

    Returns:
      The last measurement, and ``steps``, ``resumed`` (steps done before).

    Raises:
      Stopped: by SIGTERM or Ctrl-C, after saving.
      RunError, Diverged, SaveError: see the modules.
    """
    steps = job.sizes.steps
    kept, position = pick_up(files.folder, outline(blank(job)), FILES, files.save_every, say=say)
    try:
        if position is None:
            if job.inputs.reward.note and is_first():
                say(job.inputs.reward.note)
            progress(0.0, "samples of the base model (compiling)")
            position = Position(0, open_run(job), {})
            kept.save(0, position.tree)
        else:
            progress(position.step / steps, f"going on after step {position.step}")
        with _opened(files.make_sinks, position.step) as sinks:
            session = _Session(job, kept, sinks, files, progress, say)
            held = run_steps(kept, position.tree, position.step, steps, session.step, preemption)
            measured = session.finish(held)
            return measured | {"resumed": position.step}
    finally:
        kept.close()


@contextlib.contextmanager
def _opened(make_sinks: MakeSinks, step: int) -> Iterator[Sequence[Sink]]:
    """The first process has them; if they cannot be had, none goes on."""
    sinks: Sequence[Sink] = ()
    problem = None
    try:
        sinks = tuple(make_sinks(step)) if is_first() else ()
    except RunError as error:
        problem = error
    if (message := agreed(None if problem is None else str(problem))) is not None:
        raise RunError(message) from problem
    try:
        yield sinks
    finally:
        for sink in sinks:
            sink.close()


class _Session:
    """One step of the loop with its rows, from the point of view of files."""

    def __init__(
        self, job: Job, kept: Kept, sinks: Sequence[Sink], files: Files, progress: Progress, say: Say
    ):
        self._job, self._kept, self._sinks, self._progress, self._say = job, kept, sinks, progress, say
        self._files, self._measure = files, evaluation(job)
        self._steps, self._every = job.sizes.steps, job.sizes.eval_every
        self._last: dict[str, Any] = {}
        self._drawn = _SAMPLES[job.choice.drawn_by]
        self._weighted: bool | None = None  # whether any sample of any step has had weight

    def _due(self, step: int) -> bool:
        if step == 0:
            return self._files.measure_first
        return self._every > 0 and step % self._every == 0

    def step(self, held: Held, step: int) -> Held:
        """Measure if it is due, then advance; rows are written when all has gone well."""
        started = time.perf_counter()
        measured = self._measure(held, step) if self._due(step) else None
        between = time.perf_counter()
        held, row = take_step(self._job, held, step)
        self._weighted = bool(self._weighted) or row["ess"] > 0.0
        if measured is not None:
            self._write_measured(measured)
        self._kept.journal.write(METRICS, row)
        for sink in self._sinks:
            sink.write(step + 1, _numbers(row))
        self._write_timing(step + 1, time.perf_counter() - between, between - started)
        self._report(step + 1, row)
        return held

    def _write_measured(self, measured: Any) -> None:
        self._last = measured.row
        self._kept.journal.write(EVALUATIONS, measured.row)
        for preview in measured.previews:
            self._kept.journal.write(SAMPLES, preview)
        for sink in self._sinks:
            values = {f"held_out/{k}": v for k, v in _numbers(measured.row).items()}
            sink.write(measured.row["step"], values)

    def _write_timing(self, step: int, seconds: float, measuring: float) -> None:
        if not is_first():
            return
        with open(self._files.folder / TIMING, "a") as file:
            file.write(f'{{"step": {step}, "seconds": {seconds:.4f}, "measuring": {measuring:.4f}}}\n')

    def _report(self, step: int, row: Mapping[str, Any]) -> None:
        """What the batch was like, whoever drew it, and the last measurement of the policy itself."""
        reward = (
            f"reward {row['reward']:.3g}, " if np.isfinite(row["reward"]) else ""
        )  # comparisons need none
        shown = f"{reward}log q/p0 {row['log_ratio']:.3g}, ESS {row['ess']:.2g}"
        if last := self._last:
            found = ", ".join(f"{label} {last[name]:.3g}" for name, label in _MEASURED.items())
            shown += f" | policy after step {last['step']}: {found}"
        self._progress(step / self._steps, f"step {step}: {self._drawn}{shown}")

    def finish(self, held: Held) -> dict[str, Any]:
        """The last measurement, which belongs to no step, and the export."""
        self._progress(1.0, "measuring")
        measured = self._measure(held, self._steps)
        if is_first() and self._written() < self._steps:
            self._write_measured(measured)
            self._kept.journal.sync()
        if self._files.export:
            self._progress(1.0, "exporting the model")
            export(self._job, held, self._files.folder / "model")
        if self._weighted is False:
            self._say("warning: no sample had any weight (no reward passed) in any step: nothing was learned")
        return {**measured.row, "steps": self._steps}

    def _written(self) -> int:
        """The step of the last measurement in the file."""
        lines = (self._files.folder / EVALUATIONS).read_bytes().splitlines()
        return json.loads(lines[-1])["step"] if lines else -1


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float) and np.isfinite(v)}
