"""Lines of a plain or gzipped file, as many as can be had: what precedes damage is delivered before the complaint."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from kl_rl.data.errors import DataError

__all__ = ["LONGEST_LINE", "read_lines"]

LONGEST_LINE = 2**26
"""Bytes; a longer line is taken for a file that is not made of lines."""

_CHUNK = 2**16
_MAGIC = {
    b"PAR1": "a parquet file",
    b"PK\x03\x04": "a zip file",
    b"\x1f\x8b": "a gzip file",
    b"ARROW1": "an Arrow file",
}


class _Damaged(Exception):
    pass


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, from 1, without their line ends; gunzipped if the name ends in ``.gz``.

    Args:
      path: the file.

    Yields:
      line number and bytes.

    Raises:
      DataError: for an empty or binary file, a damaged gzip stream (after all lines before the damage), or a
        line of more than 64 MiB.
      OSError: of the file system.
    """
    number = 0
    with open(path, "rb") as handle:
        chunks: Iterator[bytes] = iter(lambda: handle.read(_CHUNK), b"")
        if str(path).endswith(".gz"):
            chunks = _inflated(chunks)
        try:
            for number, line in enumerate(_split(_checked(chunks, path), path), 1):
                yield number, line
        except _Damaged as error:
            raise DataError(f"{path}: line {number + 1}: {error}") from None
    if not number:
        raise DataError(f"{path}: is empty; write one JSON object on each line")


def _checked(chunks: Iterable[bytes], path: str | Path) -> Iterator[bytes]:
    """Refuses what is plainly not text."""
    first = True
    for chunk in chunks:
        if first:
            kind = next((k for magic, k in _MAGIC.items() if chunk.startswith(magic)), None)
            if kind or b"\0" in chunk:
                raise DataError(
                    f"{path}: is {kind or 'a binary file'}, not JSON lines in UTF-8; check name and ending"
                )
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")
        first = False
        yield chunk


def _split(chunks: Iterable[bytes], path: str | Path) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")
        if len(rest) > LONGEST_LINE:
            raise _Damaged(f"is longer than {LONGEST_LINE >> 20} MiB; not a file of JSON lines")
    if rest:
        yield rest


def _inflated(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Gunzip, several members too; all that can be inflated is delivered before an error is raised."""
    inflater = None
    for chunk in chunks:
        while chunk:
            inflater = inflater or zlib.decompressobj(wbits=31)
            before = inflater.copy()
            try:
                data = inflater.decompress(chunk)
            except zlib.error:
                yield from _slowly(before, chunk)
                return
            yield from (data,) if data else ()
            chunk = inflater.unused_data.lstrip(b"\0") if inflater.eof else b""
            inflater = None if inflater.eof else inflater
    if inflater is not None:
        yield from (rest,) if (rest := inflater.flush()) else ()
        raise _Damaged("the gzip stream ends here; the file is cut short: fetch or write it again")


def _slowly(inflater: zlib._Decompress, chunk: bytes) -> Iterator[bytes]:
    """Byte by byte up to the damage."""
    try:
        for i in range(len(chunk)):
            if data := inflater.decompress(chunk[i : i + 1]):
                yield data
    except zlib.error as error:
        raise _Damaged(f"the gzip stream is damaged here ({error}): fetch or write the file again") from None
