"""Devices that a plan is made for: TPU slices described by libtpu, or simulated CPU devices."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

from kl_rl.sharding.mesh import AXES

__all__ = ["CHIPS", "Topology", "find_topology", "parse_mesh"]

# GiB of memory per chip; cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, table "System architecture" of each.
CHIPS: dict[str, float] = {"v4": 32.0, "v5e": 16.0, "v5p": 95.0, "v6e": 32.0}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A named set of devices.

    Attributes:
      name: "v5e:4x4".
      devices: as jax objects, without hardware behind them for TPUs.
      memory: bytes per device, or None where there is no fixed limit (simulated devices).
    """

    name: str
    devices: tuple[Any, ...]
    memory: int | None


def _known() -> str:
    return ", ".join(f"{chip}:AxB" for chip in CHIPS) + " (v4 and v5p: AxBxC), cpu:N"


def _simulated(name: str, count: int) -> Topology:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"--topology {name}: this process has {len(devices)} simulated devices; start it with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return Topology(name, tuple(devices[:count]), None)


def find_topology(name: str) -> Topology:
    """The devices behind a name.

    Args:
      name: chip and shape, "v5e:16x16", or "cpu:8" for simulated devices.

    Returns:
      The topology.

    Raises:
      ValueError: for an unknown one, or if libtpu is not installed.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    chip, shape = match.groups() if match else (name, "")
    if match and chip == "cpu" and shape.isdigit() and int(shape) > 0:
        return _simulated(name, int(shape))
    if not match or chip not in CHIPS:
        raise ValueError(f"--topology {name}: unknown; known: {_known()}")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology {name} needs libtpu, which compiles for TPUs without one: pip install 'kl-rl[tpu]'; "
            "--topology cpu:N works without"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    try:
        devices = tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"--topology {name}: libtpu does not know this shape of {chip} ({reason})") from None
    return Topology(name, devices, int(CHIPS[chip] * 2**30))


def parse_mesh(text: str | None, count: int) -> dict[str, int]:
    """Sizes of the mesh axes from ``data=1,fsdp=64,tensor=4``.

    Args:
      text: axes that are left out are 1; None: all devices are fsdp.
      count: devices of the topology.

    Returns:
      Axis -> size.

    Raises:
      ValueError: for an unknown axis, a size below 1, or sizes whose product is not ``count``.
    """
    sizes = dict.fromkeys(AXES, 1)
    if text is None:
        return sizes | {"fsdp": count}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdigit() or int(size) < 1:
            raise ValueError(f"--mesh {text}: {part!r} must be AXIS=SIZE with AXIS one of {', '.join(AXES)}")
        sizes[name] = int(size)
    product = math.prod(sizes.values())
    if product != count:
        shape = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"--mesh {text}: {shape} makes {product} devices; the topology has {count}")
    return sizes
