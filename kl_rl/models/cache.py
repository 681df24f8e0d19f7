"""Sampling with a cache: prefill a prompt once, fork it into K samples, go on one token at a time.

Keys and values of the prompt are kept once per prompt, those of the samples in their own buffers of known size, so
memory is ``2 N G D (P L + P K T)`` numbers whatever happens, and rows can be regathered by ancestor (sequential Monte
Carlo) without touching the prompt.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kl_rl.models.attention import fork_attention, heads_first, row_attention
from kl_rl.models.config import DecoderConfig, Execution
from kl_rl.models.head import logits_of
from kl_rl.models.layers import fuse, normalize, rotations, run_layers, unstack
from kl_rl.models.positions import Layout, last_index, layout_of, visible
from kl_rl.models.shared import embed

__all__ = ["Advance", "Cache", "Fork", "Gather", "Prefill", "Prepare"]


class Cache(NamedTuple):
    """Keys and values of every layer.

    Attributes:
      prompt: per layer, keys and values [P, G, L, D].
      own: per layer, keys and values of the samples [P * K, G, T, D].
      layout: of the prompt; [P, L].
      length: tokens in each prompt; [P].
      filled: tokens of the samples that are in the cache; a scalar.
      hidden: hidden state after the final norm of the last token read, which twist heads look at; [P * K, d].
    """

    prompt: Any
    own: Any
    layout: Layout
    length: jax.Array
    filled: jax.Array
    hidden: jax.Array


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Run the prompts: ``(weights, prompt [P, L], horizon) -> (logits [P, V], cache)`` with one sample per prompt."""

    config: DecoderConfig
    execution: Execution

    def __call__(self, weights: Any, prompt: jax.Array, horizon: int) -> tuple[jax.Array, Cache]:
        """Logits of the first completion token, and the cache."""
        layout = layout_of(prompt)
        x = embed(self.config, self.execution, weights, prompt, layout.positions)

        def attend(window, query, key, value, extra):
            out = row_attention(self.config, self.execution, query, key, value, layout, window)
            return out, (heads_first(key), heads_first(value))

        angles = rotations(self.config, layout.positions)
        x, kept = run_layers(self.config, self.execution, weights["layers"], x, angles, attend)
        last = jnp.take_along_axis(x, last_index(prompt)[:, None, None], axis=1)[:, 0]
        empty = lambda part: jnp.zeros((*part.shape[:-2], horizon, part.shape[-1]), part.dtype)
        length = jnp.sum(prompt >= 0, axis=-1, dtype=jnp.int32)
        hidden = normalize(self.config.norm, weights["final_norm"], last)
        cache = Cache(kept, jax.tree.map(empty, kept), layout, length, jnp.zeros((), jnp.int32), hidden)
        return logits_of(self.config, weights, hidden), cache


def _row_axis(leaf: jax.Array) -> int:
    """The axis of the samples: behind the layer axis where there is one."""
    return leaf.ndim - 4


@dataclasses.dataclass(frozen=True)
class Fork:
    """Share the prompts: ``(cache, K) -> cache``: K samples for each prompt, which stays shared."""

    def __call__(self, cache: Cache, num_samples: int) -> Cache:
        """Give every sample its own buffers."""
        copy = lambda leaf: jnp.repeat(leaf, num_samples, axis=_row_axis(leaf))
        hidden = jnp.repeat(cache.hidden, num_samples, axis=0)
        return cache._replace(own=jax.tree.map(copy, cache.own), hidden=hidden)


@dataclasses.dataclass(frozen=True)
class Gather:
    """``(cache, ancestor [P * K]) -> cache``: row i goes on from what row ``ancestor[i]`` of its prompt wrote."""

    def __call__(self, cache: Cache, ancestor: jax.Array) -> Cache:
        """Regather the samples' buffers; the prompts stay."""
        pick = lambda leaf: jnp.take(leaf, ancestor, axis=_row_axis(leaf))
        return cache._replace(own=jax.tree.map(pick, cache.own), hidden=cache.hidden[ancestor])


@dataclasses.dataclass(frozen=True)
class Prepare:
    """``weights -> weights``: what would otherwise be done at every token, once.

    Projections are fused, matrices are in the compute dtype, and layers that are not scanned are taken apart: slices of
    a stack would be copied in every turn of the loop. This costs one copy of the weights in the compute dtype.
    """

    config: DecoderConfig
    execution: Execution

    def __call__(self, weights: Any) -> Any:
        """The weights as ``Advance`` likes them best; it computes the same numbers from them."""
        dtype = jnp.dtype(self.execution.compute_dtype)
        matrices = ("kernel", "table", "lora_a", "lora_b")
        narrow = lambda path, leaf: leaf.astype(dtype) if path[-1].key in matrices else leaf
        stacked = fuse(self.config, weights["layers"]) if self.execution.fuse else weights["layers"]
        ready = jax.tree_util.tree_map_with_path(narrow, weights | {"layers": stacked})
        if not self.execution.scan_layers:
            ready["layers"] = unstack(ready["layers"], self.config.layers)
        return ready


@dataclasses.dataclass(frozen=True)
class Advance:
    """``(weights, cache, token [P * K]) -> (logits [P * K, V], cache)``: one more token of every sample."""

    config: DecoderConfig
    execution: Execution

    def __call__(self, weights: Any, cache: Cache, token: jax.Array) -> tuple[jax.Array, Cache]:
        """Logits of the token after ``token``, and the cache with it."""
        rows = token.shape[0]
        here = cache.length + cache.filled  # [P]
        positions = jnp.broadcast_to(here[:, None], (here.shape[0], rows // here.shape[0])).reshape(-1)
        x = embed(self.config, self.execution, weights, token, positions)
        pair = zip(cache.prompt, cache.own, strict=True)
        extras = (cache.prompt, cache.own) if self.execution.scan_layers else list(pair)
        angles = rotations(self.config, positions)
        x, own = run_layers(
            self.config, self.execution, weights["layers"], x, angles, self._attend(cache, here), extras
        )
        hidden = normalize(self.config.norm, weights["final_norm"], x)
        cache = cache._replace(own=own, filled=cache.filled + 1, hidden=hidden)
        return logits_of(self.config, weights, hidden), cache

    def _attend(self, cache: Cache, here: jax.Array) -> Any:
        """One query per sample against its prompt and what it has written, itself included."""
        query_layout = Layout(here[:, None], jnp.ones_like(here[:, None]))

        def attend(window, query, key, value, extra):
            (prompt_key, prompt_value), own = extra
            put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
                old, new[:, :, None], cache.filled, axis=2
            )
            own = (put(own[0], key), put(own[1], value))
            index = jnp.arange(own[0].shape[2], dtype=jnp.int32)[None]
            written = cache.length[:, None] + index
            own_layout = Layout(written, jnp.ones_like(written))
            seen = visible(query_layout, cache.layout, window), visible(query_layout, own_layout, window)
            out = fork_attention(self.config, query[:, None], prompt_key, prompt_value, *own, *seen)
            return out[:, 0], own

        return attend
