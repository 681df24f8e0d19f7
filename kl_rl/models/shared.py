"""A prompt computed once for all its completions: the forward pass of scoring with shared prompts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kl_rl.models.activations import split_batch, whole_rows
from kl_rl.models.attention import fork_attention, heads_first, row_attention
from kl_rl.models.config import DecoderConfig, Execution
from kl_rl.models.layers import normalize, rotations, run_layers
from kl_rl.models.positions import Layout, last_index, layout_of, visible

__all__ = ["completion_hidden", "completion_layout", "embed"]


def embed(
    config: DecoderConfig, execution: Execution, weights: Any, ids: jax.Array, positions: jax.Array
) -> jax.Array:
    """Input embeddings in the compute dtype; ids [...], padding reads row 0 -> [..., d]."""
    dtype = jnp.dtype(execution.compute_dtype)
    x = whole_rows(weights["embed"]["table"])[jnp.maximum(ids, 0)].astype(dtype)
    if config.embed_scale != 1.0:
        x = x * jnp.asarray(config.embed_scale, dtype)
    if config.rotary is None:
        x = x + whole_rows(weights["position"]["table"])[positions].astype(dtype)
    return split_batch(x)


def completion_layout(prompt: jax.Array, tokens: jax.Array) -> Layout:
    """Positions of completion tokens, which go on where the prompt ends; [P, L], [P, K, S] -> [P * K, S]."""
    num_prompts, num_samples, length = tokens.shape
    start = jnp.sum(prompt >= 0, axis=-1, dtype=jnp.int32)
    index = start[:, None, None] + jnp.arange(length, dtype=jnp.int32)[None, None]
    positions = jnp.broadcast_to(index, tokens.shape).reshape(-1, length)
    return Layout(positions, jnp.ones_like(positions))


def completion_hidden(
    config: DecoderConfig, execution: Execution, weights: Any, prompt: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Hidden states that predict each completion token, the prompt computed once for its K completions.

    A prompt and its completions run through each layer as one row, so that every projection is one matrix product and
    the prompts can be split over devices; only attention tells them apart.

    Args:
      config: the architecture.
      execution: how it is run.
      weights: of the model.
      prompt: ids below 0 are padding; [P, L].
      tokens: [P, K, T].

    Returns:
      [P, K, T, d]; entry t predicts ``tokens[..., t]``.
    """
    if tokens.shape[-1] == 1:  # no token is an input then; as if another one followed
        two = jnp.concatenate([tokens, tokens], axis=-1)
        return completion_hidden(config, execution, weights, prompt, two)[:, :, :1]
    inputs = tokens[..., :-1]
    size = prompt.shape[1]
    before, own = layout_of(prompt), completion_layout(prompt, inputs)
    row = lambda x: x.reshape(prompt.shape[0], -1)
    positions = jnp.concatenate([before.positions, row(own.positions)], axis=1)
    ids = jnp.concatenate([prompt, row(inputs).astype(prompt.dtype)], axis=1)
    x = embed(config, execution, weights, ids, positions)
    first = Layout(*(part.reshape(*inputs.shape)[:, 0] for part in own))  # all K stand at the same positions

    def attend(window, query, key, value, extra):
        parts: tuple[Any, ...] = (query, key, value)
        of_prompt: Any = [part[:, :size] for part in parts]
        of_own: Any = [part[:, size:].reshape(*inputs.shape, *part.shape[2:]) for part in parts]
        inside = row_attention(config, execution, of_prompt[0], of_prompt[1], of_prompt[2], before, window)
        prompt_seen, own_seen = visible(first, before, window), visible(first, first, window)
        one, *rows = (part.reshape(-1, *part.shape[2:]) for part in of_own)
        prompt_key, prompt_value = (heads_first(part) for part in of_prompt[1:])
        own_key, own_value = (heads_first(part) for part in rows)
        outside = fork_attention(
            config, one, prompt_key, prompt_value, own_key, own_value, prompt_seen, own_seen
        )
        outside = outside.reshape(prompt.shape[0], -1, *query.shape[2:])
        return jnp.concatenate([inside, outside], axis=1), None

    x, _ = run_layers(config, execution, weights["layers"], x, rotations(config, positions), attend)
    width = x.shape[-1]
    last = jnp.take_along_axis(x, last_index(prompt)[:, None, None], axis=1)[:, None]
    start = jnp.broadcast_to(last, (*tokens.shape[:2], 1, width))
    rows = jnp.concatenate([start, x[:, size:].reshape(*inputs.shape, width)], axis=2)
    return normalize(config.norm, weights["final_norm"], rows)
