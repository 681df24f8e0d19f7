"""The layers of a decoder as functions of plain arrays, and one driver that runs them scanned or unrolled.

Attention is a hole: ``attend(window, query, key, value, extra) -> (out, kept)`` is given by who calls, so that whole
rows, shared prompts and one token with a cache run through the very same layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kl_rl.models.activations import split_batch
from kl_rl.models.config import DecoderConfig, Execution, Norm
from kl_rl.models.positions import rotate, rotation

__all__ = ["Rotations", "dense", "fuse", "layer", "normalize", "rotations", "run_layers", "unstack"]

Weights = Any
Attend = Callable[..., tuple[jax.Array, Any]]
Rotations = tuple[Any, Any]  # for layers without and with a window

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}
_FAR = 2**30  # a window wider than any sequence


def normalize(norm: Norm, weights: Weights, x: jax.Array) -> jax.Array:
    """LayerNorm or RMSNorm over the last axis, computed in float32 or better, returned in the dtype of x."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    expand = (1,) * (x.ndim - 1) + (-1,)
    if norm.centred:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + norm.eps)
    y = wide * inverse * (norm.offset + weights["scale"].astype(wide.dtype)).reshape(expand)
    if "bias" in weights:
        y = y + weights["bias"].astype(wide.dtype).reshape(expand)
    return y.astype(x.dtype)


def dense(weights: Weights, x: jax.Array, num_in: int = 1) -> jax.Array:
    """``x @ kernel + bias``, plus a low-rank term ``(x @ lora_a) @ lora_b`` where there is an adapter.

    Args:
      weights: kernel [in..., out...], optional bias [out...], optional lora_a [in, r] and lora_b [r, out].
      x: [..., in] with the input axes flattened.
      num_in: leading axes of the kernel that are contracted.

    Returns:
      [..., out...].
    """
    kernel = weights["kernel"]
    shape = kernel.shape[num_in:]
    y = x @ kernel.reshape(x.shape[-1], -1).astype(x.dtype)
    if "lora_a" in weights:
        y = y + (x @ weights["lora_a"].astype(x.dtype)) @ weights["lora_b"].astype(x.dtype)
    if "bias" in weights:
        y = y + weights["bias"].reshape((1,) * (x.ndim - 1) + (-1,)).astype(x.dtype)
    return y.reshape(*x.shape[:-1], *shape)


def _mlp(config: DecoderConfig, weights: Weights, x: jax.Array) -> jax.Array:
    act = _ACTIVATIONS[config.feed_forward.activation]
    up = dense(weights["up"], x)
    hidden = act(dense(weights["gate"], x)) * up if config.feed_forward.gated else act(up)
    return dense(weights["down"], hidden)


def fuse(config: DecoderConfig, stacked: Weights) -> Weights:
    """Queries, keys and values as one matrix product, where no adapter sits on them.

    Args:
      config: the architecture.
      stacked: weights with a leading layer axis.

    Returns:
      The weights with ``qkv`` in place of ``query``, ``key`` and ``value``.
    """
    names = ("query", "key", "value")
    if "qkv" in stacked or any("lora_a" in stacked[name] for name in names):
        return stacked
    join = lambda part: jnp.concatenate([stacked[name][part] for name in names], axis=-2)
    fused = {part: join(part) for part in stacked["query"]}
    return {name: part for name, part in stacked.items() if name not in names} | {"qkv": fused}


def _project(config: DecoderConfig, weights: Weights, x: jax.Array) -> tuple[jax.Array, ...]:
    """Queries [..., H, D], keys and values [..., G, D]."""
    if "qkv" not in weights:
        return tuple(dense(weights[name], x) for name in ("query", "key", "value"))
    heads, groups = config.attention.heads, config.attention.kv_heads
    return tuple(jnp.split(dense(weights["qkv"], x), (heads, heads + groups), axis=-2))


