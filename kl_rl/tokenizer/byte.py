"""Bytes as tokens: nothing to train, nothing to download, every text has an encoding."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["BYTE_MARKER", "ByteTokenizer"]

END, BEGIN = 256, 257
NAMES = {END: "<end>", BEGIN: "<begin>"}
BYTE_MARKER = {"kl_rl_tokenizer": "bytes"}
PRINTABLE = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}


def _alphabet() -> dict[str, int]:
    """The character by which byte-level tokenizers write each byte (Radford et al. 2019)."""
    others = iter(range(256, 512))
    return {chr(byte if byte in PRINTABLE else next(others)): byte for byte in range(256)}


def _special(ident: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": ident, "content": NAMES[ident], **flags}


def _tokenizer_json() -> dict[str, Any]:
    """A byte-level BPE without merges, in the format of the tokenizers library."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    wrap = {"SpecialToken": {"id": NAMES[BEGIN], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    begin = {NAMES[BEGIN]: {"id": NAMES[BEGIN], "ids": [BEGIN], "tokens": [NAMES[BEGIN]]}}
    model = {"type": "BPE", "vocab": _alphabet() | {name: i for i, name in NAMES.items()}, "merges": []}
    none: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer"))
    return {
        "version": "1.0",
        **none,
        "added_tokens": [_special(END), _special(BEGIN)],
        "pre_tokenizer": level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": list(wrap),
            "pair": [*wrap, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": begin,
        },
        "decoder": level,
        "model": model,
    }


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes are ids 0..255; 256 ends a text; 257 begins one and is never emitted.

    A model for it has ``vocab = 257`` and at least one input-only id (``DecoderConfig.extra``), the begin mark. The
    encoding of a text never holds 256 or 257, whatever the text says.
    """

    @property
    def vocab_size(self) -> int:
        """Ids that a model emits: bytes and the end."""
        return END + 1

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The end."""
        return (END,)

    @property
    def begin_id(self) -> int:
        """The begin mark, an input-only id."""
        return BEGIN

    @property
    def chat_template(self) -> None:
        """There is none."""
        return None

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Bytes of a text.

        Args:
          text: any.
          add_special_tokens: with the begin mark before it.

        Returns:
          Ids.
        """
        return [BEGIN] * add_special_tokens + list(text.encode("utf-8", errors="surrogatepass"))

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD.

        Args:
          ids: those below 0 are padding; those above 257 are nothing.
          skip_special_tokens: leave out begin and end; else they are written ``<begin>`` and ``<end>``.

        Returns:
          The text.
        """
        marks = {} if skip_special_tokens else {i: name.encode() for i, name in NAMES.items()}
        parts = (bytes([i]) if 0 <= i < 256 else marks.get(i, b"") for i in map(int, ids))
        return b"".join(parts).decode("utf-8", errors="replace")

    def apply_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Refused: bytes have no chat template.

        Raises:
          ValueError: always.
        """
        raise ValueError("the byte tokenizer has no chat template; give prompts as text")

    def save(self, folder: str | Path) -> None:
        """Write a tokenizer.json that the tokenizers library and transformers open, and a mark to know it by.

        Args:
          folder: made if missing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": NAMES[BEGIN],
            "eos_token": NAMES[END],
        }
        config |= {"clean_up_tokenization_spaces": False, **BYTE_MARKER}
        ends = {"bos_token_id": BEGIN, "eos_token_id": END, "suppress_tokens": [BEGIN]}
        parts = {
            "tokenizer.json": _tokenizer_json(),
            "tokenizer_config.json": config,
            "generation_config.json": ends,
        }
        for name, content in parts.items():
            (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
