"""Beside transformers itself: larger random models read by us, folders written by us read by it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_rl.huggingface import config_from_dict, config_to_dict, load_checkpoint, save_checkpoint
from kl_rl.models.config import Attention, DecoderConfig, Execution, FeedForward, Norm, Rotary
from kl_rl.models.decoder import forward
from kl_rl.models.parameters import init_weights
from kl_rl.tokenizer import ByteTokenizer

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("default")]
ROWS, LENGTH, VOCAB = 3, 96, 1000
SIZES = {"vocab_size": VOCAB, "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 6}
SIZES |= {
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
}
SIZES |= {"bos_token_id": None, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
GEMMA = {"head_dim": 64, "sliding_window": 17, "query_pre_attn_scalar": 48}
CASES = {
    "GPT2Config": {"vocab_size": VOCAB, "n_embd": 192, "n_layer": 6, "n_head": 6, "n_positions": 256},
    "LlamaConfig": {**SIZES, "rope_theta": 5e5, "rope_scaling": LLAMA3},
    "Qwen2Config": {**SIZES, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 3},
    "Qwen3Config": {**SIZES, "head_dim": 64, "tie_word_embeddings": True},
    "Gemma2Config": {**SIZES, **GEMMA},
    "Gemma3TextConfig": {**SIZES, **GEMMA, "num_hidden_layers": 8},
}

GATED = FeedForward(48, "silu", gated=True, bias=False)
RMS, GEMMA_NORM = Norm(1e-6, centred=False), Norm(1e-6, centred=False, offset=1.0)
GEMMA_REST = {"post_norms": True, "embed_scale": math.sqrt(24), "tied": True}
GEGLU = FeedForward(48, "gelu_tanh", gated=True, bias=False)
OURS = {
    "gpt2": DecoderConfig.gpt2(257, width=24, layers=3, heads=4, context=64, extra=2),
    "gpt2 untied, wide": dataclasses.replace(
        DecoderConfig.gpt2(257, width=24, layers=2, heads=2, context=64, extra=1),
        tied=False,
        feed_forward=FeedForward(40, "gelu"),
    ),
    "llama": DecoderConfig(
        90, 24, 3, 64, Attention(4, 2, 8), GATED, RMS, Rotary(5e5, llama3=(4.0, 1.0, 4.0, 32)), tied=False
    ),
    "llama with biases, tied": DecoderConfig(
        90,
        24,
        2,
        64,
        Attention(4, 2, 6, bias=True, out_bias=True),
        dataclasses.replace(GATED, bias=True),
        RMS,
        Rotary(factor=2.0),
    ),
    "qwen2": DecoderConfig(
        90, 24, 3, 64, Attention(4, 2, 6, bias=True, windows=(5, None, 5)), GATED, RMS, Rotary(), extra=3
    ),
    "qwen3": DecoderConfig(
        90, 24, 2, 64, Attention(4, 1, 10, qk_norm=True), GATED, RMS, Rotary(1e6), tied=False
    ),
    "gemma2": DecoderConfig(
        90,
        24,
        3,
        64,
        Attention(4, 2, 8, scale=12**-0.5, softcap=50.0, windows=(6, None, 6)),
        GEGLU,
        GEMMA_NORM,
        Rotary(),
        softcap=30.0,
        **GEMMA_REST,
    ),
    "gemma3": DecoderConfig(
        90,
        24,
        3,
        64,
        Attention(4, 2, 8, qk_norm=True, windows=(6, 6, None), local_rotary=Rotary(1e4)),
        GEGLU,
        GEMMA_NORM,
        Rotary(1e6, factor=8.0),
        **GEMMA_REST,
    ),
}


@pytest.fixture(scope="module")
def peer():
    """torch and transformers."""
    return pytest.importorskip("torch"), pytest.importorskip("transformers")


def their_logits(torch, model, ids):
    real = torch.tensor(ids >= 0)
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(torch.tensor(ids.clip(0)), attention_mask=real.long(), position_ids=positions)
    return out.logits.numpy()


jitted = jax.jit(forward, static_argnums=(0, 1))


def our_logits(config, weights, ids):
    return np.asarray(jitted(config, Execution(), weights, jnp.asarray(ids)))


def rows(vocab, length):
    ids = np.random.default_rng(0).integers(0, vocab, (ROWS, length))
    ids[-1, : length // 3] = -1
    return ids


def open_theirs(torch, transformers, folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_we_read_what_transformers_writes(peer, name, tmp_path, record_property):
    torch, transformers = peer
    torch.manual_seed(0)
    config = getattr(transformers, name)(**CASES[name])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="3MB")
    checkpoint = load_checkpoint(tmp_path / "theirs")
    ids = rows(VOCAB, LENGTH)
    expected, found = their_logits(torch, model, ids), our_logits(checkpoint.config, checkpoint.weights, ids)
    error = np.abs(found - expected)[ids >= 0].max()
    print(f"{name}: {error:.1e} of {np.abs(expected).max():.1f}")
    assert error < 1e-4
    save_checkpoint(tmp_path / "ours", checkpoint.config, checkpoint.weights, like=checkpoint)
    for path in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", OURS)
def test_transformers_reads_what_we_write(peer, name, tmp_path):
    torch, transformers = peer
    config = OURS[name]
    weights = init_weights(jax.random.key(0), config)
    leaves, structure = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [w + 0.2 * jax.random.normal(k, w.shape, w.dtype) for w, k in zip(leaves, keys, strict=True)]
    weights = jax.tree.unflatten(structure, noisy)
    save_checkpoint(tmp_path, config, weights, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = rows(config.vocab + config.extra, 40)
    model = open_theirs(torch, transformers, tmp_path)
    expected = their_logits(torch, model, ids)[..., : config.vocab]
    error = np.abs(our_logits(config, weights, ids) - expected)[ids >= 0].max()
    print(f"{name}: {error:.1e} of {np.abs(expected).max():.1f}")
    assert error < 1e-4


def test_a_byte_model_opens_with_its_tokenizer_and_generates(peer, tmp_path):
    torch, transformers = peer
    config = OURS["gpt2"]
    weights = jax.tree.map(lambda w: 5 * w, init_weights(jax.random.key(0), config))
    save_checkpoint(tmp_path, config, weights, tokenizer_from=ByteTokenizer())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "naïve ☃"
    assert tokenizer.encode(text) == ByteTokenizer().encode(text, add_special_tokens=True)
    assert tokenizer.decode(ByteTokenizer().encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (257, 256)
    model = open_theirs(torch, transformers, tmp_path)
    prompt = torch.tensor([tokenizer.encode(text)])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=True)
    assert int(out[:, prompt.shape[1] :].max()) <= 256


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_is_read_as_transformers_reads_it(peer, name):
    """Class defaults, and its own rendering of what we write."""
    _, transformers = peer
    kind = getattr(transformers, name)
    default = kind().to_dict()
    config = config_from_dict(default | {"architectures": None})
    again = kind.from_dict(config_to_dict(config)).to_dict()
    assert config_from_dict(again | {"architectures": None}) == config
