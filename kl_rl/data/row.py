"""One row of a data file: fields looked up by their known names, values checked, every complaint with its place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from kl_rl.data.errors import DataError

__all__ = [
    "ALIASES",
    "ROUNDING",
    "Content",
    "Message",
    "Row",
    "as_list",
    "as_log_prob",
    "as_log_probs",
    "as_message",
    "as_number",
    "as_text",
    "as_tokens",
    "describe",
]

ALIASES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("instruction", "question", "query"),
    "prompt_tokens": ("tokens",),
    "completion": ("response", "output"),
    "completions": ("responses", "outputs"),
    "reward": ("score",),
    "rewards": ("scores",),
    "log_behaviour": ("log_behavior", "logprobs"),
    "probability": ("preference_probability",),
    "ranks": ("ranking",),
    "return": ("return_to_go",),
}
"""Other names under which a field is often found; every field is also known by its own name."""

ROUNDING = 1e-6
"""A log-probability may exceed 0 by this many nats (rounding of whoever wrote it); it is then taken to be 0."""

_CANONICAL = {other: name for name, others in ALIASES.items() for other in others}
_LARGEST_ID = 2**31 - 1
_LARGEST_NUMBER = 1e30  # sums of squares of larger ones are infinite in float32


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


class Content(NamedTuple):
    """A prompt or a completion: text, a conversation, or token ids; ids win where both are given."""

    text: str | None = None
    tokens: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None


def describe(value: object) -> str:
    """What was found, for a message: the kind of value and its beginning."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return f"text {value!r:.60}"
    if isinstance(value, int | float):
        return f"number {value!r:.40}" if isinstance(value, float) or abs(value) < 10**30 else "a huge number"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, Mapping) else type(value).__name__


class Row:
    """A row with its place; ``null`` counts as absent.

    Args:
      where: "file: line 12".
      values: as read.
      fields: canonical names this kind of record knows.
      ignore: names that are passed over.
      rename: name in the file -> canonical name.

    Raises:
      DataError: for a name that is not known, or a field given under two names.
    """

    def __init__(
        self,
        where: str,
        values: Mapping[str, Any],
        fields: Collection[str],
        *,
        ignore: Collection[str] = (),
        rename: Mapping[str, str] | None = None,
    ):
        self.where = where
        self._fields = fields
        self._values: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        for name, value in values.items():
            if value is None or name in ignore:
                continue
            canonical = (rename or {}).get(name) or _CANONICAL.get(name, name)
            if canonical not in fields:
                raise self._unknown(name)
            if canonical in self._values:
                raise DataError(
                    f'{where}: fields "{self._names[canonical]}" and "{name}" are two names of the same thing; '
                    "keep one"
                )
            self._values[canonical], self._names[canonical] = value, name

    def _unknown(self, name: str) -> DataError:
        known = [f"{f} (or {', '.join(ALIASES[f])})" if f in ALIASES else f for f in self._fields]
        return DataError(
            f'{self.where}: unknown field "{name:.60}"; known fields: {", ".join(known)}; '
            "remove it, or name it among the fields to ignore or rename"
        )

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def place(self, name: str, index: int | None = None) -> str:
        """The place of a value, ``file: line 12: field "rewards"[3]``, with the name as the file has it."""
        return f'{self.where}: field "{self._names.get(name, name)}"' + (
            "" if index is None else f"[{index}]"
        )

    def get(self, name: str) -> Any:
        """The value.

        Raises:
          DataError: if the field is absent.
        """
        if name not in self._values:
            others = f" (or {', '.join(ALIASES[name])})" if name in ALIASES else ""
            found = ", ".join(self._names.values()) or "none"
            raise DataError(f'{self.where}: missing field "{name}"{others}; fields found: {found}')
        return self._values[name]

    def text(self, name: str) -> str:
        """A text that is not empty."""
        return as_text(self.get(name), self.place(name))

    def number(self, name: str) -> float:
        """A finite number."""
        return as_number(self.get(name), self.place(name))

    def items(self, name: str, check: Callable[[Any, str], Any]) -> tuple[Any, ...]:
        """A list that is not empty, each item checked.

        Raises:
          DataError: if it is not a list, is empty, or an item does not pass.
        """
        value = as_list(self.get(name), self.place(name))
        return tuple(check(item, self.place(name, i)) for i, item in enumerate(value))

    def content(self, name: str, tokens: str) -> Content:
        """Text under one name, or token ids under the other, or both."""
        ids = as_tokens(self.get(tokens), self.place(tokens)) if tokens in self else None
        return Content(self.text(name) if name in self or ids is None else None, ids)

    def prompt(self) -> Content:
        """The fields ``prompt``, ``messages`` and ``prompt_tokens``.

        Raises:
          DataError: if all are absent, or both text and messages are there.
        """
        if "messages" not in self:
            return self.content("prompt", "prompt_tokens")
        if "prompt" in self:
            raise DataError(
                f'{self.place("messages")}: there is a field "{self._names["prompt"]}" too; keep one'
            )
        messages = self.items("messages", as_message)
        ids = (
            as_tokens(self.get("prompt_tokens"), self.place("prompt_tokens"))
            if "prompt_tokens" in self
            else None
        )
        return Content(None, ids, messages)


