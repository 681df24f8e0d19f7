"""Checksums of arrays that do not depend on how an array is laid out over devices and processes."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from kl_rl.sharding.processes import is_first, summed

__all__ = ["checksums"]


def _words(data: np.ndarray) -> np.ndarray:
    """The bits of an array, 32 at most to a word; uint32 [..., n or 2 n]."""
    bits = np.atleast_1d(np.ascontiguousarray(data))
    if data.dtype.itemsize == 8:
        return bits.view(np.uint32)
    return bits.view(f"u{data.dtype.itemsize}").astype(np.uint32, copy=False)


def _row_positions(shape: tuple[int, ...], start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Positions, modulo 2^32, of the rows of the part of an array that begins at ``start``; uint32 [rows]."""
    flat: np.ndarray = np.zeros(1, np.uint32)
    for first, count, whole in zip(start, size, shape, strict=True):
        flat = (flat * np.uint32(whole))[:, None] + np.arange(first, first + count, dtype=np.uint32)
        flat = flat.reshape(-1)
    return flat


def _part(words: np.ndarray, shape: tuple[int, ...], start: tuple[int, ...]) -> np.ndarray:
    """``sum_i w_i`` and ``sum_i i w_i`` of the words of a part, i their place in the whole; uint32 [2], modulo 2^32."""
    *outer, size = words.shape
    rows, ends = words.reshape(-1, size), np.arange(start[-1], start[-1] + size, dtype=np.uint32)
    sums = rows.sum(axis=1, dtype=np.uint32)
    within = np.einsum("ij,j->i", rows, ends)
    bases = _row_positions(shape[:-1], start[:-1], outer) * np.uint32(shape[-1])
    return np.array([sums.sum(dtype=np.uint32), (bases * sums + within).sum(dtype=np.uint32)])


def _own(x: jax.Array) -> np.ndarray:
    """What the devices of this process add to the checksum of an array."""
    total = np.zeros(2, np.uint32)
    if x.size == 0 or (x.is_fully_addressable and not is_first()):
        return total  # every process has it
    wide = 2 if x.dtype.itemsize == 8 else 1
    *outer, size = x.shape or (1,)
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            starts = [index.indices(n)[0] for index, n in zip(shard.index, x.shape, strict=True)] or [0]
            start = (*starts[:-1], starts[-1] * wide)
            total += _part(_words(np.asarray(shard.data)), (*outer, size * wide), start)
    return total


def checksums(arrays: Sequence[jax.Array]) -> list[str]:
    """The checksum of each array: the same on any mesh, in any number of processes, all of which must call this.

    ``(sum_i w_i, sum_i i w_i)`` over 32-bit words, modulo 2^32 (Fletcher 1982, doi:10.1109/TCOM.1982.1095369): every
    change of a single entry changes it, and other damage goes unnoticed with a chance of about 2^-64.

    Args:
      arrays: no typed PRNG keys.

    Returns:
      16 hexadecimal digits for each.
    """
    if not arrays:
        return []
    totals = summed(np.stack([_own(x) for x in arrays]))
    return [f"{plain:08x}{placed:08x}" for plain, placed in totals.tolist()]
