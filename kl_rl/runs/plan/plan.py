"""A plan: both programs of a step compiled for a topology; memory by kind, whether it fits, communication."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kl_rl.models.config import DecoderConfig
from kl_rl.models.parameters import count_parameters
from kl_rl.runs.job import mesh_of
from kl_rl.runs.plan.compiled import Compiled, compile_program
from kl_rl.runs.plan.flops import Flops, step_flops
from kl_rl.runs.plan.programs import Lowered, lower
from kl_rl.runs.plan.setting import Setting
from kl_rl.runs.plan.topology import Topology
from kl_rl.sharding.rules import axis_size

__all__ = ["Plan", "device_bytes", "make_plan"]


class Plan(NamedTuple):
    """What a step needs on each device.

    Attributes:
      parameters: of the model.
      mesh: axis -> size.
      resident: bytes of what stays in memory between programs, by kind.
      cache: bytes of the sampler's keys and values (part of sampling's temporaries).
      sampling: the compiled sampler.
      update: the compiled update.
      peak: bytes needed while either runs, with everything resident.
      memory: bytes a device has, or None.
      flops: of one step on all devices.
    """

    parameters: int
    mesh: dict[str, int]
    resident: dict[str, int]
    cache: int
    sampling: Compiled
    update: Compiled
    peak: int
    memory: int | None
    flops: Flops

    @property
    def fits(self) -> bool | None:
        """Whether both programs fit; None where devices have no limit of their own."""
        if self.sampling.refusal or self.update.refusal:
            return False
        return None if self.memory is None else self.peak <= self.memory


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        size = leaf.dtype.itemsize if isinstance(leaf.dtype, np.dtype) else 8
        total += math.prod(shape) * size
    return total


def _resident(lowered: Lowered) -> dict[str, int]:
    state = lowered.held.state
    return {
        "parameters": device_bytes(state.policy),
        "optimizer": device_bytes(state.optimizer),
        "twist": device_bytes((state.heads, state.targets)),
        "base": device_bytes(lowered.base),
        "memory": device_bytes((lowered.held.memory, state.extra)),
        "batch": device_bytes(lowered.batch),
    }


def _cache_bytes(config: DecoderConfig, setting: Setting, mesh: Mesh) -> int:
    """Keys and values of prompts and samples, in the compute dtype, split over batch and key heads."""
    tokens = setting.prompt_length + setting.num_samples * setting.horizon
    numbers = (
        2 * config.layers * config.attention.kv_heads * config.attention.head_dim * setting.batch * tokens
    )
    size = np.dtype(jnp.dtype(setting.compute_dtype)).itemsize
    return size * numbers // (axis_size(mesh, "batch") * axis_size(mesh, "kv_heads"))


def make_plan(
    config: DecoderConfig, setting: Setting, topology: Topology, sizes: dict[str, int] | None = None
) -> Plan:
    """Compile both programs of a step and read off what they need.

    Args:
      config: the architecture.
      setting: method and sizes.
      topology: from ``find_topology``.
      sizes: mesh axis -> size; all devices on ``fsdp`` if None.

    Returns:
      The plan.

    Raises:
      ValueError: for sizes that do not go together.
    """
    setting.check(config)
    axes = sizes or {"fsdp": len(topology.devices)}
    parts = setting.gradient_accumulation
    mesh = mesh_of(axes, setting.batch, parts, config, devices=topology.devices)
    assert mesh is not None
    lowered = lower(config, setting, mesh)
    resident = _resident(lowered)
    sampling = None if lowered.sampling is None else compile_program(lowered.sampling)
    update = compile_program(lowered.update)
    needed = update.whole
    if sampling is not None:
        beside = max(0, sum(resident.values()) - sampling.arguments)
        needed = max(needed, sampling.whole + beside)
    return Plan(
        count_parameters(config),
        dict(mesh.shape),
        resident,
        _cache_bytes(config, setting, mesh),
        sampling or Compiled(),
        update,
        needed,
        topology.memory,
        step_flops(config, setting),
    )
