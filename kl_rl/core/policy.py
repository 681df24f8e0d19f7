"""Policies: parameters plus a static function from (prompt, tokens) to next-token logits.

The library never looks inside a network. Parameters are a pytree and travel as arguments of ``jit``; the
function is static and compared by value, so new weights or a new seed never recompile and no weights are
baked into a program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from kl_rl.core import numerics

__all__ = [
    "Decoder",
    "Policy",
    "Trunk",
    "Weighted",
    "log_prob_of",
    "sequence_log_prob",
    "token_log_probs",
    "vocabulary",
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


class Trunk(NamedTuple):
    """A policy in two halves, so that whole next-token laws can be looked at a few positions at a time.

    Attributes:
      hidden: ``(weights, prompt [P, L], tokens [P, K, T]) -> features [P, K, T, d]``, each prompt computed once.
      logits: ``(weights, features [..., d]) -> [..., V]``.
    """

    hidden: Callable[..., jax.Array]
    logits: Callable[..., jax.Array]


class Weighted:
    """What policies and twists have in common: parameters, perhaps on top of arrays that belong to somebody else."""

    params: Params
    shared: Params

    @property
    def weights(self) -> Params:
        """What the functions get: the parameters, with the shared arrays before them if there are any."""
        return self.params if self.shared is None else (self.shared, self.params)

    def with_params(self, params: Params) -> Self:
        """The same function with other parameters."""
        return dataclasses.replace(self, params=params)  # type: ignore[type-var]

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        count = sum(getattr(leaf, "size", 1) for leaf in leaves)
        kinds = ", ".join(sorted({str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in leaves}))
        made = getattr(self.apply, "__name__", type(self.apply).__name__)  # type: ignore[attr-defined]
        return f"{type(self).__name__}({made.strip('_')}, {count:,} parameters: {kinds or 'none'})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Policy(Weighted):
    """A sequence model ``q(y | x) = prod_t softmax(apply(params, x, y)[t])[y_t]``.

    Attributes:
      params: pytree of arrays.
      apply: static; ``apply(params, prompt [..., L], tokens [..., T]) -> logits [..., T, V]`` where row t may
        depend on the prompt and on ``tokens[..., :t]`` only. Must be hashable and equal by value: a
        module-level function or a frozen dataclass with ``__call__``, not a fresh lambda.
      decoder: static; optional incremental form, used for sampling.
      scorer: static; optional ``(weights, prompt [P, L], tokens [P, K, T]) -> log-probabilities [P, K, T]`` that
        never holds all logits and computes each prompt once.
      trunk: static; optional, see ``Trunk``.
      shared: arrays that belong to somebody else and are never trained (the base under an adapter); the functions
        then get ``(shared, params)`` as their weights.
    """

    params: Params
    apply: Apply = dataclasses.field(metadata={"static": True})
    decoder: Decoder | None = dataclasses.field(default=None, metadata={"static": True})
    scorer: Callable[..., jax.Array] | None = dataclasses.field(default=None, metadata={"static": True})
    shared: Params = None
    trunk: Trunk | None = dataclasses.field(default=None, metadata={"static": True})

    def logits(self, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        """Next-token logits; prompt [..., L], tokens [..., T] -> [..., T, V]."""
        return self.apply(self.weights, prompt, tokens)


def vocabulary(policy: Policy, prompt: jax.Array) -> int:
    """Size V of a policy's vocabulary, by the shape of its logits; computes nothing.

    Args:
      policy: the model.
      prompt: of which the shape counts; [P, L].

    Returns:
      V.

    Raises:
      ValueError: if prompts are not [P, L], or logits not [P, 1, V] of floating-point numbers.
    """
    if prompt.ndim != 2:
        raise ValueError(f"prompt must be [P, L]; got shape {prompt.shape}: one prompt is prompt[None]")
    shape = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    leaves, structure = jax.tree.flatten(jax.tree.map(shape, policy.weights))
    return _vocabulary(policy.apply, structure, tuple(leaves), prompt.shape)


@functools.lru_cache(maxsize=64)
def _vocabulary(apply: Apply, structure: Any, leaves: tuple[Any, ...], prompt_shape: tuple[int, int]) -> int:
    ids = lambda *size: jax.ShapeDtypeStruct(size, jnp.int32)
    tokens = ids(prompt_shape[0], 1)
    logits = jax.eval_shape(apply, jax.tree.unflatten(structure, leaves), ids(*prompt_shape), tokens)
    if logits.shape[:-1] != tokens.shape or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"Policy.apply must give floating-point logits [..., T, V]; for tokens {tokens.shape} it gives "
            f"{logits.dtype} {logits.shape}"
        )
    return logits.shape[-1]


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
