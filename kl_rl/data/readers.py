"""Rows of a data file, each with its place: JSON lines (also gzipped), parquet, Hugging Face datasets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kl_rl.data.errors import DataError, Skipped, pass_over
from kl_rl.data.lines import read_lines

__all__ = ["HUB_PREFIX", "Rows", "read_datasets", "read_jsonl", "read_parquet", "read_rows"]

Rows = Iterator[tuple[str, dict[str, Any]]]

HUB_PREFIX = "hf:"
"""What a data set of the Hugging Face kind is named with: ``hf:NAME:SPLIT`` or ``hf:NAME:CONFIG:SPLIT``."""

_HUB_NAME = re.compile(r"hf:(?P<name>[^:]+)(?::(?P<config>[^:\[\]]+))?:(?P<split>[^:\[\]]+(?:\[[^\]]*\])?)")


class _Twice(ValueError):
    pass


def read_rows(source: str | Path, *, skipped: Skipped | None = None) -> Rows:
    """Read any of the formats, told by the ending or by the prefix ``hf:``.

    Args:
      source: a file ending in .jsonl, .jsonl.gz or .parquet, or the name of a data set.
      skipped: counts malformed rows, which are then passed over; None: they raise.

    Returns:
      Iterator over ("file: line 12", row).

    Raises:
      DataError: naming file, line and field.
      OSError: of the file system.
    """
    name = str(source)
    if name.startswith(HUB_PREFIX):
        return read_datasets(name)
    if name.endswith(".parquet"):
        return read_parquet(source, skipped=skipped)
    if name.endswith((".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")):
        return read_jsonl(source, skipped=skipped)
    raise DataError(
        f"{name}: not a known kind of data; give a file ending in .jsonl, .jsonl.gz or .parquet, "
        f"or {HUB_PREFIX}NAME:SPLIT for a Hugging Face data set"
    )


def read_jsonl(path: str | Path, *, skipped: Skipped | None = None) -> Rows:
    """JSON lines: one object on each line, UTF-8; blank lines are passed over.

    Args:
      path: the file; gunzipped if it ends in ``.gz``.
      skipped: counts malformed lines, which are then passed over; None: they raise.

    Yields:
      ("file: line 12", object).

    Raises:
      DataError: for an empty, binary or damaged file, and for lines that are not a JSON object.
      OSError: of the file system.
    """
    found = False
    lines = read_lines(path)
    while True:
        try:
            number, line = next(lines)
            if not line.strip():
                continue
            found = True
            row = _parsed(line, f"{path}: line {number}")
        except StopIteration:
            break
        except DataError as error:
            if not found:  # nothing of the file could be read
                raise
            pass_over(error, skipped)
            continue
        yield f"{path}: line {number}", row
    if not found:
        raise DataError(f"{path}: is empty; write one JSON object on each line")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise _Twice(key)
        row[key] = value
    return row


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode(), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8; save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        hint = "; one object on each line, not one list" if line.lstrip().startswith(b"[") else ""
        raise DataError(f"{where}: column {error.colno}: not valid JSON: {error.msg}{hint}") from None
    except _Twice as error:
        raise DataError(f'{where}: field "{error!s:.60}" appears twice; keep one') from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, nesting without end
        raise DataError(f"{where}: not valid JSON: {str(error).split(';')[0]}") from None
    if not isinstance(row, dict):
        kind = {list: "a list", str: "text", bool: "true or false", type(None): "null"}.get(
            type(row), "a number"
        )
        raise DataError(f"{where}: must be a JSON object in braces; found {kind}")
    return row


def read_parquet(path: str | Path, *, skipped: Skipped | None = None) -> Rows:
    """Rows of a parquet file; a null is an absent field.

    Args:
      path: the file.
      skipped: counts rows whose text is not UTF-8, which are then passed over; None: they raise.

    Yields:
      ("file: row 12", row), rows counted from 1.

    Raises:
      DataError: for a file that is not parquet, is damaged, or has no rows.
      OSError: of the file system.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    with open(path, "rb") as handle:
        try:
            file = pq.ParquetFile(handle)
            names = file.schema_arrow.names
            if double := next((n for n in names if names.count(n) > 1), None):
                raise DataError(f'{path}: field "{double}" appears twice; keep one')
            for batch in file.iter_batches(batch_size=1024):
                for index in range(batch.num_rows):
                    number += 1
                    try:
                        (row,) = batch.slice(index, 1).to_pylist()
                    except UnicodeDecodeError:
                        pass_over(DataError(f"{path}: row {number}: holds text that is not UTF-8"), skipped)
                        continue
                    except ValueError as error:  # a time too fine for Python's
                        problem = str(error).split("\n")[0]
                        pass_over(DataError(f"{path}: row {number}: cannot be read: {problem:.200}"), skipped)
                        continue
                    yield f"{path}: row {number}", row
        except (pa.ArrowException, OSError, OverflowError) as error:
            reason = str(error).split("\n")[0]
            place = f"row {number + 1}: " if number else ""
            raise DataError(f"{path}: {place}not a parquet file, or damaged: {reason:.200}") from None
    if not number:
        raise DataError(f"{path}: is empty; it has no rows")


def read_datasets(name: str) -> Rows:
    """Rows of a Hugging Face data set, from the hub or from a folder that ``save_to_disk`` wrote.

    Args:
      name: ``hf:NAME:SPLIT`` or ``hf:NAME:CONFIG:SPLIT``; the split may be a slice, ``train[:100]``.

    Yields:
      ("hf:org/name:train: row 12", row), rows counted from 1.

    Raises:
      DataError: for a name of another form, a data set that cannot be loaded or has no rows, or without the package.
    """
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise DataError(f"{name}: must be {HUB_PREFIX}NAME:SPLIT or {HUB_PREFIX}NAME:CONFIG:SPLIT")
    number = 0
    for number, row in enumerate(_load(name, **match.groupdict()), 1):
        yield f"{name}: row {number}", dict(row)
    if not number:
        raise DataError(f"{name}: is empty; it has no rows")


def _load(where: str, name: str, config: str | None, split: str) -> Iterable[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{where}: needs the package datasets: pip install 'kl-rl[datasets]'") from None
    try:
        if not Path(name).is_dir():
            return datasets.load_dataset(name, config, split=split)
        saved = datasets.load_from_disk(name)
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    except Exception as error:  # whatever hub, network or format raise: one line instead of a traceback
        raise DataError(f"{where}: cannot be loaded: {type(error).__name__}: {error!s:.300}") from None
