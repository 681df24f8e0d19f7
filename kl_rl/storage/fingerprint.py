"""What a run has read, in a form that tells whether it has changed."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

__all__ = ["fingerprint"]


def fingerprint(path: str | Path) -> dict[str, Any] | None:
    """Size and checksum of the ends of a file, or of each file of a checkpoint, to see changes; None: no such file."""
    path = Path(path).expanduser()
    if not path.exists() and path.suffix.startswith(".py:"):  # a function in a file
        path = path.with_suffix(".py")
    if path.is_dir():
        files = sorted([*path.glob("*.safetensors"), *path.glob("config.json"), *path.glob("tokenizer.json")])
        return {file.name: fingerprint(file) for file in files}
    if not path.is_file():
        return None
    size = path.stat().st_size
    with open(path, "rb") as file:
        total = zlib.crc32(file.read(2**20))
        file.seek(max(0, size - 2**20))
        return {"bytes": size, "crc32": zlib.crc32(file.read(), total)}
