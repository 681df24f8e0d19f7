"""Saving and restoring pytrees (a policy, a run) with orbax: whole or not at all, no pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Checkpoints"]


def _plain(tree: Any) -> Any:
    """Typed PRNG keys as their data, which orbax can store."""

    def leaf(x: Any) -> Any:
        return jax.random.key_data(x) if _is_key(x) else jnp.asarray(x)

    return {str(i): leaf(x) for i, x in enumerate(jax.tree.leaves(tree))}


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


class Checkpoints:
    """Numbered checkpoints in a folder; a save that was cut short is ignored when the folder is opened again.

    Args:
      folder: created if missing.
      keep: how many to keep.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """Number of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, number: int, tree: Any) -> None:
        """Write a pytree; durable on return."""
        import orbax.checkpoint as ocp

        self._manager.save(number, args=ocp.args.StandardSave(_plain(tree)))
        self._manager.wait_until_finished()

    def restore(self, like: Any, number: int | None = None) -> Any:
        """Read a pytree of the same structure, bit for bit, onto the shardings of ``like``.

        Args:
          like: a tree with the structure, shapes and dtypes that were saved.
          number: which checkpoint; the newest if None.

        Returns:
          The tree.

        Raises:
          FileNotFoundError: if there is no complete checkpoint.
        """
        import orbax.checkpoint as ocp

        number = self.latest if number is None else number
        if number is None:
            raise FileNotFoundError(f"{self._manager.directory}: no complete checkpoint")
        leaves, structure = jax.tree.flatten(like)
        saved = self._manager.restore(number, args=ocp.args.StandardRestore(_plain(like)))
        found = [saved[str(i)] for i in range(len(leaves))]
        wrapped = [
            jax.random.wrap_key_data(x) if _is_key(old) else x for x, old in zip(found, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, wrapped)

    def close(self) -> None:
        """Release the folder."""
        self._manager.close()
