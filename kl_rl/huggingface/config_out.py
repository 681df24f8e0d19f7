"""DecoderConfig -> config.json: the first family that, read again, gives the same architecture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from kl_rl.huggingface.config_in import ARCHITECTURES, FULL, SLIDING, config_from_dict
from kl_rl.huggingface.errors import CheckpointError
from kl_rl.huggingface.rope import rope_fields
from kl_rl.models.config import DecoderConfig, Rotary

__all__ = ["config_to_dict"]


def _activation(config: DecoderConfig, tanh: str) -> str:
    return tanh if config.feed_forward.activation == "gelu_tanh" else config.feed_forward.activation


def _common(config: DecoderConfig) -> dict[str, Any]:
    """What all families but GPT-2 call by the same names."""
    part = config.attention
    return {
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": part.heads,
        "num_key_value_heads": part.kv_heads,
        "head_dim": part.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm.eps,
        "hidden_act": _activation(config, "gelu_pytorch_tanh"),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _layer_types(config: DecoderConfig) -> dict[str, Any]:
    sizes = [w for w in config.windows if w is not None]
    types = [FULL if w is None else SLIDING for w in config.windows]
    return {"layer_types": types, "sliding_window": sizes[0] if sizes else None}


def _gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.attention.heads,
        "n_positions": config.context,
        "n_inner": config.feed_forward.width,
        "activation_function": _activation(config, "gelu_new"),
        "layer_norm_epsilon": config.norm.eps,
        "scale_attn_weights": config.attention.scale is None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _llama(config: DecoderConfig) -> dict[str, Any]:
    flags = {"attention_bias": config.attention.bias, "mlp_bias": config.feed_forward.bias}
    return _common(config) | rope_fields(config) | flags


def _qwen2(config: DecoderConfig) -> dict[str, Any]:
    types = _layer_types(config)
    first = next((i for i, w in enumerate(config.windows) if w is not None), config.layers)
    windows = {"use_sliding_window": SLIDING in types["layer_types"], "max_window_layers": first}
    return _common(config) | rope_fields(config) | types | windows


def _qwen3(config: DecoderConfig) -> dict[str, Any]:
    return _qwen2(config) | {"attention_bias": config.attention.bias}


def _gemma(config: DecoderConfig) -> dict[str, Any]:
    scalar = config.query_scale**-2
    whole = round(scalar)
    common, types = _common(config), _layer_types(config)
    if types["sliding_window"] is None:  # transformers reads it even if no layer has one
        types["sliding_window"] = config.context
    return common | {
        "hidden_activation": common["hidden_act"],
        "attention_bias": config.attention.bias,
        "query_pre_attn_scalar": whole if math.isclose(scalar, whole, rel_tol=1e-9) else scalar,
        "attn_logit_softcapping": config.attention.softcap,
        "final_logit_softcapping": config.softcap,
        **types,
    }


def _gemma2(config: DecoderConfig) -> dict[str, Any]:
    return _gemma(config) | rope_fields(config)


def _gemma3(config: DecoderConfig) -> dict[str, Any]:
    return _gemma(config) | rope_fields(config, nested=True)


WRITERS: dict[str, Callable[[DecoderConfig], dict[str, Any]]] = {
    "GPT2LMHeadModel": _gpt2,
    "LlamaForCausalLM": _llama,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
}


def _canonical(config: DecoderConfig) -> DecoderConfig:
    """The same architecture with defaults spelled in one way."""
    part, width = config.attention, math.sqrt(config.width)
    windows = part.windows if any(w is not None for w in part.windows) else ()
    local = part.local_rotary if windows and part.local_rotary != config.rotary else None
    scale = None if math.isclose(config.query_scale, part.head_dim**-0.5, rel_tol=1e-9) else part.scale
    attention = dataclasses.replace(part, windows=windows, local_rotary=local, scale=scale)
    embed = width if math.isclose(config.embed_scale, width, rel_tol=1e-9) else config.embed_scale
    return dataclasses.replace(config, attention=attention, embed_scale=embed)


def _leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Fields by dotted name; parts are opened."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner = dataclasses.is_dataclass(value) and not isinstance(value, Rotary)
        found |= _leaves(value, f"{prefix}{field.name}.") if inner else {prefix + field.name: value}
    return found


def _close(a: Any, b: Any) -> bool:
    return math.isclose(a, b, rel_tol=1e-9) if isinstance(a, float) and isinstance(b, float) else a == b


def _differences(config: DecoderConfig, other: DecoderConfig) -> list[str]:
    mine, theirs = _leaves(config), _leaves(other)
    return [name for name in mine if not _close(mine[name], theirs[name])]


def _spec(architecture: str, config: DecoderConfig) -> dict[str, Any]:
    head = {"architectures": [architecture], "model_type": ARCHITECTURES[architecture][0]}
    size = {"vocab_size": config.vocab + config.extra, "tie_word_embeddings": config.tied}
    extra = {"kl_rl_extra": config.extra} if config.extra else {}
    return head | size | WRITERS[architecture](config) | extra


def config_to_dict(config: DecoderConfig) -> dict[str, Any]:
    """A config.json for an architecture, in the first family of ``ARCHITECTURES`` that can express it.

    The embedding of a model with input-only ids has ``vocab + extra`` rows: that is ``vocab_size`` in the file, and
    ``kl_rl_extra`` says how many of the last ids are never emitted.

    Args:
      config: the architecture.

    Returns:
      The JSON object; ``config_from_dict`` gives the architecture back.

    Raises:
      CheckpointError: no family can express it; the message says which fields stand in the way of each.
    """
    wanted, reasons = _canonical(config), []
    for architecture in ARCHITECTURES:
        if architecture != "GPT2LMHeadModel" and config.rotary is None:
            reasons.append(f"{architecture}: rotary")
            continue
        spec = _spec(architecture, wanted)
        try:
            different = _differences(wanted, config_from_dict(spec))
        except CheckpointError as error:
            different = [str(error)]
        if not different:
            return spec
        reasons.append(f"{architecture}: {', '.join(different)}")
    raise CheckpointError("no known family has this architecture; what differs: " + "; ".join(reasons))
