"""Where batches come from, and what is kept between them: nothing, recent groups, a data set, raters' labels.

A ``Memory`` is handed the fresh batch, so the same one serves a jitted loop and a loop whose rewards come from the
host. What it keeps are whole groups (a prompt with its K samples), so that prompts may change at every step. A
``Source`` is a way to draw fresh samples, with a memory behind it. Nothing here learns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kl_rl.core.policy import Policy
from kl_rl.core.posterior import Posterior
from kl_rl.core.ranges import check_range
from kl_rl.core.rollouts import RewardFn, rollout
from kl_rl.core.trajectories import Trajectories

__all__ = [
    "Memory",
    "Rater",
    "Ring",
    "Source",
    "bradley_terry",
    "fresh",
    "given",
    "logged",
    "rated",
    "replay",
]

Draw = Callable[[Any, jax.Array, Trajectories], tuple[Trajectories, Any]]
Rater = Callable[[jax.Array, jax.Array], jax.Array]


class Ring(NamedTuple):
    """G groups, [G, ...] each, and where the next ones go."""

    data: Trajectories
    cursor: jax.Array


def _pass(kept: Any, key: jax.Array, batch: Trajectories) -> tuple[Trajectories, Any]:
    return batch, kept


class Memory(NamedTuple):
    """What is kept between steps; as it stands, nothing.

    Attributes:
      filling: batches of p0's samples that are kept before the first step.
      samples: whether steps draw fresh samples; if not, of the fresh batch only the shapes are looked at.
      draw: ``(kept, key, fresh batch) -> (batch to learn from, kept)``.
    """

    filling: int = 0
    samples: bool = True
    draw: Draw = _pass


NOTHING = Memory()


def given() -> Memory:
    """Batches come from the user's data; nothing is drawn or kept."""
    return Memory(samples=False)


def replay(share: float = 0.5, batches: int = 8) -> Memory:
    """Fresh groups mixed with old ones, which keep their behaviour log-probabilities.

    Sound for objectives whose minimum does not depend on the samples' law.

    Args:
      share: expected share of old groups in a batch.
      batches: how many batches of groups are kept; filled with samples of p0.

    Returns:
      The memory.

    Raises:
      ValueError: an option out of range.
    """
    check_range("share", share, 0, 1)
    check_range("batches", batches, 1)

    def draw(kept: Ring, key: jax.Array, batch: Trajectories) -> tuple[Trajectories, Ring]:
        size, capacity = batch.reward.shape[0], kept.data.reward.shape[0]
        if capacity < size:
            raise ValueError(f"a ring of {capacity} groups cannot hold a batch of {size}")
        mix_key, old_key = jax.random.split(key)
        take_old = jax.random.uniform(mix_key, (size,)) < share
        index = jax.random.randint(old_key, (size,), 0, capacity)
        spread = lambda x: take_old.reshape((-1,) + (1,) * (x.ndim - 1))
        mixed = batch.map_prompts(
            lambda new, rows: jnp.where(spread(new), rows[index].astype(new.dtype), new), kept.data
        )
        slots = (kept.cursor + jnp.arange(size)) % capacity
        stored = kept.data.map_prompts(lambda rows, new: rows.at[slots].set(new.astype(rows.dtype)), batch)
        return mixed, Ring(stored, (kept.cursor + size) % capacity)

    return Memory(batches, True, draw)


def logged(batches: int = 16) -> Memory:
    """A fixed data set of p0's samples, drawn once; each batch is some of its groups, with replacement.

    Args:
      batches: size of the data set, in batches.

    Returns:
      The memory.

    Raises:
      ValueError: an option out of range.
    """
    check_range("batches", batches, 1)

    def draw(kept: Ring, key: jax.Array, batch: Trajectories) -> tuple[Trajectories, Ring]:
        index = jax.random.randint(key, batch.reward.shape[:1], 0, kept.data.reward.shape[0])
        return kept.data.map_prompts(lambda rows: rows[index]), kept

    return Memory(batches, False, draw)


def bradley_terry(key: jax.Array, reward: jax.Array) -> jax.Array:
    """Raters who compare neighbouring samples: 1 for the winner, who wins with probability sigmoid(r - r'), else 0.

    Bradley and Terry 1952.

    Args:
      key: PRNG key.
      reward: K even; [P, K].

    Returns:
      [P, K].

    Raises:
      ValueError: for an odd K.
    """
    if reward.shape[1] % 2:
        raise ValueError(f"comparisons need an even number of samples; got K = {reward.shape[1]}")
    first, second = reward[:, 0::2], reward[:, 1::2]
    wins = jax.random.uniform(key, first.shape) < jax.nn.sigmoid(first - second)
    return jnp.stack([wins, ~wins], axis=-1).reshape(reward.shape).astype(reward.dtype)


def rated(rater: Rater = bradley_terry) -> Memory:
    """Fresh samples with what a rater says of them as ``label``; their gold ``reward`` stays.

    Args:
      rater: ``(key, reward [P, K]) -> label [P, K]``.

    Returns:
      The memory.
    """

    def draw(kept: Any, key: jax.Array, batch: Trajectories) -> tuple[Trajectories, Any]:
        return batch._replace(label=rater(key, batch.reward)), kept

    return Memory(0, True, draw)


class Source(NamedTuple):
    """Fresh samples of a policy, with a memory behind them; jittable.

    Attributes:
      sample: ``(key, policy) -> batch``.
      memory: what is kept between steps.
    """

    sample: Callable[[jax.Array, Policy], Trajectories]
    memory: Memory = NOTHING

    def init(self, key: jax.Array, posterior: Posterior) -> Any:
        """What is kept before the first step: samples of p0."""
        if not self.memory.filling:
            return ()
        keys = jax.random.split(key, self.memory.filling)
        batches = jax.lax.map(lambda k: self.sample(k, posterior.base), keys)
        flat = batches.map_prompts(lambda x: x.reshape(-1, *x.shape[2:]))
        return Ring(flat, jnp.zeros((), jnp.int32))

    def draw(self, kept: Any, key: jax.Array, behaviour: Policy) -> tuple[Trajectories, Any]:
        """A batch to learn from, and what is kept."""
        if self.memory.samples:
            batch = self.sample(key, behaviour)
        else:
            batch = jax.eval_shape(self.sample, key, behaviour)
        return self.memory.draw(kept, jax.random.fold_in(key, 1), batch)


def fresh(
    prompt: jax.Array,
    reward_fn: RewardFn,
    *,
    num_samples: int,
    horizon: int,
    end: int | None = None,
    memory: Memory = NOTHING,
) -> Source:
    """Samples of the behaviour policy, drawn anew at every step and scored on the device.

    Args:
      prompt: [P, L].
      reward_fn: jittable; see ``kl_rl.core.rollout``.
      num_samples: K.
      horizon: T.
      end: optional end token.
      memory: what is kept between steps: ``replay()``, ``logged()``, ``rated()``, or nothing.

    Returns:
      The source.
    """

    def sample(key: jax.Array, behaviour: Policy) -> Trajectories:
        return rollout(behaviour, key, prompt, reward_fn, num_samples=num_samples, horizon=horizon, end=end)

    return Source(sample, memory)
