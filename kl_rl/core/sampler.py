"""The sampler: one loop for every policy, every transform, every way to stop; log-probabilities recorded on the way.

Prompts are run once and shared by their K samples; the loop ends when every row has ended; a generation can be cut into
pieces (streaming) and its rows regathered by ancestor (sequential Monte Carlo) in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kl_rl.core import numerics
from kl_rl.core.policy import Decoder, Policy
from kl_rl.core.transform import Transform, check_transform, transformed

__all__ = ["Generated", "Progress", "begin", "finish", "generate", "proceed", "reorder"]


class Generated(NamedTuple):
    """K completions of each prompt.

    Attributes:
      tokens: what lies behind the mask is meaningless; [P, K, T].
      mask: 1 up to and including the stop token; [P, K, T].
      log_behaviour: log-probability of each token under the transformed distribution it was drawn from, nats, 0
        behind the mask; [P, K, T].
      log_model: the same under the model itself; [P, K, T].
    """

    tokens: jax.Array
    mask: jax.Array
    log_behaviour: jax.Array
    log_model: jax.Array


class Progress(NamedTuple):
    """A generation on its way: everything the next token needs, as arrays.

    Attributes:
      cache: of the decoder.
      token: the last token of every row; [P * K].
      tokens: what has been written; [T, P * K].
      log_behaviour: [T, P * K].
      log_model: [T, P * K].
      alive: rows that have not stopped; [P * K].
      position: tokens written so far.
      uniforms: one random number for each token to come; [T, P * K].
    """

    cache: Any
    token: jax.Array
    tokens: jax.Array
    log_behaviour: jax.Array
    log_model: jax.Array
    alive: jax.Array
    position: jax.Array
    uniforms: jax.Array


def _recompute(policy: Policy) -> Decoder:
    """The decoder of a policy that has none: one forward pass per token, the cache being the text itself."""

    def init(weights, prompt, horizon):
        tokens = jnp.zeros((prompt.shape[0], horizon), jnp.int32)
        logits = policy.apply(weights, prompt, tokens)[:, 0]
        return logits, (prompt, tokens, jnp.zeros((), jnp.int32))

    def step(weights, cache, token):
        prompt, tokens, index = cache
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None].astype(jnp.int32), index, axis=1)
        rows = policy.apply(weights, prompt, tokens)
        logits = jax.lax.dynamic_index_in_dim(rows, index + 1, axis=1, keepdims=False)
        return logits, (prompt, tokens, index + 1)

    def gather(cache, ancestor):
        prompt, tokens, index = cache
        return prompt, tokens[ancestor], index

    return Decoder(init, step, None, gather)


def _inverse(law: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first token whose cumulative probability exceeds a uniform number; never one of probability 0.

    Args:
      law: log-probabilities; [B, V].
      uniform: in [0, 1); [B].

    Returns:
      int32 [B].
    """
    mass = jnp.exp(law)
    total = jnp.cumsum(mass, axis=-1)
    index = jnp.arange(law.shape[-1], dtype=jnp.int32)[None]
    middle = (
        uniform + jnp.finfo(uniform.dtype).eps / 2
    )  # of the cell of the grid: 0 would be drawn far too often
    above = (total > middle[:, None] * total[:, -1:]) & (mass > 0)
    first = jnp.min(jnp.where(above, index, law.shape[-1]), axis=-1)
    last = jnp.max(jnp.where(mass > 0, index, 0), axis=-1)  # should rounding leave nothing above
    return jnp.minimum(first, last)


def _draw(logits, uniforms, index, transform: Transform, stop: Sequence[int]):
    """One token per row, with its log-probability under the transformed distribution and under the model."""
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    model = numerics.safe_log_softmax(logits.astype(wide))
    law = transformed(transform, model, index, horizon=uniforms.shape[0], stop=stop)
    token = _inverse(law, jax.lax.dynamic_index_in_dim(uniforms, index, keepdims=False).astype(wide))
    pick = lambda table: jnp.take_along_axis(table, token[:, None], axis=-1)[:, 0]
    return token, pick(law), pick(model)


def _stopped(token: jax.Array, stop: Sequence[int]) -> jax.Array:
    ended = jnp.zeros(token.shape, bool)
    for end in stop:
        ended |= token == end
    return ended


def begin(
    policy: Policy,
    key: jax.Array,
    prompt: jax.Array,
    *,
    num_samples: int,
    horizon: int,
    transform: Transform | None = None,
    stop: Sequence[int] = (),
) -> Progress:
    """Run the prompts and draw the first token of every row.

    Args:
      policy: the model.
      key: PRNG key.
      prompt: ids below 0 are padding, if the policy knows padding; [P, L].
      num_samples: K.
      horizon: T, at least 1.
      transform: the declared transform; none if None.
      stop: stop tokens, static.

    Returns:
      A generation with one token written.
    """
    transform = transform or Transform()
    check_transform(transform, stop)
    if prompt.ndim != 2:
        raise ValueError(f"prompt must be [P, L]; got shape {prompt.shape}: one prompt is prompt[None]")
    decoder = policy.decoder or _recompute(policy)
    if decoder.fork is None:
        logits, cache = decoder.init(policy.weights, jnp.repeat(prompt, num_samples, axis=0), horizon)
    else:
        logits, cache = decoder.init(policy.weights, prompt, horizon)
        logits, cache = jnp.repeat(logits, num_samples, axis=0), decoder.fork(cache, num_samples)
    first = jnp.zeros((), jnp.int32)
    uniforms = jax.random.uniform(key, (horizon, logits.shape[0]), jnp.float32)
    token, log_behaviour, log_model = _draw(logits, uniforms, first, transform, stop)
    put = lambda x: jnp.zeros((horizon, *x.shape), x.dtype).at[0].set(x)
    written = (put(token), put(log_behaviour), put(log_model))
    return Progress(cache, token, *written, ~_stopped(token, stop), first + 1, uniforms)


