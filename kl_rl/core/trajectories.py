"""The one batch type: prompts, K sampled completions each, masks, behaviour log-probabilities and rewards.

A logged data set, a replay buffer, an on-policy batch and a set of comparisons are all ``Trajectories``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Trajectories", "check_trajectories", "completion_mask", "pairs"]


class Trajectories(NamedTuple):
    """K completions for each of P prompts, as arrays.

    Attributes:
      prompt: token ids; [P, L].
      tokens: completion token ids; what lies behind the mask is ignored; [P, K, T].
      mask: 1 for tokens of the completion (the end token included), 0 for padding; [P, K, T].
      controlled: 1 for tokens chosen by the policy, 0 for tokens of its environment; [P, K, T].
      log_behaviour: log-probability of each token under whatever produced it, in nats, recorded when
        sampling and never recomputed; [P, K, T].
      reward: plain data; [P, K].
      label: what a rater said of each sample (1 for the winner of a pair, a rank, desirability), or None; [P, K].
      token_reward: rewards of single tokens, beside ``reward``, or None; [P, K, T].
    """

    prompt: jax.Array
    tokens: jax.Array
    mask: jax.Array
    controlled: jax.Array
    log_behaviour: jax.Array
    reward: jax.Array
    label: jax.Array | None = None
    token_reward: jax.Array | None = None

    def map_prompts(self, function: Callable[..., jax.Array], *others: Trajectories) -> Trajectories:
        """``function`` of every array, all of which have the prompts P as leading axis."""
        return jax.tree.map(function, self, *others)

    def map_samples(
        self, function: Callable[..., jax.Array], *others: Trajectories, prompt: jax.Array | None = None
    ) -> Trajectories:
        """``function`` of every array with axes [P, K, ...]; the prompts stay as they are.

        Args:
          function: of one array, and of the same array of each of the others.
          others: batches with the same fields.
          prompt: the prompts of the result, if they change; [P', L].

        Returns:
          The batch.
        """
        without = lambda batch: batch._replace(prompt=None)
        mapped = jax.tree.map(function, without(self), *map(without, others))
        return mapped._replace(prompt=self.prompt if prompt is None else prompt)

    @property
    def action_mask(self) -> jax.Array:
        """Tokens that are real and the policy's own: ``mask * controlled``; [P, K, T]."""
        return self.mask * self.controlled


def completion_mask(tokens: jax.Array, end: int | None) -> jax.Array:
    """1 up to and including the first end token, 0 behind it; all ones without an end token; [..., T]."""
    if end is None:
        return jnp.ones(tokens.shape, jnp.float32)
    ended = jnp.cumsum(tokens == end, axis=-1)
    before = jnp.concatenate([jnp.zeros_like(ended[..., :1]), ended[..., :-1]], axis=-1)
    return (before == 0).astype(jnp.float32)


def check_trajectories(batch: Trajectories, *, min_samples: int = 1) -> None:
    """Static shape check at a public border.

    Args:
      batch: the trajectories.
      min_samples: smallest admissible K (leave-one-out baselines, log-variance and comparisons need 2).

    Raises:
      ValueError: naming the field whose shape is wrong, or the K that is too small.
    """
    if batch.tokens.ndim != 3:
        raise ValueError(f"Trajectories.tokens must be [P, K, T]; got shape {batch.tokens.shape}")
    num_prompts, num_samples, _ = batch.tokens.shape
    expected = {
        "mask": batch.tokens.shape,
        "controlled": batch.tokens.shape,
        "log_behaviour": batch.tokens.shape,
        "reward": (num_prompts, num_samples),
        "label": (num_prompts, num_samples),
        "token_reward": batch.tokens.shape,
    }
    for name, shape in expected.items():
        found = getattr(batch, name)
        if found is not None and found.shape != shape:
            raise ValueError(f"Trajectories.{name} must be {shape}; got {found.shape}")
    if batch.prompt.ndim != 2 or batch.prompt.shape[0] != num_prompts:
        raise ValueError(f"Trajectories.prompt must be [P={num_prompts}, L]; got {batch.prompt.shape}")
    if num_samples < min_samples:
        raise ValueError(
            f"this method compares samples of one prompt and needs K >= {min_samples}; got K = {num_samples}: "
            "draw more samples per prompt"
        )


def pairs(batch: Trajectories) -> tuple[Trajectories, jax.Array]:
    """Regroup K samples of a prompt into K // 2 pairs: [P, K, ...] becomes [P * K // 2, 2, ...]; and their prompts."""
    num_prompts, num_samples, _ = batch.tokens.shape
    if num_samples % 2:
        raise ValueError(f"pairs need an even number of samples per prompt; got K = {num_samples}")
    split = lambda x: x.reshape(num_prompts * num_samples // 2, 2, *x.shape[2:])
    prompt = jnp.repeat(batch.prompt, num_samples // 2, axis=0)
    return batch.map_samples(split, prompt=prompt), prompt
