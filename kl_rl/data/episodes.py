"""Interleaved episodes: return, observation, action, return, observation, action, ...

One record is ``{"steps": [{"return": 3, "observation": "wall ahead", "action": "left"}, ...], "return": 3}``.
In a step, ``return`` (the return to go, a number) and ``observation`` may be absent; observation and action are text
or token ids, and ``log_behaviour`` is the log-probability of the action, in nats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from kl_rl.data.errors import DataError
from kl_rl.data.row import Content, Row, as_log_probs, as_text, as_tokens, describe

__all__ = ["EpisodeRecord", "Step"]

_STEP = ("return", "observation", "action", "log_behaviour")


class Step(NamedTuple):
    """One decision.

    Attributes:
      target: the return to go that the step is labelled with, or None.
      observation: what the environment said before the action, or None.
      action: what was done.
      log_behaviour: log-probability of the action's tokens, or their total, in nats; None if not recorded.
    """

    target: float | None
    observation: Content | None
    action: Content
    log_behaviour: float | tuple[float, ...] | None


def _as_part(row: Row, name: str) -> Content:
    """Text, ids, or a single id."""
    value = row.get(name)
    if isinstance(value, str):
        return Content(as_text(value, row.place(name)))
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list | tuple):
        raise DataError(f"{row.place(name)}: must be text or token ids; found {describe(value)}")
    return Content(None, as_tokens(value, row.place(name)))


def _as_step(value: Any, place: str) -> Step:
    if not isinstance(value, Mapping):
        raise DataError(f'{place}: must be an object with "action"; found {describe(value)}')
    row = Row(place, value, _STEP)
    recorded = None
    if "log_behaviour" in row:
        recorded = as_log_probs(row.get("log_behaviour"), row.place("log_behaviour"))
    action = _as_part(row, "action")
    if isinstance(recorded, tuple) and action.tokens is not None and len(recorded) != len(action.tokens):
        raise DataError(
            f"{row.place('log_behaviour')}: must have one entry for each of {len(action.tokens)} tokens; "
            f"found {len(recorded)}"
        )
    target = row.number("return") if "return" in row else None
    observation = _as_part(row, "observation") if "observation" in row else None
    return Step(target, observation, action, recorded)


@dataclasses.dataclass(frozen=True)
class EpisodeRecord:
    """A sequence of decisions with the return of the whole.

    Attributes:
      where: file and line.
      prompt: what precedes the first step, or None.
      steps: at least one.
      total: return of the episode; the first step's return to go where the record does not say.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("prompt", "messages", "prompt_tokens", "steps", "return")
    where: str
    prompt: Content | None
    steps: tuple[Step, ...]
    total: float

    @classmethod
    def parse(cls, row: Row) -> EpisodeRecord:
        """Check a row.

        Raises:
          DataError: naming file, line and field.
        """
        steps = row.items("steps", _as_step)
        prompt = row.prompt() if any(name in row for name in cls.FIELDS[:3]) else None
        first = steps[0].target
        total = row.number("return") if "return" in row or first is None else first
        return cls(row.where, prompt, steps, total)
