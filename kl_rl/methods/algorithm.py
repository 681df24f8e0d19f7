"""The solver type: four functions. A named method is an expression over these parts, never a subclass.

    init(policy)                           -> State
    behaviour(state, posterior)            -> Policy      who should draw the next batch
    step(state, posterior, batch[, mix])   -> State, Info
    deploy(state, posterior)               -> Policy      what the method has learned, as one policy

``step`` does no sampling and a rollout does no learning, so replay, host-side rewards and logged data are
ordinary. ``needs`` says what a batch must be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kl_rl.core import numerics
from kl_rl.core.policy import Policy
from kl_rl.core.posterior import Evidence, Posterior, check_temperature
from kl_rl.core.rollouts import score
from kl_rl.core.trajectories import Trajectories, check_trajectories
from kl_rl.core.twist import Twist, prefix_twists
from kl_rl.methods.needs import Behaviour, Feed, Head, Needs, own_policy
from kl_rl.methods.parts import map_parts, num_parts, value_and_grad
from kl_rl.methods.statistics import TokenStatistics, token_statistics
from kl_rl.objectives import credit, weights

__all__ = ["Algorithm", "Extra", "Info", "Mix", "Scored", "State", "gradient_algorithm"]


class Scored(NamedTuple):
    """The arrays every method reads, in nats, 0 on masked or uncontrolled tokens.

    Attributes:
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


class State(NamedTuple):
    """What the next step needs."""

    policy: Policy
    heads: dict[str, Twist]
    targets: dict[str, Twist]
    optimizer: Any
    extra: Any
    step: jax.Array


class Info(NamedTuple):
    """What a person may want to look at; scalars.

    Attributes:
      loss: mean loss of the batch before the update.
      reward: mean reward of the batch.
      log_ratio: mean of log q - log p0 over the batch, nats; on-policy it estimates KL(q || p0).
      ess: effective sample size of the batch's weights, as a fraction of its size; 0 if nothing had weight.
      grad_norm: global norm of the gradient.
    """

    loss: jax.Array
    reward: jax.Array
    log_ratio: jax.Array
    ess: jax.Array
    grad_norm: jax.Array


class Algorithm(NamedTuple):
    """A method; see the module docstring for the four signatures."""

    init: Callable[[Policy], State]
    behaviour: Behaviour
    step: Callable[..., tuple[State, Info]]
    deploy: Callable[[State, Posterior], Policy]
    needs: Needs


class Extra(NamedTuple):
    """State of a method beyond its networks: a frozen policy, return statistics, a running log Z.

    Attributes:
      init: ``policy -> extra``.
      update: ``(extra, state, scored, batch) -> extra``, before the gradient step; ``scored`` is under the
        current policy.
    """

    init: Callable[[Policy], Any]
    update: Callable[[Any, State, Scored, Trajectories], Any]


LossFn = Callable[[Scored, Evidence, Any], tuple[jax.Array, jax.Array]]


class Mix(NamedTuple):
    """A second loss on other text: PPO-ptx, unsupervised terms.

    Attributes:
      loss: as a method's.
      weight: of its mean beside the method's own loss.
    """

    loss: LossFn
    weight: jax.Array | float = 1.0


def _identity(batch: Trajectories) -> tuple[Trajectories, jax.Array]:
    return batch, batch.prompt


class _Seen(NamedTuple):
    """A batch as the policy sees it, and its prompts as p0 sees them; [P, L]."""

    trajectories: Trajectories
    base_prompt: jax.Array


def _head_values(name: str, twist: Twist, batch: Trajectories, log_evidence: jax.Array) -> jax.Array:
    values = prefix_twists(twist, batch)
    if name == Head.LOG_Z:
        return values[..., 0]
    return credit.terminal_twist(values, log_evidence, batch.mask) if name == Head.VALUE else values


def _scored(
    policy: Policy,
    heads: Mapping[str, Twist],
    targets: Mapping[str, Twist],
    posterior: Posterior,
    seen: _Seen,
    whole_laws: bool,
) -> Scored:
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


def _params(state: State) -> dict[str, Any]:
    return {"policy": state.policy.params} | {name: twist.params for name, twist in state.heads.items()}


def _with_params(state: State, params: dict[str, Any]) -> tuple[Policy, dict[str, Twist]]:
    heads = {name: twist.with_params(params[name]) for name, twist in state.heads.items()}
    return state.policy.with_params(params["policy"]), heads


def _check(needs: Needs, posterior: Posterior, batch: Trajectories, mix: Any, asked_mix: bool) -> None:
    """Refuse, while tracing, a batch that is not what the method needs."""
    if posterior.evidence.hard and not needs.hard:
        raise ValueError(
            f"hard evidence ({type(posterior.evidence).__name__}) has zero-probability strings: "
            "reverse KL and squared residuals are "
            "infinite there; use a filtered-imitation method, or soft evidence (Tilt)"
        )
    check_temperature(posterior.evidence)
    check_trajectories(batch, min_samples=needs.samples)
    if needs.feed in (Feed.PAIRS, Feed.RANKINGS):
        if batch.label is None:
            raise ValueError(f"this method learns from {needs.feed.value}: Trajectories.label is missing")
    else:
        _check_finite("reward", batch.reward)
    if (mix is None) == asked_mix:
        raise ValueError(
            "this method mixes in a second batch" if asked_mix else "this method takes one batch"
        )


