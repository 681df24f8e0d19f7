"""SIGTERM and Ctrl-C: finish the step, save, leave. A second Ctrl-C leaves at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from kl_rl.sharding.processes import agreed

__all__ = ["Preemption"]


class Preemption:
    """Notes a request to stop; a context manager, so that handlers are put back. Works in the main thread only.

    Attributes:
      signal: name of the signal that was received, or None.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before: dict[int, Any] = {}

    @property
    def code(self) -> int:
        """Exit status: 128 and the number of the signal; 0 if there was none."""
        return 0 if self.signal is None else 128 + signal.Signals[self.signal]

    def asked(self) -> bool:
        """Whether any process has received a signal, which then counts for all; all must ask at the same step."""
        heard = agreed(self.signal)
        self.signal = self.signal or heard  # one that has come meanwhile counts at the next step
        return heard is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def __enter__(self) -> Self:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        """Put back the handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
