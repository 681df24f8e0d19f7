"""The shape of a decoder-only transformer, as plain hashable numbers: GPT-2, Llama, Qwen and Gemma are values of it.

Three small parts (attention, positions, feed-forward) and a whole. Nothing here holds an array, so a configuration
can be a static argument of ``jit``. How a model is *run* (precision, scanned or unrolled layers) is ``Execution``:
it changes no parameter and no checkpoint.
"""

from __future__ import annotations

import dataclasses
import math

__all__ = ["Attention", "DecoderConfig", "Execution", "FeedForward", "Norm", "Rotary"]


@dataclasses.dataclass(frozen=True)
class Norm:
    """A normalization layer, computed in float32.

    Attributes:
      eps: added to the variance.
      centred: True: LayerNorm with mean and bias (Ba et al. 2016, arXiv 1607.06450); False: RMSNorm (Zhang and
        Sennrich 2019, arXiv 1910.07467).
      offset: added to the scale; 1 for Gemma, whose files hold ``scale - 1``.
    """

    eps: float = 1e-5
    centred: bool = True
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions in half-split form (Su et al. 2021, arXiv 2104.09864).

    Attributes:
      theta: base of the frequencies.
      factor: positions are divided by this (linear scaling); 1: not scaled.
      llama3: ``(factor, low_freq_factor, high_freq_factor, original_context)`` of Llama 3.1, or None.
    """

    theta: float = 10_000.0
    factor: float = 1.0
    llama3: tuple[float, float, float, int] | None = None


@dataclasses.dataclass(frozen=True)
class Attention:
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245).

    Attributes:
      heads: query heads H.
      kv_heads: key and value heads G; divides H.
      head_dim: D.
      bias: on queries, keys and values.
      out_bias: on the output projection.
      qk_norm: RMSNorm on queries and keys, per head, before the rotation.
      scale: factor on query-key products; D ** -0.5 if None.
      softcap: products become ``softcap * tanh(x / softcap)``; None: not capped.
      windows: one entry per layer, how many positions back (itself included) a token sees; None: all. Empty: no layer
        has a window.
      local_rotary: rotary positions of the layers with a window, if they differ from the others' (Gemma 3).
    """

    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    scale: float | None = None
    softcap: float | None = None
    windows: tuple[int | None, ...] = ()
    local_rotary: Rotary | None = None


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """The position-wise layer: ``down(act(up x))``, or gated ``down(act(gate x) * up x)`` (arXiv 2002.05202).

    Attributes:
      width: hidden size F.
      activation: "gelu_tanh", "gelu" (exact) or "silu".
      gated: with a gate.
      bias: on all its projections.
    """

    width: int
    activation: str = "gelu_tanh"
    gated: bool = False
    bias: bool = True


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer with pre-normalized residual layers.

    Attributes:
      vocab: V, ids that can be emitted; the embedding has V + extra rows.
      width: model width d.
      layers: number of layers N.
      context: longest sequence, prompt and completion together.
      attention: see ``Attention``.
      feed_forward: see ``FeedForward``.
      norm: see ``Norm``.
      rotary: rotary positions, or None: a learned table of ``context`` rows.
      post_norms: also normalize what attention and feed-forward add to the residual stream (Gemma).
      tied: the output matrix is the embedding.
      embed_scale: embeddings are multiplied by this (Gemma: sqrt(d)).
      softcap: logits become ``softcap * tanh(x / softcap)``; None: not capped.
      extra: input ids V, ..., V + extra - 1 that are read but never emitted (begin mark, return tokens).
    """

    vocab: int
    width: int
    layers: int
    context: int
    attention: Attention
    feed_forward: FeedForward
    norm: Norm = Norm()
    rotary: Rotary | None = None
    post_norms: bool = False
    tied: bool = True
    embed_scale: float = 1.0
    softcap: float | None = None
    extra: int = 0

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be.

        Raises:
          ValueError: naming the field.
        """
        heads, groups = self.attention.heads, self.attention.kv_heads
        for name in ("vocab", "width", "layers", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"DecoderConfig.{name} must be at least 1; got {getattr(self, name)}")
        if groups < 1 or heads % groups:
            raise ValueError(f"Attention.kv_heads must divide heads = {heads}; got {groups}")
        if self.attention.windows and len(self.attention.windows) != self.layers:
            raise ValueError(
                f"Attention.windows must have one entry for each of {self.layers} layers; "
                f"got {len(self.attention.windows)}"
            )
        if self.rotary is not None and self.attention.head_dim % 2:
            raise ValueError(
                f"rotary positions need an even Attention.head_dim; got {self.attention.head_dim}"
            )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """One entry per layer."""
        return self.attention.windows or (None,) * self.layers

    @property
    def query_scale(self) -> float:
        """Factor on query-key products."""
        scale = self.attention.scale
        return 1.0 / math.sqrt(self.attention.head_dim) if scale is None else scale

    @classmethod
    def gpt2(
        cls,
        vocab: int,
        *,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        context: int = 512,
        extra: int = 0,
    ) -> DecoderConfig:
        """The GPT-2 shape (Radford et al. 2019) at any size.

        Args:
          vocab: V.
          width: d.
          layers: N.
          heads: H, divides d.
          context: longest sequence.
          extra: input-only ids.

        Returns:
          The configuration.

        Raises:
          ValueError: if the heads do not divide the width.
        """
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of the number of heads, {heads}")
        attention = Attention(heads, heads, width // heads, bias=True, out_bias=True)
        return cls(vocab, width, layers, context, attention, FeedForward(4 * width), extra=extra)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is run; changes speed, memory and rounding, never a parameter.

    Attributes:
      compute_dtype: of matrix products and of the residual stream ("float32", "bfloat16", "float64"); norms,
        softmax and log-probabilities are in float32 or better.
      scan_layers: one compiled layer body in a loop: compiles fast however deep, and rematerializes layer by layer.
      remat: recompute each layer in the backward pass instead of keeping its activations.
      attention: "xla", "cudnn" or None (what ``jax.nn.dot_product_attention`` chooses).
      fuse: queries, keys and values as one matrix product; not where heads are split over devices.
      chunk_rows: token positions whose logits exist at a time on a device.
      chunk_vocab: vocabulary entries whose logits exist at a time; where the vocabulary is split over devices, each
        takes its share at once.
    """

    compute_dtype: str = "float32"
    scan_layers: bool = False
    remat: bool = False
    attention: str | None = None
    fuse: bool = True
    chunk_rows: int = 1024
    chunk_vocab: int = 16_384
