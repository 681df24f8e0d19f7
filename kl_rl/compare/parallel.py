"""Several methods at once: XLA compiles and runs outside the interpreter lock, so threads fill the cores."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import FrameType
from typing import TypeVar

__all__ = ["Board", "Stopped", "in_parallel", "interruptible"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stopped(Exception):
    """Raised inside a worker after an interruption, at its next report of progress."""


class Board:
    """Progress of several methods as one fraction; also the way to stop them.

    Args:
      progress: called with the overall fraction and a message, one caller at a time.
      offset: methods that were finished before.
      total: methods in all.
      stop: set when everything is to stop.
    """

    def __init__(
        self, progress: Callable[[float, str], None], *, offset: int, total: int, stop: threading.Event
    ):
        self._progress, self._offset, self._total = progress, offset, total
        self._lock, self._done = threading.Lock(), dict[str, float]()
        self.stop = stop

    def tell(self, name: str, fraction: float, message: str) -> None:
        """Report how far a method is.

        Raises:
          Stopped: if the run has been interrupted.
        """
        if self.stop.is_set():
            raise Stopped
        with self._lock:
            self._done[name] = fraction
            self._progress((self._offset + sum(self._done.values())) / self._total, message)


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, besides raising ``KeyboardInterrupt``.

    The exception alone can be lost: where it strikes in a callback of the garbage collector it is only printed.

    Yields:
      For ``in_parallel``.
    """
    stop, before = threading.Event(), signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        stop.set()
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def in_parallel(
    work: Callable[[Item], Result], items: Iterable[Item], stop: threading.Event
) -> Iterator[tuple[Item, Result]]:
    """Items with their results as they finish, as many at once as there are cores, two at most.

    Args:
      work: must call ``Board.tell`` now and then, so that it can be stopped.
      items: what to work on, started in this order.
      stop: set from outside, or on the way out, whatever happens; running work then ends with ``Stopped``.

    Yields:
      (item, result).

    Raises:
      KeyboardInterrupt: stopped from outside.
    """
    if stop.is_set():
        raise KeyboardInterrupt
    pool = ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1))
    futures = {pool.submit(work, item): item for item in items}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except Stopped:
        raise KeyboardInterrupt from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
