"""Small decoders of the GPT-2 shape, for texts.

Inputs are ``[prompt, tokens]``; the prompt has at least one token (a begin mark, or a return token in its
place), so that row t of the output depends on the prompt and on ``tokens[:t]`` only.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kl_rl.core.policy import Policy
from kl_rl.core.twist import Twist
from kl_rl.models.config import DecoderConfig, Execution
from kl_rl.models.decoder import decoder_policy
from kl_rl.models.twist import decoder_twist
from kl_rl.models.weights import init_weights

__all__ = ["small_config", "small_policy", "small_twist", "tie_extra_rows"]


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


def small_twist(key: jax.Array, vocab: int, **options: Any) -> Twist:
    """A freshly initialized twist head with its own trunk.

    ``apply(params, prompt [..., L], tokens [..., T]) -> log_twist [..., T + 1]``, in nats.
    """
    config = small_config(vocab, **options)
    weights = init_weights(key, config, jnp.result_type(float))
    return decoder_twist(config, weights, _execution(), train_trunk=True)


def tie_extra_rows(policy: Policy, begin: int) -> Policy:
    """Give every input id above ``begin`` the embedding of ``begin``: return tokens then start out meaning nothing.

    Args:
      policy: from ``decoder_policy``.
      begin: id of the begin mark, V.

    Returns:
      A policy equal to the old one on prompts that start with ``begin``, and indifferent to return tokens.
    """
    table = policy.params["embed"]["table"]
    return policy.with_params(policy.params | {"embed": {"table": table.at[begin + 1 :].set(table[begin])}})