def _check_finite(name: str, values: Any) -> None:
    """Where values are known (not while they are traced)."""
    if isinstance(values, jax.core.Tracer) or np.isfinite(np.asarray(values)).all():
        return
    where = tuple(int(i) for i in np.argwhere(~np.isfinite(np.asarray(values)))[0])
    raise ValueError(f"Trajectories.{name}{list(where)} is {np.asarray(values)[where]}: it must be finite")


def gradient_algorithm(
    loss: LossFn,
    *,
    optimizer: optax.GradientTransformation,
    needs: Needs,
    deploy: Callable[[State, Posterior], Policy] = own_policy,
    prepare: Callable[[Trajectories], tuple[Trajectories, jax.Array]] = _identity,
    heads: Mapping[Head, Twist] = MappingProxyType({}),
    head_optimizer: optax.GradientTransformation | None = None,
    targets: Mapping[Head, float] = MappingProxyType({}),
    extra: Extra | None = None,
    epochs: int = 1,
    statistics: bool = False,
    mix: Mix | None = None,
) -> Algorithm:
    """Assemble a method from a loss and what it needs.

    Args:
      loss: ``(scored, evidence, extra) -> (losses [P, K] or [P], weights [P, K])``; the mean of the losses is
        minimized, the weights only feed ``Info.ess``.
      optimizer: for the policy's parameters; ``kl_rl.methods.in_parts`` of one adds up gradients over parts of a batch.
      needs: what a batch must be; who draws it.
      deploy: the learned policy.
      prepare: applied to each batch first (relabelling, pairing); returns it with the prompts that p0 is to see.
      heads: initial heads, those that ``needs`` names.
      head_optimizer: for the parameters of the heads; ``optimizer`` if None.
      targets: heads of which slow copies are kept (``Scored.targets``), and how far these follow in a step, in (0, 1].
      extra: further state.
      epochs: gradient steps on each batch.
      statistics: whether the loss reads ``Scored.statistics``.
      mix: a second loss, on the second batch that ``step`` is then given.

    Returns:
      An Algorithm.

    Raises:
      ValueError: at once, if heads are missing or gradients may not be gathered in parts; from ``step``, while tracing,
        if K is too small, the evidence is hard or comparisons are missing where they may not be, or, where its value is
        known, a reward is not finite.
    """
    if set(heads) != set(needs.heads):
        missing, found = ([h.value for h in hs] for hs in (needs.heads, heads))
        raise ValueError(f"this method needs the heads {missing}; got {found}")
    parts = num_parts(optimizer)
    if parts > 1 and not needs.parts:
        raise ValueError("this method looks at its batch as a whole: gradients cannot be gathered in parts")
    transforms = {"policy": optimizer} | {head.value: head_optimizer or optimizer for head in heads}

    def init(policy: Policy) -> State:
        own = {head.value: twist for head, twist in heads.items()}
        slow = {head.value: jax.tree.map(jnp.copy, own[head.value]) for head in targets}
        state = State(policy, own, slow, None, None if extra is None else extra.init(policy), jnp.int32(0))
        return state._replace(
            optimizer={name: transforms[name].init(p) for name, p in _params(state).items()}
        )

    def look(state: State, posterior: Posterior, seen: _Seen) -> Scored:
        return _scored(state.policy, state.heads, state.targets, posterior, seen, statistics)

    def descend(state: State, posterior: Posterior, both: tuple[_Seen, Any]) -> tuple[State, Info]:
        def objective(params: dict[str, Any], part: tuple[_Seen, Any]):
            policy, own = _with_params(state, params)
            now = state._replace(policy=policy, heads=own)
            scored = look(now, posterior, part[0])
            losses, weight = loss(scored, posterior.evidence, state.extra)
            total = jnp.mean(losses)
            if mix is not None:
                mixed, _ = mix.loss(look(now, posterior, part[1]), posterior.evidence, state.extra)
                total = total + mix.weight * jnp.mean(mixed)
            return total, (scored.log_ratio, weight)

        params = _params(state)
        (value, (log_ratio, weight)), grads = value_and_grad(objective, params, both, parts)
        optimizers, updated = {}, {}
        for name in params:
            updates, optimizers[name] = transforms[name].update(
                grads[name], state.optimizer[name], params[name]
            )
            updated[name] = optax.apply_updates(params[name], updates)
        policy, own = _with_params(state, updated)
        follow = lambda head, rate: optax.incremental_update(own[head], state.targets[head], rate)
        slow = {head.value: follow(head.value, rate) for head, rate in targets.items()}
        info = Info(
            loss=value,
            reward=jnp.mean(both[0].trajectories.reward),
            log_ratio=jnp.mean(log_ratio),
            ess=weights.effective_sample_size(weight.reshape(-1)) / weight.size,
            grad_norm=optax.tree.norm(grads),
        )
        return State(policy, own, slow, optimizers, state.extra, state.step + 1), info

    def step(
        state: State, posterior: Posterior, batch: Trajectories, other: Trajectories | None = None
    ) -> tuple[State, Info]:
        _check(needs, posterior, batch, other, mix is not None)
        seen = _Seen(*prepare(batch))
        both = (seen, None if other is None else _Seen(*_identity(other)))
        if extra is not None:
            scored = map_parts(lambda part: look(state, posterior, part), seen, parts)
            state = state._replace(extra=extra.update(state.extra, state, scored, seen.trajectories))
        if epochs == 1:
            return descend(state, posterior, both)
        state, infos = jax.lax.scan(lambda s, _: descend(s, posterior, both), state, None, length=epochs)
        return state, jax.tree.map(lambda x: x[0], infos)

    return Algorithm(init, needs.behaviour, step, deploy, needs)
