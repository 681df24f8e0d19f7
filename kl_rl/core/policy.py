"""Policies: parameters plus a static function from (prompt, tokens) to next-token logits.

The library never looks inside a network. Parameters are a pytree and travel as arguments of ``jit``; the
function is static and compared by value, so new weights or a new seed never recompile and no weights are
baked into a program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kl_rl.core import numerics

__all__ = [
    "Decoder",
    "Mixture",
    "Policy",
    "from_nnx",
    "log_prob_of",
    "mixture",
    "sequence_log_prob",
    "token_log_probs",
]

Params = Any
Apply = Callable[[Params, jax.Array, jax.Array], jax.Array]


class Decoder(NamedTuple):
    """Incremental form of a policy: static functions that must agree with ``apply``.

    Attributes:
      init: ``(weights, prompt [B, L], horizon) -> (logits [B, V], cache)``, logits of the first completion
        token.
      step: ``(weights, cache, token [B]) -> (logits [B, V], cache)``, logits of the token after ``token``.
      fork: ``(cache, K) -> cache`` of K samples for each row, or None: prompts are then repeated before ``init``.
      gather: ``(cache, ancestor [B]) -> cache`` in which row i goes on from row ``ancestor[i]``, of the same prompt.
      prepare: ``weights -> weights`` in the form that ``step`` likes best, made once before the loop; or None.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    fork: Callable[..., Any] | None = None
    gather: Callable[..., Any] | None = None
    prepare: Callable[..., Any] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """A sequence model ``q(y | x) = prod_t softmax(apply(params, x, y)[t])[y_t]``.

    Attributes:
      params: pytree of arrays.
      apply: static; ``apply(params, prompt [..., L], tokens [..., T]) -> logits [..., T, V]`` where row t may
        depend on the prompt and on ``tokens[..., :t]`` only. Must be hashable and equal by value: a
        module-level function or a frozen dataclass with ``__call__``, not a fresh lambda.
      decoder: static; optional incremental form, used for sampling.
      scorer: static; optional ``(weights, prompt [P, L], tokens [P, K, T]) -> log-probabilities [P, K, T]`` that
        never holds all logits and computes each prompt once.
      shared: arrays that belong to somebody else and are never trained (the base under an adapter); the functions
        then get ``(shared, params)`` as their weights.
    """

    params: Params
    apply: Apply = dataclasses.field(metadata={"static": True})
    decoder: Decoder | None = dataclasses.field(default=None, metadata={"static": True})
    scorer: Callable[..., jax.Array] | None = dataclasses.field(default=None, metadata={"static": True})
    shared: Params = None

    @property
    def weights(self) -> Params:
        """What the functions get: the parameters, with the shared arrays before them if there are any."""
        return self.params if self.shared is None else (self.shared, self.params)

    def logits(self, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        """Next-token logits; prompt [..., L], tokens [..., T] -> [..., T, V]."""
        return self.apply(self.weights, prompt, tokens)

    def with_params(self, params: Params) -> Policy:
        """The same function with other parameters."""
        return dataclasses.replace(self, params=params)


def token_log_probs(policy: Policy, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
    """``log q(y_t | x, y_<t)`` for every token, in nats, computed in float32 or better.

    Args:
      policy: the model.
      prompt: [..., L].
      tokens: [..., T].

    Returns:
      [..., T].
    """
    return log_prob_of(policy.logits(prompt, tokens), tokens)


def log_prob_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probability of each token under its row of logits, in float32 or better; [..., V], [...] -> [...]."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_probs = numerics.safe_log_softmax(logits)
    return jnp.take_along_axis(log_probs, tokens[..., None].astype(jnp.int32), axis=-1)[..., 0]


def sequence_log_prob(policy: Policy, prompt: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """``log q(y | x) = sum_t mask_t log q(y_t | x, y_<t)``, in nats; [..., T] -> [...]."""
    return numerics.masked_sum(token_log_probs(policy, prompt, tokens), mask)


@dataclasses.dataclass(frozen=True)
class _NnxApply:
    """Rebuilds a flax.nnx module from its static graph and calls it; equal by value through the graph."""

    graphdef: Any

    def __call__(self, params: Params, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        from flax import nnx

        return nnx.merge(self.graphdef, params)(prompt, tokens)


@dataclasses.dataclass(frozen=True)
class _NnxMethod:
    """As ``_NnxApply`` for a named method (``prefill``, ``decode``)."""

    graphdef: Any
    name: str

    def __call__(self, params: Params, *args: Any) -> Any:
        from flax import nnx

        return getattr(nnx.merge(self.graphdef, params), self.name)(*args)


def from_nnx(module: Any) -> Policy:
    """Cross once from flax.nnx: split a module into a static graph and a pytree of parameters.

    Args:
      module: an ``nnx.Module`` with ``__call__(prompt [..., L], tokens [..., T]) -> logits [..., T, V]``; if
        it also has ``prefill(prompt, horizon)`` and ``decode(cache, token)`` they become the policy's
        decoder.

    Returns:
      A Policy whose ``params`` are the module's state as a plain nested dict.
    """
    from flax import nnx

    graphdef, state = nnx.split(module)
    params = nnx.to_pure_dict(state)
    decoder = None
    if hasattr(module, "prefill") and hasattr(module, "decode"):
        decoder = Decoder(_NnxMethod(graphdef, "prefill"), _NnxMethod(graphdef, "decode"))
    return Policy(params, _NnxApply(graphdef), decoder)


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
