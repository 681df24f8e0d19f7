"""Samples of the base that many lanes share: drawn once, kept on disk, found again after an interruption."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kl_rl.runs.programs import Drawn
from kl_rl.runs.step import Rewarded
from kl_rl.storage.folder import write_atomically

__all__ = ["SharedSamples"]


class SharedSamples:
    """A folder of samples by name.

    Args:
      folder: made when it is needed.
      between: called before anything is drawn; may raise, to stop.
    """

    def __init__(self, folder: Path, between: Callable[[], None]):
        self._folder, self._between = folder, between

    def __call__(self, name: str, draw: Callable[[], Rewarded]) -> Rewarded:
        """The samples of this name, drawn if they are not there yet; kept, if no reward failed."""
        path = self._folder / f"{name}.npz"
        with contextlib.suppress(
            FileNotFoundError, zipfile.BadZipFile, ValueError, KeyError, EOFError
        ):  # or damaged
            with np.load(path, allow_pickle=False) as kept:
                arrays = [kept[field] for field in Drawn._fields]
                return Rewarded(Drawn(*arrays), kept["reward"])
        self._between()
        found = draw()
        if np.isfinite(found.reward).all():  # a reward that fails may be mended
            self._folder.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            np.savez(content, **found.drawn._asdict(), reward=found.reward)
            write_atomically(path, content.getvalue())
        return found
