"""config.json -> DecoderConfig, one function per family; defaults as in transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kl_rl.huggingface.errors import CheckpointError
from kl_rl.huggingface.fields import Fields
from kl_rl.huggingface.rope import read_local_rotary, read_rotary
from kl_rl.models.config import Attention, DecoderConfig, FeedForward, Norm, Rotary

__all__ = ["ARCHITECTURES", "config_from_dict", "model_type"]

FULL, SLIDING = "full_attention", "sliding_attention"
REFUSED = {
    "quantization_config": "quantized weights are not supported; save the model in float32, bfloat16 or float16",
    "num_local_experts": "mixtures of experts are not supported",
    "num_experts": "mixtures of experts are not supported",
    "n_routed_experts": "mixtures of experts are not supported",
    "is_encoder_decoder": "only decoders are supported",
    "add_cross_attention": "only decoders without cross-attention are supported",
    "scale_attn_by_inverse_layer_idx": "attention scaled by the layer's number is not supported",
    "use_bidirectional_attention": "only causal attention is supported",
}


def _windows(f: Fields, layers: int, window: int | None, default: Sequence[str]) -> tuple[int | None, ...]:
    """One entry per layer from ``layer_types``; empty if no layer has a window."""
    types = f.spec.get("layer_types") or list(default)
    if not isinstance(types, list) or len(types) != layers:
        raise f.error("layer_types", f"must be a list with one entry for each of {layers} layers")
    if unknown := sorted({str(t) for t in types} - {FULL, SLIDING}):
        raise f.error("layer_types", f"{unknown[0]!r} is not supported; known: {FULL}, {SLIDING}")
    if SLIDING in types and window is None:
        raise f.error("sliding_window", "missing, though layer_types has sliding_attention")
    return tuple(window if t == SLIDING else None for t in types) if SLIDING in types else ()


def _every(layers: int, pattern: int) -> list[str]:
    """Every ``pattern``-th layer sees everything."""
    return [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]


def _heads(f: Fields, head_dim: int | None = None) -> Attention:
    """Sizes of the attention; ``head_dim`` is the family's default, or the width is divided by the heads."""
    heads, width = f.integer("num_attention_heads"), f.integer("hidden_size")
    if f.spec.get("head_dim") is None and head_dim is None:
        if width % heads:
            raise f.error("hidden_size", f"{width} must be a multiple of num_attention_heads = {heads}")
        head_dim = width // heads
    return Attention(heads, f.integer("num_key_value_heads", heads), f.integer("head_dim", head_dim))


def _gated(
    f: Fields,
    attention: Attention,
    rotary: Rotary,
    *,
    act: tuple[str, str] = ("hidden_act", "silu"),
    **rest: Any,
) -> DecoderConfig:
    """What all families but GPT-2 share."""
    tied = f.flag("tie_word_embeddings", rest.pop("tied", False))
    mlp = FeedForward(
        f.integer("intermediate_size"), f.activation(*act), gated=True, bias=rest.pop("mlp_bias", False)
    )
    norm = Norm(f.number("rms_norm_eps", 1e-6), centred=False, offset=rest.pop("offset", 0.0))
    return DecoderConfig(
        f.integer("vocab_size"),
        f.integer("hidden_size"),
        f.integer("num_hidden_layers"),
        f.integer("max_position_embeddings"),
        attention,
        mlp,
        norm,
        rotary,
        tied=tied,
        **rest,
    )


