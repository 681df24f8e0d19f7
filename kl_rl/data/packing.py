"""Short documents laid side by side in rows of one length, each with its number in the row."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kl_rl.data.padding import PADDING

__all__ = ["Packed", "pack"]


class Packed(NamedTuple):
    """Rows of packed documents.

    Attributes:
      ids: -1 where there is no document; int32 [B, S].
      segments: number of the document in its row, from 1; 0 is padding; int32 [B, S].
    """

    ids: np.ndarray
    segments: np.ndarray

    @property
    def fill(self) -> float:
        """Fraction of positions that hold a token."""
        return float(np.mean(self.segments > 0))


def pack(documents: Sequence[Sequence[int]], length: int, *, split: bool = False) -> Packed:
    """Best fit, longest documents first; the same documents always give the same rows.

    Args:
      documents: token ids, each 0 or more.
      length: S.
      split: cut documents longer than S into pieces, each a segment of its own; otherwise they are an error.

    Returns:
      The rows.

    Raises:
      ValueError: for an empty document, one that is too long, or none at all; documents are numbered from 0.
    """
    pieces = [
        piece
        for number, document in enumerate(documents)
        for piece in _pieces(number, document, length, split)
    ]
    if not pieces:
        raise ValueError("no documents to pack")
    rows = _best_fit(pieces, length)
    ids = np.full((len(rows), length), PADDING, np.int32)
    segments = np.zeros((len(rows), length), np.int32)
    for r, row in enumerate(rows):
        start = 0
        for number, piece in enumerate(row, 1):
            ids[r, start : start + len(piece)] = piece
            segments[r, start : start + len(piece)] = number
            start += len(piece)
    return Packed(ids, segments)


def _pieces(number: int, document: Sequence[int], length: int, split: bool) -> list[Sequence[int]]:
    if not len(document):
        raise ValueError(f"document {number} is empty")
    if len(document) > length and not split:
        raise ValueError(
            f"document {number} has {len(document)} tokens for rows of {length}: split it or drop it"
        )
    return [document[start : start + length] for start in range(0, len(document), length)]


def _best_fit(pieces: Sequence[Sequence[int]], length: int) -> list[list[Sequence[int]]]:
    """Each piece goes to the fullest row that can take it."""
    rows: list[list[Sequence[int]]] = []
    open_rows: dict[int, list[int]] = {}  # room left -> rows with just that
    rooms: list[int] = []  # the rooms that occur, ascending
    for piece in sorted(pieces, key=len, reverse=True):
        at = bisect.bisect_left(rooms, len(piece))
        if at == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        rows[row].append(piece)
        if left := room - len(piece):
            if left not in open_rows:
                bisect.insort(rooms, left)
                open_rows[left] = []
            open_rows[left].append(row)
    return rows
