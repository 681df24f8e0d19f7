"""Rewards on text: weighted words, compiled to an automaton that runs inside ``jit``, or regular expressions.

A *word* is a maximal run of letters and apostrophes, without the apostrophes at its ends and, unless `case`
is set, in lower case. A word counts when the character that ends it is part of the completion: a word still
open at the end of the completion is NOT counted, since nobody knows what it would have become.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.exact.automaton import Automaton, automaton_reward

__all__ = [
    "FINEST",
    "BadReward",
    "LexiconScorer",
    "PatternScorer",
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

    def compile(self, alphabet: str) -> LexiconScorer | PatternScorer:
        """The reward as a jittable function of token ids: ``(prompt, tokens, mask) -> reward``.

        Args:
          alphabet: character i is token i.

        Returns:
          A pytree; pass it as an argument of ``jit``. A word list runs as an automaton; patterns call back to
          the host.

        Raises:
          BadReward: if no word of the list can be spelled with the alphabet.
        """
        if self.patterns:
            return PatternScorer(self, alphabet)
        return LexiconScorer(_automaton(self, alphabet), self.unit, self.clip)


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


def _automaton(reward: TextReward, alphabet: str) -> Automaton:
    """A trie with word boundaries: state 0 is "between words", 1 "in a word that is not listed".

    A weight is collected on the transition that ends the word. After a listed word, apostrophes lead to one
    state for each distinct weight, from which a letter leads to state 1.
    """
    ids: dict[str, list[int]] = {}
    for i, c in enumerate(alphabet):
        if in_word(c):
            ids.setdefault(_fold(c, reward.case), []).append(i)
    weight = {word: w for word, w in reward.words if set(word) <= set(ids)}
    if not weight:
        raise BadReward(
            f"{reward.name}: none of its {len(reward.words)} words can be spelled with the characters of the "
            "text; use a word list in the language of the text"
        )
    prefixes = sorted({word[:n] for word in weight for n in range(1, len(word) + 1)})
    quoted = {w: 2 + i for i, w in enumerate(sorted(set(weight.values())))}
    node = {prefix: 2 + len(quoted) + i for i, prefix in enumerate(prefixes)}
    gain = np.zeros(2 + len(quoted) + len(node))
    following = np.ones((len(gain), len(alphabet)), np.int32)
    outside = np.array([not in_word(c) for c in alphabet])
    apostrophe = ids.get("'", [])
    following[:, outside] = 0
    following[0, apostrophe] = 0
    for w, state in quoted.items():
        gain[state] = w
        following[state, apostrophe] = state
    for prefix, state in node.items():
        gain[state] = weight.get(prefix.rstrip("'"), 0.0)
        if prefix.rstrip("'") in weight:
            following[state, apostrophe] = quoted[gain[state]]
    for prefix, state in node.items():  # after the line above: an apostrophe inside a listed word wins
        following[node.get(prefix[:-1], 0), ids[prefix[-1]]] = state
    table = np.where(outside[None, :], gain[:, None], 0.0)
    return Automaton(
        jnp.zeros((), jnp.int32), jnp.asarray(following), jnp.asarray(table, jnp.result_type(float))
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LexiconScorer:
    """A word list over an alphabet: runs inside ``jit`` without leaving the device.

    Attributes:
      automaton: over the characters; Q states.
      unit: totals are rounded to multiples of this; static.
      clip: limit of the total, or None; static.
    """

    automaton: Automaton
    unit: float = dataclasses.field(metadata={"static": True})
    clip: float | None = dataclasses.field(metadata={"static": True})

    def __call__(self, prompt: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Rewards; prompt [..., L], tokens [..., T], mask [..., T] -> [...]."""
        total = automaton_reward(self.automaton, prompt, tokens, mask)
        total = self.unit * jnp.round(total / self.unit)
        return total if self.clip is None else jnp.clip(total, -self.clip, self.clip)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PatternScorer:
    """Regular expressions over an alphabet: a callback, so every batch costs a round trip to the host.

    Attributes:
      reward: static.
      alphabet: static.
    """

    reward: TextReward = dataclasses.field(metadata={"static": True})
    alphabet: str = dataclasses.field(metadata={"static": True})

    def __call__(self, prompt: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Rewards; prompt [..., L] (not read), tokens [..., T], mask [..., T] -> [...]."""
        dtype = jnp.result_type(float)

        def host(tokens: Any, mask: Any) -> np.ndarray:
            rows, live = np.asarray(tokens), np.asarray(mask) > 0
            shape = rows.shape[:-1]
            rows, live = rows.reshape(-1, rows.shape[-1]), live.reshape(-1, rows.shape[-1])
            texts = (
                "".join(self.alphabet[i] for i in row[keep]) for row, keep in zip(rows, live, strict=True)
            )
            return np.array([self.reward.score(text) for text in texts], dtype).reshape(shape)

        shape = jax.ShapeDtypeStruct(tokens.shape[:-1], dtype)
        return jax.pure_callback(host, shape, tokens, mask, vmap_method="broadcast_all")
