"""Records to arrays: every kind of record becomes prompts or ``Trajectories``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from kl_rl.core.trajectories import Trajectories
from kl_rl.data.encoder import Encoder
from kl_rl.data.episodes import EpisodeRecord, Step
from kl_rl.data.errors import DataError, Skipped, pass_over
from kl_rl.data.padding import Encoded, Example, padded_prompts
from kl_rl.data.records import ComparisonRecord, LoggedRecord, PromptRecord, RankingRecord
from kl_rl.data.row import Content

__all__ = ["encode_comparisons", "encode_episodes", "encode_logged", "encode_prompts", "encode_rankings"]

EncodeReturn = Callable[[float], Sequence[int]]


def encode_prompts(
    records: Iterable[PromptRecord], encoder: Encoder, *, skipped: Skipped | None = None
) -> np.ndarray:
    """Prompts, padded with -1 on the right; with a context limit, ``limits.completion`` tokens of it are kept free.

    Args:
      records: P of them.
      encoder: tokenizer and limits.
      skipped: counts records that do not fit, which are then passed over; None: they raise.

    Returns:
      int32 [P, L].

    Raises:
      DataError: naming the record.
    """
    limits, kept = encoder.limits, []
    for record in records:
        try:
            ids = encoder.prompt(record.where, record.prompt)
            kept.append(encoder.fit(record.where, ids, limits.completion or 0))
        except DataError as error:
            pass_over(error, skipped)
    if not kept:
        raise DataError("no prompt to encode")
    return padded_prompts(kept, limits.prompt)


def encode_logged(
    records: Iterable[LoggedRecord],
    encoder: Encoder,
    *,
    assume_base: bool = False,
    skipped: Skipped | None = None,
) -> Trajectories:
    """Logged completions with rewards and behaviour log-probabilities.

    Args:
      records: P of them, each with the same number of completions; see ``grouped``.
      encoder: tokenizer and limits.
      assume_base: the completions were drawn from the base policy and no record says how likely they were:
        ``log_behaviour`` is 0 and the caller fills it, ``batch._replace(log_behaviour=score(base, batch))``.
      skipped: counts records that do not fit, which are then passed over; None: they raise.

    Returns:
      Trajectories of NumPy arrays, all tokens controlled.

    Raises:
      DataError: naming the record; also if log-probabilities are missing, or there although ``assume_base``.
    """
    return encoder.stack((partial(_logged, encoder, record, assume_base) for record in records), skipped)


def _check_recorded(where: str, recorded: bool, assume_base: bool) -> None:
    if recorded and assume_base:
        raise DataError(
            f'{where}: field "log_behaviour" is there although assume_base=True says nothing is recorded; '
            "leave assume_base out, or ignore the field when reading"
        )
    if not recorded and not assume_base:
        raise DataError(
            f'{where}: missing field "log_behaviour": off-policy methods need the log-probability of each token under '
            "whatever drew it; if that was the base model, pass assume_base=True and score the batch with it"
        )


def _logged(encoder: Encoder, record: LoggedRecord, assume_base: bool) -> Example:
    _check_recorded(record.where, record.log_behaviour is not None, assume_base)
    recorded = record.log_behaviour or (None,) * len(record.completions)
    completions = [
        encoder.completion(record.where, f"completion {k + 1}", content, entry)
        for k, (content, entry) in enumerate(zip(record.completions, recorded, strict=True))
    ]
    return encoder.example(
        record.where, encoder.prompt(record.where, record.prompt), completions, record.rewards
    )


def encode_comparisons(
    records: Iterable[ComparisonRecord], encoder: Encoder, *, skipped: Skipped | None = None
) -> Trajectories:
    """Comparisons: K = 2, the chosen completion first, label 1 and 0 (its probability p and 1 - p where given).

    ``log_behaviour`` is 0: comparisons do not say how likely their completions were, and preference objectives do
    not ask. Methods that read only which label is larger take a p below 1/2 as the other one preferred.

    Args:
      records: P of them.
      encoder: tokenizer and limits.
      skipped: counts records that do not fit, which are then passed over; None: they raise.

    Returns:
      Trajectories of NumPy arrays, [P, 2, ...].

    Raises:
      DataError: naming the record.
    """

    def make(record: ComparisonRecord) -> Example:
        both = (record.chosen, record.rejected)
        labels = (record.probability, 1.0 - record.probability)
        return _labelled(encoder, record.where, record.prompt, both, ("chosen", "rejected"), labels)

    return encoder.stack((partial(make, record) for record in records), skipped)


def encode_rankings(
    records: Iterable[RankingRecord], encoder: Encoder, *, skipped: Skipped | None = None
) -> Trajectories:
    """Rankings K-wise: the label is minus the rank, so that larger is better; ``log_behaviour`` is 0.

    For pairs, ``encode_comparisons(ranking_pairs(records), encoder)``.

    Args:
      records: P of them, each with the same number of completions.
      encoder: tokenizer and limits.
      skipped: counts records that do not fit, which are then passed over; None: they raise.

    Returns:
      Trajectories of NumPy arrays, [P, K, ...].

    Raises:
      DataError: naming the record.
    """

    def make(record: RankingRecord) -> Example:
        names = [f"completion {k + 1}" for k in range(len(record.completions))]
        labels = [-float(rank) for rank in record.ranks]
        return _labelled(encoder, record.where, record.prompt, record.completions, names, labels)

    return encoder.stack((partial(make, record) for record in records), skipped)


def _labelled(
    encoder: Encoder,
    where: str,
    prompt: Content,
    contents: Sequence[Content],
    names: Sequence[str],
    labels: Sequence[float],
) -> Example:
    completions = [encoder.completion(where, n, c, None) for n, c in zip(names, contents, strict=True)]
    return encoder.example(where, encoder.prompt(where, prompt), completions, None, labels)


def encode_episodes(
    records: Iterable[EpisodeRecord],
    encoder: Encoder,
    *,
    encode_return: EncodeReturn | None = None,
    assume_base: bool = False,
    skipped: Skipped | None = None,
) -> Trajectories:
    """Episodes: K = 1, tokens return, observation, action, return, observation, action, ...

    Actions are controlled; returns and observations are the environment's (``controlled`` 0). Nothing is put
    between the parts, and no end token behind them.

    Args:
      records: P of them; one without a prompt needs an encoder with a begin id.
      encoder: tokenizer and limits.
      encode_return: token ids of a return to go; None: those of its shortest decimal form, "3" or "0.5".
      assume_base: as for ``encode_logged``.
      skipped: counts records that do not fit, which are then passed over; None: they raise.

    Returns:
      Trajectories of NumPy arrays, [P, 1, ...], with the episode's return as reward.

    Raises:
      DataError: naming the record; also if the log-probability of an action is missing, or there although
        ``assume_base``.
    """
    returns = encode_return or (lambda value: encoder.tokenizer.encode(_written(value)))
    return encoder.stack(
        (partial(_episode, encoder, record, returns, assume_base) for record in records), skipped
    )


def _written(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def _episode(encoder: Encoder, record: EpisodeRecord, returns: EncodeReturn, assume_base: bool) -> Example:
    parts = [
        part
        for i, step in enumerate(record.steps)
        for part in _step(encoder, f'{record.where}: field "steps"[{i}]', step, returns, assume_base)
    ]
    joined = Encoded(*(tuple(x for values in column for x in values) for column in zip(*parts, strict=True)))
    if encoder.limits.vocab is not None and (high := max(joined.tokens)) >= encoder.limits.vocab:
        raise DataError(
            f"{record.where}: the episode has token id {high}, but the vocabulary has {encoder.limits.vocab} entries"
        )
    return encoder.example(
        record.where, encoder.prompt(record.where, record.prompt), [joined], [record.total]
    )


def _step(
    encoder: Encoder, where: str, step: Step, returns: EncodeReturn, assume_base: bool
) -> list[Encoded]:
    _check_recorded(where, step.log_behaviour is not None, assume_base)
    given = [] if step.target is None else [tuple(returns(step.target))]
    if step.observation is not None:
        given.append(encoder.ids(where, "observation", step.observation))
    action = encoder.ids(where, "action", step.action)
    log_probs = encoder.per_token(where, "action", step.log_behaviour, len(action))
    return [
        *(Encoded(ids, (0.0,) * len(ids), (0.0,) * len(ids)) for ids in given),
        Encoded(action, (1.0,) * len(action), log_probs),
    ]
