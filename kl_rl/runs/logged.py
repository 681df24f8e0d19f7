"""A run's data instead of samples: comparisons, or completions with rewards that somebody else drew."""

from __future__ import annotations

from typing import Any

from kl_rl.core.trajectories import Trajectories
from kl_rl.data import (
    ComparisonRecord,
    LoggedRecord,
    encode_comparisons,
    encode_logged,
    grouped,
    load_records,
)
from kl_rl.methods.needs import Feed
from kl_rl.runs.choice import Choice
from kl_rl.runs.prompts import Prompts, Reader
from kl_rl.storage.errors import RunError

__all__ = ["load_logged"]


def _check_draws(file: str, choice: Choice, found: int) -> None:
    method = choice.method
    if method.needs.samples > found:
        raise RunError(f"{method.name} compares completions of one prompt: {file} has one of each")
    if method.knob is not None and method.knob.option == "n" and choice.value > found:
        raise RunError(
            f"--n must be at most the {found} completions that {file} has of a prompt; got {choice.value:g}"
        )


def load_logged(file: str, choice: Choice, reader: Reader) -> tuple[Prompts, Trajectories]:
    """Read a file of data.

    Args:
      file: its name.
      choice: the method; its needs say whether it wants comparisons (``chosen``, ``rejected``) or completions with
        rewards, those of a prompt joined if it compares them, with ``log_behaviour`` if it weighs by that.
      reader: makes ids of texts.

    Returns:
      N prompts, and their K completions as host arrays, [N, K, ...]; what raters said of comparisons is ``label``.

    Raises:
      RunError, DataError: naming file, line and field, or what does not fit.
    """
    needs, encoder = choice.method.needs, reader.encoder
    records: list[Any]
    try:
        if needs.feed is Feed.PAIRS:
            records = load_records(file, ComparisonRecord).records
            batch = encode_comparisons(records, encoder)
        else:
            records = load_records(file, LoggedRecord).records
            records = grouped(records) if needs.samples > 1 else records
            recorded = any(record.log_behaviour is not None for record in records)
            batch = encode_logged(records, encoder, assume_base=needs.unrecorded and not recorded)
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror or error}") from error
    _check_draws(file, choice, batch.reward.shape[1])
    prompts = reader.read([(record.where, record.prompt) for record in records])
    ids: Any = prompts.ids
    return prompts, batch._replace(prompt=ids)
