"""One safetensors file: its header as it is, its tensors as views of the mapped file; checked before anything is read.

The format (8 bytes of header length, a JSON header, the bytes of the tensors one after another) is read here directly,
because a file can only be written again bit for bit if the order of its tensors and the bytes of its header are kept.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kl_rl.huggingface.errors import CheckpointError

__all__ = ["DTYPES", "Stored", "TensorFile", "header_bytes", "open_file"]

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
LONGEST_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
      name: as in the file.
      dtype: safetensors' name of it.
      shape: as in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """An opened file.

    Attributes:
      path: of the file.
      header: its first bytes, up to the first tensor.
      metadata: strings about the file.
      tensors: in the order of their bytes.
    """

    path: Path
    header: bytes
    metadata: dict[str, str] | None
    tensors: tuple[Stored, ...]

    def views(self) -> dict[str, np.ndarray]:
        """All tensors as read-only views of the mapped file; bytes are read when they are used."""
        offset, found = len(self.header), {}
        whole = np.memmap(self.path, np.uint8, mode="r")
        for tensor in self.tensors:
            raw = np.asarray(whole[offset : offset + tensor.size])
            found[tensor.name] = raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape)
            offset += tensor.size
        return found


def header_bytes(tensors: tuple[Stored, ...], metadata: dict[str, str] | None) -> bytes:
    """The first bytes of a file: length and JSON header, padded with spaces to a multiple of eight.

    Args:
      tensors: in the order in which their bytes follow.
      metadata: strings about the file.

    Returns:
      The bytes up to the first tensor.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.size]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_header(path: Path, size: int) -> tuple[bytes, dict[str, Any]]:
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > LONGEST_HEADER or 8 + length > size:
            raise CheckpointError(
                f"{path}: truncated or no safetensors file: it has {size} bytes, its header would need {8 + length}"
            )
        text = file.read(length)
    try:
        entries = json.loads(text)
        if not isinstance(entries, dict):
            raise ValueError("its header is no JSON object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    return start + text, entries


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r:.60} is no whole number")
    return value


def _stored(path: Path, name: str, entry: Any) -> tuple[int, int, Stored]:
    """Begin and end of the bytes of a tensor, and what it is."""
    try:
        begin, end = map(_whole, entry["data_offsets"])
        tensor = Stored(name, str(entry["dtype"]), tuple(map(_whole, entry["shape"])))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: tensor {name}: damaged entry in the header: {entry!r:.200}"
        ) from error
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name}: dtype {tensor.dtype!r} is not supported")
    if min(tensor.shape, default=0) < 0 or end - begin != tensor.size:
        raise CheckpointError(
            f"{path}: tensor {name}: {end - begin} bytes do not make {tensor.dtype} {tensor.shape}"
        )
    return begin, end, tensor


def open_file(path: Path) -> TensorFile:
    """Read and check the header of a file.

    Args:
      path: a .safetensors file.

    Returns:
      The file; no tensor is read yet.

    Raises:
      CheckpointError: truncated, damaged, or not in this format.
      OSError: the file cannot be read.
    """
    size = path.stat().st_size
    header, entries = _read_header(path, size)
    metadata = entries.pop("__metadata__", None)
    tensors = sorted((_stored(path, *item) for item in entries.items()), key=lambda item: item[:2])
    position = 0
    for begin, end, tensor in tensors:
        if begin != position:
            raise CheckpointError(
                f"{path}: tensor {tensor.name}: its bytes begin at {begin}, expected {position}"
            )
        position = end
    if len(header) + position != size:
        problem = "truncated" if len(header) + position > size else "longer than its header says"
        raise CheckpointError(f"{path}: {problem}: it has {size} bytes, expected {len(header) + position}")
    return TensorFile(path, header, metadata, tuple(tensor for _, _, tensor in tensors))
