"""What a method reads: the arrays of a batch under every network, and the refusal of batches it cannot read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.core import numerics
from kl_rl.core.policy import Policy, vocabulary
from kl_rl.core.posterior import Posterior, check_temperature
from kl_rl.core.rollouts import score
from kl_rl.core.trajectories import Trajectories, check_trajectories
from kl_rl.core.twist import Twist, prefix_twists
from kl_rl.methods.needs import Feed, Head, Needs
from kl_rl.methods.statistics import TokenStatistics, token_statistics
from kl_rl.objectives import credit

__all__ = ["Scored", "Seen", "as_it_is", "check_batch", "scored_by"]


class Scored(NamedTuple):
    """The arrays every method reads, in nats, 0 on masked or uncontrolled tokens.

    Attributes:
      tokens: [P, K, T].
      log_q: under the policy being fitted; [P, K, T].
      log_base: under p0; [P, K, T].
      log_behaviour: under whatever produced the sample, as recorded; [P, K, T].
      mask: real and controlled tokens; [P, K, T].
      live: real tokens, those of the environment included; [P, K, T].
      reward: [P, K].
      log_evidence: log l(reward); [P, K].
      label: what a rater said, or None; [P, K].
      token_reward: rewards of single tokens, or None; [P, K, T].
      heads: by ``Head``: log Z [P, K], values with the evidence in place of the last one [P, K, T + 1], values of
        actions [P, K, T, V].
      targets: slow copies of some heads, without gradient.
      statistics: of whole next-token laws, if the method asked for them.
    """

    tokens: jax.Array
    log_q: jax.Array
    log_base: jax.Array
    log_behaviour: jax.Array
    mask: jax.Array
    live: jax.Array
    reward: jax.Array
    log_evidence: jax.Array
    label: jax.Array | None
    token_reward: jax.Array | None
    heads: Mapping[str, jax.Array]
    targets: Mapping[str, jax.Array]
    statistics: TokenStatistics | None

    @property
    def sequence_log_q(self) -> jax.Array:
        """Log q(y); [P, K]."""
        return jnp.sum(self.log_q, axis=-1)

    @property
    def log_ratio(self) -> jax.Array:
        """L = log q(y) - log p0(y); [P, K]."""
        return jnp.sum(self.log_q - self.log_base, axis=-1)

    @property
    def delta(self) -> jax.Array:
        """Log q(y) - log p0(y) - log l(y), equal to -log Z at q = p*; [P, K]."""
        return self.log_ratio - self.log_evidence

    @property
    def log_importance(self) -> jax.Array:
        """Log p0(y) - log behaviour(y); [P, K]."""
        return jnp.sum(self.log_base - self.log_behaviour, axis=-1)


def as_it_is(batch: Trajectories) -> tuple[Trajectories, jax.Array]:
    """No preparation: policy and p0 see the same prompts."""
    return batch, batch.prompt


class Seen(NamedTuple):
    """A batch as the policy sees it, and its prompts as p0 sees them; [P, L]."""

    trajectories: Trajectories
    base_prompt: jax.Array


def _head_values(name: str, twist: Twist, batch: Trajectories, log_evidence: jax.Array) -> jax.Array:
    values = prefix_twists(twist, batch)
    if name == Head.LOG_Z:
        return values[..., 0]
    return credit.terminal_twist(values, log_evidence, batch.mask) if name == Head.VALUE else values


def scored_by(
    policy: Policy,
    heads: Mapping[str, Twist],
    targets: Mapping[str, Twist],
    posterior: Posterior,
    seen: Seen,
    whole_laws: bool,
) -> Scored:
    """A batch under every network; gradients flow through the policy and its heads."""
    batch, stop = seen.trajectories, jax.lax.stop_gradient
    log_evidence = posterior.evidence.log_evidence(batch.reward)
    value = lambda name, twist: _head_values(name, twist, batch, log_evidence)
    statistics = None
    if whole_laws:
        statistics = token_statistics(policy, posterior.base, batch, seen.base_prompt)
        log_q, log_base = statistics.log_q, statistics.log_base
    else:
        log_q = score(policy, batch)
        log_base = score(posterior.base, batch._replace(prompt=seen.base_prompt))
    return Scored(
        tokens=batch.tokens,
        log_q=log_q,
        log_base=stop(log_base),
        log_behaviour=numerics.multiply_no_nan(
            batch.log_behaviour, batch.action_mask.astype(batch.log_behaviour.dtype)
        ),
        mask=batch.action_mask,
        live=batch.mask,
        reward=batch.reward,
        log_evidence=log_evidence,
        label=batch.label,
        token_reward=batch.token_reward,
        heads={name: value(name, twist) for name, twist in heads.items()},
        targets={name: stop(value(name, twist)) for name, twist in targets.items()},
        statistics=statistics,
    )


def check_batch(
    needs: Needs, policy: Policy, posterior: Posterior, batch: Trajectories, mix: Any, asked_mix: bool
) -> None:
    """Refuse a batch that is not what the method needs: shapes while tracing, values where they are known."""
    if isinstance(posterior.evidence, type) or not hasattr(posterior.evidence, "log_evidence"):
        raise TypeError(
            f"Posterior.evidence must be evidence such as Tilt(beta); got {posterior.evidence!r:.60}, which has no "
            "log_evidence"
        )
    if posterior.evidence.hard and not needs.hard:
        raise ValueError(
            f"hard evidence ({type(posterior.evidence).__name__}) has zero-probability strings: "
            "reverse KL and squared residuals are "
            "infinite there; use a filtered-imitation method, or soft evidence (Tilt)"
        )
    check_temperature(posterior.evidence)
    check_trajectories(batch, min_samples=needs.samples)
    own, base = vocabulary(policy, batch.prompt), vocabulary(posterior.base, batch.prompt)
    if own != base:
        raise ValueError(
            f"the policy has a vocabulary of {own} tokens, the base of {base}: a posterior reweights the strings of "
            "its base, so both must have the same"
        )
    if needs.feed in (Feed.LABELS, Feed.PAIRS, Feed.RANKINGS):
        if batch.label is None:
            raise ValueError(f"this method learns from {needs.feed.value}: Trajectories.label is missing")
        _check_finite("label", batch.label)
    else:
        _check_finite("reward", batch.reward)
    if not needs.unrecorded:
        _check_finite("log_behaviour", batch.log_behaviour, batch.action_mask)
    _check_ids("tokens", batch.tokens, own, batch.mask)
    if (mix is None) == asked_mix:
        raise ValueError(
            "this method mixes in a second batch" if asked_mix else "this method takes one batch"
        )
    if mix is not None:
        check_trajectories(mix)
        _check_ids("tokens", mix.tokens, own, mix.mask)


def _refuse(name: str, values: Any, wrong: Any, must: str) -> None:
    if np.any(wrong):
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"Trajectories.{name}{list(where)} is {np.asarray(values)[where]}: it must be {must}"
        )


def _check_finite(name: str, values: Any, mask: Any = 1.0) -> None:
    """Where values are known (not while they are traced)."""
    if not any(isinstance(x, jax.core.Tracer) for x in (values, mask)):
        _refuse(name, values, ~np.isfinite(np.asarray(values)) & (np.asarray(mask) > 0), "finite")


def _check_ids(name: str, ids: Any, vocab: int, mask: Any) -> None:
    """Of the written tokens; what pads them need not be an id."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"Trajectories.{name} must be whole numbers; got {ids.dtype}")
    if not any(isinstance(x, jax.core.Tracer) for x in (ids, mask)):
        wrong = ((np.asarray(ids) < 0) | (np.asarray(ids) >= vocab)) & (np.asarray(mask) > 0)
        _refuse(name, ids, wrong, f"an id from 0 to {vocab - 1}")
