"""The folder of a run that several processes may share: the first one locks it, all hear what is wrong."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kl_rl.sharding.processes import agreed, is_first, same
from kl_rl.storage.folder import OutputError, opened, provenance, write_atomically

__all__ = ["held"]


@contextlib.contextmanager
def _opened(folder: Path, settings: dict[str, Any], resume: bool) -> Iterator[None]:
    if not same(json.dumps(settings, sort_keys=True)):
        raise OutputError("the processes were not asked the same: give all the same options and files")
    if not is_first():
        yield
        return
    with opened(folder, json.loads(json.dumps(settings)), resume=resume):
        if not (folder / "provenance.json").exists():
            write_atomically(folder / "provenance.json", json.dumps(provenance(), indent=2) + "\n")
        yield


@contextlib.contextmanager
def held(folder: Path, settings: dict[str, Any], *, resume: bool) -> Iterator[None]:
    """The folder of a run, locked by the first process; ``run.json`` and ``provenance.json`` are in it.

    If a new run fails before its first checkpoint its files are taken out again, so that it can be asked for otherwise.

    Args:
      folder: made if missing.
      settings: what is asked; must be the same on resume.
      resume: go on with the run that is there.

    Raises:
      OutputError: held by another process, of another run, or not to be written.
    """
    with contextlib.ExitStack() as stack:
        problem: Exception | None = None
        new = is_first() and not (folder / "run.json").exists()
        try:
            stack.enter_context(_opened(folder, settings, resume))
        except (OutputError, OSError) as error:
            problem = error
        if (message := agreed(None if problem is None else str(problem))) is not None:
            raise OutputError(message) from problem
        try:
            yield
        except BaseException:
            if new and not _has_begun(folder):
                _withdraw(folder)
            raise


def _has_begun(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from."""
    return any(path.name.isdigit() for path in folder.glob("checkpoints/*"))


def _withdraw(folder: Path) -> None:
    """Take out what a run without a checkpoint has put into its folder; the session takes out its settings."""
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in folder.glob("*.jsonl"):
        path.unlink()
