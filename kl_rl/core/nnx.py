"""The one crossing from flax.nnx: a module becomes a static graph and a pytree of parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kl_rl.core.policy import Decoder, Policy

__all__ = ["from_nnx"]


@dataclasses.dataclass(frozen=True)
class _NnxCall:
    """Rebuilds a flax.nnx module from its static graph and calls it, or a method; equal by value through the graph."""

    graphdef: Any
    split: bool
    name: str = "__call__"

    def __call__(self, weights: Any, *args: Any) -> Any:
        from flax import nnx

        states = (weights[1], weights[0]) if self.split else (weights,)
        return getattr(nnx.merge(self.graphdef, *states), self.name)(*args)


def from_nnx(module: Any, *, trained: Any = None) -> Policy:
    """Cross once from flax.nnx: split a module into a static graph and a pytree of parameters.

    Args:
      module: an ``nnx.Module`` with ``__call__(prompt [..., L], tokens [..., T]) -> logits [..., T, V]``; if
        it also has ``prefill(prompt, horizon)`` and ``decode(cache, token)`` they become the policy's
        decoder. ``kl_rl.check_policy`` tells whether they agree.
      trained: flax filter of the variables that are trained, ``nnx.Param`` if None.

    Returns:
      A Policy whose ``params`` are these variables as a plain nested dict; all others (statistics, keys) are ``shared``
      and stay as they are.

    Raises:
      ValueError: for layers that are random or change with every call, as in training mode: a policy is one law.
    """
    from flax import nnx

    for path, part in nnx.iter_graph(module):
        rates = (getattr(part, name, 0) for name in ("rate", "dropout_rate"))
        active = getattr(part, "deterministic", None) is False and any(rate > 0 for rate in rates)
        if active or getattr(part, "use_running_average", None) is False:
            where = ".".join(map(str, path)) or "the module"
            raise ValueError(
                f"{where} ({type(part).__name__}) is in training mode: a policy is one law; call .eval() on the module "
                "before from_nnx"
            )
    graphdef, params, others = nnx.split(module, nnx.Param if trained is None else trained, ...)  # type: ignore[misc]
    shared = nnx.to_pure_dict(others)
    call = lambda name: _NnxCall(graphdef, bool(jax.tree.leaves(shared)), name)
    decoder = None
    if hasattr(module, "prefill") and hasattr(module, "decode"):
        decoder = Decoder(call("prefill"), call("decode"))
    return Policy(
        nnx.to_pure_dict(params),
        call("__call__"),
        decoder,
        shared=shared if jax.tree.leaves(shared) else None,
    )
