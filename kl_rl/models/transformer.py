"""The transformer of the enumerable worlds, in flax.nnx: few and small operations, since many copies run at once.

Inputs are ``[prompt, tokens]``; the prompt has at least one token (a begin mark, or a return token in its
place), so that row t of the output depends on the prompt and on ``tokens[:t]`` only.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kl_rl.core.nnx import from_nnx
from kl_rl.core.policy import Policy
from kl_rl.core.twist import Twist
from kl_rl.models.parameters import tied_rows

__all__ = ["Transformer", "tie_extra_tokens", "transformer_policy", "transformer_twist"]


def attend(query: jax.Array, key: jax.Array, value: jax.Array, allowed: jax.Array) -> jax.Array:
    """Softmax attention; query [B, Q, H, D], key and value [B, S, H, D], allowed [Q, S] -> [B, Q, H, D].

    Heads are moved in front of time, so that the products are plain batched matrix multiplications.
    """
    to_heads = lambda x: jnp.swapaxes(x, 1, 2)
    query, key, value = to_heads(query), to_heads(key), to_heads(value)
    scores = query @ jnp.swapaxes(key, -1, -2) * (query.shape[-1] ** -0.5)
    scores = jnp.where(allowed[None, None], scores, jnp.finfo(scores.dtype).min)
    return jnp.swapaxes(jax.nn.softmax(scores, axis=-1) @ value, 1, 2)


class Block(nnx.Module):
    """Pre-norm attention and a GELU feed-forward layer of four times the width."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm1 = nnx.LayerNorm(width, rngs=rngs, param_dtype=jnp.result_type(float))
        self.norm2 = nnx.LayerNorm(width, rngs=rngs, param_dtype=jnp.result_type(float))
        dense = lambda i, o: nnx.Linear(i, o, rngs=rngs, param_dtype=jnp.result_type(float))
        self.qkv, self.out = dense(width, 3 * width), dense(width, width)
        self.up, self.down = dense(width, 4 * width), dense(4 * width, width)

    def project(self, x: jax.Array) -> list[jax.Array]:
        """Queries, keys and values, each [B, S, H, D]."""
        qkv = self.qkv(self.norm1(x))
        shape = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        return [part.reshape(shape) for part in jnp.split(qkv, 3, axis=-1)]

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Residual additions of attention [B, S, H, D] and feed-forward."""
        x = x + self.out(attended.reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """Decoder-only transformer with logits over ``vocab`` and embeddings for ``vocab + extra`` ids.

    Args:
      vocab: V, the tokens that can be emitted.
      extra: further input ids: the begin mark (id V) and return tokens (ids V + 1, ...).
      context: longest prompt plus completion.
      width: model width d.
      layers: number of blocks.
      heads: attention heads.
      outputs: size of the output; V unless given (1 for a twist head).
      rngs: nnx random streams.
    """

    def __init__(
        self,
        vocab: int,
        *,
        extra: int = 1,
        context: int = 16,
        width: int = 32,
        layers: int = 2,
        heads: int = 2,
        outputs: int | None = None,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.result_type(float)
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(
            vocab + extra, width, embedding_init=init, rngs=rngs, param_dtype=dtype, dtype=dtype
        )
        self.position = nnx.Embed(
            context, width, embedding_init=init, rngs=rngs, param_dtype=dtype, dtype=dtype
        )
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs, param_dtype=dtype)
        self.head = nnx.Linear(width, outputs or vocab, kernel_init=init, rngs=rngs, param_dtype=dtype)

    def hidden(self, ids: jax.Array) -> jax.Array:
        """Output rows for every position; ids [B, S] -> [B, S, outputs]."""
        length = ids.shape[1]
        x = self.embed(ids) + self.position(jnp.arange(length))[None]
        causal = jnp.tril(jnp.ones((length, length), bool))
        for block in self.blocks:
            query, key, value = block.project(x)
            x = block.finish(x, attend(query, key, value, causal))
        return self.head(self.norm(x))

    def __call__(self, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        """Next-token logits; prompt [..., L], tokens [..., T] -> [..., T, V]."""
        batch, horizon, start = tokens.shape[:-1], tokens.shape[-1], prompt.shape[-1]
        ids = jnp.concatenate([jnp.broadcast_to(prompt, (*batch, start)), tokens[..., :-1]], axis=-1)
        rows = self.hidden(ids.reshape(-1, start + horizon - 1))[:, start - 1 :]
        return rows.reshape(*batch, horizon, -1)

    def prefill(self, prompt: jax.Array, horizon: int) -> tuple[jax.Array, Any]:
        """Run the prompt and keep keys and values; prompt [B, L] -> logits [B, V], cache."""
        length = prompt.shape[1]
        x = self.embed(prompt) + self.position(jnp.arange(length))[None]
        causal = jnp.tril(jnp.ones((length, length), bool))
        cache = []
        for block in self.blocks:
            query, key, value = block.project(x)
            x = block.finish(x, attend(query, key, value, causal))
            pad = ((0, 0), (0, horizon - 1), (0, 0), (0, 0))
            cache.append((jnp.pad(key, pad), jnp.pad(value, pad)))
        return self.head(self.norm(x[:, -1])), (cache, jnp.asarray(length))

    def decode(self, cache: Any, token: jax.Array) -> tuple[jax.Array, Any]:
        """One more token; token [B] -> logits [B, V], cache."""
        layers, position = cache
        x = (self.embed(token) + self.position(position)[None])[:, None]
        filled = []
        for block, (keys, values) in zip(self.blocks, layers, strict=True):
            query, key, value = block.project(x)
            keys = jax.lax.dynamic_update_slice_in_dim(keys, key, position, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(values, value, position, axis=1)
            allowed = (jnp.arange(keys.shape[1]) <= position)[None]
            x = block.finish(x, attend(query, keys, values, allowed))
            filled.append((keys, values))
        return self.head(self.norm(x[:, 0])), (filled, position + 1)


class _Twist(nnx.Module):
    """A transformer with one output for each prefix of the completion, the empty and the full one included."""

    def __init__(self, trunk: Transformer):
        self.trunk = trunk

    def __call__(self, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        padded = jnp.concatenate([tokens, tokens[..., -1:]], axis=-1)
        return self.trunk(prompt, padded)[..., 0]


def transformer_policy(key: jax.Array, vocab: int, **options: Any) -> Policy:
    """A freshly initialized transformer as a Policy.

    Args:
      key: PRNG key.
      vocab: V.
      **options: of ``Transformer``.

    Returns:
      Policy with decoder.
    """
    return from_nnx(Transformer(vocab, rngs=nnx.Rngs(key), **options))


def transformer_twist(key: jax.Array, vocab: int, **options: Any) -> Twist:
    """A freshly initialized twist head.

    ``apply(params, prompt [..., L], tokens [..., T]) -> log_twist [..., T + 1]``, in nats.
    """
    made = from_nnx(_Twist(Transformer(vocab, outputs=1, rngs=nnx.Rngs(key), **options)))
    return Twist(made.params, made.apply)


def tie_extra_tokens(policy: Policy, begin: int) -> Policy:
    """Give every input id above ``begin`` the embedding of ``begin``: return tokens then start out meaning nothing.

    Args:
      policy: from ``transformer_policy``.
      begin: id of the begin mark, V.

    Returns:
      A policy equal to the old one on prompts that start with ``begin``, and indifferent to return tokens.
    """
    tied = tied_rows(policy.params["embed"]["embedding"], begin)
    return policy.with_params({**policy.params, "embed": {**policy.params["embed"], "embedding": tied}})
