"""Small decoders of the GPT-2 shape, for texts.

Inputs are ``[prompt, tokens]``; the prompt has at least one token (a begin mark, or a return token in its
place), so that row t of the output depends on the prompt and on ``tokens[:t]`` only.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kl_rl.core.policy import Policy
from kl_rl.models.config import DecoderConfig, Execution
from kl_rl.models.decoder import decoder_policy
from kl_rl.models.parameters import init_weights

__all__ = ["small_config", "small_policy"]


def small_config(
    vocab: int, *, extra: int = 1, context: int = 16, width: int = 32, layers: int = 2, heads: int = 2
) -> DecoderConfig:
    """The GPT-2 shape at toy size.

    Args:
      vocab: V, the tokens that can be emitted.
      extra: further input ids: the begin mark (id V) and return tokens (ids V + 1, ...).
      context: longest prompt plus completion.
      width: model width d.
      layers: number of layers.
      heads: attention heads.

    Returns:
      The configuration.
    """
    return DecoderConfig.gpt2(vocab, width=width, layers=layers, heads=heads, context=context, extra=extra)


def _execution() -> Execution:
    return Execution(compute_dtype=jnp.dtype(jnp.result_type(float)).name)


def small_policy(key: jax.Array, vocab: int, **options: Any) -> Policy:
    """A freshly initialized transformer as a Policy.

    Args:
      key: PRNG key.
      vocab: V.
      **options: of ``small_config``.

    Returns:
      Policy with scorer and decoder.
    """
    config = small_config(vocab, **options)
    return decoder_policy(config, init_weights(key, config, jnp.result_type(float)), _execution())
