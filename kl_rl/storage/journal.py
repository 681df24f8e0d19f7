"""JSON-lines files that a resumed run cuts back to where its checkpoint was, so that they end up the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from kl_rl.sharding.processes import is_first
from kl_rl.storage.folder import clean

__all__ = ["Journal", "open_journal"]


class Journal:
    """Files that only grow.

    Args:
      folder: of the run.
      offsets: bytes to keep of each file, which is cut there; a file that is not named is emptied.
      names: of the files.
    """

    def __init__(self, folder: Path, names: tuple[str, ...], offsets: Mapping[str, int] | None = None):
        self._files: dict[str, IO[bytes]] = {}
        self.shortened: list[str] = []
        for name in names:
            file = open(folder / name, "ab")
            kept = (offsets or {}).get(name, 0)
            if file.tell() < kept:
                self.shortened.append(name)
                kept = (folder / name).read_bytes().rfind(b"\n") + 1
            file.truncate(kept)
            file.seek(0, os.SEEK_END)
            self._files[name] = file

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a row; it survives the death of the process, but not of the machine, until ``sync``."""
        self._files[name].write((json.dumps(clean(dict(row)), allow_nan=False) + "\n").encode())
        self._files[name].flush()

    def offsets(self) -> dict[str, int]:
        """The length of each file, bytes."""
        return {name: file.tell() for name, file in self._files.items()}

    def sync(self) -> dict[str, int]:
        """Make everything durable.

        Returns:
          The length of each file, bytes.
        """
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return self.offsets()

    def close(self) -> None:
        """Release the files."""
        for file in self._files.values():
            file.close()


class _Unwritten(Journal):
    """Of the other processes, which have the same rows."""

    def __init__(self, folder: Path):
        super().__init__(folder, ())

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """The first process writes it."""


def open_journal(folder: Path, names: tuple[str, ...], offsets: Mapping[str, int] | None = None) -> Journal:
    """The run's files; only the first of several processes writes them.

    Args:
      folder: of the run.
      names: of the files.
      offsets: as in ``Journal``.

    Returns:
      The journal.
    """
    return Journal(folder, names, offsets) if is_first() else _Unwritten(folder)
