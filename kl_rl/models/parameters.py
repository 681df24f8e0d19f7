"""The parameters of a decoder: one nested dict, layers stacked in front, and a flax.nnx module around it."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kl_rl.core.policy import Policy
from kl_rl.models.config import DecoderConfig, Execution
from kl_rl.models.decoder import decoder_policy

__all__ = ["DecoderModule", "count_parameters", "init_weights", "tied_rows", "weight_shapes"]

Weights = dict[str, Any]
_LARGE = 2**22  # entries of a matrix that is drawn by itself


def _norm_shapes(config: DecoderConfig, *shape: int) -> dict[str, tuple[int, ...]]:
    return {"scale": shape, "bias": shape} if config.norm.centred else {"scale": shape}


def _dense_shapes(kernel: tuple[int, ...], bias: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    return {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}


def _layer_shapes(config: DecoderConfig) -> dict[str, Any]:
    n, d, f = config.layers, config.width, config.feed_forward.width
    part, mlp = config.attention, config.feed_forward
    h, g, k = part.heads, part.kv_heads, part.head_dim
    shapes: dict[str, Any] = {
        "attention_norm": _norm_shapes(config, n, d),
        "mlp_norm": _norm_shapes(config, n, d),
    }
    for name, count in (("query", h), ("key", g), ("value", g)):
        shapes[name] = _dense_shapes((n, d, count, k), (n, count, k) if part.bias else None)
    shapes["out"] = _dense_shapes((n, h, k, d), (n, d) if part.out_bias else None)
    for name in ("up", "gate") if mlp.gated else ("up",):
        shapes[name] = _dense_shapes((n, d, f), (n, f) if mlp.bias else None)
    shapes["down"] = _dense_shapes((n, f, d), (n, d) if mlp.bias else None)
    if part.qk_norm:
        shapes |= {"query_norm": {"scale": (n, k)}, "key_norm": {"scale": (n, k)}}
    if config.post_norms:
        shapes |= {
            "attention_post_norm": _norm_shapes(config, n, d),
            "mlp_post_norm": _norm_shapes(config, n, d),
        }
    return shapes


def weight_shapes(config: DecoderConfig) -> Weights:
    """Shapes of all parameters, as a nested dict of tuples.

    Args:
      config: the architecture.

    Returns:
      The same structure as ``init_weights``.
    """
    shapes: Weights = {
        "embed": {"table": (config.vocab + config.extra, config.width)},
        "layers": _layer_shapes(config),
        "final_norm": _norm_shapes(config, config.width),
    }
    if config.rotary is None:
        shapes["position"] = {"table": (config.context, config.width)}
    if not config.tied:
        shapes["head"] = {"kernel": (config.width, config.vocab)}
    return shapes


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def count_parameters(config: DecoderConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(s) for s in jax.tree.leaves(weight_shapes(config), is_leaf=_is_shape))


def _normals(key: jax.Array, shapes: list[tuple[int, ...]], dtype: Any) -> list[jax.Array]:
    """Standard normal arrays. Small ones are cut from one draw: compiling a generator for each shape costs seconds."""
    sizes = [math.prod(shape) for shape in shapes]
    own, common = jax.random.split(key)
    flat = jax.random.normal(common, (sum(size for size in sizes if size < _LARGE),), dtype)
    drawn, start = [], 0
    for index, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        if size >= _LARGE:
            drawn.append(jax.random.normal(jax.random.fold_in(own, index), shape, dtype))
            continue
        drawn.append(flat[start : start + size].reshape(shape))
        start += size
    return drawn


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def init_weights(key: jax.Array, config: DecoderConfig, dtype: Any = jnp.float32) -> Weights:
    """Random weights: normal(0.02), projections into the residual stream by a further 1/sqrt(2N), norms at one.

    Args:
      key: PRNG key.
      config: the architecture.
      dtype: of the parameters.

    Returns:
      Nested dict of arrays; layers stacked.
    """
    shapes, structure = jax.tree.flatten_with_path(weight_shapes(config), is_leaf=_is_shape)
    random = [shape for path, shape in shapes if path[-1].key not in ("scale", "bias")]
    normals = iter(_normals(key, random, dtype))
    inner = 0.02 / (2.0 * config.layers) ** 0.5

    def one(path, shape):
        module, name = path[-2].key, path[-1].key
        if name == "scale":
            return jnp.full(shape, 1.0 - config.norm.offset, dtype)
        if name == "bias":
            return jnp.zeros(shape, dtype)
        return (inner if module in ("out", "down") else 0.02) * next(normals)

    return jax.tree.unflatten(structure, [one(path, shape) for path, shape in shapes])


class DecoderModule(nnx.Module):
    """A decoder-only transformer as a flax.nnx module; ``policy()`` is how it enters the library.

    Args:
      config: the architecture.
      execution: how it is run.
      param_dtype: of the parameters (float32 master weights, whatever the compute dtype).
      rngs: nnx random streams.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        execution: Execution | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.execution = execution or Execution()
        weights = init_weights(rngs.params(), config, param_dtype)
        self.weights = nnx.data(jax.tree.map(nnx.Param, weights))

    def __call__(self, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        """Next-token logits; prompt [..., L], tokens [..., T] -> [..., T, V]."""
        return self.policy().logits(prompt, tokens)

    def policy(self) -> Policy:
        """The module's present weights as a Policy with scorer and decoder."""
        weights = jax.tree.map(lambda p: p[...], self.weights, is_leaf=lambda x: isinstance(x, nnx.Param))
        return decoder_policy(self.config, weights, self.execution)


def tied_rows(table: jax.Array, begin: int) -> jax.Array:
    """Give every input id above ``begin`` the embedding of ``begin``: return tokens then start out meaning nothing.

    Args:
      table: embeddings; [V + extra, d].
      begin: id of the begin mark.

    Returns:
      [V + extra, d].
    """
    return table.at[begin + 1 :].set(table[begin])
