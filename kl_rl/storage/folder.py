"""The folder of a run: its declared settings, rows that are on disk the moment they exist, and a lock."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np

__all__ = ["OutputError", "Session", "clean", "opened", "provenance", "write_atomically"]


class OutputError(ValueError):
    """The output folder cannot be used; the message says why and what to do."""


def clean(value: Any) -> Any:
    """Plain JSON values, at any depth; non-finite numbers become null (infinite or undefined)."""
    if isinstance(value, dict):
        return {key: clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def provenance() -> dict[str, Any]:
    """Versions, commit and device of this process, for every row of results."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
    versions["python"] = platform.python_version()
    versions["kl-rl"] = importlib.metadata.version("kl-rl")
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False) if _has_git() else None
    commit = found.stdout.strip() if found is not None and found.returncode == 0 else None
    return {"versions": versions, "commit": commit or None, "device": jax.devices()[0].device_kind}


def _has_git() -> bool:
    import shutil

    return shutil.which("git") is not None


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a crash leaves either the old one or the new one."""
    temporary = _temporary(path)
    data = content.encode() if isinstance(content, str) else content
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    if not isinstance(settings, dict):
        return {name: settings}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{name}.{key}" if name else str(key))
    return found


class Session:
    """An output folder held by one process: ``run.json`` (settings), ``results.jsonl``, ``curves.jsonl``.

    Args:
      folder: created if missing.
      settings: what was asked; a resumed run must have been asked the same.
      resume: go on with the rows that are there.

    Raises:
      OutputError: if the folder holds another run, is in use, or cannot be written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, resume: bool):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(folder / ".lock", timeout=0)
            self._lock.acquire()
        except filelock.Timeout as error:
            message = "another process is writing to this folder; wait for it or choose another --out"
            raise OutputError(f"{folder}: {message}") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"{folder}: cannot write here: {reason}; choose another --out") from error
        try:
            self._check_settings(settings, resume)
        except BaseException:
            self.close()
            raise

    def _check_settings(self, settings: dict[str, Any], resume: bool) -> None:
        path = self.folder / "run.json"
        self._new = not path.exists()
        if self._new:
            unfinished = _temporary(path).name  # of a run that was killed as it began
            foreign = [p.name for p in self.folder.iterdir() if p.name not in (".lock", unfinished)]
            if foreign:
                raise OutputError(
                    f"{self.folder}: not empty and not a run of kl-rl (found {sorted(foreign)[0]}); "
                    "choose another --out"
                )
            write_atomically(path, json.dumps(settings, indent=2) + "\n")
            return
        if not resume:
            raise OutputError(
                f"{self.folder}: already holds a run; add --resume to go on with it, or choose another --out"
            )
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise OutputError(f"{path}: not valid JSON ({error}); choose another --out") from error
        old, new = _flat(before), _flat(settings)
        changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        if changed:
            key = changed[0]
            raise OutputError(
                f"{path}: this run was started with {key} = {old.get(key)!r}, now asked for {new.get(key)!r}; "
                "repeat the old options with --resume, or choose another --out"
            )

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add rows to a JSON-lines file, durable on return."""
        text = "".join(json.dumps(clean(row), allow_nan=False) + "\n" for row in rows)
        with open(self.folder / name, "a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Rows written so far; a line cut short by a crash is dropped from the file."""
        path = self.folder / name
        if not path.exists():
            return []
        lines = path.read_text().splitlines(keepends=True)
        whole = []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith("\n"):
                break
            whole.append(row)
        if len(whole) < len(lines):
            write_atomically(path, "".join(lines[: len(whole)]))
        return whole

    def withdraw(self) -> None:
        """Let the folder be asked for otherwise, if this session is new and holds nothing but its settings."""
        own = {"run.json", "provenance.json"}
        if self._new and {path.name for path in self.folder.iterdir()} <= own | {".lock"}:
            for name in own:
                (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Release the folder."""
        self._lock.release()


@contextlib.contextmanager
def opened(folder: Path, settings: dict[str, Any], *, resume: bool) -> Iterator[Session]:
    """A session that is closed whatever happens; a new one that fails before anything is written leaves no trace."""
    session = Session(folder, settings, resume=resume)
    try:
        yield session
    except BaseException:
        session.withdraw()
        raise
    finally:
        session.close()
