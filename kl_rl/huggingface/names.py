"""Where each parameter lives in a checkpoint: tensor names, transposes and fused tensors, one table per family."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from kl_rl.models.config import DecoderConfig
from kl_rl.models.parameters import weight_shapes

__all__ = ["HEAD", "Piece", "is_buffer", "pieces", "prefix"]

HEAD = "lm_head.weight"
PREFIX = {"gpt2": "transformer."}  # the others: "model."

GPT2 = {
    "embed/table": "wte.weight",
    "position/table": "wpe.weight",
    "layers/attention_norm/scale": "h.{i}.ln_1.weight",
    "layers/attention_norm/bias": "h.{i}.ln_1.bias",
    "layers/query/kernel": "h.{i}.attn.c_attn.weight",
    "layers/query/bias": "h.{i}.attn.c_attn.bias",
    "layers/key/kernel": "h.{i}.attn.c_attn.weight",
    "layers/key/bias": "h.{i}.attn.c_attn.bias",
    "layers/value/kernel": "h.{i}.attn.c_attn.weight",
    "layers/value/bias": "h.{i}.attn.c_attn.bias",
    "layers/out/kernel": "h.{i}.attn.c_proj.weight",
    "layers/out/bias": "h.{i}.attn.c_proj.bias",
    "layers/mlp_norm/scale": "h.{i}.ln_2.weight",
    "layers/mlp_norm/bias": "h.{i}.ln_2.bias",
    "layers/up/kernel": "h.{i}.mlp.c_fc.weight",
    "layers/up/bias": "h.{i}.mlp.c_fc.bias",
    "layers/down/kernel": "h.{i}.mlp.c_proj.weight",
    "layers/down/bias": "h.{i}.mlp.c_proj.bias",
    "final_norm/scale": "ln_f.weight",
    "final_norm/bias": "ln_f.bias",
    "head/kernel": HEAD,
}
LLAMA = {
    "embed/table": "embed_tokens.weight",
    "layers/attention_norm/scale": "layers.{i}.input_layernorm.weight",
    "layers/query/kernel": "layers.{i}.self_attn.q_proj.weight",
    "layers/query/bias": "layers.{i}.self_attn.q_proj.bias",
    "layers/key/kernel": "layers.{i}.self_attn.k_proj.weight",
    "layers/key/bias": "layers.{i}.self_attn.k_proj.bias",
    "layers/value/kernel": "layers.{i}.self_attn.v_proj.weight",
    "layers/value/bias": "layers.{i}.self_attn.v_proj.bias",
    "layers/query_norm/scale": "layers.{i}.self_attn.q_norm.weight",
    "layers/key_norm/scale": "layers.{i}.self_attn.k_norm.weight",
    "layers/out/kernel": "layers.{i}.self_attn.o_proj.weight",
    "layers/out/bias": "layers.{i}.self_attn.o_proj.bias",
    "layers/mlp_norm/scale": "layers.{i}.post_attention_layernorm.weight",
    "layers/gate/kernel": "layers.{i}.mlp.gate_proj.weight",
    "layers/gate/bias": "layers.{i}.mlp.gate_proj.bias",
    "layers/up/kernel": "layers.{i}.mlp.up_proj.weight",
    "layers/up/bias": "layers.{i}.mlp.up_proj.bias",
    "layers/down/kernel": "layers.{i}.mlp.down_proj.weight",
    "layers/down/bias": "layers.{i}.mlp.down_proj.bias",
    "final_norm/scale": "norm.weight",
    "head/kernel": HEAD,
}
GEMMA = LLAMA | {
    "layers/attention_post_norm/scale": "layers.{i}.post_attention_layernorm.weight",
    "layers/mlp_norm/scale": "layers.{i}.pre_feedforward_layernorm.weight",
    "layers/mlp_post_norm/scale": "layers.{i}.post_feedforward_layernorm.weight",
}
TABLES = {"gpt2": GPT2, "llama": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "gemma2": GEMMA, "gemma3_text": GEMMA}
FUSED = {"query": 0, "key": 1, "value": 2}  # thirds of GPT-2's c_attn
BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # in older files; no parameters


def prefix(model_type: str) -> str:
    """What all names but the head's begin with in a file written by transformers."""
    return PREFIX.get(model_type, "model.")


