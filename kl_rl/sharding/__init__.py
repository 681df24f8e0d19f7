"""Placing a run on a mesh of devices: axes data, fsdp and tensor, from one device to a pod.

No method and no model knows of it: ``jax.jit`` follows the shardings of its arguments, so the same ``advance`` runs
unsharded, on simulated devices, and in many processes. The rules are one table in ``rules``.
"""

from kl_rl.sharding.mesh import AXES, make_mesh, split_cpu
from kl_rl.sharding.placement import place, place_batch, put, replicated, shardings
from kl_rl.sharding.rules import MESH_AXES, PARAMETERS, check_mesh, parameter_spec, weight_sharding
from kl_rl.sharding.step import jit_step

__all__ = [
    "AXES",
    "MESH_AXES",
    "PARAMETERS",
    "check_mesh",
    "jit_step",
    "make_mesh",
    "parameter_spec",
    "place",
    "place_batch",
    "put",
    "replicated",
    "shardings",
    "split_cpu",
    "weight_sharding",
]
