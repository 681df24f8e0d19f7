"""A long text as windows for pretraining, at random places given by (seed, step)."""

from __future__ import annotations

import numpy as np

__all__ = ["TextWindows"]


class TextWindows:
    """Windows of S ids from one long sequence.

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

    def sample(self, step: int, batch_size: int, *, seed: int) -> np.ndarray:
        """Windows at uniformly random places: a pure function of (seed, step), so a resume needs the step alone.

        Args:
          step: number of the batch.
          batch_size: B.
          seed: of the places, 0 or more.

        Returns:
          int32 [B, S].
        """
        # The raw stream of a bit generator is fixed for good, unlike what a Generator makes of it.
        raw = np.random.Philox(np.random.SeedSequence([seed, step])).random_raw(batch_size)
        start = raw % np.uint64(len(self.ids) - self.window + 1)
        return np.stack([self.ids[s : s + self.window] for s in start.tolist()]).astype(np.int32)
