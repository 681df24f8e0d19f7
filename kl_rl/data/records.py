"""The kinds of record a data file may hold, and what each must look like.

    prompts       {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]} or {"prompt_tokens": [5, 7]}
    logged        ... with "completions": ["...", ...], "rewards": [1.0, ...], "log_behaviour": [[-0.3, ...], ...]
                  or "completion", "reward", "log_behaviour": [-0.3, ...]; token ids as "completion_tokens"
    comparisons   ... with "chosen": "...", "rejected": "..." and perhaps "probability": 0.8
    rankings      ... with "completions": ["...", ...], "ranks": [1, 3, 2], 1 the best, equal ranks are ties
    episodes      {"steps": [{"return": 3, "observation": "...", "action": "..."}, ...], "return": 3}, see ``episodes``

Other names of the fields are in ``row.ALIASES``. Log-probabilities are in nats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

from kl_rl.data.errors import DataError
from kl_rl.data.row import (
    Content,
    Row,
    as_list,
    as_log_probs,
    as_number,
    as_text,
    as_tokens,
    describe,
)

__all__ = ["ComparisonRecord", "LoggedRecord", "PromptRecord", "RankingRecord", "grouped", "ranking_pairs"]

LogProbs = float | tuple[float, ...]

_PROMPT = ("prompt", "messages", "prompt_tokens")


@dataclasses.dataclass(frozen=True)
class PromptRecord:
    """A prompt to continue.

    Attributes:
      where: file and line.
      prompt: text, messages or token ids.
    """

    FIELDS: ClassVar[tuple[str, ...]] = _PROMPT
    where: str
    prompt: Content

    @classmethod
    def parse(cls, row: Row) -> PromptRecord:
        """Check a row.

        Raises:
          DataError: naming file, line and field.
        """
        return cls(row.where, row.prompt())


def _as_many(row: Row, one: str, many: str) -> bool:
    if one in row and many in row:
        raise DataError(
            f"{row.place(many)}: there is {row.place(one).split(': ')[-1]} too; keep one of the two"
        )
    return many in row


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(x, list | tuple) for x in value)


def _completions(row: Row) -> tuple[Content, ...]:
    """Text and token ids of the K completions."""
    nested = "completion_tokens" in row and _is_nested(row.get("completion_tokens"))
    if not (_as_many(row, "completion", "completions") or nested):
        return (row.content("completion", "completion_tokens"),)
    ids = row.items("completion_tokens", as_tokens) if "completion_tokens" in row else None
    if "completions" not in row and ids is not None:
        return tuple(Content(None, x) for x in ids)
    texts = row.items("completions", as_text)
    if ids is not None:
        _same_length(row, "completion_tokens", len(ids), len(texts))
    return tuple(Content(text, None if ids is None else ids[k]) for k, text in enumerate(texts))


def _same_length(row: Row, name: str, length: int, expected: int) -> None:
    if length != expected:
        raise DataError(
            f"{row.place(name)}: must have one entry for each of {expected} completions; found {length}"
        )


def _rewards(row: Row, count: int) -> tuple[float, ...]:
    if _as_many(row, "reward", "rewards"):
        rewards = row.items("rewards", as_number)
        _same_length(row, "rewards", len(rewards), count)
        return rewards
    if count > 1:
        row.get("rewards")
    return (row.number("reward"),)


def _log_behaviour(row: Row, completions: tuple[Content, ...]) -> tuple[LogProbs, ...] | None:
    """One total or one list for each completion; a lone completion may leave the outer list out."""
    if "log_behaviour" not in row:
        return None
    value = row.get("log_behaviour")
    nested = _is_nested(value)
    if ("completion" in row or "completions" not in row) and len(completions) == 1 and not nested:
        found: tuple[LogProbs, ...] = (as_log_probs(value, row.place("log_behaviour")),)
    else:
        found = row.items("log_behaviour", as_log_probs)
    _same_length(row, "log_behaviour", len(found), len(completions))
    for k, (entry, completion) in enumerate(zip(found, completions, strict=True)):
        if (
            isinstance(entry, tuple)
            and completion.tokens is not None
            and len(entry) != len(completion.tokens)
        ):
            raise DataError(
                f"{row.place('log_behaviour', k if nested else None)}: must have one entry for each of "
                f"{len(completion.tokens)} tokens; found {len(entry)}"
            )
    return found


@dataclasses.dataclass(frozen=True)
class LoggedRecord:
    """Completions of one prompt with their rewards, as somebody drew them.

    Attributes:
      where: file and line.
      prompt: text, messages or token ids.
      completions: K of them.
      rewards: [K].
      log_behaviour: for each completion its log-probability under whatever drew it, in nats: one number for
        each token, or their total; None where it was not recorded.
    """

    FIELDS: ClassVar[tuple[str, ...]] = (
        *_PROMPT, "completions", "completion", "completion_tokens", "rewards", "reward", "log_behaviour"
    )  # fmt: skip
    where: str
    prompt: Content
    completions: tuple[Content, ...]
    rewards: tuple[float, ...]
    log_behaviour: tuple[LogProbs, ...] | None = None

    @classmethod
    def parse(cls, row: Row) -> LoggedRecord:
        """Check a row.

        Raises:
          DataError: naming file, line and field.
        """
        completions = _completions(row)
        return cls(
            row.where,
            row.prompt(),
            completions,
            _rewards(row, len(completions)),
            _log_behaviour(row, completions),
        )


@dataclasses.dataclass(frozen=True)
class ComparisonRecord:
    """Two completions of one prompt, the first preferred.

    Attributes:
      where: file and line.
      prompt: text, messages or token ids.
      chosen: the preferred one.
      rejected: the other.
      probability: that ``chosen`` is preferred, of a random rater.
    """

    FIELDS: ClassVar[tuple[str, ...]] = (
        *_PROMPT, "chosen", "rejected", "chosen_tokens", "rejected_tokens", "probability"
    )  # fmt: skip
    where: str
    prompt: Content
    chosen: Content
    rejected: Content
    probability: float = 1.0

    @classmethod
    def parse(cls, row: Row) -> ComparisonRecord:
        """Check a row.

        Raises:
          DataError: naming file, line and field.
        """
        prompt = row.prompt()
        chosen = row.content("chosen", "chosen_tokens")
        rejected = row.content("rejected", "rejected_tokens")
        probability = row.number("probability") if "probability" in row else 1.0
        if not 0.0 <= probability <= 1.0:
            raise DataError(f"{row.place('probability')}: must lie between 0 and 1; found {probability:g}")
        return cls(row.where, prompt, chosen, rejected, probability)


def _as_rank(value: Any, place: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(f"{place}: must be a rank, a whole number from 1 (the best); found {describe(value)}")
    as_number(value, place)
    return value


@dataclasses.dataclass(frozen=True)
class RankingRecord:
    """K >= 2 completions of one prompt, ordered.

    Attributes:
      where: file and line.
      prompt: text, messages or token ids.
      completions: K of them.
      ranks: 1 is the best, equal ranks are ties; [K].
    """

    FIELDS: ClassVar[tuple[str, ...]] = (*_PROMPT, "completions", "completion_tokens", "ranks")
    where: str
    prompt: Content
    completions: tuple[Content, ...]
    ranks: tuple[int, ...]

    @classmethod
    def parse(cls, row: Row) -> RankingRecord:
        """Check a row.

        Raises:
          DataError: naming file, line and field.
        """
        if "completion_tokens" not in row:
            as_list(row.get("completions"), row.place("completions"))
        completions = _completions(row)
        ranks = row.items("ranks", _as_rank)
        _same_length(row, "ranks", len(ranks), len(completions))
        if len(completions) < 2:
            raise DataError(
                f"{row.place('ranks')}: a ranking needs at least 2 completions; found {len(completions)}"
            )
        return cls(row.where, row.prompt(), completions, ranks)


def ranking_pairs(records: Iterable[RankingRecord]) -> list[ComparisonRecord]:
    """All pairs of different rank, the better one chosen; ties give no pair."""
    return [
        ComparisonRecord(record.where, record.prompt, better, worse)
        for record in records
        for better, i in zip(record.completions, record.ranks, strict=True)
        for worse, j in zip(record.completions, record.ranks, strict=True)
        if i < j
    ]


def grouped(records: Iterable[LoggedRecord]) -> list[LoggedRecord]:
    """Records of the same prompt joined into one, in the order of the file.

    Args:
      records: often with one completion each.

    Returns:
      One record for each prompt; behaviour log-probabilities are kept where all parts have them.

    Raises:
      DataError: if some records of a prompt have behaviour log-probabilities and others have not.
    """
    parts: dict[Content, list[LoggedRecord]] = {}
    for record in records:
        parts.setdefault(record.prompt, []).append(record)
    return [_joined(same) for same in parts.values()]


def _joined(same: list[LoggedRecord]) -> LoggedRecord:
    first = same[0]
    for record in same[1:]:
        if (record.log_behaviour is None) != (first.log_behaviour is None):
            with_it, without = (record, first) if first.log_behaviour is None else (first, record)
            raise DataError(
                f'{without.where}: missing field "log_behaviour", which {with_it.where} with the same prompt has'
            )
    return LoggedRecord(
        first.where,
        first.prompt,
        tuple(c for r in same for c in r.completions),
        tuple(x for r in same for x in r.rewards),
        None if first.log_behaviour is None else tuple(x for r in same for x in r.log_behaviour or ()),
    )
