"""What every reward is made of: prompts as rewards see them, and values asked for one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

__all__ = ["PromptText", "Values", "one_by_one"]


class PromptText(str):
    """A prompt as rewards see it: a string, without special tokens.

    Attributes:
      messages: ``({"role": ..., "content": ...}, ...)`` if the prompt was given as a conversation, else None.
    """

    messages: tuple[dict[str, str], ...] | None = None

    @classmethod
    def of(cls, text: str, messages: Iterable[Any] | None) -> PromptText:
        """A text, with the conversation that it renders (named tuples of role and content)."""
        made = cls(text)
        made.messages = None if messages is None else tuple(message._asdict() for message in messages)
        return made


Values = Callable[[Sequence[str], Sequence[str]], Iterable[Any]]


def one_by_one(function: Callable[[str, str], Any]) -> Values:
    """A function of one prompt and one completion, called for each when its value is asked for."""

    def values(prompts: Sequence[str], completions: Sequence[str]) -> Iterator[Any]:
        for pair in zip(prompts, completions, strict=True):
            try:
                yield function(*pair)
            except Exception as error:  # of the user's function
                yield error
            except SystemExit as error:
                yield RuntimeError(f"it called sys.exit({error.code!r})")

    return values
