"""Sampled sequences as four arrays (reward, two log-probabilities, prompt), read from JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

__all__ = ["BadSamples", "Samples", "read_samples"]

_NUMBERS = ("reward", "logp_tuned", "logp_base")
_CHUNK = 20_000
_ROUNDING = 1e-6  # a log-probability may exceed 0 by this much


class BadSamples(ValueError):
    """The samples cannot be used; the message names the file, the line, the field and what to do."""


class Samples(NamedTuple):
    """Sequences drawn from one policy and scored under both; equal lengths, log-probabilities in nats.

    Attributes:
        reward: reward of each sequence, [n].
        logp_tuned: log q(y|x) of the whole sequence, [n].
        logp_base: log p0(y|x) of the same sequence, [n].
        prompt: identifier of the prompt of each sequence (integers or strings), [n]; None: one prompt only.
    """

    reward: np.ndarray
    logp_tuned: np.ndarray
    logp_base: np.ndarray
    prompt: np.ndarray | None = None

    @property
    def log_ratio(self) -> np.ndarray:
        """`l = log q - log p0`, [n]."""
        return np.asarray(self.logp_tuned, np.float64) - np.asarray(self.logp_base, np.float64)

    @classmethod
    def from_log_ratio(
        cls, reward: np.ndarray, log_ratio: np.ndarray, prompt: np.ndarray | None = None
    ) -> Samples:
        """Samples known by their log-ratio only, which is all that the calibration loss needs."""
        ratio = np.asarray(log_ratio, np.float64)
        return cls(np.asarray(reward, np.float64), ratio, np.zeros_like(ratio), prompt)


def read_samples(path: str | Path) -> Samples:
    """Read one JSON object a line: `{"reward": r, "logp_tuned": a, "logp_base": b, "prompt": id}`.

    Lines are parsed in chunks and checked as arrays; only a chunk that fails is looked at line by line.

    Args:
        path: the file; "-" reads standard input. "prompt" (an integer or a string) is on all lines or on
            none.

    Returns:
        The samples.

    Raises:
        BadSamples: for anything unreadable, naming file, line number and field.
    """
    name = "standard input" if str(path) == "-" else str(path)
    lines = _lines(_bytes(path, name), name)
    first = _parse(lines[0].strip(), 1, name, last=len(lines) == 1)
    with_prompt = "prompt" in first
    chunks = [_chunk(lines[i : i + _CHUNK], i, name, with_prompt) for i in range(0, len(lines), _CHUNK)]
    columns = [np.concatenate([chunk[j] for chunk in chunks]) for j in range(3)]
    prompt = np.concatenate([chunk[3] for chunk in chunks]) if with_prompt else None
    return Samples(columns[0], columns[1], columns[2], prompt)


def _bytes(path: str | Path, name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
    except IsADirectoryError:
        raise BadSamples(f"{name}: is a directory; give a file with one JSON object a line") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadSamples(f"{name}: cannot be read ({reason})") from None


def _lines(data: bytes, name: str) -> list[str]:
    """Decoded lines without the blank ones at the end."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadSamples(f"{name}, line {line}: not valid UTF-8 text; save the file as UTF-8") from None
    text = text.rstrip("\r\n\t ")
    if not text:
        raise BadSamples(f"{name}: is empty; it needs one JSON object a line, at least two lines")
    return text.split("\n")


def _chunk(lines: list[str], before: int, name: str, with_prompt: bool) -> tuple[np.ndarray, ...]:
    """Parse many lines at once; on any irregularity go through them one by one to name the culprit."""
    stripped = [line.strip() for line in lines]
    try:
        if not all(line.startswith("{") and line.endswith("}") for line in stripped):
            raise ValueError("a line is not one object")
        rows = json.loads("[" + ",".join(stripped) + "]")
        if len(rows) != len(lines):
            raise ValueError("a line holds several objects")
        return _columns(rows, with_prompt)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        _diagnose(stripped, before, name, with_prompt)


def _columns(rows: list[dict], with_prompt: bool) -> tuple[np.ndarray, ...]:
    """Arrays from parsed rows; any failure raises, the reason is found by `_diagnose`."""
    if {len(row) for row in rows} != {3 + with_prompt}:
        raise ValueError("fields differ")
    arrays = []
    for field in _NUMBERS:
        column = [row[field] for row in rows]
        if not set(map(type, column)) <= {int, float}:
            raise ValueError("not a number")
        arrays.append(np.array(column, np.float64))
    if not all(np.all(np.isfinite(a)) for a in arrays) or max(a.max() for a in arrays[1:]) > _ROUNDING:
        raise ValueError("out of range")
    if not with_prompt:
        return tuple(arrays)
    prompts = np.empty(len(rows), object)
    prompts[:] = [row["prompt"] for row in rows]
    if not set(map(type, prompts)) <= {int, str}:
        raise ValueError("prompt is neither an integer nor a string")
    return (*arrays, prompts)


def _fail(name: str, line: int, message: str) -> NoReturn:
    raise BadSamples(f"{name}, line {line}: {message}")


def _diagnose(lines: list[str], before: int, name: str, with_prompt: bool) -> NoReturn:
    """Raise for the first bad line of a chunk that follows `before` good lines."""
    for number, line in enumerate(lines, before + 1):
        row = _parse(line, number, name, last=number == before + len(lines))
        if ("prompt" in row) != with_prompt:
            state = "is missing here but given" if with_prompt else "is given here but missing"
            _fail(name, number, f'field "prompt" {state} on line 1; give it on every line or on none')
        _check_fields(row, number, name)
    _fail(name, before + 1, "the lines from here on cannot be read as samples")


def _parse(line: str, number: int, name: str, last: bool) -> dict:
    if not line:
        _fail(name, number, "blank line; remove it")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = (
            " (the line looks cut off: was the file written to its end?)" if last and line[0] == "{" else ""
        )
        _fail(name, number, f"not valid JSON: {error}{hint}")
    if not isinstance(row, dict):
        _fail(name, number, f"not a JSON object but {type(row).__name__}; each line is one object in braces")
    return row


def _check_fields(row: dict, number: int, name: str) -> None:
    for field in _NUMBERS:
        if field not in row:
            _fail(name, number, f'field "{field}" is missing; each line needs {", ".join(_NUMBERS)}')
        _check_number(row[field], field, number, name)
    unknown = sorted(set(row) - {*_NUMBERS, "prompt"})
    if unknown:
        _fail(name, number, f'unknown field "{unknown[0]}"; known are {", ".join(_NUMBERS)}, prompt')
    if "prompt" in row and type(row["prompt"]) not in (int, str):
        _fail(name, number, f'field "prompt" must be an integer or a string, got {row["prompt"]!r:.60}')


def _check_number(value: object, field: str, number: int, name: str) -> None:
    if type(value) not in (int, float):
        _fail(name, number, f'field "{field}" must be a number, got {value!r:.60}')
    try:
        x = float(value)  # type: ignore[arg-type]
    except OverflowError:
        x = float("inf")
    if not np.isfinite(x):
        _fail(
            name,
            number,
            f'field "{field}" must be finite, got {str(value)[:40]}; drop or rescore this sample',
        )
    if field != "reward" and x > _ROUNDING:
        advice = "it must be a log-probability (natural log, <= 0) of the whole sequence"
        _fail(name, number, f'field "{field}" is {x:g} > 0; {advice}')
