"""The mesh: three named axes, in one process or in many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

__all__ = ["AXES", "make_mesh"]

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of ``data * fsdp * tensor`` devices with automatic axes.

    Args:
      data: copies of the model, each with a share of the batch.
      fsdp: parts that parameters are split into, each also with a share of the batch; parameters are gathered layer by
        layer when they are needed (Rajbhandari et al. 2019, arXiv 1910.02054).
      tensor: parts that heads, feed-forward units and vocabulary are split into (Shoeybi et al. 2019, arXiv
        1909.08053); put neighbouring devices here, it communicates most.
      devices: all devices of all processes if None; the first ones are taken.

    Returns:
      The mesh.

    Raises:
      ValueError: if there are fewer devices than that, or an axis is below 1.
    """
    shape = (data, fsdp, tensor)
    if min(shape) < 1:
        raise ValueError(f"mesh axes must be at least 1; got data={data}, fsdp={fsdp}, tensor={tensor}")
    devices = jax.devices() if devices is None else devices
    count = math.prod(shape)
    if count > len(devices):
        raise ValueError(
            f"a mesh of data={data} x fsdp={fsdp} x tensor={tensor} needs {count} devices; there are {len(devices)}"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=list(devices)[:count])
