"""Low-rank adapters on a shared base: the reference policy is the same weights with the adapter off.

``W x + (alpha / r) B A x`` (Hu et al. 2021, arXiv 2106.09685). The adapter is all that is trained, carried and saved;
the base stays one set of arrays in memory, whoever reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kl_rl.core.policy import Decoder, Policy, Trunk

__all__ = ["PROJECTIONS", "lora_policy", "merge_lora"]

PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")


def _attach(weights: Any, adapter: Any, scale: float) -> Any:
    """The base's tree with the adapter's factors beside its kernels; no array is copied."""
    layers = dict(weights["layers"])
    for name, factors in adapter["layers"].items():
        layers[name] = layers[name] | {"lora_a": scale * factors["a"], "lora_b": factors["b"]}
    attached = weights | {"layers": layers}
    if "extra" in adapter:
        table = weights["embed"]["table"]
        first = table.shape[0] - adapter["extra"].shape[0]
        attached["embed"] = {"table": table.at[first:].add(adapter["extra"].astype(table.dtype))}
    return attached


@dataclasses.dataclass(frozen=True)
class _Adapted:
    """A function of weights, called with base and adapter apart."""

    inner: Callable[..., Any]
    scale: float

    def __call__(self, weights: Any, *args: Any) -> Any:
        shared, adapter = weights
        return self.inner(_attach(shared, adapter, self.scale), *args)


def _factors(key: jax.Array, kernel: jax.Array, name: str, rank: int) -> dict[str, jax.Array]:
    """A ~ normal(1 / sqrt(in)), B = 0, so that the adapted model starts at the base."""
    layers = kernel.shape[0]
    size_in = kernel.shape[1] * (kernel.shape[2] if name == "out" else 1)
    size_out = kernel[0].size // size_in
    first = jax.random.normal(key, (layers, size_in, rank), jnp.float32) / size_in**0.5
    return {"a": first, "b": jnp.zeros((layers, rank, size_out), jnp.float32)}


def lora_policy(
    base: Policy,
    key: jax.Array,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = PROJECTIONS,
    extra: int = 0,
) -> Policy:
    """A policy that starts equal to ``base`` and trains a low-rank adapter only.

    Args:
      base: from ``decoder_policy`` (its decoder prepares weights); its arrays are shared, not copied.
      key: PRNG key.
      rank: r.
      alpha: the adapter is scaled by alpha / r; alpha = r if None.
      targets: projections that get an adapter; those the model lacks are passed over.
      extra: input-only ids whose embeddings are trained too (return tokens).

    Returns:
      Policy with ``params`` the adapter and ``shared`` the base.

    Raises:
      ValueError: for an unknown projection or a rank below 1.
    """
    unknown = sorted(set(targets) - set(PROJECTIONS))
    if unknown or rank < 1:
        raise ValueError(
            f"unknown projection {unknown[0]!r}; known: {', '.join(PROJECTIONS)}"
            if unknown
            else f"rank must be at least 1; got {rank}"
        )
    weights = base.weights
    names = [name for name in PROJECTIONS if name in targets and name in weights["layers"]]
    keys = jax.random.split(key, len(names))
    kernels = {name: weights["layers"][name]["kernel"] for name in names}
    adapter: dict[str, Any] = {
        "layers": {name: _factors(k, kernels[name], name, rank) for name, k in zip(names, keys, strict=True)}
    }
    if extra:
        adapter["extra"] = jnp.zeros((extra, weights["embed"]["table"].shape[1]), jnp.float32)
    scale = 1.0 if alpha is None else alpha / rank
    adapt = lambda function: None if function is None else _Adapted(function, scale)
    decoder = base.decoder and Decoder(
        _Adapted(base.decoder.init, scale),
        base.decoder.step,  # of weights that have been prepared: the adapter is in its place
        base.decoder.fork,
        base.decoder.gather,
        adapt(base.decoder.prepare),
    )
    trunk = base.trunk and Trunk(_Adapted(base.trunk.hidden, scale), _Adapted(base.trunk.logits, scale))
    return Policy(adapter, _Adapted(base.apply, scale), decoder, adapt(base.scorer), weights, trunk)


def merge_lora(policy: Policy) -> Any:
    """Weights of the plain model that equals an adapted one, for export.

    Args:
      policy: from ``lora_policy``.

    Returns:
      A new tree with ``W + (alpha / r) A B`` in place of each adapted W.
    """
    assert isinstance(policy.apply, _Adapted)
    attached = _attach(policy.shared, policy.params, policy.apply.scale)
    layers = {}
    for name, entry in attached["layers"].items():
        if "lora_a" in entry:
            delta = jnp.einsum("nir,nro->nio", entry["lora_a"], entry["lora_b"])
            kernel = entry["kernel"] + delta.reshape(entry["kernel"].shape).astype(entry["kernel"].dtype)
            entry = {k: v for k, v in entry.items() if not k.startswith("lora_")} | {"kernel": kernel}
        layers[name] = entry
    return attached | {"layers": layers}
