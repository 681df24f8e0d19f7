"""The rules, in one place: which axes a parameter has, and which mesh axis each of them is split over.

A parameter is known by the last two names of its path (``layers.query.kernel`` by ``query.kernel``), so that gradients,
optimizer moments and accumulated gradients, which carry the same names, follow their parameter.
"""

from __future__ import annotations

import math
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kl_rl.models.config import DecoderConfig
from kl_rl.models.parameters import weight_shapes

__all__ = [
    "MESH_AXES",
    "OPTIONAL",
    "PARAMETERS",
    "axis_size",
    "check_mesh",
    "parameter_spec",
    "weight_sharding",
]

# Logical axis -> mesh axes it is split over; an axis that is not here stays whole on every device.
MESH_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}

# Stays whole where it does not divide (GPT-2 has 50257 entries); every other axis that does not divide is an error.
OPTIONAL = frozenset({"vocab"})

# Parameter -> logical axes. LoRA factors are flat: the columns of ``query.b`` are heads x head_dim, head by head.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "embed.table": ("vocab", "embed"),
    "position.table": ("context", "embed"),
    "head.kernel": ("embed", "vocab"),
    "query.kernel": ("layers", "embed", "heads", "head_dim"),
    "query.bias": ("layers", "heads", "head_dim"),
    "query.a": ("layers", "embed", "rank"),
    "query.b": ("layers", "rank", "heads"),
    "key.kernel": ("layers", "embed", "kv_heads", "head_dim"),
    "key.bias": ("layers", "kv_heads", "head_dim"),
    "key.a": ("layers", "embed", "rank"),
    "key.b": ("layers", "rank", "kv_heads"),
    "value.kernel": ("layers", "embed", "kv_heads", "head_dim"),
    "value.bias": ("layers", "kv_heads", "head_dim"),
    "value.a": ("layers", "embed", "rank"),
    "value.b": ("layers", "rank", "kv_heads"),
    "out.kernel": ("layers", "heads", "head_dim", "embed"),
    "out.bias": ("layers", "norm"),
    "out.a": ("layers", "heads", "rank"),
    "out.b": ("layers", "rank", "embed"),
    "gate.kernel": ("layers", "embed", "mlp"),
    "gate.bias": ("layers", "mlp"),
    "gate.a": ("layers", "embed", "rank"),
    "gate.b": ("layers", "rank", "mlp"),
    "up.kernel": ("layers", "embed", "mlp"),
    "up.bias": ("layers", "mlp"),
    "up.a": ("layers", "embed", "rank"),
    "up.b": ("layers", "rank", "mlp"),
    "down.kernel": ("layers", "mlp", "embed"),
    "down.bias": ("layers", "norm"),
    "down.a": ("layers", "mlp", "rank"),
    "down.b": ("layers", "rank", "embed"),
    "attention_norm.scale": ("layers", "norm"),
    "attention_norm.bias": ("layers", "norm"),
    "attention_post_norm.scale": ("layers", "norm"),
    "attention_post_norm.bias": ("layers", "norm"),
    "mlp_norm.scale": ("layers", "norm"),
    "mlp_norm.bias": ("layers", "norm"),
    "mlp_post_norm.scale": ("layers", "norm"),
    "mlp_post_norm.bias": ("layers", "norm"),
    "query_norm.scale": ("layers", "head_dim"),
    "key_norm.scale": ("layers", "head_dim"),
    "final_norm.scale": ("norm",),
    "final_norm.bias": ("norm",),
}


def axis_size(mesh: Mesh, logical: str) -> int:
    """Number of parts that a logical axis is split into."""
    return math.prod(mesh.shape.get(axis, 1) for axis in MESH_AXES.get(logical, ()))


def _entry(mesh: Mesh, logical: str, size: int) -> Any:
    parts = axis_size(mesh, logical)
    if parts == 1 or size % parts:
        return None
    axes = tuple(axis for axis in MESH_AXES[logical] if mesh.shape.get(axis, 1) > 1)
    return axes[0] if len(axes) == 1 else axes


def parameter_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec | None:
    """How a parameter is split; an axis that its mesh axis does not divide stays whole.

    Args:
      name: the last two names of its path, "query.kernel".
      shape: of the array.
      mesh: the mesh.

    Returns:
      The spec, or None for a name (or a number of axes) that the table does not have.
    """
    logical = PARAMETERS.get(name)
    if logical is None or len(logical) != len(shape):
        return None
    return PartitionSpec(*(_entry(mesh, axis, size) for axis, size in zip(logical, shape, strict=True)))


def weight_sharding(mesh: Mesh) -> Any:
    """``(path, shape) -> sharding`` of a decoder's parameter, for reading a checkpoint straight into its place."""

    def sharding(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(".".join(path[-2:]), shape, mesh) or PartitionSpec())

    return sharding


def _named_shapes(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    if isinstance(tree, tuple):
        return [(path, tree)]
    return [found for name, entry in tree.items() for found in _named_shapes(entry, (*path, name))]


def check_mesh(config: DecoderConfig, mesh: Mesh) -> None:
    """Refuse a mesh that does not divide a model.

    Args:
      config: the architecture.
      mesh: from ``make_mesh``.

    Raises:
      ValueError: naming parameter, axis and sizes, and what would do.
    """
    sizes: dict[tuple[str, ...], int] = {}
    wrong = None
    for path, shape in _named_shapes(weight_shapes(config)):
        for logical, size in zip(PARAMETERS[".".join(path[-2:])], shape, strict=True):
            axes = MESH_AXES.get(logical)
            if axes is None or logical in OPTIONAL:
                continue
            sizes[axes] = math.gcd(sizes.get(axes, 0), size)
            if wrong is None and size % axis_size(mesh, logical):
                wrong = path, shape, logical, size, axes
    if wrong is None:
        return
    path, shape, logical, size, axes = wrong
    common = sizes[axes]
    fitting = [str(n) for n in range(1, common + 1) if common % n == 0]
    allowed = fitting[0] if len(fitting) == 1 else ", ".join(fitting[:-1]) + " or " + fitting[-1]
    named = " x ".join(f"{axis}={mesh.shape.get(axis, 1)}" for axis in axes)
    raise ValueError(
        f"mesh {named} does not divide the {size} {logical} of {'.'.join(path)} {list(shape)}: use {allowed}"
    )
