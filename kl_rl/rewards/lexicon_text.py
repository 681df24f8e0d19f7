"""Rewards on text: weighted words, or regular expressions.

A *word* is a maximal run of letters and apostrophes, without the apostrophes at its ends and, unless `case`
is set, in lower case. A word counts when the character that ends it is part of the completion: a word still
open at the end of the completion is NOT counted, since nobody knows what it would have become.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

__all__ = [
    "FINEST",
    "BadReward",
    "TextReward",
    "in_word",
    "normalized",
    "words_in",
]

# Totals are rounded to this when nothing coarser is asked for, so that equal scores are equal numbers.
FINEST = 1e-4


class BadReward(ValueError):
    """A reward file cannot be used; the message names the file, the line or field, and what to do."""


@dataclasses.dataclass(frozen=True)
class TextReward:
    """``r(y) = clip(sum of the weights of the words, or pattern matches, in y)``.

    Attributes:
      name: label for reports.
      words: words, as normalized by `case`, with their weights; empty for patterns.
      patterns: regular expressions with their weights; empty for words.
      case: whether upper and lower case differ.
      clip: the total is limited to [-clip, clip]; None: no limit.
      unit: totals are rounded to multiples of this.
      skipped: entries of the file that are not words (emoticons, phrases) or whose weight rounds to 0.
    """

    name: str
    words: tuple[tuple[str, float], ...] = ()
    patterns: tuple[tuple[str, float], ...] = ()
    case: bool = False
    clip: float | None = None
    unit: float = FINEST
    skipped: int = 0

    @property
    def summary(self) -> str:
        """How the file was understood, in a line."""
        kind, entries = ("patterns", self.patterns) if self.patterns else ("words", self.words)
        rounded = f", rounded to multiples of {self.unit:g}" if self.unit > FINEST else ""
        left = f"; {self.skipped:,} entries left out (no words, or a weight of 0)" if self.skipped else ""
        return f"{self.name}: {len(entries):,} {kind}{rounded}{left}; a word counts when something ends it"

    @functools.cached_property
    def _weight(self) -> dict[str, float]:
        return dict(self.words)

    def score(self, text: str, context: str = "") -> float:
        """Reward of one completion, on the host.

        Args:
          text: the completion.
          context: the prompt; a word may begin there, but must end inside the completion. Patterns do not
            see it.

        Returns:
          The reward.
        """
        if self.patterns:
            flags = 0 if self.case else re.IGNORECASE
            hits = [(w, re.finditer(p, text, flags)) for p, w in self.patterns]
            total = sum(w * sum(m.end() > m.start() for m in found) for w, found in hits)
        else:
            total = sum(self._weight.get(word, 0.0) for word in words_in(text, context, case=self.case))
        total = self.unit * round(total / self.unit)
        return total if self.clip is None else max(-self.clip, min(self.clip, total))


def in_word(character: str) -> bool:
    """Whether a character belongs to words: letters and apostrophes."""
    return character.isalpha() or character in "'\u2019"


def _fold(character: str, case: bool) -> str:
    if character == "\u2019":
        return "'"
    lower = character.lower()
    return character if case or len(lower) != 1 else lower


def normalized(word: str, case: bool) -> str:
    """A word without outer apostrophes and, unless `case`, in lower case where that is one letter."""
    return "".join(_fold(c, case) for c in word).strip("'")


def words_in(text: str, context: str = "", *, case: bool = False) -> list[str]:
    """Normalized words that end inside a text and before its last character.

    Args:
      text: the completion.
      context: what stands before it; a word may begin there.
      case: whether case is kept.

    Returns:
      The words in order.
    """
    whole, end, words = context + text, 0, []
    for inside, run in itertools.groupby(whole, in_word):
        letters = "".join(run)
        end += len(letters)
        if inside and len(context) <= end < len(whole):
            words.append(normalized(letters, case))
    return words
