"""Sampling: draw completions and record, in the same pass, the log-probability of every token drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kl_rl.core import numerics
from kl_rl.core.policy import Policy, log_prob_of
from kl_rl.core.sampler import generate
from kl_rl.core.trajectories import Trajectories
from kl_rl.core.transform import Transform, transformed

__all__ = ["rollout", "sample", "score"]

RewardFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def sample(
    policy: Policy,
    key: jax.Array,
    prompt: jax.Array,
    *,
    num_samples: int,
    horizon: int,
    end: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draw K completions for each prompt, and their log-probabilities, in one pass.

    Args:
      policy: the model; its decoder is used if it has one, otherwise one forward pass per token.
      key: PRNG key.
      prompt: [P, L].
      num_samples: K.
      horizon: T.
      end: end token; what follows it is masked and set to ``end``.

    Returns:
      tokens [P, K, T], mask [P, K, T], and the log-probability of each token in nats [P, K, T] (0 behind the
      mask).
    """
    stop = () if end is None else (end,)
    drawn = generate(policy, key, prompt, num_samples=num_samples, horizon=horizon, stop=stop)
    tokens = drawn.tokens if end is None else jnp.where(drawn.mask > 0, drawn.tokens, end)
    return tokens, drawn.mask, drawn.log_model


def rollout(
    policy: Policy,
    key: jax.Array,
    prompt: jax.Array,
    reward_fn: RewardFn,
    *,
    num_samples: int,
    horizon: int,
    end: int | None = None,
) -> Trajectories:
    """Sample completions and score them: an on-policy batch.

    Args:
      policy: who acts.
      key: PRNG key.
      prompt: [P, L].
      reward_fn: ``(prompt [P, 1, L], tokens [P, K, T], mask [P, K, T]) -> reward [P, K]``; jittable here. For
        host-side rewards call ``sample`` and fill in ``Trajectories.reward`` yourself.
      num_samples: K.
      horizon: T.
      end: optional end token.

    Returns:
      Trajectories, with ``log_behaviour`` as recorded while sampling.
    """
    tokens, mask, log_probs = sample(policy, key, prompt, num_samples=num_samples, horizon=horizon, end=end)
    reward = reward_fn(prompt[:, None], tokens, mask)
    return Trajectories(prompt, tokens, mask, jnp.ones_like(mask), log_probs, reward)


def _scored(policy: Policy, batch: Trajectories) -> jax.Array:
    """Log-probability of every token; prompts go in once where the policy can share them."""
    tokens = jnp.where(batch.mask > 0, batch.tokens, 0)  # whatever pads them need not be an id
    if policy.scorer is not None:
        return policy.scorer(policy.weights, batch.prompt, tokens)
    prompt = jnp.broadcast_to(batch.prompt[:, None], (*tokens.shape[:2], batch.prompt.shape[-1]))
    return log_prob_of(policy.logits(prompt, tokens), tokens)


def _transformed_score(
    policy: Policy, batch: Trajectories, transform: Transform, stop: Sequence[int]
) -> jax.Array:
    """One completion of each prompt at a time: all entries of a law are needed to truncate it."""
    horizon = batch.tokens.shape[-1]

    def one(tokens: jax.Array) -> jax.Array:
        logits = policy.logits(batch.prompt, tokens)
        model = numerics.safe_log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
        law = transformed(transform, model, jnp.arange(horizon)[None], horizon=horizon, stop=stop)
        return jnp.take_along_axis(law, tokens[..., None], axis=-1)[..., 0]

    tokens = jnp.where(batch.mask > 0, batch.tokens, 0)
    return jnp.moveaxis(jax.lax.map(one, jnp.moveaxis(tokens, 1, 0)), 0, 1)


def score(
    policy: Policy, batch: Trajectories, transform: Transform | None = None, *, stop: Sequence[int] = ()
) -> jax.Array:
    """Teacher-forced token log-probabilities of a batch under a policy, in nats; 0 on masked or uncontrolled tokens.

    Args:
      policy: the model.
      batch: the trajectories; T is the horizon they were drawn with, where that matters to the transform.
      transform: score under this transformation of the model, as the sampler records it in ``log_behaviour``; -inf
        for what it excludes. The logits [P, T, V] of one completion of each prompt then exist at a time.
      stop: stop tokens of the transform.

    Returns:
      [P, K, T].
    """
    if transform is not None and not transform.identity:
        log_probs = _transformed_score(policy, batch, transform, stop)
    else:
        log_probs = _scored(policy, batch)
    return numerics.multiply_no_nan(log_probs, batch.action_mask.astype(log_probs.dtype))
