"""Makes the tiny checkpoints in this folder, with transformers' own logits beside them.

Run with transformers and torch installed, from anywhere; everything is seeded:

    python tests/checkpoints/make_checkpoints.py

Each folder holds what transformers writes (config.json, safetensors, in one case a tokenizer) and ``expected.npz``:
``ids`` [rows, S] (-1: padding on the left), ``logits`` [rows, S, V] in float32, and the versions that made them.
``reward_models`` holds sequence classifiers with one label, and ``rewards`` [rows] in place of the logits.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
VOCAB, LENGTH = 96, 14
SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 64}
SMALL |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 12, "pad_token_id": 0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}

CASES = {
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=1
    ),
    "llama": transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama_old": transformers.LlamaConfig(
        **SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "qwen2": transformers.Qwen2Config(
        **SMALL, tie_word_embeddings=True, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**(SMALL | {"vocab_size": 320}), head_dim=8, rope_theta=1000000.0),
    "gemma2": transformers.Gemma2Config(**(SMALL | GEMMA | {"num_hidden_layers": 3})),
    "gemma3": transformers.Gemma3TextConfig(
        **(SMALL | GEMMA | {"num_hidden_layers": 4}),
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=GEMMA3_ROPE,
    ),
}
SHARDED = {"llama": "12KB"}
BFLOAT16 = {"qwen2"}
SENTENCES = [
    "The posterior is the base policy reweighted by the evidence.",
    "A policy that is tuned is a posterior that is approximated.",
    "What the reward says, the temperature weighs: naïve, but exact.",
]
CHAT_TEMPLATE = (
    "{%- for message in messages %}\n"
    "{%- if message.role not in ['system', 'user', 'assistant'] %}\n"
    "{{- raise_exception('unknown role: ' + message.role) }}\n"
    "{%- endif %}\n"
    "{{- '<|start|>' + message.role + '\\n' + message.content + eos_token + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}{%- endif %}\n"
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why <b>?</b>"}]


def random_model(
    config: transformers.PreTrainedConfig, seed: int, kind: type = transformers.AutoModelForCausalLM
) -> torch.nn.Module:
    """A model whose every parameter, biases and norms included, is away from its default."""
    torch.manual_seed(seed)
    model = kind.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            near_default = parameter.ndim == 1 and "bias" not in name
            parameter.copy_(parameter + 0.2 * noise if near_default else 0.25 * noise)
    return model


def input_rows(vocab: int, seed: int) -> np.ndarray:
    """Three whole rows and two that are padded on the left."""
    ids = np.random.default_rng(seed).integers(2, vocab, size=(5, LENGTH))
    ids[3, :4] = -1
    ids[4, :9] = -1
    return ids


def expected_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """What transformers answers, reading the folder in float32; zero at padding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    real = torch.tensor(ids >= 0)
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(torch.tensor(ids.clip(0)), attention_mask=real.long(), position_ids=positions)
    return np.where(real.numpy()[..., None], out.logits.float().numpy(), np.float32(0))


def in_the_old_style(folder: Path) -> None:
    """Rewrite config.json as transformers 4 wrote it, and add the buffers that older files held."""
    spec = json.loads((folder / "config.json").read_text())
    del spec["rope_parameters"], spec["head_dim"]
    spec |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    spec["torch_dtype"] = spec.pop("dtype")
    (folder / "config.json").write_text(json.dumps(spec, indent=2, sort_keys=True) + "\n")
    tensors = load_file(folder / "model.safetensors")
    inverse = 1 / 5000.0 ** (torch.arange(0, 4, 2) / 4)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": inverse.clone() for i in range(2)}
    save_file(tensors | buffers, folder / "model.safetensors", metadata={"format": "pt"})


def add_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 320 entries with a chat template, and what it answers."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|text|>", "<|end|>", "<|start|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|text|> $A", special_tokens=[("<|text|>", 0)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|text|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    transformers.GenerationConfig(bos_token_id=0, eos_token_id=[1, 2]).save_pretrained(folder)
    texts = [*SENTENCES, "Unseen: ☃ 123\n\tdéjà-vu", ""]
    expected = {
        "texts": texts,
        "ids": [fast.encode(text, add_special_tokens=False) for text in texts],
        "ids_with_special_tokens": [fast.encode(text) for text in texts],
        "messages": CHAT,
        "chat": fast.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True),
        "chat_ids": fast.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False),
    }
    (folder / "expected_tokenizer.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False))


def make(name: str, seed: int) -> None:
    """One folder."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model = random_model(CASES[name], seed)
    if name in BFLOAT16:
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=SHARDED.get(name, "5GB"))
    if name == "llama_old":
        in_the_old_style(folder)
    if name == "qwen3":
        add_tokenizer(folder)
    ids = input_rows(CASES[name].vocab_size, seed)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    np.savez_compressed(folder / "expected.npz", ids=ids, logits=expected_logits(folder, ids), **versions)


def make_reward_model(name: str, seed: int) -> None:
    """A sequence classifier, and what it answers for unpadded rows and, where there is a tokenizer, for texts."""
    folder = HERE / "reward_models" / name
    shutil.rmtree(folder, ignore_errors=True)
    spec = CASES[name].to_dict() | {"num_labels": 1}
    config = type(CASES[name]).from_dict(spec)
    model = random_model(config, seed, transformers.AutoModelForSequenceClassification)
    model.save_pretrained(folder)
    ids = np.maximum(input_rows(config.vocab_size, seed), 0)
    answer = lambda rows: model(torch.tensor(rows)).logits[:, 0].detach().numpy()
    expected = {"ids": ids, "rewards": np.concatenate([answer(row[None]) for row in ids])}
    if name == "qwen3":
        add_tokenizer(folder)
        (folder / "expected_tokenizer.json").unlink()
        fast = transformers.AutoTokenizer.from_pretrained(folder)
        rows = [np.array(fast.encode(text))[None] for text in SENTENCES]
        expected |= {"texts": np.array(SENTENCES), "text_rewards": np.concatenate([answer(r) for r in rows])}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    np.savez_compressed(folder / "expected.npz", **expected, **versions)


def main() -> None:
    """All of them, or those named."""
    for seed, name in enumerate(CASES):
        if len(sys.argv) == 1 or name in sys.argv[1:]:
            make(name, seed)
    for seed, name in enumerate(("gpt2", "qwen3", "gemma3")):
        if len(sys.argv) == 1 or f"reward_models/{name}" in sys.argv[1:]:
            make_reward_model(name, seed)


if __name__ == "__main__":
    main()