def as_text(value: Any, place: str) -> str:
    """Text with something in it, that UTF-8 can hold."""
    if not isinstance(value, str):
        raise DataError(f"{place}: must be text; found {describe(value)}")
    if not value.strip():
        raise DataError(f"{place}: is empty; remove the record or give it text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: half of a surrogate pair at character {error.start + 1}; not Unicode text"
        ) from None
    return value


def as_number(value: Any, place: str) -> float:
    """A finite number that float32 can be computed with, as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{place}: must be a number; found {describe(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"{place}: must be a finite number; found {describe(value)}")
    if abs(number) > _LARGEST_NUMBER:
        raise DataError(f"{place}: must be at most {_LARGEST_NUMBER:g} in size; found {describe(value)}")
    return number


def as_list(value: Any, place: str) -> list[Any]:
    """A list with something in it."""
    if not isinstance(value, list | tuple):
        raise DataError(f"{place}: must be a list; found {describe(value)}")
    if not value:
        raise DataError(f"{place}: is an empty list")
    return list(value)


def as_tokens(value: Any, place: str) -> tuple[int, ...]:
    """Token ids, at least one."""
    ids = as_list(value, place)
    for i, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= _LARGEST_ID:
            raise DataError(f"{place}[{i}]: must be a token id, 0 or more; found {describe(token)}")
    return tuple(ids)


def as_log_prob(value: Any, place: str) -> float:
    """A log-probability in nats: at most 0."""
    number = as_number(value, place)
    if number > ROUNDING:
        raise DataError(f"{place}: must be a log-probability in nats, at most 0; found {describe(value)}")
    return min(number, 0.0)


def as_log_probs(value: Any, place: str) -> float | tuple[float, ...]:
    """One total, or one log-probability for each token."""
    if not isinstance(value, list | tuple):
        return as_log_prob(value, place)
    return tuple(as_log_prob(item, f"{place}[{i}]") for i, item in enumerate(as_list(value, place)))


def as_message(value: Any, place: str) -> Message:
    """An object with ``role`` and ``content``."""
    if not isinstance(value, Mapping):
        raise DataError(f'{place}: must be an object with "role" and "content"; found {describe(value)}')
    for name in Message._fields:
        if value.get(name) is None:
            raise DataError(f'{place}: missing field "{name}"')
    for name in value:
        if name not in Message._fields and value[name] is not None:
            raise DataError(f'{place}: unknown field "{name:.60}"; a message has role and content; remove it')
    return Message(as_text(value["role"], f"{place}.role"), as_text(value["content"], f"{place}.content"))
