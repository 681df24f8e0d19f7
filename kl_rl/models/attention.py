"""Attention in two forms that agree: over whole rows, and over a prompt shared by several continuations.

The first goes through ``jax.nn.dot_product_attention`` (flash kernels where the device has them). The second serves
scoring and sampling alike: queries of K continuations see the keys of their one prompt and their own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kl_rl.models.config import DecoderConfig, Execution
from kl_rl.models.positions import Layout, visible

__all__ = ["fork_attention", "heads_first", "row_attention"]


def _cap(scores: jax.Array, softcap: float | None) -> jax.Array:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def row_attention(
    config: DecoderConfig,
    execution: Execution,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    layout: Layout | None,
    window: Any,
) -> jax.Array:
    """Causal attention within rows.

    Args:
      config: scale and soft-cap.
      execution: which implementation.
      query: [B, S, H, D].
      key: [B, S, G, D].
      value: [B, S, G, D].
      layout: positions and segments, or None: one unpadded sequence per row.
      window: how far back a token sees, or None.

    Returns:
      [B, S, H, D].
    """
    plain = layout is None and not isinstance(window, jax.Array)
    library = config.attention.softcap is None and query.dtype != jnp.float64  # its softmax is in float32
    how: Any = execution.attention
    if library and plain:
        return jax.nn.dot_product_attention(
            query, key, value, scale=config.query_scale, is_causal=True,
            local_window_size=None if window is None else (window - 1, 0), implementation=how,
        )  # fmt: skip
    if layout is None:
        shape = query.shape[:2]
        index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
        layout = Layout(index, jnp.ones_like(index))
    seen = visible(layout, layout, window)
    if library:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=config.query_scale,
            mask=seen[:, None],
            implementation=how,
        )
    none = jnp.zeros((query.shape[0], key.shape[2], 0, key.shape[3]), key.dtype)
    nothing = jnp.zeros((*query.shape[:2], 0), bool)
    keys, values = heads_first(key), heads_first(value)
    return fork_attention(config, query, none, none, keys, values, nothing, seen)


def heads_first(part: jax.Array) -> jax.Array:
    """[B, S, G, D] -> [B, G, S, D]: each head's rows contiguous, so that products are plain batched matrix products."""
    return jnp.swapaxes(part, 1, 2)


def fork_attention(
    config: DecoderConfig,
    query: jax.Array,
    prompt_key: jax.Array,
    prompt_value: jax.Array,
    key: jax.Array,
    value: jax.Array,
    prompt_seen: jax.Array,
    seen: jax.Array,
) -> jax.Array:
    """Attention of K continuations over their one prompt and over themselves; softmax in float32 or better.

    The queries of all K samples meet the prompt's keys in one matrix product.

    Args:
      config: scale and soft-cap.
      query: [P * K, Q, H, D].
      prompt_key: [P, G, L, D].
      prompt_value: [P, G, L, D].
      key: [P * K, G, S, D].
      value: [P * K, G, S, D].
      prompt_seen: what of the prompt each query may see, the same for all K; [P, Q, L].
      seen: what of its own continuation; [P, Q, S].

    Returns:
      [P * K, Q, H, D].
    """
    rows, length, heads, head_dim = query.shape
    prompts, groups, size = prompt_key.shape[:3]
    samples, per_group = rows // prompts, heads // groups
    wide = jnp.promote_types(query.dtype, jnp.float32)
    turned = jnp.moveaxis(query.reshape(rows, length, groups, per_group, head_dim), 1, 3) * config.query_scale
    own = turned.reshape(rows, groups, per_group * length, head_dim)  # [P K, G, R Q, D]

    def together(x: jax.Array) -> jax.Array:
        """[P K, G, R Q, ...] -> [P, G, K, R Q, ...]: the rows of a prompt side by side."""
        return jnp.swapaxes(x.reshape(prompts, samples, *x.shape[1:]), 1, 2)

    def apart(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 1, 2).reshape(rows, *x.shape[1:2], *x.shape[3:])

    def masked(scores: jax.Array, seen: jax.Array) -> jax.Array:
        """Scores [P, G, K, R, Q, S], seen [P, Q, S]; hidden ones as low as can be."""
        capped = _cap(scores, config.attention.softcap)
        return jnp.where(seen[:, None, None, None], capped, jnp.finfo(wide).min)

    split = (prompts, groups, samples, per_group, length)
    flat = together(own).reshape(prompts, groups, -1, head_dim)
    of_prompt = jnp.einsum("pgmd,pgld->pgml", flat, prompt_key, preferred_element_type=wide)
    of_own = jnp.einsum("bgmd,bgsd->bgms", own, key, preferred_element_type=wide)
    of_prompt = masked(of_prompt.reshape(*split, size), prompt_seen)
    of_own = masked(together(of_own).reshape(*split, -1), seen)
    # One softmax over both parts, without putting them side by side.
    top = lambda scores: jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(wide).min)
    highest = jax.lax.stop_gradient(jnp.maximum(top(of_prompt), top(of_own)))
    of_prompt, of_own = jnp.exp(of_prompt - highest), jnp.exp(of_own - highest)
    total = jnp.sum(of_prompt, axis=-1) + jnp.sum(of_own, axis=-1)  # [P, G, K, R, Q]
    shared = of_prompt.reshape(*flat.shape[:-1], size).astype(value.dtype)
    alone = apart(of_own.reshape(prompts, groups, samples, per_group * length, -1)).astype(value.dtype)
    out = jnp.einsum("pgml,pgld->pgmd", shared, prompt_value, preferred_element_type=wide)
    out = apart(out.reshape(prompts, groups, samples, per_group * length, head_dim))
    out += jnp.einsum("bgms,bgsd->bgmd", alone, value, preferred_element_type=wide)
    out /= apart(total.reshape(prompts, groups, samples, per_group * length, 1))
    out = out.astype(query.dtype)
    return jnp.moveaxis(out.reshape(rows, groups, per_group, length, head_dim), 3, 1).reshape(query.shape)
