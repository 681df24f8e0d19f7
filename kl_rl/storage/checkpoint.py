"""Saving and restoring pytrees (a policy, a run) with orbax: whole or not at all, checked when read, no pickle."""

from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.sharding.processes import agreed, is_first
from kl_rl.storage.checksum import checksums
from kl_rl.storage.strays import only_the_exception

__all__ = ["Checkpoints", "DamagedCheckpoint", "Recovered", "SaveError", "is_full", "outline"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = ("No space left", "File too large", "quota exceeded", "RESOURCE_EXHAUSTED")


class DamagedCheckpoint(ValueError):
    """A checkpoint cannot be read, or what is read is not what was written."""


class SaveError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class Recovered(NamedTuple):
    """What was found in a folder.

    Attributes:
      number: of the checkpoint.
      tree: as saved, bit for bit.
      about: the plain facts that were saved with it.
      damaged: newer checkpoints that could not be used: number and reason.
    """

    number: int
    tree: Any
    about: dict[str, Any]
    damaged: list[tuple[int, str]]


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.prng_key)


def _plain(tree: Any) -> dict[str, jax.Array]:
    """Typed PRNG keys as their data, which orbax can store."""

    def leaf(x: Any) -> jax.Array:
        return jax.random.key_data(x) if _is_key(x) else jnp.asarray(x)

    return {str(i): leaf(x) for i, x in enumerate(jax.tree.leaves(tree))}


def _checksums(plain: dict[str, jax.Array]) -> dict[str, str]:
    return dict(zip(plain, checksums(list(plain.values())), strict=True))


def outline(tree: Any) -> Any:
    """Shapes, dtypes and places of a tree's arrays without the arrays: what a checkpoint can be restored onto.

    Args:
      tree: arrays, typed PRNG keys included.

    Returns:
      The same structure of ``jax.ShapeDtypeStruct``.
    """
    array = lambda x: jnp.asarray(x) if not isinstance(x, jax.Array) else x
    one = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return jax.tree.map(lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else one(array(x)), tree)


