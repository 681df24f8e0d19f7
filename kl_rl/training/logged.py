"""A run's data instead of samples: comparisons, or completions with rewards that somebody else drew."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kl_rl.data import (
    ComparisonRecord,
    DataError,
    LoggedRecord,
    encode_comparisons,
    encode_logged,
    grouped,
    load_records,
)
from kl_rl.training.errors import TrainingError
from kl_rl.training.model import Model
from kl_rl.training.prompts import Prompts, encoded, encoder_of
from kl_rl.training.settings import Settings
from kl_rl.trajectories import Trajectories

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


def load_logged(settings: Settings, model: Model, *, comparisons: bool, weighs_behaviour: bool) -> Logged:
    """Read a file of data.

    Args:
      settings: of the run.
      model: its tokenizer and context.
      comparisons: pairs (``chosen``, ``rejected``); else completions with rewards, those of a prompt joined.
      weighs_behaviour: whether the method reads the log-probabilities under whatever drew the completions.

    Returns:
      The data; rewards are 1 and 0 in pairs.

    Raises:
      TrainingError, DataError: naming file, line and field, or what does not fit.
    """
    file, encoder = str(settings.task.data), encoder_of(settings, model, completions=True)
    records: list[Any]
    try:
        if comparisons:
            records = load_records(file, ComparisonRecord).records
            batch = encode_comparisons(records, encoder)
        else:
            records = grouped(load_records(file, LoggedRecord).records)
            recorded = any(record.log_behaviour is not None for record in records)
            batch = encode_logged(records, encoder, assume_base=not (recorded or weighs_behaviour))
    except OSError as error:
        raise TrainingError(f"{file}: cannot be read: {error.strerror or error}") from error
    prompts = encoded(settings, model, [(record.where, record.prompt) for record in records])
    if batch.reward.shape[1] < 2:
        raise DataError(f"{records[0].where}: one completion of a prompt; methods compare at least two")
    arrays: tuple[Any, ...] = (prompts.ids, *batch[1:])
    return Logged(prompts, Trajectories(*arrays))
