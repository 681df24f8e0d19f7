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
from kl_rl.runs.returns import with_place
from kl_rl.runs.settings import Settings
from kl_rl.storage.errors import TrainingError

__all__ = ["Prompts", "encoded", "encoder_of", "load_prompts", "order_of", "split_rows"]


_LINE_END = re.compile(r"\r\n|\r|\n")  # not at form feeds and separators of Unicode, as str.splitlines


class Prompts(NamedTuple):
    """N prompts.

    Attributes:
      ids: padded with -1 on the right; where there are return tokens, column 0 is their place; int32 [N, L].
      texts: as the reward function sees them.
    """

    ids: np.ndarray
    texts: tuple[PromptText, ...]

    def take(self, index: np.ndarray) -> Prompts:
        """The prompts ``index``."""
        return Prompts(self.ids[index], tuple(self.texts[i] for i in index))


def encoder_of(settings: Settings, model: Model, *, completions: bool = False) -> Encoder:
    """What makes token ids of records, so that a completion of ``--horizon`` tokens fits behind every prompt.

    Args:
      settings: of the run.
      model: its tokenizer and context.
      completions: an end token is put behind completions, where the tokenizer has one.

    Returns:
      The encoder.

    Raises:
      TrainingError: nothing would fit.
    """
    tokenizer, begin, horizon = model.tokenizer, begin_of(model.tokenizer), settings.sizes.horizon
    room = model.config.context - int(begin is None and model.first_token >= 0)
    if horizon >= room:
        raise TrainingError(
            f"--horizon {horizon} leaves no room for a prompt in a context of {model.config.context}"
        )
    return Encoder(
        tokenizer,
        Limits(context=room, completion=horizon, vocab=model.config.vocab + model.config.extra),
        render=tokenizer.apply_chat if tokenizer.chat_template is not None else None,
        add_end=completions and bool(tokenizer.end_ids),
        begin=begin,
    )


def encoded(settings: Settings, model: Model, contents: Sequence[tuple[str, Content]]) -> Prompts:
    """Prompts as ids, with a place for a return token if there are any, and as texts.

    Args:
      settings: of the run.
      model: its tokenizer and context.
      contents: where each is from, and what it is.

    Returns:
      The prompts.

    Raises:
      TrainingError, DataError: naming the prompt that does not fit.
    """
    encoder, begin = encoder_of(settings, model), begin_of(model.tokenizer)
    rows, conversations = [], []
    for where, content in contents:
        ids = encoder.fit(where, encoder.prompt(where, content), settings.sizes.horizon)
        try:
            rows.append(list(ids) if model.first_token < 0 else with_place(ids, begin))
        except TrainingError as error:
            raise DataError(f"{where}: {error}") from error
        conversations.append(content.messages if content.tokens is None else None)
    width = max(map(len, rows))
    padded = np.array([row + [-1] * (width - len(row)) for row in rows], np.int32)
    texts = map(PromptText.of, map(model.tokenizer.decode, rows), conversations)
    return Prompts(padded, tuple(texts))


def load_prompts(settings: Settings, model: Model) -> Prompts:
    """Read a file of prompts.

    Args:
      settings: of the run; .jsonl, .parquet (field ``prompt``, ``messages`` or ``prompt_tokens``), or .txt.
      model: its tokenizer and context.

    Returns:
      The prompts.

    Raises:
      TrainingError, DataError: naming file, line and field, or the prompt that does not fit the context.
    """
    encoder_of(settings, model)  # before anything is read
    return encoded(settings, model, _spread(_contents(settings, model), settings.task.num_prompts))


def _spread(items: Sequence[tuple[str, Content]], count: int | None) -> list[tuple[str, Content]]:
    """At most ``count`` of the items, evenly spaced."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _contents(settings: Settings, model: Model) -> list[tuple[str, Content]]:
    task = settings.task
    assert task.prompts is not None
    if Path(task.prompts).suffix in (".txt", ".md"):
        return _text(task.prompts, task.prompt_length, model)
    if task.prompt_length is not None:
        raise TrainingError("--prompt-length cuts a .txt file; prompts of other files are taken as they are")
    try:
        records = load_records(task.prompts, PromptRecord).records
    except OSError as error:
        raise TrainingError(f"{task.prompts}: cannot be read: {error.strerror or error}") from error
    return [(record.where, record.prompt) for record in records]


def _text(name: str, length: int | None, model: Model) -> list[tuple[str, Content]]:
    """Lines that are not blank, or pieces of ``length`` tokens."""
    try:
        text = Path(name).expanduser().read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TrainingError(f"{name}: byte {error.start}: not UTF-8 text; save the file as UTF-8") from error
    except OSError as error:
        raise TrainingError(f"{name}: cannot be read: {error.strerror or error}") from error
    if length is None:
        lines = enumerate(_LINE_END.split(text), 1)
        found = [(f"{name}: line {number}", Content(text=line)) for number, line in lines if line.strip()]
    else:
        ids = model.tokenizer.encode(text)
        if len(ids) < length:
            raise TrainingError(
                f"{name}: has {len(ids)} tokens, less than one prompt of --prompt-length {length}"
            )
        starts = range(0, len(ids) - length + 1, length)
        found = [(f"{name}: token {s + 1}", Content(tokens=tuple(ids[s : s + length]))) for s in starts]
    if not found:
        raise TrainingError(f"{name}: holds no prompt; write one on each line")
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
