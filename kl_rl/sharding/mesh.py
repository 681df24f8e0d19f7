"""The mesh: three named axes, in one process or in many."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

__all__ = ["AXES", "make_mesh", "split_cpu"]

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


def split_cpu(count: int) -> None:
    """Let the CPU be several devices, before anything is computed; GPUs and TPUs are left as they are.

    A program for one CPU device uses other cores inside large matrix products only. Over a mesh with ``data`` as large
    as the number of cores each core has rows of its own, which decoding, made of small operations, needs.

    Args:
      count: of CPU devices.

    Raises:
      ValueError: if computations have begun, and there are fewer.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return  # the user has said how many
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if len(jax.devices("cpu")) < count:
            raise ValueError(
                f"the CPU must be split into {count} devices before the first computation"
            ) from error
