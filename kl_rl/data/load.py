"""From a file to checked records: the one call most callers need."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from kl_rl.data.errors import DataError, Skipped, pass_over
from kl_rl.data.readers import read_rows
from kl_rl.data.row import Row

__all__ = ["Loaded", "load_records"]

Kind = TypeVar("Kind", covariant=True)
R = TypeVar("R")


class _Parses(Protocol[Kind]):
    @property
    def FIELDS(self) -> tuple[str, ...]: ...

    def parse(self, row: Row) -> Kind: ...


class Loaded(NamedTuple, Generic[R]):
    """Checked records.

    Attributes:
      records: in the order of the file.
      skipped: how many rows were passed over, and why.
    """

    records: list[R]
    skipped: Skipped


def load_records(
    source: str | Path,
    kind: _Parses[R],
    *,
    on_error: Literal["raise", "skip"] = "raise",
    ignore: Collection[str] = (),
    rename: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Loaded[R]:
    """Read a file and check every row of it.

    Args:
      source: see ``kl_rl.data.read_rows``.
      kind: ``PromptRecord``, ``LoggedRecord``, ``ComparisonRecord``, ``RankingRecord`` or ``EpisodeRecord``.
      on_error: "raise" at the first malformed row, or "skip" and count them.
      ignore: fields to pass over.
      rename: name in the file -> the name known here.
      limit: read at most this many good rows.

    Returns:
      The records, and what was skipped.

    Raises:
      DataError: naming file, line and field; also if every row was skipped.
      OSError: of the file system.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip"; got {on_error!r}')
    skipped = Skipped()
    counter = skipped if on_error == "skip" else None

    def good():
        for where, values in read_rows(source, skipped=counter):
            try:
                yield kind.parse(Row(where, values, kind.FIELDS, ignore=ignore, rename=rename))
            except DataError as error:
                pass_over(error, counter)

    records: list[Any] = list(itertools.islice(good(), limit))
    if not records:
        raise DataError(f"{source}: no usable record; {skipped.summary()}")
    return Loaded(records, skipped)
