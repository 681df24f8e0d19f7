"""config.json of the families: fields of older and newer files, and a clear message for what is not supported."""

import dataclasses

import pytest
from checkpoint_files import spec_of

from kl_rl.huggingface import (
    CheckpointError,
    config_from_dict,
    config_to_dict,
)
from kl_rl.models.config import Attention, DecoderConfig, FeedForward, Norm, Rotary

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def read(model_type, **fields):
    return config_from_dict({"model_type": model_type, **SIZES, **fields})


def test_fields_of_older_and_newer_files():
    assert read("llama", rope_theta=5e5).rotary == Rotary(5e5)
    assert read("llama", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}).rotary == Rotary(5e5)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 32}
    llama3 = Rotary(5e5, llama3=(8.0, 1.0, 4.0, 32))
    assert read("llama", rope_theta=5e5, rope_scaling=scaling).rotary == llama3
    assert read("llama", rope_parameters=scaling | {"rope_theta": 5e5}).rotary == llama3
    assert read("llama").attention.head_dim == 4 and read("llama", head_dim=8).attention.head_dim == 8
    assert read("llama", num_key_value_heads=None).attention.kv_heads == 4
    assert read("qwen2").attention.bias and not read("qwen2").attention.out_bias
    assert read("qwen2", sliding_window=8).attention.windows == ()
    assert read(
        "qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=3
    ).attention.windows == ((None,) * 3 + (8,))
    null = {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 3}
    assert read("qwen2", **null).attention.windows == read("qwen3", **null).attention.windows == ()
    assert read("qwen3").attention.head_dim == 128
    gemma2 = read("gemma2", sliding_window=8)
    assert gemma2.attention.windows == (8, None, 8, None) and gemma2.tied
    assert (gemma2.attention.softcap, gemma2.softcap, gemma2.embed_scale) == (50.0, 30.0, 4.0)
    assert gemma2.attention.scale is None and read("gemma2", head_dim=8).attention.scale == 256**-0.5


def test_gemma3_positions_of_older_and_newer_files():
    old = {
        "rope_theta": 2e6,
        "rope_local_base_freq": 3e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    old |= {"sliding_window": 8, "sliding_window_pattern": 2}
    config = read("gemma3_text", **old)
    assert config.rotary == Rotary(2e6, factor=8.0) and config.attention.local_rotary == Rotary(3e4)
    assert config.attention.windows == (8, None, 8, None) and config.softcap is None
    nested = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6}}
    nested["sliding_attention"] = {"rope_type": "default", "rope_theta": 3e4}
    types = ["sliding_attention", "full_attention"] * 2
    assert config == read("gemma3_text", rope_parameters=nested, sliding_window=8, layer_types=types)
    plain = read("gemma3_text", sliding_window=8)
    assert plain.attention.windows == (8,) * 4 and plain.attention.local_rotary == Rotary(1e4)
    assert plain.rotary == Rotary(1e6)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_gemma_without_windows_is_written_with_a_width(family):
    """Transformers reads it even if no layer uses it, and refuses to run if it is null."""
    config = read(family, layer_types=["full_attention"] * 4)
    spec = config_to_dict(config)
    assert spec["sliding_window"] >= 1 and set(spec["layer_types"]) == {"full_attention"}
    assert config_from_dict(spec) == config


def test_an_architecture_that_no_family_has_is_refused():
    config = DecoderConfig(
        10,
        8,
        2,
        16,
        Attention(2, 2, 4, windows=(4, None)),
        FeedForward(16, "silu", True, False),
        Norm(centred=False),
    )
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM: rotary"):
        config_to_dict(config)
    config = dataclasses.replace(config, rotary=Rotary())
    with pytest.raises(
        CheckpointError, match=r"LlamaForCausalLM: attention.windows;.*Qwen2.*: attention.bias"
    ):
        config_to_dict(config)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "llama",
            {"architectures": ["MixtralForCausalLM"]},
            "architectures: unknown.*'Mixtral.*known: GPT2LMHead",
        ),
        ("llama", {"architectures": None, "model_type": "mamba"}, "model_type: unknown architecture 'mamba'"),
        (
            "llama",
            {"architectures": ["X"], "auto_map": {"AutoModel": "x.X"}},
            r"its own code \(auto_map\) is never run",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type: 'yarn' is not supported",
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor: missing"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        (
            "llama",
            {"quantization_config": {"bits": 4}},
            "quantization_config: quantized weights are not supported",
        ),
        ("llama", {"num_local_experts": 8}, "num_local_experts: mixtures of experts are not supported"),
        ("llama", {"hidden_act": "relu"}, "hidden_act: 'relu' is not supported; known: gelu_new"),
        ("llama", {"hidden_size": None}, "hidden_size: missing"),
        (
            "llama",
            {"num_hidden_layers": "2"},
            "num_hidden_layers: must be a whole number of at least 1; got '2'",
        ),
        ("llama", {"num_key_value_heads": 3}, "kv_heads must divide heads = 4; got 3"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings: must be true or false"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx: attention scaled",
        ),
        (
            "gemma2",
            {"layer_types": ["full_attention"]},
            "layer_types: must be a list with one entry for each of 3",
        ),
        (
            "gemma2",
            {"layer_types": ["chunked_attention"] * 3},
            "layer_types: 'chunked_attention' is not supported",
        ),
        ("gemma3", {"sliding_window": None}, "sliding_window: missing"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0 is not supported"),
        ("gemma3", {"use_bidirectional_attention": True}, "only causal attention"),
    ],
)
def test_what_is_not_supported_is_named(name, change, message):
    with pytest.raises(CheckpointError, match=r"^here\.json: .*" + message):
        config_from_dict(spec_of(name) | change, "here.json")
