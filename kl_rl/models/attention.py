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

__all__ = ["fork_attention", "row_attention"]


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
    how: Any = execution.attention
    if config.attention.softcap is None and plain:
        return jax.nn.dot_product_attention(
            query, key, value, scale=config.query_scale, is_causal=True,
            local_window_size=None if window is None else (window - 1, 0), implementation=how,
        )  # fmt: skip
    if layout is None:
        shape = query.shape[:2]
        index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
        layout = Layout(index, jnp.ones_like(index))
    seen = visible(layout, layout, window)
    if config.attention.softcap is None:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=config.query_scale,
            mask=seen[:, None],
            implementation=how,
        )
    none = jnp.zeros((query.shape[0], 0, *key.shape[2:]), key.dtype)
    own = seen[:, None]
    nothing = jnp.zeros((query.shape[0], query.shape[1], 0), bool)
    return fork_attention(config, query[:, None], none, none, key[:, None], value[:, None], nothing, own)[
        :, 0
    ]


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

    Args:
      config: scale and soft-cap.
      query: [P, K, Q, H, D].
      prompt_key: [P, L, G, D].
      prompt_value: [P, L, G, D].
      key: [P, K, S, G, D].
      value: [P, K, S, G, D].
      prompt_seen: what of the prompt each query may see; [P, Q, L] (the same for all K) or [P, K, Q, L].
      seen: what of its own continuation; [P, K, Q, S] or [P, 1, Q, S].

    Returns:
      [P, K, Q, H, D].
    """
    num_prompts, num_samples, length, heads, head_dim = query.shape
    groups = key.shape[-2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(num_prompts, num_samples, length, groups, heads // groups, head_dim)
    # scores: [P, G, K, R, Q, L] and [P, G, K, R, Q, S], R queries to each key head
    of_prompt = jnp.einsum("pkqgrd,plgd->pgkrql", grouped, prompt_key, preferred_element_type=wide)
    of_own = jnp.einsum("pkqgrd,pksgd->pgkrqs", grouped, key, preferred_element_type=wide)
    scores = _cap(
        jnp.concatenate([of_prompt, of_own], axis=-1) * config.query_scale, config.attention.softcap
    )
    if prompt_seen.ndim == 3:
        prompt_seen = prompt_seen[:, None]
    parts = [
        jnp.broadcast_to(s[:, None, :, None], (*scores.shape[:1], 1, num_samples, 1, length, s.shape[-1]))
        for s in (prompt_seen, seen)
    ]
    scores = jnp.where(jnp.concatenate(parts, axis=-1), scores, jnp.finfo(wide).min)
    weight = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    size = prompt_key.shape[1]
    out = jnp.einsum("pgkrql,plgd->pkqgrd", weight[..., :size], prompt_value)
    out += jnp.einsum("pgkrqs,pksgd->pkqgrd", weight[..., size:], value)
    return out.reshape(query.shape)
