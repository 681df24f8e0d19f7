"""Text, conversations and ids to token ids, with what is decided once for a data set.

The end token: a completion given as text is taken to have ended, and the tokenizer's first end id is put behind it
(``add_end``). Where log-probabilities are recorded token by token their number decides: one more than the text has
tokens, and the end token was drawn; just as many, and the completion had been cut off. Completions given as token
ids are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from kl_rl.core.trajectories import Trajectories
from kl_rl.data.errors import DataError, Skipped, pass_over
from kl_rl.data.padding import Encoded, Example, Limits, fitted, stacked
from kl_rl.data.records import LogProbs
from kl_rl.data.row import Content

__all__ = ["Encoder", "TextCodec"]


class TextCodec(Protocol):
    """What is needed of a tokenizer."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a completion; the first is the one to write."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""


class Encoder:
    """A tokenizer with what is decided once for a data set.

    Args:
      tokenizer: text to ids.
      limits: see ``kl_rl.data.Limits``.
      render: a conversation, ``[{"role": ..., "content": ...}, ...]``, to text with all special tokens (a chat
        template; ``tokenizer.apply_chat`` where there is one); needed for records with messages.
      add_end: put the end token behind completions given as text.
      begin: id put before every prompt but rendered conversations, or None.
      spread_totals: where only the total log-probability of a completion is recorded, give each token an equal part.
        Sums over a completion are then exact, ratios of single tokens are not.

    Raises:
      ValueError: if there is no end token to add.
    """

    def __init__(
        self,
        tokenizer: TextCodec,
        limits: Limits | None = None,
        *,
        render: Callable[[Sequence[Mapping[str, str]]], str] | None = None,
        add_end: bool = True,
        begin: int | None = None,
        spread_totals: bool = False,
    ):
        if add_end and not tokenizer.end_ids:
            raise ValueError("add_end=True needs a tokenizer with an end token; its end_ids are empty")
        self.tokenizer, self.limits, self._render = tokenizer, limits or Limits(), render
        self.end = tokenizer.end_ids[:1] if add_end else ()
        self.spread_totals = spread_totals
        self._begin = () if begin is None else (begin,)

    def prompt(self, where: str, content: Content | None) -> tuple[int, ...]:
        """Ids of a prompt, the begin id first.

        Raises:
          DataError: if there is nothing in it, or a conversation cannot be rendered.
        """
        if content is None and not self._begin:
            raise DataError(
                f'{where}: missing field "prompt", and there is no begin token to stand in its place'
            )
        if content is None:
            return self._begin
        begin = () if content.messages is not None and content.tokens is None else self._begin
        return begin + self.ids(where, "prompt", content)

    def ids(self, where: str, name: str, content: Content) -> tuple[int, ...]:
        """Ids of a text, a conversation, or ids.

        Raises:
          DataError: naming the record, if there are none.
        """
        if content.tokens is not None:
            return content.tokens
        text = content.text if content.messages is None else self._rendered(where, content)
        found = tuple(self.tokenizer.encode(text or ""))
        if not found:
            raise DataError(f'{where}: field "{name}" has no tokens')
        return found

    def _rendered(self, where: str, content: Content) -> str:
        if self._render is None:
            raise DataError(
                f'{where}: field "messages" needs a chat template and this tokenizer has none; give "prompt"'
            )
        try:
            return self._render([message._asdict() for message in content.messages or ()])
        except ValueError as error:
            raise DataError(f'{where}: field "messages" cannot be rendered: {error}') from None

    def completion(self, where: str, name: str, content: Content, recorded: LogProbs | None) -> Encoded:
        """Ids of a completion with its behaviour log-probabilities; see the module docstring for the end token."""
        ids = self.ids(where, name, content)
        end = self.end if content.tokens is None else ()
        if isinstance(recorded, tuple) and len(recorded) == len(ids):
            end = ()
        ids = ids + end
        if self.limits.vocab is not None and (high := max(ids)) >= self.limits.vocab:
            raise DataError(
                f"{where}: {name} has token id {high}, but the vocabulary has {self.limits.vocab} entries"
            )
        return Encoded(ids, (1.0,) * len(ids), self.per_token(where, name, recorded, len(ids)))

    def per_token(self, where: str, name: str, recorded: LogProbs | None, count: int) -> tuple[float, ...]:
        """One log-probability for each of ``count`` tokens: as recorded, a total in equal parts, or zeros.

        Raises:
          DataError: if their number differs, or there is a total for several tokens without ``spread_totals``.
        """
        if recorded is None:
            return (0.0,) * count
        if not isinstance(recorded, tuple):
            if count > 1 and not self.spread_totals:
                raise DataError(
                    f'{where}: field "log_behaviour" has a total for {name}, not one entry for each token; with '
                    "spread_totals=True each token gets an equal part (sums stay exact, ratios of single tokens do not)"
                )
            return (recorded / count,) * count
        if len(recorded) != count:
            raise DataError(
                f'{where}: field "log_behaviour" has {len(recorded)} entries for the {count} tokens of {name}, '
                "the end token included: another tokenizer? give the token ids it was recorded with"
            )
        return recorded

    def fit(self, where: str, prompt: Sequence[int], longest: int) -> Sequence[int]:
        """The prompt, cut to the limits if it may be; the begin id stays."""
        return fitted(where, prompt, longest, self.limits, keep=len(self._begin))

    def example(
        self,
        where: str,
        prompt: Sequence[int],
        completions: Sequence[Encoded],
        rewards: Sequence[float] | None,
        labels: Sequence[float] | None = None,
    ) -> Example:
        """An example within the limits."""
        longest = max(len(c.tokens) for c in completions)
        return Example(where, self.fit(where, prompt, longest), completions, rewards, labels)

    def stack(self, examples: Iterable[Callable[[], Example]], skipped: Skipped | None) -> Trajectories:
        """Run what makes the examples, passing over those that fail if there is a counter, and stack them."""
        kept = []
        for make in examples:
            try:
                kept.append(make())
            except DataError as error:
                pass_over(error, skipped)
        return stacked(kept, self.limits)
