"""Prompts of a run: read, checked against the context, split into those trained on and those measured on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kl_rl.data import DataError, Encoder, Limits, PromptRecord, load_records
from kl_rl.data.row import Content
from kl_rl.huggingface.opened import Model, begin_of
from kl_rl.rewards.values import PromptText
from kl_rl.storage.errors import RunError
from kl_rl.tokenizer import Tokenizer

__all__ = ["Prompts", "Reader", "load_prompts", "order_of", "reader_of", "split_rows", "with_place"]

_LINE_END = re.compile(r"\r\n|\r|\n")  # not at form feeds and separators of Unicode, as str.splitlines


class Prompts(NamedTuple):
    """N prompts.

    Attributes:
      ids: padded on the right with -1; int32 [N, L].
      texts: as the reward sees them.
    """

    ids: np.ndarray
    texts: tuple[PromptText, ...]

    def take(self, index: np.ndarray) -> Prompts:
        """The prompts ``index``."""
        return Prompts(self.ids[index], tuple(self.texts[i] for i in index))


class Reader(NamedTuple):
    """What makes ids of texts, made once for a run.

    Attributes:
      tokenizer: of the base.
      encoder: of prompts and completions; a completion of ``horizon`` tokens fits behind every prompt.
      horizon: T.
      begin: the begin mark that the tokenizer puts before texts, or None.
      place: whether a return token takes the begin mark's place, or one that is made for it.
    """

    tokenizer: Tokenizer
    encoder: Encoder
    horizon: int
    begin: int | None
    place: bool

    def read(self, contents: Sequence[tuple[str, Content]]) -> Prompts:
        """Prompts, each with where it stands, as ids and as texts."""
        rows, conversations = [], []
        for where, content in contents:
            ids = self.encoder.fit(where, self.encoder.prompt(where, content), self.horizon)
            rows.append(self._placed(where, list(ids)))
            conversations.append(content.messages if content.tokens is None else None)
        width = max(map(len, rows))
        padded = np.array([row + [-1] * (width - len(row)) for row in rows], np.int32)
        return Prompts(padded, tuple(map(PromptText.of, map(self.tokenizer.decode, rows), conversations)))

    def _placed(self, where: str, ids: list[int]) -> list[int]:
        try:
            return with_place(ids, self.begin) if self.place else ids
        except RunError as error:
            raise DataError(f"{where}: {error}") from error


def with_place(ids: Sequence[int], begin: int | None) -> list[int]:
    """A prompt with a place for a return token in front: its begin mark, or -1 where the tokenizer has none.

    Raises:
      RunError: the prompt does not begin with the mark.
    """
    if begin is None:
        return [-1, *ids]
    if list(ids[:1]) != [begin]:
        raise RunError("return tokens replace the begin mark, and this prompt does not begin with it")
    return list(ids)


def reader_of(model: Model, horizon: int, *, place: bool) -> Reader:
    """What makes ids for a model.

    Args:
      model: tokenizer and context.
      horizon: T.
      place: whether prompts need a place for a return token.

    Returns:
      The reader.

    Raises:
      RunError: if no prompt can fit.
    """
    tokenizer, begin = model.tokenizer, begin_of(model.tokenizer)
    room = model.config.context - int(place and begin is None)
    if horizon >= room:
        raise RunError(
            f"--horizon {horizon} leaves no room for a prompt in a context of {model.config.context}"
        )
    encoder = Encoder(
        tokenizer,
        Limits(context=room, completion=horizon, vocab=model.config.vocab + model.config.extra),
        render=tokenizer.apply_chat if tokenizer.chat_template is not None else None,
        add_end=bool(tokenizer.end_ids),
        begin=begin,
    )
    return Reader(tokenizer, encoder, horizon, begin, place)


def load_prompts(file: str, length: int | None, count: int | None, reader: Reader) -> Prompts:
    """Read a file of prompts.

    Args:
      file: .txt: a prompt on each line, or with ``length`` pieces of so many tokens; else records.
      length: of the pieces.
      count: use at most this many, evenly spaced; None: all.
      reader: makes ids of them.

    Returns:
      The prompts.

    Raises:
      RunError, DataError: naming file, line and field.
    """
    if Path(file).suffix in (".txt", ".md"):
        contents = _text(file, length, reader.tokenizer)
    elif length is not None:
        raise RunError("--prompt-length cuts a .txt file; prompts of other files are taken as they are")
    else:
        try:
            contents = [(record.where, record.prompt) for record in load_records(file, PromptRecord).records]
        except OSError as error:
            raise RunError(f"{file}: cannot be read: {error.strerror or error}") from error
    return reader.read(_spread(contents, count))


def _spread(items: Sequence[tuple[str, Content]], count: int | None) -> list[tuple[str, Content]]:
    """At most ``count`` of the items, evenly spaced."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _text(name: str, length: int | None, tokenizer: Tokenizer) -> list[tuple[str, Content]]:
    """Lines that are not blank, or pieces of ``length`` tokens."""
    try:
        text = Path(name).expanduser().read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RunError(f"{name}: byte {error.start}: not UTF-8 text; save the file as UTF-8") from error
    except OSError as error:
        raise RunError(f"{name}: cannot be read: {error.strerror or error}") from error
    if length is None:
        lines = enumerate(_LINE_END.split(text), 1)
        found = [(f"{name}: line {number}", Content(text=line)) for number, line in lines if line.strip()]
    else:
        ids = tokenizer.encode(text)
        if len(ids) < length:
            raise RunError(f"{name}: has {len(ids)} tokens, less than one prompt of --prompt-length {length}")
        starts = range(0, len(ids) - length + 1, length)
        found = [(f"{name}: token {s + 1}", Content(tokens=tuple(ids[s : s + length]))) for s in starts]
    if not found:
        raise RunError(f"{name}: holds no prompt; write one on each line")
    return found