def _plain_outline(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The outline of what ``_plain`` makes of a tree, or of its outline."""

    def leaf(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not _is_key(x):
            return x
        data = jax.eval_shape(jax.random.key_data, x)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)

    return {str(i): leaf(x) for i, x in enumerate(jax.tree.leaves(outline(tree)))}


def is_full(error: BaseException) -> bool:
    """Whether an error says that there is no room left."""
    text = str(error)
    return getattr(error, "errno", None) in _FULL or any(word in text for word in _FULL_WORDS)


class Checkpoints:
    """Numbered checkpoints in a folder; a save that was cut short is ignored when the folder is opened again.

    Args:
      folder: created if missing.
      keep: how many to keep.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        self._folder, self._keep = Path(folder).absolute(), keep
        self._open()

    def _open(self) -> None:
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=("default", "facts"))

    @property
    def latest(self) -> int | None:
        """Number of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, number: int, tree: Any, about: dict[str, Any] | None = None) -> None:
        """Write a pytree; durable on return.

        Args:
          number: of the checkpoint, larger than those before.
          tree: arrays, typed PRNG keys included.
          about: plain facts (JSON) to keep with it.

        Raises:
          SaveError: the disk is full or cannot be written; the checkpoints before are intact.
        """
        import orbax.checkpoint as ocp

        plain = _plain(tree)
        facts = {"about": about or {}, "checksums": _checksums(plain)}
        try:
            if (problem := agreed(self._no_space(sum(x.nbytes for x in plain.values())))) is not None:
                raise OSError(errno.ENOSPC, problem)
            items = ocp.args.Composite(default=ocp.args.StandardSave(plain), facts=ocp.args.JsonSave(facts))
            with only_the_exception():
                self._manager.save(number, args=items)
                self._manager.wait_until_finished()
        except Exception as error:  # orbax and tensorstore raise many kinds
            self._clear_remains(number)
            raise SaveError(self._why(number, error)) from error

    def _no_space(self, size: int) -> str | None:
        free = shutil.disk_usage(self._folder).free
        return f"No space left: {size:,} bytes needed, {free:,} free" if free < size else None

    def _why(self, number: int, error: Exception) -> str:
        reason = "the disk is full" if is_full(error) else str(error).split("\n")[0][:200]
        before = "there is no earlier one" if self.latest is None else f"checkpoint {self.latest} is intact"
        return f"{self._folder}: checkpoint {number} could not be written: {reason}; {before}"

    def _clear_remains(self, number: int) -> None:
        """Remove what a failed save left behind; a full disk needs the room."""
        for path in self._folder.glob(f"{number}.orbax-checkpoint-tmp*") if is_first() else ():
            shutil.rmtree(path, ignore_errors=True)

    def restore(self, like: Any, number: int | None = None) -> Any:
        """Read a pytree of the same structure, bit for bit, onto the shardings of ``like``.

        Args:
          like: a tree with the structure, shapes and dtypes that were saved, or its ``outline``.
          number: which checkpoint; the newest if None.

        Returns:
          The tree.

        Raises:
          FileNotFoundError: if there is no complete checkpoint.
          DamagedCheckpoint: it cannot be read, or is not what was written.
        """
        number = self.latest if number is None else number
        if number is None:
            raise FileNotFoundError(f"{self._folder}: no complete checkpoint")
        return self._read(like, number)[0]

    def _read(self, like: Any, number: int) -> tuple[Any, dict[str, Any]]:
        import orbax.checkpoint as ocp

        plain, where = _plain_outline(like), f"{self._folder / str(number)}"
        items = ocp.args.Composite(default=ocp.args.StandardRestore(plain), facts=ocp.args.JsonRestore())
        try:
            with only_the_exception():
                saved = self._manager.restore(number, args=items)
            facts, found = saved["facts"], saved["default"]
            written, about = facts["checksums"], facts["about"]
        except Exception as error:  # whatever damage makes of it
            reason = str(error.__cause__ or error).split("\n")[0]  # orbax puts its whole specification first
            raise DamagedCheckpoint(f"{where}: cannot be read: {reason[:200]}") from error
        if written.keys() != plain.keys():
            raise DamagedCheckpoint(f"{where}: holds {len(written)} arrays, not {len(plain)}")
        read = _checksums({name: found[name] for name in plain})
        wrong = [name for name, value in written.items() if read[name] != value]
        if wrong:
            raise DamagedCheckpoint(f"{where}: array {wrong[0]} is not what was written (checksum)")
        leaves, structure = jax.tree.flatten(like)
        wrapped = [
            jax.random.wrap_key_data(found[str(i)]) if _is_key(old) else found[str(i)]
            for i, old in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, wrapped), about

    def recover(self, like: Any) -> Recovered | None:
        """The newest checkpoint that is whole; damaged ones are moved out of the way, to ``<folder>.damaged``.

        Args:
          like: as in ``restore``.

        Returns:
          What was found; None if no checkpoint was ever completed.

        Raises:
          DamagedCheckpoint: there are checkpoints, and all are damaged.
        """
        damaged: list[tuple[int, str]] = []
        for number in sorted(self._manager.all_steps(), reverse=True):
            found, problem = None, None
            try:
                found = self._read(like, number)
            except DamagedCheckpoint as error:
                problem = str(error)
            if (said := agreed(problem)) is not None or found is None:
                damaged.append((number, str(said)))
                continue
            if damaged:
                self._set_aside([n for n, _ in damaged])
            return Recovered(number, *found, damaged)
        if damaged:
            raise DamagedCheckpoint(f"{damaged[0][1]}; no other checkpoint is whole")
        return None

    def _set_aside(self, numbers: list[int]) -> None:
        self._manager.close()
        if is_first():
            self._move(numbers)
        agreed(None)  # none opens the folder before it is in order
        self._open()

    def _move(self, numbers: list[int]) -> None:
        aside = self._folder.with_name(self._folder.name + ".damaged")
        aside.mkdir(exist_ok=True)
        for number in numbers:
            target = aside / str(number)
            shutil.rmtree(target, ignore_errors=True)
            (self._folder / str(number)).rename(target)

    def close(self) -> None:
        """Release the folder."""
        try:
            self._manager.close()
        except Exception as error:  # a failed save is raised again here; it has been reported
            print(f"{self._folder}: {str(error).split(chr(10))[0][:200]}", file=sys.stderr)
