"""What is kept between steps: nothing, a ring of recent groups, a fixed data set. Jittable.

``kl_rl.methods.Source`` with two differences: the fresh batch is handed in, since its rewards come from the host between
two programs; and what is kept are whole groups (a prompt with its K samples), so that prompts may change at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kl_rl.core.trajectories import Trajectories, take
from kl_rl.methods.sources import Source, comparisons

__all__ = ["Memory", "Ring", "compared", "fresh", "given", "logged", "replay"]

Draw = Callable[[Any, jax.Array, Trajectories], tuple[Trajectories, Any]]


class Ring(NamedTuple):
    """G groups, [G, ...] each, and where the next ones go."""

    data: Trajectories
    cursor: jax.Array


class Memory(NamedTuple):
    """Where batches come from.

    Attributes:
      filling: groups of p0's samples it starts with, as a multiple of the batch; 0: it starts empty.
      samples: whether new samples are drawn at every step.
      draw: ``(kept, key, fresh batch) -> batch, kept``.
    """

    filling: int
    samples: bool
    draw: Draw


def fresh() -> Memory:
    """Fresh samples at every step; nothing is kept between steps."""
    return Memory(0, True, lambda kept, key, batch: (batch, kept))


def given() -> Memory:
    """Batches come from the user's data; nothing is drawn or kept."""
    return Memory(0, False, lambda kept, key, batch: (batch, kept))


def replay(share: float = 0.5, batches: int = 8) -> Memory:
    """Fresh groups mixed with old ones, which keep their behaviour log-probabilities.

    Args:
      share: probability that a group of the batch is an old one.
      batches: size of the ring, in batches; it is filled with p0's samples at the start.

    Returns:
      The memory.
    """

    def draw(kept: Ring, key: jax.Array, batch: Trajectories) -> tuple[Trajectories, Ring]:
        size, capacity = batch.reward.shape[0], kept.data.reward.shape[0]
        mix_key, old_key = jax.random.split(key)
        take_old = jax.random.uniform(mix_key, (size,)) < share
        old = take(kept.data, jax.random.randint(old_key, (size,), 0, capacity))
        spread = lambda x: take_old.reshape((-1,) + (1,) * (x.ndim - 1))
        mixed = Trajectories(*(jnp.where(spread(a), b, a) for a, b in zip(batch, old, strict=True)))
        slots = (kept.cursor + jnp.arange(size)) % capacity
        stored = (rows.at[slots].set(x) for rows, x in zip(kept.data, batch, strict=True))
        return mixed, Ring(Trajectories(*stored), (kept.cursor + size) % capacity)

    return Memory(batches, True, draw)


def logged(batches: int = 16) -> Memory:
    """A fixed data set of p0's samples, drawn once; each batch is some of its groups, with replacement.

    Args:
      batches: size of the data set, in batches.

    Returns:
      The memory.
    """

    def draw(kept: Ring, key: jax.Array, batch: Trajectories) -> tuple[Trajectories, Ring]:
        index = jax.random.randint(key, batch.reward.shape[:1], 0, kept.data.reward.shape[0])
        return take(kept.data, index), kept

    return Memory(batches, False, draw)


def compared() -> Memory:
    """Bradley-Terry raters compare neighbouring samples: the reward becomes 1 for the winner and 0 for the other."""

    def draw(kept: Any, key: jax.Array, batch: Trajectories) -> tuple[Trajectories, Any]:
        given = Source(lambda key, posterior: (), lambda memory, key, behaviour: (batch, memory))
        rated, _ = comparisons(given).draw((), key, None)  # type: ignore[arg-type]
        return rated, kept

    return Memory(0, True, draw)