def split_rows(texts: Sequence[str], held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to measure on; of a few prompts, at most a quarter is held out.

    A prompt that occurs several times is held out, once, or trained on. A single prompt (up to three) is used for both,
    and so are all where none is to be held out.

    Args:
      texts: of the prompts.
      held_out: prompts wished for.
      seed: of the choice.

    Returns:
      Indices of rows, ascending.
    """
    first: dict[str, int] = {}
    for row, text in enumerate(texts):
        first.setdefault(text, row)
    rows, total = np.array(list(first.values())), len(first)
    order = np.argsort(np.random.Philox(np.random.SeedSequence([seed, 1])).random_raw(total), kind="stable")
    count = min(held_out, total // 4)
    if count == 0:
        return np.arange(len(texts)), np.sort(rows[order[: max(1, min(held_out, total))]])
    kept = {texts[row] for row in rows[order[:count]]}
    return np.array([i for i, text in enumerate(texts) if text not in kept]), np.sort(rows[order[:count]])


def order_of(prompts: Prompts, batch: int, seed: int) -> Callable[[int], np.ndarray]:
    """Which prompts step s uses: another permutation every epoch, a pure function of (seed, s).

    Args:
      prompts: N of them.
      batch: B; prompts repeat within a batch if N < B.
      seed: of the permutations.

    Returns:
      ``step -> index [B]``.
    """
    total = len(prompts.texts)

    def permutation(epoch: int) -> np.ndarray:
        raw = np.random.Philox(np.random.SeedSequence([seed, 2, epoch])).random_raw(total)
        return np.argsort(raw, kind="stable")

    def index(step: int) -> np.ndarray:
        places = np.arange(step * batch, (step + 1) * batch)
        orders = {e: permutation(e) for e in {int(p) // total for p in places}}
        return np.array([orders[int(p) // total][int(p) % total] for p in places])

    return index
