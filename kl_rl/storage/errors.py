"""What can go wrong in a run, said in one line."""

from __future__ import annotations

__all__ = ["BadRewardValue", "Stopped", "RunError"]


class RunError(ValueError):
    """A run cannot start or go on; the message says why and what to do."""


class BadRewardValue(RunError):
    """The reward function raised, or returned something that is not a finite number."""


class Stopped(Exception):
    """The run was asked to stop and has saved everything.

    Args:
      step: steps done.
      signal: name of the signal.
      code: exit status.
    """

    def __init__(self, step: int, signal: str, code: int):
        super().__init__(f"{signal} after step {step}")
        self.step, self.signal, self.code = step, signal, code
