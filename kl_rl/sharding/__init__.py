"""Placing a run on a mesh of devices: axes data, fsdp and tensor, from one device to a pod, in one process or many.

No method and no model knows of it: ``jax.jit`` follows the shardings of its arguments, so the same ``advance`` runs
unsharded, on simulated devices, and in many processes. The rules are one table in ``rules``.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
