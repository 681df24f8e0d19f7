"""Generation for people: prompts of any lengths, few compiled programs, rows handed over as soon as they end."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.core.policy import Policy
from kl_rl.core.sampler import Progress, begin, proceed
from kl_rl.core.transform import Transform, check_transform

__all__ = ["Completion", "bucket_length", "cache_bytes", "pad_prompts", "stream"]

PAD = -1


class Completion(NamedTuple):
    """One finished sample, on the host.

    Attributes:
      prompt: which prompt it belongs to.
      sample: which of its K samples it is.
      tokens: the stop token included, if it ended by one; int32 [n].
      log_behaviour: nats, under the transformed distribution; [n].
      log_model: nats, under the model; [n].
      stopped: whether it ended by a stop token (False: the horizon was reached).
    """

    prompt: int
    sample: int
    tokens: np.ndarray
    log_behaviour: np.ndarray
    log_model: np.ndarray
    stopped: bool


def bucket_length(length: int, smallest: int = 16) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: at most a third is padding, and few lengths means few programs."""
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def pad_prompts(prompts: Sequence[Sequence[int]], length: int | None = None) -> np.ndarray:
    """Prompts of any lengths as one array, padded on the right: what comes first in a prompt is in column 0.

    A return token takes that place (``decision_transformer``, ``mixture``).

    Args:
      prompts: token ids, at least one each.
      length: L; the bucket of the longest if None.

    Returns:
      int32 [P, L]; -1 where there is padding.

    Raises:
      ValueError: for an empty prompt, or one longer than L; naming its number.
    """
    for number, ids in enumerate(prompts):
        if len(ids) == 0:
            raise ValueError(f"prompt {number} is empty: give at least a begin mark")
        if length is not None and len(ids) > length:
            raise ValueError(f"prompt {number} has {len(ids)} tokens; the limit is {length}")
    size = bucket_length(max(map(len, prompts))) if length is None else length
    rows = np.full((len(prompts), size), PAD, np.int32)
    for row, ids in zip(rows, prompts, strict=True):
        row[: len(ids)] = ids
    return rows


def cache_bytes(policy: Policy, prompt_shape: tuple[int, int], num_samples: int, horizon: int) -> int:
    """Memory that a generation's cache will take, known before anything is allocated.

    Args:
      policy: with a decoder.
      prompt_shape: (P, L).
      num_samples: K.
      horizon: T.

    Returns:
      Bytes.
    """

    def first(policy: Policy, prompt: jax.Array) -> Progress:
        return begin(policy, jax.random.key(0), prompt, num_samples=num_samples, horizon=horizon)

    shape = jax.eval_shape(first, policy, jax.ShapeDtypeStruct(prompt_shape, jnp.int32))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shape.cache))


@functools.partial(jax.jit, static_argnames=("num_samples", "horizon", "stop"))
def _begin(policy, key, prompt, transform, *, num_samples, horizon, stop):
    return begin(
        policy, key, prompt, num_samples=num_samples, horizon=horizon, transform=transform, stop=stop
    )


@functools.partial(jax.jit, static_argnames=("num_steps", "stop"), donate_argnames=("progress",))
def _proceed(policy, progress, transform, *, num_steps, stop):
    return proceed(policy, progress, num_steps=num_steps, transform=transform, stop=stop)


def _completion(row: int, num_samples: int, progress: Progress, stop: Sequence[int]) -> Completion:
    tokens = np.asarray(progress.tokens[:, row])[: int(progress.position)]
    ends = np.flatnonzero(np.isin(tokens, list(stop)))
    size = int(ends[0]) + 1 if len(ends) else len(tokens)
    drawn, model = (
        np.asarray(x[:size, row], np.float64) for x in (progress.log_behaviour, progress.log_model)
    )
    return Completion(row // num_samples, row % num_samples, tokens[:size], drawn, model, bool(len(ends)))


def stream(
    policy: Policy,
    key: jax.Array,
    prompts: Sequence[Sequence[int]],
    *,
    num_samples: int = 1,
    horizon: int,
    transform: Transform | None = None,
    stop: Sequence[int] = (),
    segment: int = 16,
) -> Iterator[Completion]:
    """Yield completions as they end, looking every ``segment`` tokens.

    The tokens are those that ``generate`` draws with the same key from the same padded prompts.

    Args:
      policy: the model.
      key: PRNG key.
      prompts: token ids of any lengths.
      num_samples: K.
      horizon: T.
      transform: the declared transform.
      stop: stop tokens.
      segment: tokens between two looks.

    Yields:
      Finished completions; those that end together in order of their rows, the unfinished ones last.

    Raises:
      ValueError: for an empty prompt or a transform out of range.
    """
    transform, stop = transform or Transform(), tuple(stop)
    check_transform(transform, stop)
    prompt = jnp.asarray(pad_prompts(prompts))
    progress = _begin(policy, key, prompt, transform, num_samples=num_samples, horizon=horizon, stop=stop)
    given = np.zeros(progress.alive.shape, bool)
    while True:
        ended = ~np.asarray(progress.alive)
        for row in np.flatnonzero(ended & ~given):
            yield _completion(int(row), num_samples, progress, stop)
        given |= ended
        if given.all() or int(progress.position) >= horizon:
            break
        progress = _proceed(policy, progress, transform, num_steps=segment, stop=stop)
    for row in np.flatnonzero(~given):
        yield _completion(int(row), num_samples, progress, stop)
