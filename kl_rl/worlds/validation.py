"""Checks of single fields of a world file; every complaint names the file, the field and what to do."""

from __future__ import annotations

import difflib
import math
from typing import Any, NoReturn

import numpy as np

__all__ = [
    "BadWorld",
    "Field",
    "check_keys",
    "distribution",
    "integer",
    "items",
    "number",
    "number_table",
    "stochastic_table",
    "token_list",
]

ROW_SUM_TOLERANCE = 1e-6


class BadWorld(ValueError):
    """A world cannot be used; the message names the file, the field and what to do."""


class Field:
    """A place in a world file, such as `base.transition[2]` of `w.json`."""

    def __init__(self, where: str, path: str = ""):
        self.where, self.path = where, path

    def __truediv__(self, key: str) -> Field:
        """The member `key` of this object."""
        return Field(self.where, f"{self.path}.{key}" if self.path else key)

    def __getitem__(self, index: int) -> Field:
        """The item `index` of this list."""
        return Field(self.where, f"{self.path}[{index}]")

    def fail(self, problem: str) -> NoReturn:
        """Raise BadWorld about this field."""
        place = f"{self.where}: {self.path}" if self.path else self.where
        raise BadWorld(f"{place}: {problem}")


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_keys(value: object, schema: dict[str, Any], field: Field) -> dict[str, Any]:
    """The object itself if its keys are those the schema knows and none is missing."""
    if not isinstance(value, dict):
        field.fail(f"must be an object in braces, got {_show(value)}")
    known = list(schema["properties"])
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            field.fail(f'unknown key "{key}"{hint} Known keys: {", ".join(known)}')
    for key in schema["required"]:
        if key not in value:
            field.fail(f'key "{key}" is missing; add it (required: {", ".join(schema["required"])})')
    return value


def items(value: object, field: Field, *, nonempty: bool = True) -> list[Any]:
    """The value if it is a JSON list."""
    if not isinstance(value, list):
        field.fail(f"must be a list in brackets, got {_show(value)}")
    if nonempty and not value:
        field.fail("is an empty list; give at least one item")
    return value


def number(value: object, field: Field) -> float:
    """A finite number; booleans, strings and NaN are refused."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        field.fail(f"must be a number, got {_show(value)}")
    if not math.isfinite(_as_float(value)):
        field.fail(f"must be finite, got {_show(value)}; give a finite number")
    return float(value)


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def integer(value: object, field: Field, *, low: int, high: int | None = None, what: str = "") -> int:
    """An integer in [low, high)."""
    if isinstance(value, bool) or not isinstance(value, int):
        field.fail(f"must be an integer, got {_show(value)}")
    if value < low or (high is not None and value >= high):
        limits = f"at least {low}" if high is None else f"between {low} and {high - 1}"
        field.fail(f"must be {limits}{what}, got {_show(value)}")
    return value


def token_list(value: object, field: Field, vocab: int, *, nonempty: bool = False) -> list[int]:
    """A list of token ids below the vocabulary size."""
    what = f" (tokens of a vocabulary of {vocab})"
    tokens = items(value, field, nonempty=nonempty)
    return [integer(token, field[i], low=0, high=vocab, what=what) for i, token in enumerate(tokens)]


def distribution(value: object, field: Field, size: int | None = None) -> np.ndarray:
    """A probability vector: nonnegative, of the right length, sum 1 up to 1e-6, then normalized."""
    entries = items(value, field)
    if size is not None and len(entries) != size:
        field.fail(f"must have {size} entries, got {len(entries)}; make the lengths agree")
    row = np.array([number(entry, field[i]) for i, entry in enumerate(entries)])
    for i in np.flatnonzero(row < 0):
        field[int(i)].fail(f"is a negative probability, {row[i]:g}; probabilities are between 0 and 1")
    total = math.fsum(row)
    if abs(total - 1.0) > ROW_SUM_TOLERANCE:
        field.fail(f"sums to {total:.9g}, not to 1; divide its entries by their sum")
    return row / total


def stochastic_table(value: object, field: Field, shape: tuple[int | None, ...]) -> np.ndarray:
    """A nested list of probability vectors; `None` in the shape: any length, but the same in all rows."""
    if len(shape) == 1:
        return distribution(value, field, shape[0])
    rows = items(value, field)
    if shape[0] is not None and len(rows) != shape[0]:
        field.fail(f"must have {shape[0]} rows, got {len(rows)}; make the lengths agree")
    parts: list[np.ndarray] = []
    inner = shape[1:]
    for i, row in enumerate(rows):
        parts.append(stochastic_table(row, field[i], inner))
        inner = parts[0].shape
    return np.stack(parts)


def number_table(value: object, field: Field, shape: tuple[int, int]) -> np.ndarray:
    """A nested list of finite numbers of a given shape."""
    rows = items(value, field)
    if len(rows) != shape[0]:
        field.fail(f"must have {shape[0]} rows, got {len(rows)}; make the lengths agree")
    table = np.empty(shape)
    for i, row in enumerate(rows):
        entries = items(row, field[i])
        if len(entries) != shape[1]:
            field[i].fail(f"must have {shape[1]} entries, one for each token, got {len(entries)}")
        table[i] = [number(entry, field[i][j]) for j, entry in enumerate(entries)]
    return table
