"""Which model a plan is for: a preset, or a config.json."""

from __future__ import annotations

import json
from pathlib import Path

from kl_rl.huggingface.config_in import config_from_dict
from kl_rl.models.config import Attention, DecoderConfig, FeedForward, Norm, Rotary

__all__ = ["PRESETS", "read_model"]


def _llama(vocab: int, width: int, layers: int, heads: int, kv_heads: int, hidden: int) -> DecoderConfig:
    """A Llama-like model: RMSNorm, rotary positions, grouped queries, SiLU gate, no biases, untied output."""
    attention = Attention(heads, kv_heads, width // heads)
    mlp = FeedForward(hidden, "silu", gated=True, bias=False)
    return DecoderConfig(
        vocab, width, layers, 8192, attention, mlp, Norm(centred=False), Rotary(500_000.0), tied=False
    )


PRESETS: dict[str, DecoderConfig] = {
    "tiny": _llama(256, 32, 2, 4, 2, 64),  # 36 thousand parameters, for trying the command
    "1b": _llama(
        32_000, 2048, 22, 32, 4, 5632
    ),  # 1.10 billion parameters, the shape of TinyLlama (arXiv 2401.02385)
    "7b": _llama(32_768, 4096, 32, 32, 8, 14_336),  # 7.25 billion, the shape of Mistral 7B (arXiv 2310.06825)
}


def read_model(name: str) -> DecoderConfig:
    """The architecture behind a name.

    Args:
      name: a preset ("tiny", "1b", "7b"), a config.json, or a folder that holds one (or the output of a run).

    Returns:
      The configuration.

    Raises:
      ValueError: if it is none of these, or not JSON, or an unknown architecture.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.is_dir():
        own, of_run = path / "config.json", path / "model" / "config.json"
        path = of_run if of_run.is_file() and not own.is_file() else own
    if not path.is_file():
        known = ", ".join(PRESETS)
        raise ValueError(
            f"--model {name}: neither a preset ({known}) nor a config.json nor a folder with one"
        )
    try:
        spec = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(spec, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return config_from_dict(spec, str(path))
