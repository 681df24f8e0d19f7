"""The loop that survives: steps, saves at whole steps, a request to stop, and how a run is picked up again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kl_rl.storage.checkpoint import Checkpoints, DamagedCheckpoint
from kl_rl.storage.errors import RunError, Stopped
from kl_rl.storage.journal import Journal, open_journal
from kl_rl.storage.preemption import Preemption

__all__ = ["Kept", "Position", "pick_up", "run_steps", "to_stderr"]

Tree = TypeVar("Tree")
CHECKPOINTS = "checkpoints"


class Position(NamedTuple):
    """Where a run stands: steps done, its arrays, and what is kept about them."""

    step: int
    tree: Any
    about: dict[str, Any]


class Kept(NamedTuple):
    """What a run keeps on disk.

    Attributes:
      store: of checkpoints.
      journal: its files.
      save_every: steps between two checkpoints.
    """

    store: Checkpoints
    journal: Journal
    save_every: int

    def save(self, step: int, tree: Any, about: dict[str, Any] | None = None) -> None:
        """Save everything, unless this very step has been saved.

        Raises:
          SaveError: it could not be written; what was saved before is intact.
        """
        if self.store.latest == step:
            return
        self.store.save(step, tree, {"offsets": self.journal.sync(), **(about or {})})

    def close(self) -> None:
        """Release the folder."""
        self.journal.close()
        self.store.close()


def pick_up(
    folder: Path, like: Any, names: tuple[str, ...], save_every: int, *, say: Callable[[str], None]
) -> tuple[Kept, Position | None]:
    """Open a folder: the newest whole checkpoint, and the files cut back to it.

    Args:
      folder: of the run.
      like: a tree of the structure that is saved, or its outline.
      names: of the journal's files.
      save_every: steps between two checkpoints.
      say: told about damaged checkpoints and missing rows.

    Returns:
      What is kept, and where the run stands; None: at its beginning.

    Raises:
      RunError: there are checkpoints and none can be used.
    """
    store = Checkpoints(folder / CHECKPOINTS)
    try:
        found = store.recover(like)
    except DamagedCheckpoint as error:
        store.close()
        raise RunError(f"{error}; start again in another --out") from error
    for number, reason in found.damaged if found else ():
        say(
            f"warning: checkpoint {number} is damaged and was set aside; going on from an earlier one ({reason})"
        )
    journal = open_journal(folder, names, found.about.get("offsets") if found else None)
    for name in journal.shortened:
        say(f"warning: {folder / name} is shorter than when the checkpoint was written; rows are missing")
    position = None if found is None else Position(found.number, found.tree, found.about)
    return Kept(store, journal, save_every), position


def run_steps(
    kept: Kept,
    tree: Tree,
    first: int,
    steps: int,
    advance: Callable[[Tree, int], Tree],
    preemption: Preemption,
    about: Callable[[], dict[str, Any]] = dict,
) -> Tree:
    """Advance step by step, saving on the way; a problem in the middle of a step leaves the step before it saved.

    Args:
      kept: where to save.
      tree: at step ``first``.
      first: steps done.
      steps: steps wanted.
      advance: ``(tree, step) -> tree``; writes to the journal; a ``RunError`` must leave ``tree`` intact.
      preemption: asked after every step.
      about: plain facts to save.

    Returns:
      The tree after the last step, which is saved too.

    Raises:
      Stopped: on request, after saving.
      RunError: of ``advance``, after saving.
    """
    offsets = kept.journal.sync()
    for step in range(first, steps):
        try:
            tree = advance(tree, step)
        except RunError:
            if kept.store.latest != step:
                kept.journal.sync()  # as far as the offsets at least
                kept.store.save(step, tree, {"offsets": offsets, **about()})
            raise
        done = step + 1
        asked = preemption.asked() and done < steps
        if asked or done == steps or done % kept.save_every == 0:
            kept.save(done, tree, about())
        offsets = kept.journal.offsets()
        if asked:
            raise Stopped(done, str(preemption.signal), preemption.code)
    return tree


def to_stderr(message: str) -> None:
    """A line on standard error, for ``say``."""
    print(message, file=sys.stderr, flush=True)
