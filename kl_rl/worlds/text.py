"""A text as a corpus of character ids: its alphabet, training and held-out blocks, windows and prompts."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["BadText", "Corpus", "load_text", "make_corpus"]

MAX_ALPHABET = 128
MIN_BYTES = 10_000
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BLOCKS = 100  # every tenth block is held out


class BadText(ValueError):
    """A text cannot be used; the message names the file and what to do."""


class Corpus(NamedTuple):
    """Characters as integers; token i is `alphabet[i]`, and V = len(alphabet) is the begin mark.

    Attributes:
      name: label for reports.
      alphabet: at most 128 characters, in code order; rarer ones were replaced.
      train: ids to learn from, int32 [N].
      held_out: ids never trained on, every tenth hundredth of the text, int32 [M].
      replaced: share of characters that were replaced.
    """

    name: str
    alphabet: str
    train: np.ndarray
    held_out: np.ndarray
    replaced: float

    @property
    def begin(self) -> int:
        """The begin mark, V."""
        return len(self.alphabet)

    @property
    def unigram_entropy(self) -> float:
        """Loss of the best memoryless model on the held-out text, nats per character (add-one counts)."""
        count = np.bincount(self.train, minlength=len(self.alphabet)) + 1.0
        return float(-np.log(count / count.sum())[self.held_out].mean())

    @property
    def fingerprint(self) -> str:
        """A hash of the characters, to tell whether a saved model belongs to this text."""
        digest = hashlib.sha256(self.alphabet.encode())
        for part in (self.train, self.held_out):
            digest.update(np.ascontiguousarray(part, np.int32).tobytes())
        return digest.hexdigest()[:16]

    def decode(self, ids: np.ndarray) -> str:
        """Characters of a row of ids; ids >= V (begin and return marks) vanish."""
        return "".join(self.alphabet[i] for i in np.asarray(ids).tolist() if i < len(self.alphabet))

    def starts(self, part: np.ndarray, length: int) -> np.ndarray:
        """Positions where a window of this length may begin: after white space, else anywhere; int32 [S].

        So the begin mark means "between two words", and a word at the start of a window is a whole word.
        """
        space = np.array([c.isspace() for c in self.alphabet])
        after = 1 + np.flatnonzero(space[part[: max(0, len(part) - length)]])
        if len(after) < len(part) // 100:
            after = np.arange(max(1, len(part) - length + 1))
        return after.astype(np.int32)

    def held_out_windows(self, count: int, length: int) -> np.ndarray:
        """Windows spread evenly over the held-out text; int32 [count, length]."""
        starts = self.starts(self.held_out, length)
        chosen = starts[np.linspace(0, len(starts) - 1, count).astype(int)]
        return self.held_out[chosen[:, None] + np.arange(length)]

    def prompts(self, count: int, length: int) -> np.ndarray:
        """The begin mark and `length` held-out characters; for count 0 one bare begin mark; int32 [P, L]."""
        if count == 0:
            return np.full((1, 1), self.begin, np.int32)
        real = self.held_out_windows(count, length)
        return np.concatenate([np.full((count, 1), self.begin, np.int32), real], axis=1)


def make_corpus(text: str, name: str) -> Corpus:
    """Turn a string into a corpus; line ends become newlines.

    Args:
      text: at least 10 000 characters.
      name: for messages and reports.

    Returns:
      The corpus.

    Raises:
      BadText: if the text is too small, or has fewer than two different characters.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if len(text) < MIN_BYTES:
        raise BadText(
            f"{name}: has {len(text)} characters; at least {MIN_BYTES} are needed to train a base model"
        )
    common = [c for c, _ in Counter(text).most_common()]
    if len(common) > MAX_ALPHABET:
        common = [c for c in common if c != _REPLACEMENT][: MAX_ALPHABET - 1] + [_REPLACEMENT]
    if len(common) < 2:
        raise BadText(f"{name}: repeats one single character; give a text to learn from")
    alphabet = "".join(sorted(common))
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    known = np.array([ord(c) for c in alphabet], np.uint32)
    ids = np.minimum(np.searchsorted(known, points), len(known) - 1)
    unknown = known[ids] != points
    ids = np.where(unknown, alphabet.find(_REPLACEMENT), ids).astype(np.int32)
    block = np.arange(len(ids)) * _BLOCKS // len(ids)
    held = block % 10 == 9
    return Corpus(name, alphabet, ids[~held], ids[held], float(unknown.mean()))


def load_text(path: str | Path | None = None) -> Corpus:
    """Read a text file, UTF-8; None: English prose that comes with Python (`pydoc_data.topics`).

    Args:
      path: the file, at least 10 kB.

    Returns:
      The corpus.

    Raises:
      BadText: for a file that is missing, empty, too small, or not text.
    """
    if path is None:
        return make_corpus(
            _standard_text(), "pydoc_data.topics, Python " + ".".join(map(str, sys.version_info[:2]))
        )
    name = str(path)
    data = _bytes(path, name)
    if not data.strip():
        raise BadText(f"{name}: is empty; give a text of at least {MIN_BYTES} bytes")
    if b"\0" in data:
        raise BadText(f"{name}: is a binary file (it holds zero bytes); give plain text in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadText(f"{name}: line {line}: not UTF-8 text; save the file as UTF-8") from None
    if len(data) < MIN_BYTES:
        raise BadText(f"{name}: has {len(data)} bytes; at least {MIN_BYTES} are needed to train a base model")
    return make_corpus(text, name)


def _bytes(path: str | Path, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise BadText(f"{name}: no such file; give a text file in UTF-8") from None
    except IsADirectoryError:
        raise BadText(f"{name}: is a directory; give one text file") from None
    except (OSError, ValueError) as error:
        raise BadText(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _standard_text() -> str:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise BadText(
            "this Python comes without pydoc_data.topics, the default text; name a text file instead"
        ) from None
    return "\n".join(topics.values())
