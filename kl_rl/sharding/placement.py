"""Putting pytrees on a mesh: runs, states, policies, batches."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kl_rl.core.trajectories import Trajectories
from kl_rl.sharding.rules import MESH_AXES, axis_size, parameter_spec

__all__ = ["is_frozen", "place", "place_batch", "put", "replicated", "shardings"]

FROZEN = frozenset({"shared", "base"})  # attributes of Policy and Posterior whose arrays no step changes


def is_frozen(path: tuple[Any, ...]) -> bool:
    """Whether a leaf is of a policy's ``shared`` arrays or of a posterior's ``base``: never trained, never donated."""
    return any(getattr(key, "name", None) in FROZEN for key in path)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)


def _generic(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """For matrices and higher that no rule names (tables): the largest axis that ``fsdp`` divides."""
    parts = mesh.shape.get("fsdp", 1)
    fitting = [axis for axis, size in enumerate(shape) if parts > 1 and size and size % parts == 0]
    if not fitting or len(shape) < 2:
        return PartitionSpec()
    longest = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*("fsdp" if axis == longest else None for axis in range(len(shape))))


def _rows(leaf: Any, mesh: Mesh) -> NamedSharding:
    """The leading axis over data and fsdp, where it divides."""
    shape = np.shape(leaf)
    if not shape or shape[0] % axis_size(mesh, "batch"):
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(MESH_AXES["batch"]))


def _leaf(path: tuple[Any, ...], leaf: Any, mesh: Mesh) -> NamedSharding:
    if _is_key(leaf):
        return replicated(mesh)
    names = [key.key for key in path if isinstance(getattr(key, "key", None), str)]
    spec = parameter_spec(".".join(names[-2:]), np.shape(leaf), mesh)
    return NamedSharding(mesh, _generic(np.shape(leaf), mesh) if spec is None else spec)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Where every array of a pytree goes; nothing is moved.

    Parameters follow the rules, and so do gradients and optimizer state, which carry their names; ``Trajectories`` are
    split by prompt; what no rule names is split over ``fsdp`` where a dimension of a matrix divides, else whole.

    Args:
      tree: arrays or ``jax.ShapeDtypeStruct``: a state, a run, a posterior, a batch.
      mesh: from ``make_mesh``.

    Returns:
      The same structure of ``NamedSharding``.
    """

    def node(path, entry):
        if isinstance(entry, Trajectories):
            return jax.tree.map(lambda leaf: _rows(leaf, mesh), entry)
        return _leaf(path, entry, mesh)

    return jax.tree.map_with_path(node, tree, is_leaf=lambda x: isinstance(x, Trajectories))


def put(leaf: Any, sharding: NamedSharding) -> Any:
    """A copy with this sharding; in many processes each hands over its own parts of a value that all of them have.

    Args:
      leaf: an array, a typed PRNG key, or a plain number, which stays as it is.
      sharding: where it goes.

    Returns:
      The copy.
    """
    if isinstance(leaf, bool | int | float):
        return leaf
    if sharding.is_fully_addressable:  # device_put alone may keep the source's buffer as the part of device 0
        return jax.device_put(jax.numpy.copy(leaf), sharding, may_alias=False)
    if _is_key(leaf):
        data = put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(jax.numpy.copy, out_shardings=sharding)(leaf)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: np.array(whole[index]))


def place(tree: Any, mesh: Mesh) -> Any:
    """Copy a pytree (a run, a posterior, both at once) onto the mesh.

    The copy never aliases its source, and no two of its trained arrays are one, so donating it deletes nothing of the
    caller's. Frozen arrays (a policy's ``shared`` weights, the posterior's base) that are one array in the tree stay
    one: place a run and its posterior in one call, and an adapter keeps sharing its base.

    Args:
      tree: arrays, typed PRNG keys included; in many processes, the same values in each.
      mesh: from ``make_mesh``.

    Returns:
      The same tree, placed.
    """
    copies: dict[int, jax.Array] = {}

    def one(path, leaf, sharding):
        if not is_frozen(path):
            return put(leaf, sharding)
        if id(leaf) not in copies:
            copies[id(leaf)] = put(leaf, sharding)
        return copies[id(leaf)]

    return jax.tree.map_with_path(one, tree, shardings(tree, mesh))


def place_batch(batch: Trajectories, mesh: Mesh) -> Trajectories:
    """Split a batch by prompt over the mesh; each process gives the prompts it has loaded.

    Args:
      batch: in one process the whole batch; in many, this process's share of the prompts.
      mesh: from ``make_mesh``.

    Returns:
      The whole batch, split over data and fsdp.

    Raises:
      ValueError: if the number of prompts cannot be split.
    """
    parts = axis_size(mesh, "batch")
    count = batch.prompt.shape[0] * len({device.process_index for device in mesh.devices.flat})
    if count % parts:
        raise ValueError(
            f"a batch of {count} prompts cannot be split over data x fsdp = {parts} devices: use a multiple of {parts}"
        )
    split = NamedSharding(mesh, PartitionSpec(MESH_AXES["batch"]))
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(split, np.asarray(leaf)), batch)
