"""A run's data instead of samples: comparisons, or completions with rewards that somebody else drew."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kl_rl.core.trajectories import Trajectories
from kl_rl.data import (
    ComparisonRecord,
    LoggedRecord,
    encode_comparisons,
    encode_logged,
    grouped,
    load_records,
)
from kl_rl.huggingface.opened import Model
from kl_rl.runs.methods import Chosen
from kl_rl.runs.prompts import Prompts, encoded, encoder_of
from kl_rl.runs.settings import Settings
from kl_rl.storage.errors import TrainingError

__all__ = ["Logged", "load_logged"]


class Logged(NamedTuple):
    """N prompts with their K completions each.

    Attributes:
      prompts: N of them, also in ``batch``.
      batch: host arrays, [N, K, ...].
    """

    prompts: Prompts
    batch: Trajectories

    def take(self, index: np.ndarray) -> Logged:
        """The rows ``index``."""
        return Logged(self.prompts.take(index), Trajectories(*(leaf[index] for leaf in self.batch)))


def _check_draws(settings: Settings, chosen: Chosen, found: int) -> None:
    task = settings.task
    if chosen.needs_groups and found < 2:
        raise TrainingError(f"{task.method} compares completions of one prompt: {task.data} has one of each")
    if chosen.method.knob == "n" and task.n > found:
        raise TrainingError(
            f"--n must be at most the {found} completions that {task.data} has of a prompt; got {task.n:g}"
        )


def load_logged(settings: Settings, model: Model, chosen: Chosen) -> Logged:
    """Read a file of data.

    Args:
      settings: of the run.
      model: its tokenizer and context.
      chosen: the method: it wants comparisons (``chosen``, ``rejected``), or completions with rewards, those of a
        prompt joined if it compares them, with ``log_behaviour`` if it weighs by that.

    Returns:
      The data; rewards are 1 and 0 in comparisons.

    Raises:
      TrainingError, DataError: naming file, line and field, or what does not fit.
    """
    file, encoder = str(settings.task.data), encoder_of(settings, model, completions=True)
    records: list[Any]
    try:
        if chosen.compares:
            records = load_records(file, ComparisonRecord).records
            batch = encode_comparisons(records, encoder)
        else:
            records = load_records(file, LoggedRecord).records
            records = grouped(records) if chosen.needs_groups else records
            recorded = any(record.log_behaviour is not None for record in records)
            batch = encode_logged(records, encoder, assume_base=not (recorded or chosen.weighs_behaviour))
    except OSError as error:
        raise TrainingError(f"{file}: cannot be read: {error.strerror or error}") from error
    _check_draws(settings, chosen, batch.reward.shape[1])
    prompts = encoded(settings, model, [(record.where, record.prompt) for record in records])
    arrays: tuple[Any, ...] = (prompts.ids, *batch[1:])
    return Logged(prompts, Trajectories(*arrays))
