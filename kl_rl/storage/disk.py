"""Replacing a folder as a whole: written beside it, flushed, renamed; a failure leaves the old one as it was."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_space", "previous", "replaced"]


def _flush(path: Path) -> None:
    """Bring a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def previous(folder: Path) -> Path:
    """Where the old folder is between two renames; it is left there only by a crash at that moment."""
    return folder.with_name(folder.name + ".previous")


def check_space(folder: Path, size: int) -> None:
    """Refuse to begin what cannot be finished.

    Args:
      folder: existing, on the disk to be written.
      size: bytes needed.

    Raises:
      OSError: not enough space.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            errno.ENOSPC, f"not enough space: {size} bytes are needed, {free} are free", str(folder)
        )


def _carry_over(old: Path, new: Path, stale: frozenset[str]) -> None:
    """Move what the new folder lacks, except stale files, out of the old one, and remove that."""
    for entry in old.iterdir():
        if (
            entry.name not in stale
            and not entry.name.endswith(".safetensors")
            and not (new / entry.name).exists()
        ):
            entry.rename(new / entry.name)
    shutil.rmtree(old)


def _swap(stage: Path, folder: Path, stale: frozenset[str]) -> None:
    old = previous(folder)
    if folder.exists():
        folder.rename(old)
    stage.rename(folder)
    _flush(folder.parent)
    if old.exists():
        _carry_over(old, folder, stale)


def _recover(folder: Path, stale: frozenset[str]) -> None:
    """Finish what a crash between two renames, or after them, has left."""
    old = previous(folder)
    if old.exists() and folder.exists():
        _carry_over(old, folder, stale)
    elif old.exists():
        old.rename(folder)


@contextmanager
def replaced(folder: Path, *, stale: frozenset[str] = frozenset()) -> Iterator[Path]:
    """A new folder to be filled; if that succeeds it takes the place of ``folder``.

    Args:
      folder: to be made or replaced. Files in it that the new one lacks are kept, except safetensors files.
      stale: names that are not kept either.

    Yields:
      The folder to write into.

    Raises:
      OSError: writing failed; the old folder is as it was.
    """
    folder = folder.resolve()  # what a link points to is replaced, not the link
    stage = folder.with_name(folder.name + ".saving")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _recover(folder, stale)
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        yield stage
        for path in [*stage.iterdir(), stage]:
            _flush(path)
        _swap(stage, folder, stale)
    except OSError as error:
        state = "is as it was" if folder.exists() else "was not made"
        message = f"could not save {folder}: {error.strerror or error}; the folder {state}"
        raise OSError(error.errno or errno.EIO, message, error.filename) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
