"""Opening the tokenizer of a folder, and checking that it fits a model."""

from __future__ import annotations

from pathlib import Path

from kl_rl.models.config import DecoderConfig
from kl_rl.tokenizer.byte import BYTE_MARKER, ByteTokenizer
from kl_rl.tokenizer.file import CONFIG, open_file_tokenizer, read_object
from kl_rl.tokenizer.protocol import Tokenizer

__all__ = ["check_vocabulary", "load_tokenizer"]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder: the byte tokenizer if it says so, else tokenizer.json.

    Args:
      folder: with tokenizer.json.

    Returns:
      The tokenizer.

    Raises:
      FileNotFoundError: no folder or no tokenizer.json.
      ValueError: a file that is damaged.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if BYTE_MARKER.items() <= read_object(folder / CONFIG).items():
        return ByteTokenizer()
    return open_file_tokenizer(folder)


def check_vocabulary(tokenizer: Tokenizer, config: DecoderConfig, where: str | Path) -> None:
    """Refuse a tokenizer with ids that a model cannot read, or an end that it cannot emit.

    An embedding with more rows than the tokenizer has ids is fine (many are padded).

    Args:
      tokenizer: to be used with the model.
      config: of the model.
      where: what to name in messages.

    Raises:
      ValueError: they do not fit.
    """
    begin = -1 if tokenizer.begin_id is None else tokenizer.begin_id
    needed, rows = max(tokenizer.vocab_size, begin + 1), config.vocab + config.extra
    if needed > rows:
        raise ValueError(
            f"{where}: the tokenizer has ids up to {needed - 1}, but the model's embedding has {rows} rows; "
            "take the tokenizer that the model was trained with"
        )
    for end in tokenizer.end_ids:
        if end >= config.vocab:
            raise ValueError(
                f"{where}: the tokenizer ends texts with id {end}; the model emits 0..{config.vocab - 1}"
            )
