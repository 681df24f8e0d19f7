"""What the commands and the data readers ask of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Tokenizer"]


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
      vocab_size: one more than the largest id that a model is to emit.
      end_ids: ids that end a text.
      begin_id: id that begins a text; None: texts begin with nothing.
      chat_template: Jinja source; None: there is none.
    """

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that a model is to emit."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a text."""

    @property
    def begin_id(self) -> int | None:
        """Id that begins a text."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; with ``add_special_tokens`` as the tokenizer wraps a whole text (begin mark)."""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; ids below 0 are padding."""

    def apply_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """A conversation as one text, special tokens included: to be encoded without adding any."""

    def save(self, folder: str | Path) -> None:
        """Write the files that ``load_tokenizer`` and transformers open."""
