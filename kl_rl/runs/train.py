"""Fine-tuning in a folder: steps, measurements, files, checkpoints, export; picked up where it was left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kl_rl.runs.evaluate import evaluation
from kl_rl.runs.export import export
from kl_rl.runs.job import Job, make_job
from kl_rl.runs.programs import Run
from kl_rl.runs.settings import Settings
from kl_rl.runs.step import advance, blank, start
from kl_rl.sharding.processes import agreed, is_first
from kl_rl.storage.checkpoint import outline
from kl_rl.storage.errors import TrainingError
from kl_rl.storage.loop import Kept, Position, pick_up, run_steps, to_stderr
from kl_rl.storage.preemption import Preemption
from kl_rl.storage.trackers import Sink

__all__ = ["FILES", "train"]

METRICS, EVALUATIONS, SAMPLES = FILES = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")
TIMING = "timing.jsonl"  # seconds differ from run to run: kept apart from what is compared bit for bit

Progress = Callable[[float, str], None]
Say = Callable[[str], None]
_MEASURED = {"reward": "reward", "kl": "KL", "C": "C"}
MakeSinks = Callable[[int], Sequence[Sink]]


def _silent(fraction: float, message: str) -> None:
    """No progress report."""


def train(
    settings: Settings,
    folder: Path,
    *,
    progress: Progress = _silent,
    say: Say = to_stderr,
    make_sinks: MakeSinks = lambda step: (),
) -> dict[str, Any]:
    """Run the method to its last step, from the newest whole checkpoint of the folder if there is one.

    The folder must be held by this run alone; of several processes (``sharding.processes``), which must see the same
    folder, the first writes what is not a checkpoint. A run that was cut off anywhere and picked up again writes the
    same bytes into ``metrics.jsonl``, ``evaluations.jsonl`` and ``samples.jsonl`` and ends with the same weights.

    Args:
      settings: what is asked.
      folder: of the run.
      progress: called with a fraction of the work and a message.
      say: told what a person should know: damaged checkpoints, how the reward was read, that nothing was learned.
      make_sinks: given the steps done, where else numbers go.

    Returns:
      The last measurement, and ``steps``, ``resumed`` (steps done before).

    Raises:
      Stopped: by SIGTERM or Ctrl-C, after saving.
      TrainingError, Diverged, SaveError: see the modules.
    """
    with Preemption() as preemption:
        progress(0.0, "opening the base model")
        job = make_job(settings)
        kept, position = pick_up(folder, outline(blank(job)), FILES, settings.saving.save_every, say=say)
        try:
            if position is None:
                if job.reward.note and is_first():
                    say(job.reward.note)
                progress(0.0, "samples of the base model (compiling)")
                position = Position(0, start(job), {})
                kept.save(0, position.tree)
            else:
                progress(position.step / settings.sizes.steps, f"going on after step {position.step}")
            sinks = _opened(make_sinks, position.step)
            try:
                session = _Session(job, kept, sinks, folder, progress, say)
                run = run_steps(
                    kept, position.tree, position.step, settings.sizes.steps, session.step, preemption
                )
                return session.finish(run) | {"resumed": position.step}
            finally:
                for sink in sinks:
                    sink.close()
        finally:
            kept.close()


def _opened(make_sinks: MakeSinks, step: int) -> Sequence[Sink]:
    """The first process has them; if they cannot be had, none goes on."""
    sinks: Sequence[Sink] = ()
    problem = None
    try:
        sinks = tuple(make_sinks(step)) if is_first() else ()
    except TrainingError as error:
        problem = error
    if (message := agreed(None if problem is None else str(problem))) is not None:
        raise TrainingError(message) from problem
    return sinks


class _Session:
    """One step of the loop with its rows, from the point of view of files."""

    def __init__(
        self, job: Job, kept: Kept, sinks: Sequence[Sink], folder: Path, progress: Progress, say: Say
    ):
        self._job, self._kept, self._sinks, self._progress, self._say = job, kept, sinks, progress, say
        self._folder, self._measure = folder, evaluation(job)
        self._steps, self._every = job.settings.sizes.steps, job.settings.sizes.eval_every
        self._last: dict[str, Any] = {}
        self._drawn = {"policy": "", "p0": "samples of p0: ", "data": "data: "}[job.chosen.drawn_from]
        self._weighted: bool | None = None  # whether any sample of any step has had weight

    def _due(self, step: int) -> bool:
        return step == 0 or (self._every > 0 and step % self._every == 0)

    def step(self, run: Run, step: int) -> Run:
        """Measure if it is due, then advance; rows are written when all has gone well."""
        started = time.perf_counter()
        measured = self._measure(run, step) if self._due(step) else None
        between = time.perf_counter()
        run, row = advance(self._job, run, step)
        self._weighted = bool(self._weighted) or row["ess"] > 0.0
        if measured is not None:
            self._write_measured(measured)
        self._kept.journal.write(METRICS, row)
        for sink in self._sinks:
            sink.write(step + 1, _numbers(row))
        self._write_timing(step + 1, time.perf_counter() - between, between - started)
        self._report(step + 1, row)
        return run

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
        with open(self._folder / TIMING, "a") as file:
            file.write(f'{{"step": {step}, "seconds": {seconds:.4f}, "measuring": {measuring:.4f}}}\n')

    def _report(self, step: int, row: Mapping[str, Any]) -> None:
        """What the batch was like, whoever drew it, and the last measurement of the policy itself."""
        shown = f"reward {row['reward']:.3g}, log q/p0 {row['log_ratio']:.3g}, ESS {row['ess']:.2g}"
        if last := self._last:
            found = ", ".join(f"{label} {last[name]:.3g}" for name, label in _MEASURED.items())
            shown += f" | policy after step {last['step']}: {found}"
        self._progress(step / self._steps, f"step {step}: {self._drawn}{shown}")

    def finish(self, run: Run) -> dict[str, Any]:
        """The last measurement, which belongs to no step, and the export."""
        self._progress(1.0, "measuring")
        measured = self._measure(run, self._steps)
        if is_first() and self._written() < self._steps:
            self._write_measured(measured)
            self._kept.journal.sync()
        self._progress(1.0, "exporting the model")
        export(self._job, run, self._folder / "model")
        if self._weighted is False:
            self._say("warning: no sample had any weight (no reward passed) in any step: nothing was learned")
        return {**measured.row, "steps": self._steps}

    def _written(self) -> int:
        """The step of the last measurement in the file."""
        lines = (self._folder / EVALUATIONS).read_bytes().splitlines()
        return json.loads(lines[-1])["step"] if lines else -1


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
