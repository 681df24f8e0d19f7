"""What is wrong with a data file, said once: file, line, field and what to do."""

from __future__ import annotations

import dataclasses

__all__ = ["DataError", "Skipped", "pass_over"]


class DataError(ValueError):
    """Unusable data; the message starts with the file and, where there is one, the line (or row) and the field."""


@dataclasses.dataclass
class Skipped:
    """Counts the records that were passed over, and keeps the first few reasons.

    Hand one to a reader or an encoder and malformed records are passed over; without one they raise.

    Attributes:
      count: how many.
      first: the first ``keep`` reasons.
      keep: how many reasons are kept.
    """

    count: int = 0
    first: list[DataError] = dataclasses.field(default_factory=list)
    keep: int = 20

    def add(self, error: DataError) -> None:
        """Count one record and keep the reason if there is room."""
        self.count += 1
        if len(self.first) < self.keep:
            self.first.append(error)

    def summary(self) -> str:
        """One line per reason kept, under a line with the count; empty if nothing was skipped."""
        if not self.count:
            return ""
        more = self.count - len(self.first)
        lines = [f"skipped {self.count} record{'s' if self.count > 1 else ''}:"]
        lines += [f"  {error}" for error in self.first]
        return "\n".join(lines + ([f"  and {more} more"] if more else []))


def pass_over(error: DataError, skipped: Skipped | None) -> None:
    """Count the error if there is a counter, raise it otherwise.

    Raises:
      DataError: the error itself, if ``skipped`` is None.
    """
    if skipped is None:
        raise error
    skipped.add(error)
