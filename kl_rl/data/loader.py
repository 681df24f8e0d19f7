"""Batches that can be picked up again: a pure function of (seed, step), shuffled by grain, split between hosts.

Batch number s of the whole machine does not depend on how many hosts there are: host h of H gets rows ``h B/H`` to
``(h + 1) B/H`` of it, so the hosts' parts in order are the batch, and a run may go on with another number of hosts.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

__all__ = ["ArrayRows", "Indexed", "Loader"]

Batch = TypeVar("Batch")
Batch_co = TypeVar("Batch_co", covariant=True)

_VERSION = 1


class Indexed(Protocol[Batch_co]):
    """N rows that can be fetched by index."""

    def __len__(self) -> int:
        """N."""

    def take(self, index: np.ndarray) -> Batch_co:
        """The rows ``index`` [B] as one batch."""


class ArrayRows(Generic[Batch]):
    """A pytree of arrays with a common leading axis, ``Trajectories`` for one, as rows.

    Args:
      arrays: [N, ...] each.

    Raises:
      ValueError: if the leading axes differ.
    """

    def __init__(self, arrays: Batch):
        import jax

        self._map: Callable[..., Any] = jax.tree.map
        self._arrays = self._map(np.asarray, arrays)
        self._leaves: list[np.ndarray] = jax.tree.leaves(self._arrays)
        shapes = [leaf.shape for leaf in self._leaves]
        if len({shape[:1] for shape in shapes}) != 1 or () in shapes:
            raise ValueError(f"arrays must have one leading axis of the same length; got shapes {shapes}")

    def __len__(self) -> int:
        return len(self._leaves[0])

    def take(self, index: np.ndarray) -> Batch:
        """The rows ``index`` [B], copied."""
        return self._map(lambda leaf: leaf[index], self._arrays)

    def fingerprint(self) -> int:
        """Checksum of all contents, shapes and dtypes."""
        total = 0
        for leaf in self._leaves:
            total = zlib.crc32(f"{leaf.shape}{leaf.dtype}".encode(), total)
            total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, total)
        return total


class Loader(Generic[Batch]):
    """An endless iterator over shuffled batches.

    Every epoch is another permutation of all rows. With ``drop_remainder=False`` batches run across the edge
    between epochs: in any case they are full, and each row comes once an epoch. With ``drop_remainder=True`` an
    epoch is ``N // B`` batches, and the rows left over (others in each epoch) are not used.

    Args:
      rows: N rows; ``ArrayRows(trajectories)`` or ``TextWindows``.
      batch_size: B, of all hosts together.
      seed: of the permutations.
      shard_index: h, number of this host.
      shard_count: H, number of hosts; divides B.
      drop_remainder: see above.
      shuffle: False: rows come in their order.

    Raises:
      ValueError: if there are no rows, B is not a positive multiple of H, h is not below H, or an epoch would
        have no batch.
    """

    def __init__(
        self,
        rows: Indexed[Batch],
        batch_size: int,
        *,
        seed: int,
        shard_index: int = 0,
        shard_count: int = 1,
        drop_remainder: bool = False,
        shuffle: bool = True,
    ):
        from kl_rl.data.shuffle import index_batches

        _check_sizes(len(rows), batch_size, shard_index, shard_count, drop_remainder)
        part = batch_size // shard_count
        self._part = slice(shard_index * part, (shard_index + 1) * part)
        self._rows, self._batch_size, self._drop, self._step = rows, batch_size, drop_remainder, 0
        self._index = index_batches(
            len(rows), batch_size, seed=seed if shuffle else None, drop_remainder=drop_remainder
        )
        self._identity = {
            "version": _VERSION,
            "rows": len(rows),
            "batch_size": batch_size,
            "seed": seed,
            "drop_remainder": drop_remainder,
            "shuffle": shuffle,
            "order": self._order(),
            "contents": rows.fingerprint() if hasattr(rows, "fingerprint") else None,
        }

    def _order(self) -> int:
        """Checksum of the first indices, should another release order them differently."""
        first = [self._index[step] for step in range(-(-64 // self._batch_size))]
        return zlib.crc32(np.concatenate(first)[:64].astype("<i8").tobytes())

    @property
    def step(self) -> int:
        """Number of the next batch."""
        return self._step

    @property
    def epoch(self) -> float:
        """Epochs done, fractions included."""
        per_epoch = len(self._rows) // self._batch_size if self._drop else len(self._rows) / self._batch_size
        return self._step / per_epoch

    def index(self, step: int) -> np.ndarray:
        """Which rows batch number ``step`` holds on this host; [B / H]."""
        return self._index[step][self._part]

    def batch(self, step: int) -> Batch:
        """This host's part of batch number ``step``, whatever came before."""
        return self._rows.take(self.index(step))

    def __iter__(self) -> Loader[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.batch(self._step)
        self._step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """The position and what it refers to, ready for JSON; the same on all hosts."""
        return {"step": self._step, **self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position saved by ``state``; the number of hosts may differ.

        Args:
          state: what ``state`` returned.

        Raises:
          ValueError: if it belongs to other data, another seed or another batch size, naming what differs.
        """
        step = state.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"data position: step must be a whole number, 0 or more; found {step!r:.60}")
        for name, own in self._identity.items():
            if state.get(name) != own:
                raise ValueError(
                    f"data position: {name} was {state.get(name)!r:.60} and is now {own!r}: "
                    f"{_ADVICE.get(name, 'go on with the settings of the saved run')}"
                )
        self._step = step


_ADVICE = {
    "rows": "the data has changed since; go on with the same file",
    "contents": "the data has changed since; go on with the same file",
    "order": "another release (grain's, or this library's) shuffles differently; go on with that of the saved run",
    "version": "it was saved by another release of this library",
}


def _check_sizes(
    rows: int, batch_size: int, shard_index: int, shard_count: int, drop_remainder: bool
) -> None:
    if rows < 1:
        raise ValueError("no rows to load")
    if shard_count < 1 or not 0 <= shard_index < shard_count:
        raise ValueError(
            f"shard_index must lie between 0 and shard_count - 1 = {shard_count - 1}; got {shard_index}"
        )
    if batch_size < 1 or batch_size % shard_count:
        raise ValueError(f"batch_size must be a positive multiple of {shard_count} hosts; got {batch_size}")
    if drop_remainder and rows < batch_size:
        raise ValueError(
            f"{rows} rows do not fill one batch of {batch_size}: take a smaller one, or drop_remainder=False"
        )
