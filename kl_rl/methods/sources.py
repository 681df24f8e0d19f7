"""Where batches come from: fresh samples, a logged data set, a replay buffer, comparisons. All jittable, none learns.

A ``Source`` is a pair of functions, ``init(key, posterior) -> memory`` and ``draw(memory, key, behaviour) ->
batch, memory``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kl_rl.core.policy import Policy
from kl_rl.core.posterior import Posterior
from kl_rl.core.rollouts import RewardFn, rollout
from kl_rl.core.trajectories import Trajectories

__all__ = ["Source", "comparisons", "fresh", "logged", "replay"]


class Source(NamedTuple):
    """Two functions; see the module docstring."""

    init: Callable[[jax.Array, Posterior], Any]
    draw: Callable[[Any, jax.Array, Policy], tuple[Trajectories, Any]]


def fresh(
    prompt: jax.Array, reward_fn: RewardFn, *, num_samples: int, horizon: int, end: int | None = None
) -> Source:
    """New samples of the behaviour policy at every step.

    Args:
      prompt: [P, L].
      reward_fn: jittable; see ``rollout``.
      num_samples: K.
      horizon: T.
      end: optional end token.

    Returns:
      Source without memory.
    """

    def draw(memory, key, behaviour):
        return rollout(
            behaviour, key, prompt, reward_fn, num_samples=num_samples, horizon=horizon, end=end
        ), memory

    return Source(lambda key, posterior: (), draw)


def _like(data: Trajectories, batch: Trajectories) -> Trajectories:
    return Trajectories(*(old.astype(new.dtype) for old, new in zip(data, batch, strict=True)))


def logged(source: Source, *, size: int) -> Source:
    """A fixed data set of ``size`` samples per prompt, drawn once from p0; each batch is K of them, with replacement.

    Args:
      source: a fresh source, which sets P, K and T.
      size: M, samples per prompt in the data set.

    Returns:
      Source whose memory is the data set, [P, M, ...].
    """

    def init(key, posterior):
        batch, _ = source.draw((), key, posterior.base)
        rounds = -(-size // batch.tokens.shape[1])
        keys = jax.random.split(key, rounds)
        parts = jax.lax.map(lambda k: source.draw((), k, posterior.base)[0], keys)
        merge = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :size]
        return Trajectories(batch.prompt, *(merge(leaf) for leaf in parts[1:]))

    def draw(memory, key, behaviour):
        shape = jax.eval_shape(lambda k: source.draw((), k, behaviour)[0], key)
        index = jax.random.randint(key, shape.reward.shape, 0, memory.reward.shape[1])
        pick = lambda x: jax.vmap(lambda rows, i: rows[i])(x, index)
        return _like(Trajectories(memory.prompt, *(pick(leaf) for leaf in memory[1:])), shape), memory

    return Source(init, draw)


class _Buffer(NamedTuple):
    data: Trajectories
    cursor: jax.Array


def replay(source: Source, *, capacity: int, share: float = 0.5) -> Source:
    """Fresh samples mixed with old ones: the last ``capacity`` samples per prompt, filled with p0's at the start.

    Args:
      source: a fresh source.
      capacity: samples kept per prompt.
      share: fraction of each batch taken from the buffer.

    Returns:
      Source whose memory is the ring buffer; behaviour log-probabilities travel with the samples.
    """
    filled = logged(source, size=capacity)

    def init(key, posterior):
        return _Buffer(filled.init(key, posterior), jnp.zeros((), jnp.int32))

    def draw(memory, key, behaviour):
        fresh_key, old_key, mix_key = jax.random.split(key, 3)
        new, _ = source.draw((), fresh_key, behaviour)
        if capacity < new.reward.shape[1]:
            raise ValueError(f"replay needs a capacity of at least K = {new.reward.shape[1]}; got {capacity}")
        old, _ = filled.draw(memory.data, old_key, behaviour)
        take_old = jax.random.uniform(mix_key, new.reward.shape) < share
        spread = lambda flag, x: flag.reshape(flag.shape + (1,) * (x.ndim - 2))
        mixed = [jnp.where(spread(take_old, a), b, a) for a, b in zip(new[1:], old[1:], strict=True)]
        slots = (memory.cursor + jnp.arange(new.reward.shape[1])) % capacity
        stored = [kept.at[:, slots].set(x) for kept, x in zip(memory.data[1:], new[1:], strict=True)]
        data = Trajectories(memory.data.prompt, *stored)
        return Trajectories(new.prompt, *mixed), _Buffer(data, (memory.cursor + len(slots)) % capacity)

    return Source(init, draw)


def comparisons(source: Source) -> Source:
    """Bradley-Terry raters on top of any source.

    Neighbouring samples are compared, ``P(a beats b) = sigmoid(r_a - r_b)``.

    Args:
      source: with an even number of samples per prompt.

    Returns:
      Source whose ``reward`` is 1 for the preferred sample of each pair and 0 for the other.
    """

    def draw(memory, key, behaviour):
        sample_key, rater_key = jax.random.split(key)
        batch, memory = source.draw(memory, sample_key, behaviour)
        if batch.reward.shape[1] % 2:
            raise ValueError(f"comparisons need an even number of samples; got K = {batch.reward.shape[1]}")
        first, second = batch.reward[:, 0::2], batch.reward[:, 1::2]
        wins = jax.random.uniform(rater_key, first.shape) < jax.nn.sigmoid(first - second)
        chosen = jnp.stack([wins, ~wins], axis=-1).reshape(batch.reward.shape)
        return batch._replace(reward=chosen.astype(batch.reward.dtype)), memory

    return Source(source.init, draw)
