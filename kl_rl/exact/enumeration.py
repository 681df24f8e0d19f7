"""Truth by enumeration: every string of a small world, its exact probability under any policy.

And exact expectations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.core import numerics
from kl_rl.core.policy import Policy
from kl_rl.core.trajectories import completion_mask

__all__ = [
    "ENUMERATION_LIMIT",
    "Enumeration",
    "Levels",
    "enumerate_strings",
    "expectation",
    "expectation_over_tuples",
    "kl_divergence",
    "level_log_prob",
    "log_partition",
    "log_posterior",
    "log_law",
    "reward_levels",
]

ENUMERATION_LIMIT = 2**20


class Enumeration(NamedTuple):
    """All N completions of at most T tokens, each as a prefix of T - 1 tokens and a last token.

    Sharing prefixes makes the forward pass V times cheaper than scoring every string.
    """

    tokens: jax.Array  # [N, T]
    mask: jax.Array  # [N, T]
    prefixes: jax.Array  # [M, T], last column unused
    prefix_mask: jax.Array  # [M, T - 1]
    parent: jax.Array  # [N], row of `prefixes`


class Levels(NamedTuple):
    """Distinct values of a reward over enumerated strings: `value[index[i]]` is the reward of string i."""

    value: Any  # [G], ascending; jax or numpy
    index: Any  # [N]


def enumerate_strings(
    vocab: int, horizon: int, *, end: int | None = None, limit: int = ENUMERATION_LIMIT
) -> Enumeration:
    """All strings of T tokens over V symbols; with an end token, all strings that end or reach T tokens.

    Args:
      vocab: V.
      horizon: T.
      end: end token, or None.
      limit: largest admissible V**T.

    Returns:
      The enumeration, in lexicographic order.

    Raises:
      ValueError: if V**T exceeds the limit (with the size, the limit and the way out).
    """
    size = vocab**horizon
    if size > limit:
        raise ValueError(
            f"{vocab}**{horizon} = {size} strings are too many to enumerate (limit {limit}): "
            "use dynamic programming (kl_rl.exact, or `kl-rl exact --method dp`) or a shorter horizon"
        )

    def grid(length: int) -> np.ndarray:
        columns = np.indices((vocab,) * length).reshape(length, -1).T if length else np.zeros((1, 0), int)
        if end is None:
            return columns
        mask = np.asarray(completion_mask(jnp.asarray(columns), end)) if length else np.zeros((1, 0))
        return columns[np.all((mask > 0) | (columns == end), axis=1)]

    tokens, heads = grid(horizon), grid(horizon - 1)
    code = vocab ** np.arange(horizon - 1)[::-1] if horizon > 1 else np.zeros(0, int)
    parent = np.searchsorted(heads @ code, tokens[:, :-1] @ code)
    padded = np.concatenate([heads, np.zeros((len(heads), 1), int)], axis=1)
    head_mask = completion_mask(jnp.asarray(heads), end) if horizon > 1 else jnp.zeros(heads.shape)
    as_ids = lambda x: jnp.asarray(x, jnp.int32)
    return Enumeration(
        as_ids(tokens), completion_mask(as_ids(tokens), end), as_ids(padded), head_mask, as_ids(parent)
    )


def log_law(
    policy: Policy, prompt: jax.Array, strings: Enumeration, *, batch_size: int | None = None
) -> jax.Array:
    """``log q(y | x)`` of every string, in nats, exact up to rounding.

    Args:
      policy: any policy.
      prompt: one prompt; [L].
      strings: from ``enumerate_strings``.
      batch_size: prefixes scored at once (bounds memory); all of them if None.

    Returns:
      [N].
    """
    horizon = strings.tokens.shape[1]

    def forward(prefixes):
        logits = policy.logits(jnp.broadcast_to(prompt, (prefixes.shape[0], prompt.shape[0])), prefixes)
        log_probs = numerics.safe_log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
        chosen = jnp.take_along_axis(log_probs, prefixes[..., None], axis=-1)[..., 0]
        return chosen[:, : horizon - 1], log_probs[:, -1]

    if batch_size is None or batch_size >= strings.prefixes.shape[0]:
        chosen, last = forward(strings.prefixes)
    else:
        chosen, last = jax.lax.map(
            lambda row: jax.tree.map(lambda x: x[0], forward(row[None])),
            strings.prefixes,
            batch_size=batch_size,
        )
    head = numerics.masked_sum(chosen, strings.prefix_mask)
    final = last[strings.parent, strings.tokens[:, -1]]
    return head[strings.parent] + numerics.multiply_no_nan(final, strings.mask[:, -1].astype(final.dtype))


def reward_levels(reward: np.ndarray | jax.Array, *, tolerance: float = 1e-9) -> Levels:
    """Group equal rewards; values closer than ``tolerance`` (relative) are one level. Host side.

    Args:
      reward: finite rewards of the enumerated strings; [N].
      tolerance: relative gap below which two rewards are the same number.

    Returns:
      Levels with ascending values.
    """
    array = np.asarray(reward, np.float64)
    order = np.argsort(array, kind="stable")
    ascending = array[order]
    gap = np.diff(ascending, prepend=ascending[:1])
    new = gap > tolerance * float(np.max(np.abs(array)))
    rank = np.cumsum(new)
    index = np.empty(len(array), np.int32)
    index[order] = rank
    first = np.flatnonzero(np.concatenate([[True], new[1:]]))
    return Levels(jnp.asarray(ascending[first], jnp.result_type(float)), jnp.asarray(index))


def level_log_prob(log_q: jax.Array, levels: Levels) -> jax.Array:
    """``log q(r)`` of every reward level, in nats; -inf where a level has no mass; [N] -> [G]."""
    size = levels.value.shape[0]
    top = jax.ops.segment_max(log_q, levels.index, size)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    total = jax.ops.segment_sum(jnp.exp(log_q - top[levels.index]), levels.index, size)
    return numerics.safe_log(total) + top


def kl_divergence(log_q: jax.Array, log_p: jax.Array) -> jax.Array:
    """``KL(q || p) = sum_y q(y) (log q(y) - log p(y))`` over enumerated outcomes, in nats; [..., N] -> [...]."""
    return jnp.sum(numerics.xlogy_difference(jnp.exp(log_q), log_q, log_p), axis=-1)


def log_partition(log_base: jax.Array, log_evidence: jax.Array) -> jax.Array:
    """``log Z = log sum_y p0(y) l(y)``, in nats (T1.1); [N] -> []."""
    return jax.nn.logsumexp(log_base + log_evidence, axis=-1)


def log_posterior(log_base: jax.Array, log_evidence: jax.Array) -> jax.Array:
    """``log p*(y) = log p0(y) + log l(y) - log Z``, in nats (T1.1); [N] -> [N]."""
    return numerics.safe_log_softmax(log_base + log_evidence)


def expectation(log_q: jax.Array, f: jax.Array) -> jax.Array:
    """``E_q f = sum_y q(y) f(y)`` with 0 * inf = 0; [..., N] -> [...]."""
    return jnp.sum(numerics.multiply_no_nan(f, jnp.exp(log_q)), axis=-1)


def expectation_over_tuples(
    estimator: Callable[[jax.Array], jax.Array], log_q: jax.Array, num_samples: int
) -> jax.Array:
    """Exact expectation of a K-sample estimator: the sum over all ordered K-tuples of strings.

    ``sum_{i_1..i_K} q(i_1) ... q(i_K) estimator(i_1, ..., i_K)``, the tuple probabilities held fixed under
    differentiation, so that ``grad`` of it is the expected gradient of the estimator.

    Args:
      estimator: maps indices of the strings drawn [K] to a scalar.
      log_q: log-probabilities of the sampling law, nats; [N].
      num_samples: K; N**K tuples are visited.

    Returns:
      The expectation, a scalar.
    """
    tuples = jnp.asarray(list(itertools.product(range(log_q.shape[0]), repeat=num_samples)))
    weight = jax.lax.stop_gradient(jnp.exp(jnp.sum(log_q[tuples], axis=-1)))
    return jnp.sum(numerics.multiply_no_nan(jax.vmap(estimator)(tuples), weight))