def proceed(
    policy: Policy,
    progress: Progress,
    *,
    num_steps: int,
    transform: Transform | None = None,
    stop: Sequence[int] = (),
) -> Progress:
    """Write up to ``num_steps`` further tokens; stops early when every row has ended or the horizon is reached.

    Args:
      policy: the model.
      progress: from ``begin`` or an earlier ``proceed``.
      num_steps: tokens to write, static.
      transform: as in ``begin``.
      stop: as in ``begin``.

    Returns:
      The generation, further on.
    """
    transform = transform or Transform()
    decoder = policy.decoder or _recompute(policy)
    horizon = progress.tokens.shape[0]
    weights = policy.weights if decoder.prepare is None else decoder.prepare(policy.weights)
    until = jnp.minimum(progress.position + num_steps, horizon)

    def body(p: Progress) -> Progress:
        logits, cache = decoder.step(weights, p.cache, p.token)
        token, *log_probs = _draw(logits, p.uniforms, p.position, transform, stop)
        put = lambda rows, x: jax.lax.dynamic_update_index_in_dim(
            rows, x.astype(rows.dtype), p.position, axis=0
        )
        live = [jnp.where(p.alive, x, 0.0) for x in log_probs]
        written = (put(p.tokens, token), put(p.log_behaviour, live[0]), put(p.log_model, live[1]))
        return Progress(cache, token, *written, p.alive & ~_stopped(token, stop), p.position + 1, p.uniforms)

    going = lambda p: (p.position < until) & (jnp.any(p.alive) if stop else True)
    return jax.lax.while_loop(going, body, progress)


def reorder(policy: Policy, progress: Progress, ancestor: jax.Array) -> Progress:
    """Let row i go on from row ``ancestor[i]`` of the same prompt: resampling in sequential Monte Carlo.

    Args:
      policy: the model.
      progress: the generation.
      ancestor: [P * K].

    Returns:
      The generation with its rows regathered, the cache included.

    Raises:
      ValueError: if the policy's decoder cannot gather.
    """
    decoder = policy.decoder or _recompute(policy)
    if decoder.gather is None:
        raise ValueError("this policy's decoder cannot regather its cache; give it Decoder.gather")
    rows = {name: getattr(progress, name)[..., ancestor] for name in ("token", "alive")}
    written = {
        name: getattr(progress, name)[:, ancestor] for name in ("tokens", "log_behaviour", "log_model")
    }
    return progress._replace(cache=decoder.gather(progress.cache, ancestor), **rows, **written)


def finish(progress: Progress, num_samples: int, stop: Sequence[int] = ()) -> Generated:
    """The completions written so far, as [P, K, T] arrays; rows that have not ended are cut where they stand."""
    shape = (-1, num_samples, progress.tokens.shape[0])
    tokens = progress.tokens.T.reshape(shape)
    ended = jnp.cumsum(_stopped(tokens, stop), axis=-1)
    open_before = jnp.concatenate([jnp.zeros_like(ended[..., :1]), ended[..., :-1]], axis=-1) == 0
    written = (jnp.arange(shape[-1]) < progress.position).reshape(1, 1, -1)
    mask = (open_before & written).astype(jnp.float32)
    over = lambda x: numerics.multiply_no_nan(x.T.reshape(shape), mask.astype(x.dtype))
    return Generated(tokens, mask, over(progress.log_behaviour), over(progress.log_model))


def generate(
    policy: Policy,
    key: jax.Array,
    prompt: jax.Array,
    *,
    num_samples: int,
    horizon: int,
    transform: Transform | None = None,
    stop: Sequence[int] = (),
) -> Generated:
    """Draw K completions of each prompt; jittable, with transform, key and prompts traced.

    Args:
      policy: the model.
      key: PRNG key.
      prompt: [P, L].
      num_samples: K.
      horizon: T.
      transform: the declared transform; none if None.
      stop: stop tokens, static.

    Returns:
      The completions.

    Raises:
      ValueError: for a transform out of range.
    """
    options: dict[str, Any] = {"transform": transform, "stop": tuple(stop)}
    progress = begin(policy, key, prompt, num_samples=num_samples, horizon=horizon, **options)
    progress = proceed(policy, progress, num_steps=horizon, **options)
    return finish(progress, num_samples, tuple(stop))
