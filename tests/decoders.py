"""Small random decoders of every architecture, for the tests of the engine."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.models import (
    Attention,
    DecoderConfig,
    Execution,
    FeedForward,
    Norm,
    Rotary,
    decoder_policy,
    weight_shapes,
)

SILU = FeedForward(24, "silu", gated=True, bias=False)
GEGLU = FeedForward(24, "gelu_tanh", gated=True, bias=False)
RMS, GEMMA_RMS = Norm(1e-6, centred=False), Norm(1e-6, centred=False, offset=1.0)

CONFIGS = {
    "gpt2": DecoderConfig.gpt2(31, width=16, layers=2, heads=2, context=48, extra=2),
    "llama2": DecoderConfig(31, 16, 2, 48, Attention(4, 4, 4), SILU, RMS, Rotary(), tied=False),
    "llama3": DecoderConfig(
        31, 16, 2, 48, Attention(4, 2, 4), SILU, RMS, Rotary(5e5, llama3=(8.0, 1.0, 4.0, 16)), tied=False
    ),
    "qwen2": DecoderConfig(31, 16, 2, 48, Attention(4, 2, 4, bias=True), SILU, RMS, Rotary(1e6)),
    "qwen3": DecoderConfig(31, 16, 2, 48, Attention(4, 2, 8, qk_norm=True), SILU, RMS, Rotary(1e6)),
    "gemma2": DecoderConfig(
        31, 16, 2, 48, Attention(4, 2, 8, scale=0.3, softcap=50.0, windows=(4, None)), GEGLU, GEMMA_RMS,
        Rotary(), post_norms=True, embed_scale=4.0, softcap=30.0,
    ),
    "gemma3": DecoderConfig(
        31, 16, 3, 48,
        Attention(4, 1, 8, scale=0.3, qk_norm=True, windows=(4, None, 4), local_rotary=Rotary(1e4)),
        GEGLU, GEMMA_RMS, Rotary(1e6, factor=8.0), post_norms=True, embed_scale=4.0,
    ),
}  # fmt: skip


@functools.cache
def random_weights(config: DecoderConfig, seed: int = 0, dtype=jnp.float32):
    """Weights large enough that every part of the network matters; numpy's, so that nothing is compiled for them."""
    rng = np.random.default_rng(seed)
    start = lambda path: 1.0 - config.norm.offset if path[-1].key == "scale" else 0.0
    draw = lambda path, shape: jnp.asarray(start(path) + 0.15 * rng.standard_normal(shape), dtype)
    return jax.tree_util.tree_map_with_path(
        draw, weight_shapes(config), is_leaf=lambda x: isinstance(x, tuple)
    )


@functools.cache
def policy_of(name: str, seed: int = 0, dtype=jnp.float32, **execution):
    """A random decoder as a policy."""
    config = CONFIGS[name]
    options = {"compute_dtype": jnp.dtype(dtype).name} | execution
    return decoder_policy(config, random_weights(config, seed, dtype), Execution(**options))


def scanned(policy):
    """The same policy with its layers in a loop."""
    how = dataclasses.replace(policy.apply.execution, scan_layers=True)
    return decoder_policy(policy.apply.config, policy.params, how)
