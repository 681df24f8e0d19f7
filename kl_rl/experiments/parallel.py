"""Several methods at once: XLA compiles and runs outside the interpreter lock, so threads fill the cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

__all__ = ["Board", "Cancelled", "in_parallel"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Cancelled(Exception):
    """Raised inside a worker after an interruption, at its next report of progress."""


class Board:
    """Progress of several methods as one fraction; also the way to stop them.

    Args:
      progress: called with the overall fraction and a message, one caller at a time.
      offset: methods that were finished before.
      total: methods in all.
    """

    def __init__(self, progress: Callable[[float, str], None], *, offset: int, total: int):
        self._progress, self._offset, self._total = progress, offset, total
        self._lock, self._done = threading.Lock(), dict[str, float]()
        self.stop = threading.Event()

    def tell(self, name: str, fraction: float, message: str) -> None:
        """Report how far a method is.

        Raises:
          Cancelled: if the run has been interrupted.
        """
        if self.stop.is_set():
            raise Cancelled
        with self._lock:
            self._done[name] = fraction
            self._progress((self._offset + sum(self._done.values())) / self._total, message)


def in_parallel(
    work: Callable[[Item], Result], items: Iterable[Item], stop: threading.Event
) -> Iterator[tuple[Item, Result]]:
    """Items with their results as they finish, as many at once as there are cores, two at most.

    Args:
      work: must call ``Board.tell`` now and then, so that it can be stopped.
      items: what to work on, started in this order.
      stop: set on the way out, whatever happens; running work then ends with ``Cancelled``.

    Yields:
      (item, result).
    """
    pool = ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1))
    futures = {pool.submit(work, item): item for item in items}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