def layer(
    config: DecoderConfig, weights: Weights, x: jax.Array, angles: Any, attend: Attend
) -> tuple[jax.Array, Any]:
    """One residual layer.

    Args:
      config: the architecture.
      weights: of this layer, without the layer axis.
      x: residual stream; [..., d].
      angles: rotary cosines and sines of these tokens, or None.
      attend: ``(query [..., H, D], key [..., G, D], value) -> (out [..., H, D], kept)``.

    Returns:
      The residual stream after the layer, and what ``attend`` kept.
    """
    head_norm = Norm(config.norm.eps, False, config.norm.offset)
    y = normalize(config.norm, weights["attention_norm"], x)
    query, key, value = _project(config, weights, y)
    if config.attention.qk_norm:
        query = normalize(head_norm, weights["query_norm"], query)
        key = normalize(head_norm, weights["key_norm"], key)
    if angles is not None:
        query, key = rotate(query, angles), rotate(key, angles)
    attended, kept = attend(query, key, value)
    y = dense(weights["out"], attended.reshape(*x.shape[:-1], -1), num_in=2)
    x = x + (normalize(config.norm, weights["attention_post_norm"], y) if config.post_norms else y)
    y = _mlp(config, weights, normalize(config.norm, weights["mlp_norm"], x))
    x = x + (normalize(config.norm, weights["mlp_post_norm"], y) if config.post_norms else y)
    return x, kept


def rotations(config: DecoderConfig, positions: jax.Array) -> Rotations:
    """Rotary angles of these positions, for layers without and with a window; (None, None) for learned positions."""
    if config.rotary is None:
        return None, None
    everywhere = rotation(config.rotary, config.attention.head_dim, positions)
    local = config.attention.local_rotary
    if local is None:
        return everywhere, everywhere
    return everywhere, rotation(local, config.attention.head_dim, positions)


def unstack(stacked: Any, count: int) -> list[Any]:
    """A tree of [N, ...] arrays as N trees; its gradient is one concatenation."""
    leaves, structure = jax.tree.flatten(stacked)
    split = [[part[0] for part in jax.lax.split(leaf, [1] * count, axis=0)] for leaf in leaves]
    return [jax.tree.unflatten(structure, [parts[i] for parts in split]) for i in range(count)]


def run_layers(
    config: DecoderConfig,
    execution: Execution,
    stacked: Weights,
    x: jax.Array,
    angles: Rotations,
    attend: Attend,
    extras: Any = None,
) -> tuple[jax.Array, Any]:
    """Run all layers.

    Args:
      config: the architecture.
      execution: scanned or unrolled, rematerialized or not.
      stacked: weights with a leading layer axis, or a list of each layer's (fused already, not to be scanned).
      x: residual stream; [..., d].
      angles: from ``rotations``.
      attend: ``(window, query, key, value, extra) -> (out, kept)``; the window is an int, None, or traced.
      extras: one for each layer (a list, or with a leading layer axis if the layers are scanned), or None.

    Returns:
      The residual stream, and what was kept: a list, or stacked if the layers are scanned.
    """
    windows = config.windows
    if not isinstance(stacked, list):
        stacked = fuse(config, stacked) if execution.fuse else stacked
        stacked = stacked if execution.scan_layers else unstack(stacked, config.layers)

    def body(x, weights, window, angle, extra):
        x = split_batch(x)
        return layer(config, weights, x, angle, lambda q, k, v: attend(window, q, k, v, extra))

    if not execution.scan_layers:
        kept = []
        one = jax.checkpoint(body, static_argnums=(2,)) if execution.remat else body
        for i, weights in enumerate(stacked):
            angle = angles[0 if windows[i] is None else 1]
            x, held = one(x, weights, windows[i], angle, None if extras is None else extras[i])
            kept.append(held)
        return x, kept

    windowed = any(w is not None for w in windows)
    widths = jnp.asarray([_FAR if w is None else w for w in windows], jnp.int32) if windowed else None

    def scanned(x, item):
        weights, width, extra = item
        angle = angles[0]
        if windowed and angles[0] is not None:
            angle = jax.tree.map(lambda far, near: jnp.where(width < _FAR, near, far), *angles)
        return body(x, weights, width, angle, extra)

    if execution.remat:
        scanned = jax.checkpoint(scanned, prevent_cse=False)
    return jax.lax.scan(scanned, x, (stacked, widths, extras))
