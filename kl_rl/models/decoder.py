"""The decoder-only language model: its weights, its forward pass over rows, and the policy made of both.

A ``Policy`` of a language model has three forms of the same function: ``apply`` (all logits), a scorer
(log-probabilities of given tokens, the prompt computed once for its K completions, logits in chunks) and a decoder
(prefill, then one token at a time with a cache).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kl_rl.core.policy import Decoder, Policy, Trunk
from kl_rl.models.attention import row_attention
from kl_rl.models.cache import Advance, Fork, Gather, Prefill, Prepare
from kl_rl.models.config import DecoderConfig, Execution
from kl_rl.models.head import logits_of, token_log_probs_of
from kl_rl.models.layers import normalize, rotations, run_layers
from kl_rl.models.positions import Layout, last_index, layout_of, packed_layout
from kl_rl.models.shared import completion_hidden, embed

__all__ = ["decoder_policy", "forward", "hidden_states", "last_hidden", "packed_log_probs"]

Weights = Any


def hidden_states(
    config: DecoderConfig, execution: Execution, weights: Weights, ids: jax.Array, layout: Layout | None
) -> jax.Array:
    """Hidden states after the final norm.

    Args:
      config: the architecture.
      execution: how it is run.
      weights: see ``init_weights``.
      ids: [B, S].
      layout: positions and segments, or None: one unpadded sequence per row.

    Returns:
      [B, S, d] in the compute dtype.
    """
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None] if layout is None else layout.positions
    x = embed(config, execution, weights, ids, jnp.broadcast_to(positions, ids.shape))

    def attend(window, query, key, value, extra):
        return row_attention(config, execution, query, key, value, layout, window), None

    angles = rotations(config, jnp.broadcast_to(positions, ids.shape))
    x, _ = run_layers(config, execution, weights["layers"], x, angles, attend)
    return normalize(config.norm, weights["final_norm"], x)


def forward(config: DecoderConfig, execution: Execution, weights: Weights, ids: jax.Array) -> jax.Array:
    """Next-token logits of whole rows; ids below 0 are padding; row s predicts id s + 1; [B, S] -> [B, S, V]."""
    return logits_of(config, weights, hidden_states(config, execution, weights, ids, layout_of(ids)))


def last_hidden(
    config: DecoderConfig, weights: Weights, ids: jax.Array, execution: Execution | None = None
) -> jax.Array:
    """Hidden state of the last token of each row, after the final norm; ids below 0 are padding; [B, S] -> [B, d]."""
    hidden = hidden_states(config, execution or Execution(), weights, ids, layout_of(ids))
    return jnp.take_along_axis(hidden, last_index(ids)[:, None, None], axis=1)[:, 0]


def packed_log_probs(
    config: DecoderConfig,
    execution: Execution,
    weights: Weights,
    ids: jax.Array,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Log-probability of each token given those before it in its sequence, in nats: the pretraining objective.

    Args:
      config: the architecture.
      execution: how it is run.
      weights: of the model.
      ids: [B, S].
      segments: number of the sequence each token belongs to, from 1, 0 for padding; [B, S]. None: one sequence per row.

    Returns:
      [B, S - 1]; entry s is the log-probability of id s + 1, 0 where that is the first of a sequence or padding.
    """
    layout = None if segments is None else packed_layout(segments)
    hidden = hidden_states(config, execution, weights, jnp.maximum(ids, 0), layout)
    target = jnp.maximum(ids[:, 1:], 0).astype(jnp.int32)
    log_probs = token_log_probs_of(config, execution, weights, hidden[:, :-1], target)
    if segments is None:
        return log_probs
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return jnp.where(inside, log_probs, 0.0)


@dataclasses.dataclass(frozen=True)
class _Apply:
    """All next-token logits of a batch of completions: ``(weights, prompt [..., L], tokens [..., T])``."""

    config: DecoderConfig
    execution: Execution

    def __call__(self, weights: Weights, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        batch, start, horizon = tokens.shape[:-1], prompt.shape[-1], tokens.shape[-1]
        prompts = jnp.broadcast_to(prompt, (*batch, start)).reshape(-1, start)
        completions = tokens.reshape(-1, horizon)
        ids = jnp.concatenate([prompts, completions[:, :-1].astype(prompts.dtype)], axis=1)
        hidden = hidden_states(self.config, self.execution, weights, ids, layout_of(ids))
        first = jnp.take_along_axis(hidden, last_index(prompts)[:, None, None], axis=1)
        rows = jnp.concatenate([first, hidden[:, start:]], axis=1)
        return logits_of(self.config, weights, rows).reshape(*batch, horizon, -1)


@dataclasses.dataclass(frozen=True)
class _LogProbs:
    """Log-probabilities of K completions of each prompt: ``(weights, [P, L], [P, K, T]) -> [P, K, T]``."""

    config: DecoderConfig
    execution: Execution

    def __call__(self, weights: Weights, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        hidden = completion_hidden(self.config, self.execution, weights, prompt, tokens)
        flat = hidden.reshape(-1, *hidden.shape[2:])
        target = tokens.reshape(-1, tokens.shape[-1]).astype(jnp.int32)
        return token_log_probs_of(self.config, self.execution, weights, flat, target).reshape(tokens.shape)


@dataclasses.dataclass(frozen=True)
class _Hidden:
    """Hidden states that predict each token: ``(weights, [P, L], [P, K, T]) -> [P, K, T, d]``."""

    config: DecoderConfig
    execution: Execution

    def __call__(self, weights: Weights, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        return completion_hidden(self.config, self.execution, weights, prompt, tokens)


@dataclasses.dataclass(frozen=True)
class _Logits:
    """``(weights, hidden [..., d]) -> logits [..., V]``."""

    config: DecoderConfig

    def __call__(self, weights: Weights, hidden: jax.Array) -> jax.Array:
        return logits_of(self.config, weights, hidden)


def decoder_policy(config: DecoderConfig, weights: Weights, execution: Execution | None = None) -> Policy:
    """A language model as a Policy.

    Args:
      config: the architecture.
      weights: from ``init_weights`` or a checkpoint.
      execution: how it is run.

    Returns:
      Policy with scorer and decoder; ids below 0 in prompts are padding.
    """
    how = (config, execution or Execution())
    decoder = Decoder(Prefill(*how), Advance(*how), Fork(), Gather(), Prepare(*how))
    trunk = Trunk(_Hidden(*how), _Logits(how[0]))
    return Policy(weights, _Apply(*how), decoder, _LogProbs(*how), trunk=trunk)
