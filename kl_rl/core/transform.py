"""The one declared sampling transform: what a sampler may do to the model's distribution, said once for both sides.

Sampler and scorer call the same function, so the behaviour log-probability that is recorded while sampling is the one
that teacher forcing would give. Off-policy corrections need it: truncation biases ratios by exactly the kept mass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kl_rl.core import numerics

__all__ = ["Transform", "check_transform", "transformed"]


class Transform(NamedTuple):
    """Numbers, so that changing them does not recompile; None leaves a part out.

    Parts are applied in this order: end tokens forbidden or forced, temperature, top-k, top-p, renormalization.

    Attributes:
      temperature: logits are divided by it; 0 is greedy. Among equals the smaller id comes first, here and below.
      top_k: only the k most probable tokens.
      top_p: only the smallest set of most probable tokens with mass at least p (Holtzman et al. 2020, arXiv
        1904.09751).
      min_length: stop tokens are impossible before this many tokens have been written.
      force_end: the last token that fits is a stop token (the first one given), whatever the model says.
    """

    temperature: jax.Array | float | None = None
    top_k: jax.Array | int | None = None
    top_p: jax.Array | float | None = None
    min_length: jax.Array | int | None = None
    force_end: jax.Array | bool | None = None

    @property
    def identity(self) -> bool:
        """Whether sampling is from the model itself."""
        return all(part is None for part in self)


def check_transform(transform: Transform, stop: Sequence[int]) -> None:
    """Refuse what is out of range, where it is known (not while traced).

    Raises:
      ValueError: naming the field.
    """
    known = lambda x: x is not None and not isinstance(x, jax.core.Tracer)
    if known(transform.temperature) and not 0 <= transform.temperature < math.inf:  # type: ignore[operator]
        raise ValueError(f"temperature must be at least 0 and finite; got {transform.temperature}")
    if known(transform.top_k) and not transform.top_k >= 1:  # type: ignore[operator]
        raise ValueError(f"top_k must be at least 1; got {transform.top_k}")
    if known(transform.top_p) and not 0 < transform.top_p <= 1:  # type: ignore[operator]
        raise ValueError(f"top_p must lie in (0, 1]; got {transform.top_p}")
    if known(transform.force_end) and transform.force_end and not stop:
        raise ValueError("force_end needs a stop token")


def _is_stop(stop: Sequence[int], vocab: int) -> jax.Array:
    ids = jnp.asarray(tuple(stop), jnp.int32)
    return jnp.any(jnp.arange(vocab)[:, None] == ids[None], axis=1)


def _length_rules(
    transform: Transform, log_probs: jax.Array, index: jax.Array, horizon: int, stop: Sequence[int]
) -> jax.Array:
    expand = (1,) * (log_probs.ndim - 1) + (-1,)
    index = jnp.asarray(index).reshape(jnp.shape(index) + (1,) * (log_probs.ndim - jnp.ndim(index)))
    ends = _is_stop(stop, log_probs.shape[-1]).reshape(expand)
    if transform.min_length is not None:
        log_probs = jnp.where(ends & (index < transform.min_length), -jnp.inf, log_probs)
    if transform.force_end is not None:
        first = (jnp.arange(log_probs.shape[-1]) == stop[0]).reshape(expand)
        forced = jnp.broadcast_to(jnp.where(first, 0.0, -jnp.inf).astype(log_probs.dtype), log_probs.shape)
        last = jnp.logical_and(transform.force_end, index == horizon - 1)
        log_probs = jnp.where(last, forced, log_probs)
    return log_probs


def _tempered(log_probs: jax.Array, temperature: jax.Array | float) -> jax.Array:
    temperature = jnp.asarray(temperature, log_probs.dtype)
    best = jnp.argmax(log_probs, axis=-1, keepdims=True)
    index = jnp.arange(log_probs.shape[-1]).reshape((1,) * (log_probs.ndim - 1) + (-1,))
    greedy = jnp.where(index == best, 0.0, -jnp.inf)
    soft = log_probs / jnp.where(temperature > 0, temperature, 1.0)
    return jnp.where(temperature > 0, soft, greedy)


def transformed(
    transform: Transform,
    log_probs: jax.Array,
    index: jax.Array | int,
    *,
    horizon: int,
    stop: Sequence[int] = (),
) -> jax.Array:
    """Log-probabilities under the transformed distribution, in nats.

    Args:
      transform: what is declared.
      log_probs: of the model, normalized; [..., V].
      index: how many tokens have been written before this one; a scalar, or broadcastable from the front of [...].
      horizon: T, for the forced end.
      stop: stop tokens.

    Returns:
      Normalized, -inf where excluded; [..., V].
    """
    if transform.identity:
        return log_probs
    if stop and (transform.min_length is not None or transform.force_end is not None):
        log_probs = _length_rules(transform, log_probs, jnp.asarray(index), horizon, stop)
    if transform.temperature is not None:
        log_probs = _tempered(log_probs, transform.temperature)
    if transform.top_k is not None or transform.top_p is not None:
        log_probs = _truncated(transform, numerics.safe_log_softmax(log_probs))
    return numerics.safe_log_softmax(log_probs)


def _truncated(transform: Transform, log_probs: jax.Array) -> jax.Array:
    """Keep the first of the order by probability.

    By rank and not by comparing values with the last one kept: a compiler may compute a value twice, once for the order
    and once for the comparison, and round it differently; the boundary token could then be drawn and yet be excluded.
    """
    order = jnp.argsort(log_probs, axis=-1, descending=True, stable=True)
    kept = jnp.ones(log_probs.shape, bool)
    if transform.top_k is not None:
        kept &= jnp.arange(log_probs.shape[-1]).reshape((1,) * (log_probs.ndim - 1) + (-1,)) < transform.top_k
    if transform.top_p is not None:
        share = jnp.exp(jnp.take_along_axis(log_probs, order, axis=-1))
        before = jnp.concatenate(
            [jnp.zeros_like(share[..., :1]), jnp.cumsum(share, axis=-1)[..., :-1]], axis=-1
        )
        kept &= (before < transform.top_p) | jnp.greater_equal(
            transform.top_p, 1.0
        )  # sums of floats reach 1 early
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(kept, rank, axis=-1), log_probs, -jnp.inf)
