"""Hints to the compiler about activations on a mesh; nothing happens where ``jax.set_mesh`` has set none.

Left alone, the compiler may give the residual stream the split of the weights (its width over ``fsdp``) and gather
whole batches on every device. Two hints prevent it: activations are split by row, a table is read with whole rows.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType

__all__ = ["BATCH_AXES", "local_rows", "split_batch", "vocabulary_is_split", "whole_rows"]

BATCH_AXES = ("data", "fsdp")  # mesh axes that rows of a batch are split over


def _sizes() -> dict[str, int]:
    """Automatic axes of the mesh in context, by name."""
    mesh = jax.sharding.get_abstract_mesh()
    named = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in named if kind == AxisType.Auto}


def _batch_axes() -> tuple[tuple[str, ...], int]:
    """Those that rows are split over, and into how many parts."""
    sizes = _sizes()
    axes = tuple(axis for axis in BATCH_AXES if sizes.get(axis, 1) > 1)
    return axes, math.prod(sizes[axis] for axis in axes)


def local_rows(rows: int) -> int:
    """How many of so many rows are on each device."""
    parts = _batch_axes()[1]
    return rows if rows % parts else rows // parts


def vocabulary_is_split() -> bool:
    """Whether each device has only some columns of the logits."""
    return _sizes().get("tensor", 1) > 1


def split_batch(x: jax.Array) -> jax.Array:
    """Split the leading axis over data and fsdp, where the mesh in context has them and they divide it.

    Args:
      x: activations; [B, ...].

    Returns:
      The same values.
    """
    axes, parts = _batch_axes()
    if not axes or x.shape[0] % parts:
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(axes))


def whole_rows(table: jax.Array) -> jax.Array:
    """Gather the columns of a table that is about to be indexed by row; its rows may stay split.

    Args:
      table: [V, d].

    Returns:
      The same values.
    """
    if all(size == 1 for size in _sizes().values()):
        return table
    return jax.lax.with_sharding_constraint(table, jax.P(jax.P.UNCONSTRAINED, None))
