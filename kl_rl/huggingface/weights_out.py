"""Parameters -> safetensors files, one tensor at a time, in the order and with the headers of given files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.huggingface.errors import CheckpointError
from kl_rl.huggingface.layout import SINGLE, CheckpointFiles
from kl_rl.huggingface.names import HEAD, Piece, pieces, prefix
from kl_rl.huggingface.safetensors_file import DTYPES, Stored, TensorFile, header_bytes
from kl_rl.models.config import DecoderConfig
from kl_rl.sharding.processes import whole

__all__ = ["OutFile", "fresh_files", "index_text", "same_files", "tensor_sources", "tensors_of", "write_file"]

METADATA = {"format": "pt"}  # transformers opens nothing else
CODES = {dtype: code for code, dtype in DTYPES.items()}
Sources = dict[str, list[Piece]]


@dataclasses.dataclass(frozen=True)
class OutFile:
    """A file to be written.

    Attributes:
      name: of the file.
      header: bytes up to the first tensor.
      tensors: in the order of their bytes.
    """

    name: str
    header: bytes
    tensors: tuple[Stored, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.header) + sum(tensor.size for tensor in self.tensors)


def tensor_sources(config: DecoderConfig, family: str, start: str | None = None) -> Sources:
    """Tensor name -> the pieces that it is made of, in the order of the model.

    Args:
      config: the architecture.
      family: model type.
      start: what the names begin with; None: as transformers writes them.
    """
    found: Sources = {}
    start = prefix(family) if start is None else start
    for piece in [piece for parts in pieces(config, family).values() for piece in parts]:
        name = piece.name if piece.name == HEAD else start + piece.name
        found.setdefault(name, []).append(piece)
    return found


def _leaf(weights: dict[str, Any], path: tuple[str, ...]) -> Any:
    node: Any = weights
    for depth, key in enumerate(path):
        if not isinstance(node, dict) or key not in node:
            raise CheckpointError(
                f"weights have no {'/'.join(path[: depth + 1])}, which the configuration asks for"
            )
        node = node[key]
    return node


def check_shapes(config: DecoderConfig, family: str, weights: dict[str, Any]) -> None:
    """Compare parameters with the configuration before anything is written.

    Raises:
      CheckpointError: naming the parameter that is missing, unknown or of a wrong shape.
    """
    expected = pieces(config, family)
    for path, parts in expected.items():
        shape = parts[0].shape if parts[0].layer is None else (len(parts), *parts[0].shape)
        found = tuple(_leaf(weights, path).shape)
        if found != shape:
            raise CheckpointError(
                f"weights: {'/'.join(path)} has shape {list(found)}, expected {list(shape)}"
            )
    for keys, _ in jax.tree.flatten_with_path(weights)[0]:
        path = tuple(str(getattr(key, "key", key)) for key in keys)
        if path not in expected:
            raise CheckpointError(f"weights: {'/'.join(path)} is no parameter of the configuration")


def same_files(layout: CheckpointFiles, sources: Sources, *, dtype: str | None) -> list[OutFile] | None:
    """The files of a layout for these tensors, or None if the layout lacks one of them.

    Args:
      layout: of the files that were read.
      sources: the tensors to be written.
      dtype: safetensors' name of the dtype of all parameters; None: as they were.
    """
    names = layout.stored.keys() - layout.buffers.keys()
    if names - {HEAD} != sources.keys() - {HEAD} or (HEAD in sources and HEAD not in names):
        return None

    def renewed(tensor: Stored) -> Stored:
        if tensor.name in layout.buffers:
            return tensor
        shape = _stored_shape(sources, tensor.name)
        return Stored(tensor.name, dtype or tensor.dtype, shape)

    return [_same_file(file, tuple(map(renewed, file.tensors))) for file in layout.files]


def _same_file(file: TensorFile, tensors: tuple[Stored, ...]) -> OutFile:
    header = file.header if tensors == file.tensors else header_bytes(tensors, file.metadata)
    return OutFile(file.path.name, header, tensors)


def _stored_shape(sources: Sources, name: str) -> tuple[int, ...]:
    if name in sources:
        return sources[name][0].stored_shape
    return _embedding(sources).stored_shape  # the head of a tied model, stored a second time


def _embedding(sources: Sources) -> Piece:
    return next(piece for parts in sources.values() for piece in parts if piece.path == ("embed", "table"))


def fresh_files(
    sources: Sources, weights: dict[str, Any], *, dtype: str | None, max_shard_bytes: float
) -> list[OutFile]:
    """One file, or several if it would be larger than a limit, as transformers names them.

    Args:
      sources: the tensors to be written.
      weights: the parameters (only their dtypes are looked at).
      dtype: safetensors' name of the dtype of all of them; None: as they are.
      max_shard_bytes: limit; a single larger tensor still makes one file.
    """
    shards: list[list[Stored]] = [[]]
    for name, parts in sources.items():
        code = dtype or CODES[np.dtype(_leaf(weights, parts[0].path).dtype)]
        tensor = Stored(name, code, parts[0].stored_shape)
        if shards[-1] and sum(t.size for t in shards[-1]) + tensor.size > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    ordered = [tuple(sorted(s, key=lambda t: (-DTYPES[t.dtype].itemsize, t.name))) for s in shards]
    total = len(ordered)
    names = (
        [SINGLE] if total == 1 else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    )
    return [OutFile(n, header_bytes(t, METADATA), t) for n, t in zip(names, ordered, strict=True)]


def index_text(files: Iterable[OutFile], layout: CheckpointFiles | None) -> str | None:
    """Text of the shard index; None for a single file.

    Args:
      files: to be written.
      layout: whose index is kept as it is where it still holds.
    """
    files = list(files)
    if [file.name for file in files] == [SINGLE]:
        return None
    unchanged = layout is not None and [f.header for f in files] == [f.header for f in layout.files]
    if unchanged and layout is not None and layout.index is not None:
        return layout.index
    where = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(tensor.size for file in files for tensor in file.tensors)
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True) + "\n"
    )


def _host(leaf: Any, layer: int | None) -> np.ndarray:
    """One layer of a parameter, gathered on the host (on every host, if it is spread over several processes)."""
    return whole(leaf if layer is None else leaf[layer])


def _holds_less(kind: np.dtype, than: np.dtype) -> bool:
    floats = all(jnp.issubdtype(x, jnp.floating) for x in (kind, than))
    return floats and bool(jnp.finfo(kind).max < jnp.finfo(than).max)


def _tensor(parts: list[Piece], weights: dict[str, Any], kind: np.dtype) -> np.ndarray:
    """A tensor as it is stored: its pieces side by side; rows that no piece covers are zero."""
    stored = np.zeros(parts[0].stored_shape, kind)
    for piece in parts:
        values = _host(_leaf(weights, piece.path), piece.layer)
        with np.errstate(over="ignore"):
            narrow = values.astype(kind)
        if _holds_less(kind, values.dtype) and np.any(np.isinf(narrow) & np.isfinite(values)):
            raise CheckpointError(f"weights: {'/'.join(piece.path)}: too large for {kind.name}; use bfloat16")
        piece.view(stored)[...] = narrow
    return stored


def tensors_of(
    file: OutFile, sources: Sources, weights: dict[str, Any], buffers: dict[str, np.ndarray]
) -> Iterator[np.ndarray]:
    """The tensors of a file in order; on the host only one exists at a time.

    Args:
      file: what goes into it.
      sources: what each tensor is made of.
      weights: the parameters. Where they are spread over several processes, each must go through all tensors.
      buffers: constants that are written as they are.

    Yields:
      Tensors as they are stored.
    """
    for tensor in file.tensors:
        if tensor.name in buffers:
            yield buffers[tensor.name]
        else:
            yield _tensor(sources.get(tensor.name) or [_embedding(sources)], weights, DTYPES[tensor.dtype])


def write_file(path: Path, header: bytes, tensors: Iterable[np.ndarray]) -> None:
    """Write one file.

    Args:
      path: of the file.
      header: bytes up to the first tensor.
      tensors: in the order of the header.
    """
    with path.open("wb") as out:
        out.write(header)
        for tensor in tensors:
            out.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
