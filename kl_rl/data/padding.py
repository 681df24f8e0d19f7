"""Ragged token sequences to the arrays of ``Trajectories``: prompts and completions padded on the right."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from kl_rl.core.trajectories import Trajectories
from kl_rl.data.errors import DataError

__all__ = ["PADDING", "Encoded", "Example", "Limits", "fitted", "padded_prompts", "stacked"]

PADDING = -1
"""What pads a prompt."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long sequences may be, in tokens; None: as long as the longest there is.

    Where ``prompt + completion <= context`` the arrays fit the context as they are; with ``context`` alone every
    single record fits, while the longest prompt and the longest completion may belong to different records.

    Attributes:
      prompt: L, to which prompts are padded.
      completion: T, to which completions are padded.
      context: prompt and completion together.
      vocab: ids must lie below; None: not checked.
      overflow: "raise", or "truncate": too long a prompt loses its beginning. Completions are never cut, since
        their reward is that of the whole.
    """

    prompt: int | None = None
    completion: int | None = None
    context: int | None = None
    vocab: int | None = None
    overflow: Literal["raise", "truncate"] = "raise"

    def __post_init__(self) -> None:
        """Refuse sizes below 1, and completions that fill the context.

        Raises:
          ValueError: naming the field.
        """
        for name in ("prompt", "completion", "context", "vocab"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Limits.{name} must be at least 1; got {value}")
        if self.context is not None and self.completion is not None and self.completion >= self.context:
            raise ValueError(
                f"Limits.completion = {self.completion} leaves no room for a prompt in a context of {self.context}"
            )
        if self.overflow not in ("raise", "truncate"):
            raise ValueError(f'Limits.overflow must be "raise" or "truncate"; got {self.overflow!r}')


class Encoded(NamedTuple):
    """Tokens of one completion; each [n].

    Attributes:
      tokens: ids.
      controlled: 1 for the policy's own, 0 for the environment's.
      log_behaviour: nats; 0 where it is not the policy's own.
    """

    tokens: Sequence[int]
    controlled: Sequence[float]
    log_behaviour: Sequence[float]


class Example(NamedTuple):
    """One prompt with its K completions, and their rewards, or what a rater said of them (rewards are then unknown)."""

    where: str
    prompt: Sequence[int]
    completions: Sequence[Encoded]
    rewards: Sequence[float] | None
    labels: Sequence[float] | None = None


def fitted(
    where: str, prompt: Sequence[int], longest: int, limits: Limits, *, keep: int = 0
) -> Sequence[int]:
    """The prompt, cut on the left if it must and may be, so that a completion of ``longest`` tokens fits behind it.

    Args:
      where: place of the record.
      prompt: ids.
      longest: tokens of the longest completion.
      limits: see ``Limits``.
      keep: ids at the very beginning that stay when it is cut (a begin token).

    Returns:
      ids.

    Raises:
      DataError: naming the record and what is too long.
    """
    if limits.vocab is not None and (high := max(prompt)) >= limits.vocab:
        raise DataError(
            f"{where}: the prompt has token id {high}, but the vocabulary has {limits.vocab} entries"
        )
    if limits.completion is not None and longest > limits.completion:
        raise DataError(
            f"{where}: a completion has {longest} tokens; the limit is {limits.completion}: raise it (--horizon) "
            "or drop the record"
        )
    if limits.context is not None and longest >= limits.context:
        raise DataError(
            f"{where}: a completion of {longest} tokens leaves no room for a prompt in a context of {limits.context}"
        )
    room = min(limits.prompt or len(prompt), (limits.context or len(prompt) + longest) - longest)
    if len(prompt) <= room:
        return prompt
    if limits.overflow == "truncate" and room > keep:
        return [*prompt[:keep], *prompt[len(prompt) - room + keep :]]
    raise DataError(
        f"{where}: the prompt has {len(prompt)} tokens where there is room for {room} "
        f"(context {limits.context}, longest completion {longest}): shorten it, raise the limit, or "
        "have it cut (Limits.overflow)"
    )


def padded_prompts(prompts: Sequence[Sequence[int]], length: int | None = None) -> np.ndarray:
    """Padded with -1 on the right to ``length``, or to the longest; int32 [P, L].

    Args:
      prompts: ids, each at most ``length`` long.
      length: L.

    Returns:
      int32 [P, L].

    Raises:
      ValueError: if one is longer.
    """
    longest = max(map(len, prompts))
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"a prompt of {longest} tokens does not fit a length of {length}")
    out = np.full((len(prompts), length), PADDING, np.int32)
    for row, prompt in zip(out, prompts, strict=True):
        row[: len(prompt)] = prompt
    return out


def stacked(examples: Sequence[Example], limits: Limits) -> Trajectories:
    """Examples with the same number of completions as arrays; what lies behind the mask is 0.

    Args:
      examples: P of them, within the limits.
      limits: gives L and T where they are not to follow the data.

    Returns:
      Trajectories of NumPy arrays: prompt int32 [P, L], tokens int32 [P, K, T], the rest float32; rewards that are not
      known are NaN.

    Raises:
      DataError: if there is nothing, or the numbers of completions differ.
    """
    if not examples:
        raise DataError("no record to encode")
    first = examples[0]
    count = len(first.completions)
    for example in examples:
        if len(example.completions) != count:
            raise DataError(
                f"{example.where}: {len(example.completions)} completions where {first.where} has {count}; "
                "every prompt needs the same number: join records of one prompt (grouped) or split them"
            )
    horizon = limits.completion or max(len(c.tokens) for e in examples for c in e.completions)
    shape = (len(examples), count, horizon)
    tokens, wide = np.zeros(shape, np.int32), np.zeros((3, *shape), np.float32)
    mask, controlled, log_behaviour = wide
    for p, example in enumerate(examples):
        for k, completion in enumerate(example.completions):
            size = len(completion.tokens)
            tokens[p, k, :size] = completion.tokens
            mask[p, k, :size] = 1.0
            controlled[p, k, :size] = completion.controlled
            log_behaviour[p, k, :size] = completion.log_behaviour
    prompt = padded_prompts([e.prompt for e in examples], limits.prompt)
    column = lambda rows: np.array(rows, np.float32)
    known = first.rewards is not None
    reward = column([e.rewards for e in examples]) if known else np.full(shape[:2], np.nan, np.float32)
    label = None if first.labels is None else column([e.labels for e in examples])
    arrays: tuple[Any, ...] = (prompt, tokens, mask, controlled, log_behaviour, reward, label)
    return Trajectories(*arrays)
