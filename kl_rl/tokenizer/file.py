"""Tokenizers that came with a checkpoint: tokenizer.json through the tokenizers library, and its chat template."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from kl_rl.tokenizer.chat import render_chat

__all__ = ["FileTokenizer", "open_file_tokenizer", "read_object"]

TOKENIZER, CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"
GENERATION, MODEL = "generation_config.json", "config.json"
FILES = (TOKENIZER, CONFIG, SPECIAL, TEMPLATE, OLD_TEMPLATE, GENERATION, "added_tokens.json")
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class FileTokenizer:
    """A tokenizer.json and what lies beside it.

    Attributes:
      inner: of the tokenizers library.
      folder: where it was read from.
      end_ids: ids that end a text.
      begin_id: id that begins a text, or None.
      chat_template: Jinja source, or None.
      special: names of special tokens ("eos_token": "</s>", ...).
    """

    inner: tokenizers.Tokenizer
    folder: Path
    end_ids: tuple[int, ...]
    begin_id: int | None
    chat_template: str | None
    special: dict[str, str]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; special tokens that are written out in it are recognised.

        Args:
          text: any.
          add_special_tokens: as the tokenizer wraps a whole text (for many models, a begin mark).

        Returns:
          Ids.
        """
        return self.inner.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids.

        Args:
          ids: those below 0 are padding; those that the tokenizer does not know are nothing.
          skip_special_tokens: leave out special tokens.

        Returns:
          The text.
        """
        real = [i for i in map(int, ids) if i >= 0]
        return self.inner.decode(real, skip_special_tokens=skip_special_tokens)

    def apply_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """A conversation as one text, special tokens included: encode it without adding any.

        Args:
          messages: objects with ``role`` and ``content``.
          add_generation_prompt: end with the beginning of the assistant's turn.
          **variables: further names that the template reads (``enable_thinking``, ...).

        Returns:
          The text.

        Raises:
          ValueError: no chat template, or messages that it refuses.
        """
        if self.chat_template is None:
            raise ValueError(f"{self.folder}: this tokenizer has no chat template; give prompts as text")
        given = {**self.special, **variables, "add_generation_prompt": add_generation_prompt}
        return render_chat(self.chat_template, messages, where=str(self.folder), **given)

    def save(self, folder: str | Path) -> None:
        """Copy the files of the tokenizer.

        Args:
          folder: made if missing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.folder / name).is_file() and folder.resolve() != self.folder.resolve():
                shutil.copyfile(self.folder / name, folder / name)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no such file.

    Args:
      path: of the file.

    Returns:
      The object.

    Raises:
      ValueError: not JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        spec = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(spec, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return spec


def _open(path: Path) -> tokenizers.Tokenizer:
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(
            f"{path}: not a tokenizer that tokenizers {tokenizers.__version__} reads: {error}"
        ) from error
    inner.no_padding()
    inner.no_truncation()
    return inner


def _special(folder: Path) -> dict[str, str]:
    """Special tokens by name; a name is given as a string or as an object with ``content``."""
    spec = read_object(folder / SPECIAL) | read_object(folder / CONFIG)
    found = {name: spec[name] for name in NAMES if spec.get(name) is not None}
    return {name: v["content"] if isinstance(v, dict) else str(v) for name, v in found.items()}


def _template(folder: Path) -> str | None:
    """From its own file, else from tokenizer_config.json; of several the one called "default"."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text("utf-8")
    template = read_object(folder / OLD_TEMPLATE).get("chat_template") or read_object(folder / CONFIG).get(
        "chat_template"
    )
    if isinstance(template, list):
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder / CONFIG}: chat_template: must be a string or a list with a default one")
    return template


def _ids(folder: Path, name: str, inner: tokenizers.Tokenizer, token: str | None) -> tuple[int, ...]:
    """Ids from generation_config.json, else config.json, else of the special token; of several it comes first."""
    ident = None if token is None else inner.token_to_id(token)
    for file in (GENERATION, MODEL):
        value = read_object(folder / file).get(name)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(i, int) and i >= 0 for i in values):
                raise ValueError(f"{folder / file}: {name}: must be an id or a list of ids; got {value!r}")
            return tuple(sorted(values, key=lambda i: i != ident))
    return () if ident is None else (ident,)


def open_file_tokenizer(folder: Path) -> FileTokenizer:
    """Open the tokenizer of a folder.

    Args:
      folder: with tokenizer.json.

    Returns:
      The tokenizer.

    Raises:
      FileNotFoundError: no tokenizer.json.
      ValueError: a file that is damaged.
    """
    if not (folder / TOKENIZER).is_file():
        hint = "; convert tokenizer.model with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        raise FileNotFoundError(
            f"{folder / TOKENIZER}: missing" + (hint if (folder / "tokenizer.model").is_file() else "")
        )
    inner, special = _open(folder / TOKENIZER), _special(folder)
    ends = _ids(folder, "eos_token_id", inner, special.get("eos_token"))
    named = special.get("bos_token")
    begin = inner.token_to_id(named) if named is not None else None
    return FileTokenizer(inner, folder, ends, begin, _template(folder), special)
