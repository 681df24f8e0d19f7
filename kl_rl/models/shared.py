"""A prompt computed once for all its completions: the forward pass of scoring with shared prompts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kl_rl.models.attention import fork_attention, row_attention
from kl_rl.models.config import DecoderConfig, Execution
from kl_rl.models.layers import normalize, rotations, run_layers
from kl_rl.models.positions import Layout, last_index, layout_of, visible

__all__ = ["completion_hidden", "completion_layout", "embed"]


def embed(
    config: DecoderConfig, execution: Execution, weights: Any, ids: jax.Array, positions: jax.Array
) -> jax.Array:
    """Input embeddings in the compute dtype; ids [...], padding reads row 0 -> [..., d]."""
    dtype = jnp.dtype(execution.compute_dtype)
    x = weights["embed"]["table"][jnp.maximum(ids, 0)].astype(dtype)
    if config.embed_scale != 1.0:
        x = x * jnp.asarray(config.embed_scale, dtype)
    if config.rotary is None:
        x = x + weights["position"]["table"][positions].astype(dtype)
    return x


def completion_layout(prompt: jax.Array, tokens: jax.Array) -> Layout:
    """Positions of completion tokens, which go on where the prompt ends; [P, L], [P, K, S] -> [P * K, S]."""
    num_prompts, num_samples, length = tokens.shape
    start = jnp.sum(prompt >= 0, axis=-1, dtype=jnp.int32)
    index = start[:, None, None] + jnp.arange(length, dtype=jnp.int32)[None, None]
    positions = jnp.broadcast_to(index, tokens.shape).reshape(-1, length)
    return Layout(positions, jnp.ones_like(positions))


def _shape(tokens: jax.Array, x: jax.Array) -> jax.Array:
    return x.reshape(*tokens.shape, *x.shape[1:])


def completion_hidden(
    config: DecoderConfig, execution: Execution, weights: Any, prompt: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Hidden states that predict each completion token, the prompt computed once for its K completions.

    Prompt and completion tokens run through each layer as one flat list, so that every projection is one matrix
    product; only attention tells them apart.

    Args:
      config: the architecture.
      execution: how it is run.
      weights: of the model.
      prompt: ids below 0 are padding; [P, L].
      tokens: [P, K, T].

    Returns:
      [P, K, T, d]; entry t predicts ``tokens[..., t]``.
    """
    inputs = tokens[..., :-1]
    size = prompt.size
    before, own = layout_of(prompt), completion_layout(prompt, inputs)
    positions = jnp.concatenate([before.positions.reshape(-1), own.positions.reshape(-1)])
    ids = jnp.concatenate([prompt.reshape(-1), inputs.reshape(-1).astype(prompt.dtype)])
    x = embed(config, execution, weights, ids, positions)
    first = Layout(*(part.reshape(*inputs.shape)[:, 0] for part in own))  # all K stand at the same positions

    def attend(window, query, key, value, extra):
        parts: tuple[Any, ...] = (query, key, value)
        of_prompt: Any = [part[:size].reshape(*prompt.shape, *part.shape[1:]) for part in parts]
        of_own: Any = [part[size:].reshape(*inputs.shape, *part.shape[1:]) for part in parts]
        inside = row_attention(config, execution, of_prompt[0], of_prompt[1], of_prompt[2], before, window)
        prompt_seen, own_seen = visible(first, before, window), visible(first, first, window)
        prompt_keys, own_keys = (of_prompt[1], of_prompt[2]), (of_own[1], of_own[2])
        outside = fork_attention(
            config, of_own[0], *prompt_keys, *own_keys, prompt_seen=prompt_seen, seen=own_seen[:, None]
        )
        flat = [part.reshape(-1, *query.shape[1:]) for part in (inside, outside)]
        return jnp.concatenate(flat), None

    x, _ = run_layers(config, execution, weights["layers"], x, rotations(config, positions), attend)
    ends = jnp.arange(prompt.shape[0]) * prompt.shape[1] + last_index(prompt)
    width = x.shape[-1]
    start = jnp.broadcast_to(x[ends][:, None, None], (*tokens.shape[:2], 1, width))
    rows = jnp.concatenate([start, x[size:].reshape(*inputs.shape, width)], axis=2)
    return normalize(config.norm, weights["final_norm"], rows)
