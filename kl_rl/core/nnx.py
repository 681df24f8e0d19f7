"""The one crossing from flax.nnx: a module becomes a static graph and a pytree of parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kl_rl.core.policy import Decoder, Params, Policy

__all__ = ["from_nnx"]


@dataclasses.dataclass(frozen=True)
class _NnxApply:
    """Rebuilds a flax.nnx module from its static graph and calls it; equal by value through the graph."""

    graphdef: Any

    def __call__(self, params: Params, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        from flax import nnx

        return nnx.merge(self.graphdef, params)(prompt, tokens)


@dataclasses.dataclass(frozen=True)
class _NnxMethod:
    """As ``_NnxApply`` for a named method (``prefill``, ``decode``)."""

    graphdef: Any
    name: str

    def __call__(self, params: Params, *args: Any) -> Any:
        from flax import nnx

        return getattr(nnx.merge(self.graphdef, params), self.name)(*args)


def from_nnx(module: Any) -> Policy:
    """Cross once from flax.nnx: split a module into a static graph and a pytree of parameters.

    Args:
      module: an ``nnx.Module`` with ``__call__(prompt [..., L], tokens [..., T]) -> logits [..., T, V]``; if
        it also has ``prefill(prompt, horizon)`` and ``decode(cache, token)`` they become the policy's
        decoder.

    Returns:
      A Policy whose ``params`` are the module's state as a plain nested dict.
    """
    from flax import nnx

    graphdef, state = nnx.split(module)
    params = nnx.to_pure_dict(state)
    decoder = None
    if hasattr(module, "prefill") and hasattr(module, "decode"):
        decoder = Decoder(_NnxMethod(graphdef, "prefill"), _NnxMethod(graphdef, "decode"))
    return Policy(params, _NnxApply(graphdef), decoder)
