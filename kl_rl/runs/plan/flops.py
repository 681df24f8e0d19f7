"""Floating-point operations that the model asks for, counted by hand.

A compiler's count takes the body of a loop over layers once. Here a matrix product is 2 operations per parameter and
token, attention 4 H D per visible query-key pair and layer, a backward pass twice the forward pass; recomputation,
norms and softmax are not counted.
"""

from __future__ import annotations

from typing import NamedTuple

from kl_rl.models.config import DecoderConfig
from kl_rl.runs.plan.setting import Setting

__all__ = ["Flops", "forward_flops", "step_flops"]


class Flops(NamedTuple):
    """Operations of one step on all devices together."""

    sampling: int
    policy: int
    base: int
    twist: int

    @property
    def update(self) -> int:
        """Scoring and learning."""
        return self.policy + self.base + self.twist


def _layer_parameters(config: DecoderConfig) -> int:
    """Parameters of all layers' matrices."""
    part, mlp = config.attention, config.feed_forward
    attention = 2 * config.width * part.head_dim * (part.heads + part.kv_heads)
    return config.layers * (attention + (3 if mlp.gated else 2) * config.width * mlp.width)


def _pairs(length: int, horizon: int, samples: int, window: int | None) -> int:
    """Visible query-key pairs of a prompt and its K completions in one layer."""
    far = window or length + horizon
    seen = lambda first, last: sum(min(far, position) for position in range(first, last + 1))
    return seen(1, length) + samples * seen(length + 1, length + horizon - 1)


def forward_flops(config: DecoderConfig, setting: Setting, *, head: bool = True) -> int:
    """One forward pass over a batch, each prompt once for its K completions.

    Args:
      config: the architecture.
      setting: P, L, T, K.
      head: whether logits are made of every completion token.

    Returns:
      Operations.
    """
    length, horizon, samples = setting.prompt_length, setting.horizon, setting.num_samples
    tokens = length + samples * (horizon - 1)
    pairs = sum(_pairs(length, horizon, samples, window) for window in config.windows)
    one = (
        2 * _layer_parameters(config) * tokens
        + 4 * config.attention.heads * config.attention.head_dim * pairs
    )
    if head:
        one += 2 * config.vocab * config.width * samples * horizon
    return setting.batch * one


def step_flops(config: DecoderConfig, setting: Setting) -> Flops:
    """Operations of sampling a batch and learning from it.

    Training all parameters is 3 forward passes; training adapters 2 (no gradient of the frozen matrices).

    Args:
      config: the architecture.
      setting: method and sizes.

    Returns:
      Operations by part.
    """
    full = forward_flops(config, setting)
    trunk = forward_flops(config, setting, head=False)
    twist = 0
    if setting.choice().method.needs.heads:
        twist = (3 if setting.learning({}).trains_trunk else 1) * trunk
    return Flops(full, (2 if setting.lora else 3) * full, full, twist)
