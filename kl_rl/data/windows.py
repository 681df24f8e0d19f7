"""A long text as windows for pretraining: in order for epochs, or at random places given by (seed, step)."""

from __future__ import annotations

import zlib

import numpy as np

__all__ = ["TextWindows"]


class TextWindows:
    """Windows of S ids from one long sequence; as rows for a ``Loader``, window i starts at ``i S``.

    Args:
      ids: the text; integers [N], may be memory-mapped.
      window: S.

    Raises:
      ValueError: if the ids are not a sequence of integers of at least S.
    """

    def __init__(self, ids: np.ndarray, window: int):
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"ids must be integers [N]; got {ids.dtype} of shape {ids.shape}")
        if window < 1:
            raise ValueError(f"window must be at least 1; got {window}")
        if len(ids) < window:
            raise ValueError(
                f"the text has {len(ids)} tokens, fewer than one window of {window}: take a smaller one"
            )
        self.ids, self.window = ids, window

    def __len__(self) -> int:
        return len(self.ids) // self.window

    def _at(self, start: np.ndarray) -> np.ndarray:
        return np.stack([self.ids[s : s + self.window] for s in start.tolist()]).astype(np.int32)

    def take(self, index: np.ndarray) -> np.ndarray:
        """Windows ``index`` [B]; int32 [B, S]."""
        return self._at(np.asarray(index) * self.window)

    def fingerprint(self) -> int:
        """Checksum of the length, the window, and the first and last 65536 ids."""
        ends = np.concatenate([self.ids[: 2**16], self.ids[-(2**16) :]]).astype("<i8")
        return zlib.crc32(ends.tobytes(), zlib.crc32(f"{len(self.ids)} {self.window}".encode()))

    def sample(
        self, step: int, batch_size: int, *, seed: int, shard_index: int = 0, shard_count: int = 1
    ) -> np.ndarray:
        """Windows at uniformly random places: a pure function of (seed, step), so a resume needs the step alone.

        The batch of all hosts together does not depend on their number; host h gets its h-th part.

        Args:
          step: number of the batch.
          batch_size: B, of all hosts together.
          seed: of the places, 0 or more.
          shard_index: h, number of this host.
          shard_count: H, number of hosts; divides B.

        Returns:
          int32 [B / H, S].

        Raises:
          ValueError: if B is not a positive multiple of H, or h is not below H.
        """
        if batch_size < 1 or batch_size % shard_count or not 0 <= shard_index < shard_count:
            raise ValueError(
                f"batch_size must be a positive multiple of {shard_count} hosts and shard_index below it; "
                f"got {batch_size} and {shard_index}"
            )
        # The raw stream of a bit generator is fixed for good, unlike what a Generator makes of it.
        raw = np.random.Philox(np.random.SeedSequence([seed, step])).random_raw(batch_size)
        start = raw % np.uint64(len(self.ids) - self.window + 1)
        part = batch_size // shard_count
        return self._at(start[shard_index * part : (shard_index + 1) * part])
