"""Sampling: draw completions and record, in the same pass, the log-probability of every token drawn."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kl_rl import numerics
from kl_rl.policy import Decoder, Policy, log_prob_of
from kl_rl.trajectories import Trajectories, completion_mask

__all__ = ["prefix_values", "rollout", "sample", "score"]

RewardFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _begin(policy: Policy, decoder: Decoder, prompt: jax.Array, num_samples: int, horizon: int):
    """Logits of the first token and a cache for K samples of each prompt, computed once where the cache can fork."""
    if decoder.fork is None:
        return decoder.init(policy.weights, jnp.repeat(prompt, num_samples, axis=0), horizon)
    logits, cache = decoder.init(policy.weights, prompt, horizon)
    return jnp.repeat(logits, num_samples, axis=0), decoder.fork(cache, num_samples)


def _sample_with_decoder(policy: Policy, key: jax.Array, prompt: jax.Array, num_samples: int, horizon: int):
    decoder = policy.decoder
    assert decoder is not None
    logits, cache = _begin(policy, decoder, prompt, num_samples, horizon)

    def draw(logits, key):
        log_probs = numerics.safe_log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
        token = jax.random.categorical(key, log_probs)
        return token, jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]

    def body(carry, key):
        logits, cache = carry
        token, log_prob = draw(logits, key)
        return decoder.step(policy.weights, cache, token), (token, log_prob)

    keys = jax.random.split(key, horizon)
    (logits, _), (tokens, log_probs) = jax.lax.scan(body, (logits, cache), keys[:-1])
    token, log_prob = draw(logits, keys[-1])
    tokens = jnp.concatenate([tokens, token[None]])
    return tokens.T, jnp.concatenate([log_probs, log_prob[None]]).T


def _sample_with_apply(policy: Policy, key: jax.Array, prompt: jax.Array, num_samples: int, horizon: int):
    prompt = jnp.repeat(prompt, num_samples, axis=0)

    def body(t, carry):
        tokens, log_probs = carry
        row = jax.lax.dynamic_index_in_dim(policy.logits(prompt, tokens), t, axis=1, keepdims=False)
        row = numerics.safe_log_softmax(row.astype(log_probs.dtype))
        token = jax.random.categorical(jax.random.fold_in(key, t), row)
        chosen = jnp.take_along_axis(row, token[:, None], axis=-1)[:, 0]
        return tokens.at[:, t].set(token.astype(tokens.dtype)), log_probs.at[:, t].set(chosen)

    shape = (prompt.shape[0], horizon)
    dtype = jnp.promote_types(
        jax.eval_shape(policy.logits, prompt, jnp.zeros(shape, jnp.int32)).dtype, jnp.float32
    )
    return jax.lax.fori_loop(0, horizon, body, (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, dtype)))


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
    num_prompts = prompt.shape[0]
    draw = _sample_with_apply if policy.decoder is None else _sample_with_decoder
    tokens, log_probs = draw(policy, key, prompt, num_samples, horizon)
    shape = (num_prompts, num_samples, horizon)
    tokens = tokens.reshape(shape).astype(jnp.int32)
    mask = completion_mask(tokens, end)
    if end is not None:
        tokens = jnp.where(mask > 0, tokens, end)
    return tokens, mask, numerics.multiply_no_nan(log_probs.reshape(shape), mask.astype(log_probs.dtype))


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


def _grouped(function: Policy, batch: Trajectories) -> jax.Array:
    """What a policy or twist says of every completion; prompts go in once where the function can share them."""
    tokens = jnp.where(batch.mask > 0, batch.tokens, 0)  # whatever pads them need not be an id
    if function.scorer is not None:
        return function.scorer(function.weights, batch.prompt, tokens)
    return function.logits(
        jnp.broadcast_to(batch.prompt[:, None], (*tokens.shape[:2], batch.prompt.shape[-1])), tokens
    )


def score(policy: Policy, batch: Trajectories) -> jax.Array:
    """Teacher-forced token log-probabilities of a batch under a policy, in nats; 0 on masked or uncontrolled tokens.

    Args:
      policy: the model.
      batch: the trajectories.

    Returns:
      [P, K, T].
    """
    log_probs = _grouped(policy, batch)
    if policy.scorer is None:
        tokens = jnp.where(batch.mask > 0, batch.tokens, 0)
        log_probs = log_prob_of(log_probs, tokens)
    return numerics.multiply_no_nan(log_probs, batch.action_mask.astype(log_probs.dtype))


def prefix_values(twist: Policy, batch: Trajectories) -> jax.Array:
    """A twist head on every prefix of every completion, in nats; [P, K, T + 1].

    Args:
      twist: the head.
      batch: the trajectories.

    Returns:
      [P, K, T + 1].
    """
    return _grouped(twist, batch)
