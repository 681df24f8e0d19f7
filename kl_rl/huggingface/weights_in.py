"""Tensors of a checkpoint -> parameters, one at a time, straight into their sharding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.huggingface.errors import CheckpointError
from kl_rl.huggingface.layout import CheckpointFiles
from kl_rl.huggingface.names import HEAD, Piece, is_buffer, pieces, prefix
from kl_rl.models.config import DecoderConfig

__all__ = ["Place", "read_weights", "untie", "with_names"]

Place = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding | None]
Views = dict[str, np.ndarray]


def full_name(layout: CheckpointFiles, name: str) -> str:
    """Name of a tensor in these files."""
    return name if name == HEAD else layout.prefix + name


def with_names(layout: CheckpointFiles, config: DecoderConfig, family: str, views: Views) -> CheckpointFiles:
    """Find out how the tensors are called and which are no parameters; check that none is missing or unknown.

    Args:
      layout: of the files.
      config: the architecture.
      family: model type.
      views: tensors by name.

    Returns:
      The layout with family, prefix and buffers.

    Raises:
      CheckpointError: naming the tensor that is missing, unknown or of a wrong shape or type.
    """
    whole = [piece for parts in pieces(config, family).values() for piece in parts]
    embedding = pieces(config, family)[("embed", "table")][0].name
    start = "" if embedding in views else prefix(family)  # some files leave it out
    layout = dataclasses.replace(layout, family=family, prefix=start)
    wanted = {full_name(layout, piece.name): piece for piece in whole}
    for name, piece in wanted.items():
        _check(layout, name, piece.stored_shape, views)
    buffers = {}
    for name in sorted(views.keys() - wanted.keys()):
        if not is_buffer(name) and not (name == HEAD and config.tied):
            raise CheckpointError(f"{layout.file_of(name)}: tensor {name}: {family} has no such parameter")
        if name != HEAD:
            buffers[name] = np.array(views[name])
    return dataclasses.replace(layout, buffers=buffers)


def _check(layout: CheckpointFiles, name: str, shape: tuple[int, ...], views: Views) -> None:
    if name not in views:
        where = layout.files[0].path if len(layout.files) == 1 else layout.folder
        raise CheckpointError(
            f"{where}: tensor {name}: missing; config.json asks for one of shape {list(shape)}"
        )
    found = views[name]
    if found.shape != shape:
        raise CheckpointError(
            f"{layout.file_of(name)}: tensor {name}: has shape {list(found.shape)}; config.json asks for {list(shape)}"
        )
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise CheckpointError(
            f"{layout.file_of(name)}: tensor {name}: holds {found.dtype}, expected floating point"
        )


def untie(config: DecoderConfig, views: Views, family: str) -> DecoderConfig:
    """Believe the file: a "tied" model whose head differs from its embedding is not tied (as in transformers).

    Args:
      config: as config.json says.
      views: tensors by name.
      family: model type.

    Returns:
      The architecture of the file.
    """
    if not config.tied or HEAD not in views:
        return config
    name = pieces(config, family)[("embed", "table")][0].name
    table = views.get(prefix(family) + name, views.get(name))
    same = table is not None and np.array_equal(table, views[HEAD])
    return config if same else dataclasses.replace(config, tied=False)


@dataclasses.dataclass(frozen=True)
class _Stacked:
    """A parameter as views of its layers' tensors; indexing reads what is asked for."""

    layers: list[np.ndarray]
    stacked: bool
    dtype: np.dtype

    def __call__(self, index: tuple[slice, ...] | None) -> np.ndarray:
        """The part of the parameter at these slices, converted; all of it for None."""
        index = index or (slice(None),) * (self.layers[0].ndim + self.stacked)
        if not self.stacked:
            return np.array(self.layers[0][index], self.dtype, order="C")  # a copy: the file may go away
        chosen = self.layers[index[0]]
        first = chosen[0][index[1:]]
        out = np.empty((len(chosen), *first.shape), self.dtype)
        for i, layer in enumerate(chosen):
            out[i] = layer[index[1:]]
        return out


def _parameter(
    layout: CheckpointFiles, parts: list[Piece], views: Views, dtype: Any
) -> tuple[tuple[int, ...], _Stacked]:
    layers = [piece.view(views[full_name(layout, piece.name)]) for piece in parts]
    stacked = parts[0].layer is not None
    shape = (len(layers), *parts[0].shape) if stacked else parts[0].shape
    kind = (
        np.dtype(jnp.result_type(*{x.dtype for x in layers})) if dtype is None else np.dtype(jnp.dtype(dtype))
    )
    return shape, _Stacked(layers, stacked, kind)


def _arrays(
    layout: CheckpointFiles, config: DecoderConfig, views: Views, dtype: Any, place: Place | None
) -> Iterator[tuple[tuple[str, ...], jax.Array]]:
    for path, parts in pieces(config, layout.family).items():
        shape, read = _parameter(layout, parts, views, dtype)
        sharding = None if place is None else place(path, shape)
        if sharding is None:
            array = jnp.asarray(read(None))
        else:
            array = jax.make_array_from_callback(shape, sharding, read)
        yield path, array.block_until_ready()


def read_weights(
    layout: CheckpointFiles, config: DecoderConfig, views: Views, *, dtype: Any, place: Place | None
) -> dict[str, Any]:
    """All parameters; on the host at most one (stacked) parameter exists at a time.

    Args:
      layout: of the files, with names.
      config: the architecture.
      views: tensors by name.
      dtype: of the parameters; None: as stored.
      place: sharding of a parameter, by path and shape; each device then reads only its own slice.

    Returns:
      The nested dict of the decoder.
    """
    weights: dict[str, Any] = {}
    for path, array in _arrays(layout, config, views, dtype, place):
        node = weights
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = array
    return weights
