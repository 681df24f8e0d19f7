"""Placing a run on a mesh: data-parallel batches, parameters split over ``fsdp`` where they divide.

No method knows of it: ``jax.jit`` follows the shardings of its arguments, so the same ``advance`` runs unsharded, on
simulated devices and on a pod.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ["make_mesh", "place"]


def make_mesh(data: int = 1, fsdp: int = 1) -> Mesh:
    """A mesh of ``data * fsdp`` devices with automatic axes.

    Args:
      data: copies of the model, each with a share of the batch.
      fsdp: parts that large parameters are split into.

    Returns:
      The mesh.

    Raises:
      ValueError: if there are fewer devices than that.
    """
    devices = jax.devices()
    if data * fsdp > len(devices):
        raise ValueError(f"a mesh of {data} x {fsdp} needs {data * fsdp} devices; there are {len(devices)}")
    grid = np.array(devices[: data * fsdp]).reshape(data, fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def _split(leaf: Any, mesh: Mesh) -> PartitionSpec:
    """Split the largest axis that ``fsdp`` divides; keep the rest whole."""
    parts = mesh.shape["fsdp"]
    shape = jax.numpy.shape(leaf)
    fitting = [axis for axis, size in enumerate(shape) if parts > 1 and size % parts == 0 and size >= parts]
    if not fitting:
        return PartitionSpec()
    longest = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*("fsdp" if axis == longest else None for axis in range(len(shape))))


def place(tree: Any, mesh: Mesh) -> Any:
    """Copy a pytree (a base policy, a run) onto the mesh, arrays split over ``fsdp`` where a dimension divides.

    The copy never aliases its source, so donating it cannot delete the caller's arrays.

    Args:
      tree: arrays, typed PRNG keys included.
      mesh: from ``make_mesh``.

    Returns:
      The same tree, placed.
    """

    def put(leaf: Any) -> Any:
        key = jax.numpy.issubdtype(jax.numpy.asarray(leaf).dtype, jax.dtypes.prng_key)
        spec = PartitionSpec() if key else _split(leaf, mesh)
        return jax.device_put(leaf, NamedSharding(mesh, spec), may_alias=False)

    return jax.tree.map(put, tree)
