"""Mixtures of conditionals: one policy out of a conditional one and a prior over its conditions, with an exact law."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kl_rl.core import numerics
from kl_rl.core.policy import Apply, Decoder, Params, Policy

__all__ = ["Mixture", "mixture"]


class Mixture(NamedTuple):
    """Parameters of a mixture of conditionals: one inner policy, R prompts' first tokens, a log-prior over them."""

    params: Params
    log_prior: jax.Array  # [R]
    first_token: jax.Array  # [R]


def _with_first_token(prompt: jax.Array, first_token: jax.Array) -> jax.Array:
    """The prompt with its first token replaced, for every mixture component; [..., L] -> [R, ..., L]."""
    copies = jnp.broadcast_to(prompt, (first_token.shape[0], *prompt.shape))
    tag = first_token.reshape((-1,) + (1,) * (prompt.ndim - 1)).astype(prompt.dtype)
    return copies.at[..., 0].set(jnp.broadcast_to(tag, copies.shape[:-1]))


@dataclasses.dataclass(frozen=True)
class _MixtureApply:
    inner: Apply

    def __call__(self, params: Mixture, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        prompts = _with_first_token(prompt, params.first_token)
        component = jax.vmap(lambda p: self.inner(params.params, p, tokens))(prompts)
        log_probs = numerics.safe_log_softmax(component)  # [R, ..., T, V]
        chosen = jnp.take_along_axis(log_probs, tokens[None, ..., None].astype(jnp.int32), axis=-1)[..., 0]
        return jax.nn.logsumexp(_component_weight(params, chosen)[..., None] + log_probs, axis=0)


def _component_weight(params: Mixture, chosen: jax.Array) -> jax.Array:
    """``log q(R | x, y_<t)`` from ``log q(y_t | R, x, y_<t)``; [R, ..., T] -> [R, ..., T]."""
    before = jnp.concatenate([jnp.zeros_like(chosen[..., :1]), chosen[..., :-1]], axis=-1)
    past = jnp.cumsum(before, axis=-1)  # log q(y_<t | R), -inf once R is excluded
    prior = params.log_prior.reshape((-1,) + (1,) * (chosen.ndim - 1))
    return numerics.safe_log_softmax(prior + past, axis=0)


@dataclasses.dataclass(frozen=True)
class _MixtureScorer:
    """One component after the other, so that no more logits exist at a time than for one policy."""

    inner: Callable[..., jax.Array]

    def __call__(self, params: Mixture, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        prompts = _with_first_token(prompt, params.first_token)
        chosen = jax.lax.map(lambda p: self.inner(params.params, p, tokens), prompts)  # [R, P, K, T]
        return jax.nn.logsumexp(_component_weight(params, chosen) + chosen, axis=0)


@dataclasses.dataclass(frozen=True)
class _MixtureInit:
    inner: Decoder

    def __call__(self, params: Mixture, prompt: jax.Array, horizon: int) -> Any:
        prompts = _with_first_token(prompt, params.first_token)
        logits, cache = jax.vmap(lambda p: self.inner.init(params.params, p, horizon))(prompts)
        log_probs = numerics.safe_log_softmax(logits)  # [R, B, V]
        weight = jnp.broadcast_to(params.log_prior[:, None], log_probs.shape[:-1])
        return jax.nn.logsumexp(weight[..., None] + log_probs, axis=0), (cache, weight, log_probs)


@dataclasses.dataclass(frozen=True)
class _MixtureStep:
    inner: Decoder

    def __call__(self, params: Mixture, cache: Any, token: jax.Array) -> Any:
        inner_cache, weight, log_probs = cache
        chosen = jnp.take_along_axis(log_probs, token[None, :, None].astype(jnp.int32), axis=-1)[..., 0]
        weight = numerics.safe_log_softmax(weight + chosen, axis=0)
        logits, inner_cache = jax.vmap(lambda c: self.inner.step(params.params, c, token))(inner_cache)
        log_probs = numerics.safe_log_softmax(logits)
        return jax.nn.logsumexp(weight[..., None] + log_probs, axis=0), (inner_cache, weight, log_probs)


@dataclasses.dataclass(frozen=True)
class _MixtureFork:
    inner: Decoder

    def __call__(self, cache: Any, num_samples: int) -> Any:
        inner_cache, weight, log_probs = cache
        forked = jax.vmap(lambda c: self.inner.fork(c, num_samples))(inner_cache)  # type: ignore[misc]
        return forked, jnp.repeat(weight, num_samples, axis=1), jnp.repeat(log_probs, num_samples, axis=1)


@dataclasses.dataclass(frozen=True)
class _MixtureGather:
    inner: Decoder

    def __call__(self, cache: Any, ancestor: jax.Array) -> Any:
        inner_cache, weight, log_probs = cache
        moved = jax.vmap(lambda c: self.inner.gather(c, ancestor))(inner_cache)  # type: ignore[misc]
        return moved, weight[:, ancestor], log_probs[:, ancestor]


@dataclasses.dataclass(frozen=True)
class _MixturePrepare:
    inner: Decoder

    def __call__(self, params: Mixture) -> Mixture:
        return params._replace(params=self.inner.prepare(params.params))  # type: ignore[misc]


def mixture(policy: Policy, first_token: jax.Array, log_prior: jax.Array) -> Policy:
    """One policy out of a conditional one and a prior over its conditions, with an exact log-probability.

    ``q(y | x) = sum_R prior(R) q(y | R, x)``, where R replaces column 0 of the prompt (so pad on the right). As a
    sequence model its next-token law is the R-average weighted by ``prior(R) q(y_<t | R)``, normalized (the
    posterior over R given the prefix).

    Args:
      policy: conditional policy.
      first_token: token ids that stand for the conditions; [R].
      log_prior: normalized log-probabilities of the conditions, in nats; -inf is allowed; [R].

    Returns:
      A Policy; sampling from it is sampling R from the prior and then y given R.
    """
    decoder = None
    if policy.decoder is not None:
        parts = policy.decoder
        decoder = Decoder(
            _MixtureInit(parts),
            _MixtureStep(parts),
            None if parts.fork is None else _MixtureFork(parts),
            None if parts.gather is None else _MixtureGather(parts),
            None if parts.prepare is None else _MixturePrepare(parts),
        )
    scorer = None if policy.scorer is None else _MixtureScorer(policy.scorer)
    return Policy(
        Mixture(policy.weights, log_prior, first_token), _MixtureApply(policy.apply), decoder, scorer
    )
