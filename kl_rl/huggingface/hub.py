"""Names on the Hugging Face hub: files are downloaded, never run and never unpickled."""

from __future__ import annotations

import re
from pathlib import Path

from kl_rl.storage.disk import previous

__all__ = ["resolve"]

HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
EXTRA = "pip install 'kl-rl[hf]'"


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"{name}: no such folder; to download it from the Hugging Face hub: {EXTRA}"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise FileNotFoundError(
            f"{name}: no such folder, and the Hugging Face hub did not give it: {type(error).__name__}: {reason}"
        ) from error


def resolve(path: str | Path) -> Path:
    """A folder, or a name on the hub ("organization/model") if there is no such folder.

    Args:
      path: folder or name.

    Returns:
      A folder on this machine.

    Raises:
      FileNotFoundError: neither; the message says what was tried.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder}: a checkpoint is a folder with config.json and safetensors files")
    if (old := previous(folder.resolve())).is_dir():
        raise FileNotFoundError(f"{folder}: missing, but {old} is there: a save was cut short; rename it")
    if HUB_NAME.fullmatch(str(path)):
        return _download(str(path))
    raise FileNotFoundError(f"{folder}: no such folder")