def is_buffer(name: str) -> bool:
    """Whether a tensor is a constant that older files hold beside the parameters (causal masks, frequencies)."""
    return name.endswith(BUFFERS) and not name.endswith(".c_attn.bias")


@dataclasses.dataclass(frozen=True)
class Piece:
    """One parameter (of one layer) and the tensor, or third of a tensor, that holds it.

    Attributes:
      path: keys of the parameter in the nested dict.
      layer: index in the stacked parameter; None: not stacked.
      shape: of the parameter, without the layers' axis.
      name: of the tensor, without the family's prefix.
      inputs: how many leading axes of the parameter are inputs of a matrix product; 0: a vector or an embedding.
      transposed: the tensor is [out, in]; else [in, out].
      part: which of ``parts`` equal pieces along the outputs.
      parts: 3 for a fused tensor.
      rows: rows of the tensor, if it has more than the parameter (head rows of input-only ids, zeros).
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    name: str
    inputs: int = 0
    transposed: bool = False
    part: int = 0
    parts: int = 1
    rows: int | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor in the file."""
        if self.path[-1] == "table":
            return self.shape
        into, out = math.prod(self.shape[: self.inputs]), math.prod(self.shape[self.inputs :]) * self.parts
        if not self.inputs:
            return (out,)
        return (self.rows or out, into) if self.transposed else (into, out)

    def view(self, stored: np.ndarray) -> np.ndarray:
        """The parameter as a view of the whole tensor: writing into it writes into the tensor, nothing is copied.

        Args:
          stored: the tensor as in the file, of ``stored_shape``.

        Returns:
          The parameter; ``shape``.
        """
        into, out = self.shape[: self.inputs], self.shape[self.inputs :]
        if not self.transposed:
            split = stored.reshape(*into, self.parts, *out)
            return split[(slice(None),) * self.inputs + (self.part,)]
        split = stored[: math.prod(out)].reshape(*out, *into)
        return np.moveaxis(split, range(len(out)), range(len(into), len(self.shape)))


def _inputs(path: tuple[str, ...]) -> int:
    """Leading axes of a kernel that are summed over: the output projection sums over heads and their entries."""
    return (2 if path[-2] == "out" else 1) if path[-1] == "kernel" else 0


def _piece(path: tuple[str, ...], layer: int | None, shape: tuple[int, ...], family: str, rows: int) -> Piece:
    name = TABLES[family]["/".join(path)].format(i=layer)
    fused = family == "gpt2" and path[-2] in FUSED
    return Piece(
        path,
        layer,
        shape,
        name,
        inputs=_inputs(path),
        transposed=path[-1] == "kernel" and (family != "gpt2" or path[0] == "head"),
        part=FUSED[path[-2]] if fused else 0,
        parts=3 if fused else 1,
        rows=rows if path[0] == "head" else None,
    )


def pieces(config: DecoderConfig, family: str) -> dict[tuple[str, ...], list[Piece]]:
    """Where every parameter of an architecture is found.

    Args:
      config: the architecture.
      family: model type of the file ("gpt2", "llama", ...), which must be able to express the architecture.

    Returns:
      For each parameter's path its pieces, layer by layer.
    """
    shapes: Any = jax.tree.flatten_with_path(weight_shapes(config), is_leaf=lambda x: isinstance(x, tuple))[0]
    found: dict[tuple[str, ...], list[Piece]] = {}
    for keys, shape in shapes:
        path = tuple(key.key for key in keys)
        layers = range(shape[0]) if path[0] == "layers" else [None]
        one = shape[1:] if path[0] == "layers" else shape
        found[path] = [_piece(path, i, one, family, config.vocab + config.extra) for i in layers]
    return found