def _gpt2(f: Fields) -> DecoderConfig:
    width, heads = f.integer("n_embd"), f.integer("n_head")
    if width % heads:
        raise f.error("n_embd", f"{width} must be a multiple of n_head = {heads}")
    scale = None if f.flag("scale_attn_weights", True) else 1.0
    attention = Attention(heads, heads, width // heads, bias=True, out_bias=True, scale=scale)
    mlp = FeedForward(f.integer("n_inner", 4 * width), f.activation("activation_function", "gelu_new"))
    return DecoderConfig(
        f.integer("vocab_size"),
        width,
        f.integer("n_layer"),
        f.integer("n_positions"),
        attention,
        mlp,
        Norm(f.number("layer_norm_epsilon", 1e-5)),
        tied=f.flag("tie_word_embeddings", True),
    )


def _llama(f: Fields) -> DecoderConfig:
    bias = f.flag("attention_bias", False)
    attention = replace(_heads(f), bias=bias, out_bias=bias)
    return _gated(f, attention, read_rotary(f), mlp_bias=f.flag("mlp_bias", False))


def _window(f: Fields) -> int | None:
    """Width of windows: 4096 if it is not said, none if it is null."""
    return None if f.spec.get("sliding_window", 4096) is None else f.integer("sliding_window", 4096)


def _qwen_windows(f: Fields) -> tuple[int | None, ...]:
    layers = f.integer("num_hidden_layers")
    window = _window(f) if f.flag("use_sliding_window", False) else None
    first = f.spec.get("max_window_layers", 28)
    return _windows(f, layers, window, [SLIDING if window and i >= first else FULL for i in range(layers)])


def _qwen2(f: Fields) -> DecoderConfig:
    return _gated(f, replace(_heads(f), bias=True, windows=_qwen_windows(f)), read_rotary(f))


def _qwen3(f: Fields) -> DecoderConfig:
    bias = f.flag("attention_bias", False)
    attention = replace(
        _heads(f, head_dim=128), bias=bias, out_bias=bias, qk_norm=True, windows=_qwen_windows(f)
    )
    return _gated(f, attention, read_rotary(f))


def _gemma_attention(f: Fields, default_layers: Sequence[str], **features: Any) -> Attention:
    layers, sizes = f.integer("num_hidden_layers"), _heads(f, head_dim=256)
    window = _window(f)
    scalar = f.number("query_pre_attn_scalar", 256.0)
    bias = f.flag("attention_bias", False)
    return replace(
        sizes,
        bias=bias,
        out_bias=bias,
        scale=None if scalar == sizes.head_dim else scalar**-0.5,
        windows=_windows(f, layers, window, default_layers),
        **features,
    )


def _gemma(f: Fields, attention: Attention, rotary: Rotary, softcap: float | None) -> DecoderConfig:
    act = ("hidden_activation", "gelu_pytorch_tanh")
    scale = math.sqrt(f.integer("hidden_size"))
    return _gated(
        f,
        attention,
        rotary,
        act=act,
        offset=1.0,
        tied=True,
        post_norms=True,
        embed_scale=scale,
        softcap=softcap,
    )


def _gemma2(f: Fields) -> DecoderConfig:
    cap = f.optional_number("attn_logit_softcapping", 50.0)
    attention = _gemma_attention(f, _every(f.integer("num_hidden_layers"), 2), softcap=cap)
    return _gemma(f, attention, read_rotary(f), f.optional_number("final_logit_softcapping", 30.0))


def _gemma3(f: Fields) -> DecoderConfig:
    if f.spec.get("attn_logit_softcapping") is not None:
        raise f.unsupported("attn_logit_softcapping", "Gemma 3 has query and key norms instead")
    rotary, local = read_local_rotary(f)
    pattern = f.integer("sliding_window_pattern", f.integer("_sliding_window_pattern", 6))
    attention = _gemma_attention(f, _every(f.integer("num_hidden_layers"), pattern), qk_norm=True)
    if attention.windows and local != rotary:
        attention = replace(attention, local_rotary=local)
    return _gemma(f, attention, rotary, f.optional_number("final_logit_softcapping", None))


ARCHITECTURES: dict[str, tuple[str, Callable[[Fields], DecoderConfig]]] = {
    "GPT2LMHeadModel": ("gpt2", _gpt2),
    "LlamaForCausalLM": ("llama", _llama),
    "Qwen2ForCausalLM": ("qwen2", _qwen2),
    "Qwen3ForCausalLM": ("qwen3", _qwen3),
    "Gemma2ForCausalLM": ("gemma2", _gemma2),
    "Gemma3ForCausalLM": ("gemma3_text", _gemma3),
}


def _architecture(f: Fields) -> str:
    """By ``architectures``; by ``model_type`` if that is missing."""
    named = f.spec.get("architectures") or [
        a for a, (t, _) in ARCHITECTURES.items() if t == f.spec.get("model_type")
    ]
    name = named[0] if isinstance(named, list) and named else None
    if isinstance(name, str) and name in ARCHITECTURES:
        return name
    known = ", ".join(ARCHITECTURES)
    shown = f.spec.get("model_type") if name is None else name
    field = "model_type" if name is None else "architectures"
    remote = "; its own code (auto_map) is never run" if f.spec.get("auto_map") else ""
    raise f.error(field, f"unknown architecture {shown!r}{remote}; known: {known}")


def model_type(spec: dict[str, Any], where: str = "config.json") -> str:
    """Family of a config.json ("gpt2", "llama", "qwen2", "qwen3", "gemma2", "gemma3_text").

    Args:
      spec: the parsed config.json.
      where: file name for messages.

    Returns:
      The model type.

    Raises:
      CheckpointError: unknown architecture.
    """
    return ARCHITECTURES[_architecture(Fields(spec, where))][0]


def config_from_dict(spec: dict[str, Any], where: str = "config.json") -> DecoderConfig:
    """The architecture that a config.json describes.

    Args:
      spec: the parsed config.json of GPT-2, Llama, Qwen2, Qwen3, Gemma 2 or Gemma 3 (text).
      where: file name for messages.

    Returns:
      The architecture. ``kl_rl_extra`` rows at the end of the embedding become input-only ids.

    Raises:
      CheckpointError: naming the field that is missing, malformed or not supported.
    """
    f = Fields(spec, where)
    architecture = _architecture(f)
    for name, problem in REFUSED.items():
        if spec.get(name) not in (None, False, 0, {}):
            raise f.error(name, problem)
    try:
        config = ARCHITECTURES[architecture][1](f)
        extra = f.integer("kl_rl_extra") if spec.get("kl_rl_extra") else 0
        return replace(config, vocab=config.vocab - extra, extra=extra)
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error
