"""Where a token stands and what it may see: padding, packing and sliding windows are one rule.

A token has a position in its own sequence and the number of that sequence in its row (0: padding). Token q sees
token k where both belong to the same sequence, ``0 <= position_q - position_k < window``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kl_rl.models.config import Rotary

__all__ = ["Layout", "last_index", "layout_of", "packed_layout", "rotate", "rotation", "visible"]


class Layout(NamedTuple):
    """Positions and sequence numbers of the tokens of a batch of rows.

    Attributes:
      positions: index in its own sequence; [B, S].
      segments: number of the sequence in its row, from 1; 0 is padding; [B, S].
    """

    positions: jax.Array
    segments: jax.Array


def layout_of(ids: jax.Array) -> Layout:
    """One sequence per row; ids below 0 are padding, left or right; [B, S]."""
    valid = ids >= 0
    positions = jnp.maximum(jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1, 0)
    return Layout(positions, valid.astype(jnp.int32))


def packed_layout(segments: jax.Array) -> Layout:
    """Several sequences per row, each a contiguous run of one number above 0; [B, S]."""
    index = jnp.arange(segments.shape[-1], dtype=jnp.int32)[None]
    before = jnp.concatenate([jnp.full_like(segments[:, :1], -1), segments[:, :-1]], axis=-1)
    start = jax.lax.cummax(jnp.where(segments != before, index, 0), axis=1)
    return Layout(index - start, segments.astype(jnp.int32))


def last_index(ids: jax.Array) -> jax.Array:
    """Index of the last id that is not padding; [B, S] -> [B]."""
    return ids.shape[-1] - 1 - jnp.argmax((ids >= 0)[:, ::-1], axis=-1).astype(jnp.int32)


def visible(query: Layout, key: Layout, window: jax.Array | int | None = None) -> jax.Array:
    """Which keys each query may see; [B, Q] and [B, S] -> bool [B, Q, S]."""
    distance = query.positions[:, :, None] - key.positions[:, None, :]
    same = (query.segments[:, :, None] == key.segments[:, None, :]) & (key.segments[:, None, :] > 0)
    seen = same & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def _frequencies(rotary: Rotary, head_dim: int) -> jax.Array:
    """Angles per position; [D / 2]."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / (rotary.theta**exponent)
    if rotary.llama3 is None:
        return frequency / rotary.factor
    factor, low, high, original = rotary.llama3
    wavelength = 2 * math.pi / frequency
    blend = jnp.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return frequency * (blend + (1.0 - blend) / factor)


def rotation(rotary: Rotary, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles, in float32.

    Args:
      rotary: theta and scaling.
      head_dim: D.
      positions: [...].

    Returns:
      Two arrays [..., 1, D / 2], ready to be broadcast over heads.
    """
    frequency = _frequencies(rotary, head_dim)
    angle = positions[..., None, None].astype(jnp.float32) * frequency.reshape(
        (1,) * (positions.ndim + 1) + (-1,)
    )
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate pairs (i, i + D/2) of each head by its position's angle; x [..., H, D]."""
    cos, sin = angles
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    first, second = jnp.split(wide, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
