"""Statistics of whole next-token laws along samples, a few positions at a time: entropy, exact KL to p0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kl_rl.core import numerics
from kl_rl.core.policy import Policy
from kl_rl.core.trajectories import Trajectories
from kl_rl.objectives.kl import exact_token_kl

__all__ = ["TokenStatistics", "token_statistics"]

_ROWS = 512  # next-token laws held at once, of either policy


class TokenStatistics(NamedTuple):
    """Along each completion, in nats, 0 on masked or uncontrolled tokens; [P, K, T] each.

    Attributes:
      log_q: of the token drawn, under the policy.
      log_base: of the token drawn, under p0.
      entropy: of the policy's law of the next token.
      kl: ``KL(q(. | x, y_<t) || p0(. | x, y_<t))`` over the whole vocabulary. Its sum over t is the Rao-Blackwellized
        estimate of the sequence KL, of no greater variance than ``log q - log p0`` (Amini et al. 2025, arXiv
        2504.10637).
    """

    log_q: jax.Array
    log_base: jax.Array
    entropy: jax.Array
    kl: jax.Array


def _halves(
    policy: Policy, prompt: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, Callable[..., jax.Array]]:
    """Features [P, K, T, d] and their map to logits; without a trunk the features are the logits."""
    if policy.trunk is not None:
        return policy.trunk.hidden(policy.weights, prompt, tokens), policy.trunk.logits
    prompts = jnp.broadcast_to(prompt[:, None], (*tokens.shape[:2], prompt.shape[-1]))
    return policy.logits(prompts, tokens), lambda weights, logits: logits


def token_statistics(
    policy: Policy, base: Policy, batch: Trajectories, base_prompt: jax.Array | None = None
) -> TokenStatistics:
    """Log-probabilities, entropies and exact KL of every position; differentiable in the policy.

    Args:
      policy: q.
      base: p0, over the same vocabulary.
      batch: the trajectories.
      base_prompt: the prompts as p0 sees them; ``batch.prompt`` if None; [P, L].

    Returns:
      The statistics.
    """
    mask = batch.action_mask
    tokens = jnp.where(batch.mask > 0, batch.tokens, 0)
    rows, horizon = tokens.shape[0] * tokens.shape[1], tokens.shape[-1]
    ours, our_logits = _halves(policy, batch.prompt, tokens)
    theirs, their_logits = _halves(base, batch.prompt if base_prompt is None else base_prompt, tokens)

    def of_laws(weights: Any, own: jax.Array, other: jax.Array, token: jax.Array) -> tuple[jax.Array, ...]:
        wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
        q, p = wide(our_logits(weights[0], own)), wide(their_logits(weights[1], other))
        log_q = numerics.safe_log_softmax(q)
        pick = lambda table: jnp.take_along_axis(table, token[..., None].astype(jnp.int32), axis=-1)[..., 0]
        entropy = -jnp.sum(numerics.multiply_no_nan(log_q, jnp.exp(log_q)), axis=-1)
        return pick(log_q), pick(numerics.safe_log_softmax(p)), entropy, exact_token_kl(q, p)

    weights = (policy.weights, base.weights)
    size = min(horizon, max(1, _ROWS // rows))
    padding = -horizon % size
    positions_first = lambda x: jnp.moveaxis(
        jnp.pad(x, ((0, 0), (0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 3)), 2, 0
    )
    chunked = lambda x: positions_first(x).reshape(-1, size, *x.shape[:2], *x.shape[3:])
    one = jax.checkpoint(of_laws)
    found = jax.lax.map(lambda part: one(weights, *part), tuple(map(chunked, (ours, theirs, tokens))))
    whole = lambda x: jnp.moveaxis(x.reshape(-1, *x.shape[2:])[:horizon], 0, 2)
    return TokenStatistics(*(numerics.multiply_no_nan(whole(x), mask.astype(x.dtype)) for x in found))
