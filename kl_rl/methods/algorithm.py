"""The solver type: four functions. A named method is an expression over these parts, never a subclass.

    init(policy)                      -> State
    behaviour(state, posterior)       -> Policy      who should draw the next batch
    step(state, posterior, batch)     -> State, Info
    deploy(state, posterior)          -> Policy      what the method has learned, as one policy

``step`` does no sampling and a rollout does no learning, so replay, host-side rewards and logged data are
ordinary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kl_rl.core import numerics
from kl_rl.core.policy import Policy
from kl_rl.core.posterior import Evidence, Posterior, check_temperature
from kl_rl.core.rollouts import prefix_values, score
from kl_rl.core.trajectories import Trajectories, check_trajectories
from kl_rl.methods.parts import map_parts, num_parts, value_and_grad
from kl_rl.objectives import credit, weights

__all__ = ["Algorithm", "Extra", "Info", "Scored", "State", "base_policy", "gradient_algorithm", "own_policy"]


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
      log_twist: log expected future evidence, boundary value in place, or None; [P, K, T + 1].
    """

    log_q: jax.Array
    log_base: jax.Array
    log_behaviour: jax.Array
    mask: jax.Array
    live: jax.Array
    reward: jax.Array
    log_evidence: jax.Array
    log_twist: jax.Array | None

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
    twist: Policy | None
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
    behaviour: Callable[[State, Posterior], Policy]
    step: Callable[[State, Posterior, Trajectories], tuple[State, Info]]
    deploy: Callable[[State, Posterior], Policy]


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


def own_policy(state: State, posterior: Posterior) -> Policy:
    """On-policy: the policy being fitted."""
    return state.policy


def base_policy(state: State, posterior: Posterior) -> Policy:
    """Imitation: samples come from p0."""
    return posterior.base


def _identity(batch: Trajectories) -> tuple[Trajectories, jax.Array]:
    return batch, batch.prompt


class _Seen(NamedTuple):
    """A batch as the policy sees it, and its prompts as p0 sees them; [P, L]."""

    trajectories: Trajectories
    base_prompt: jax.Array


def _scored(policy: Policy, twist: Policy | None, posterior: Posterior, seen: _Seen) -> Scored:
    batch, log_evidence = seen.trajectories, posterior.evidence.log_evidence(seen.trajectories.reward)
    log_twist = None
    if twist is not None:
        log_twist = credit.terminal_twist(prefix_values(twist, batch), log_evidence, batch.mask)
    log_behaviour = numerics.multiply_no_nan(
        batch.log_behaviour, batch.action_mask.astype(batch.log_behaviour.dtype)
    )
    return Scored(
        log_q=score(policy, batch),
        log_base=jax.lax.stop_gradient(score(posterior.base, batch._replace(prompt=seen.base_prompt))),
        log_behaviour=log_behaviour,
        mask=batch.action_mask,
        live=batch.mask,
        reward=batch.reward,
        log_evidence=log_evidence,
        log_twist=log_twist,
    )


def _params(state: State) -> dict[str, Any]:
    own = {"policy": state.policy.params}
    return own if state.twist is None else own | {"twist": state.twist.params}


def _with_params(state: State, params: dict[str, Any]) -> tuple[Policy, Policy | None]:
    twist = None if state.twist is None else state.twist.with_params(params["twist"])
    return state.policy.with_params(params["policy"]), twist


def gradient_algorithm(
    loss: LossFn,
    *,
    optimizer: optax.GradientTransformation,
    behaviour: Callable[[State, Posterior], Policy] = own_policy,
    deploy: Callable[[State, Posterior], Policy] = own_policy,
    prepare: Callable[[Trajectories], tuple[Trajectories, jax.Array]] = _identity,
    twist: Policy | None = None,
    twist_optimizer: optax.GradientTransformation | None = None,
    extra: Extra | None = None,
    epochs: int = 1,
    min_samples: int = 1,
    soft_evidence: bool = False,
) -> Algorithm:
    """Assemble a method from a loss and where its samples come from.

    Args:
      loss: ``(scored, evidence, extra) -> (losses [P, K] or [P], weights [P, K])``; the mean of the losses is
        minimized, the weights only feed ``Info.ess``.
      optimizer: for the policy's parameters; ``kl_rl.methods.in_parts`` of one adds up gradients over parts of a batch.
      behaviour: who draws the samples.
      deploy: the learned policy.
      prepare: applied to each batch first (relabelling, pairing); returns it with the prompts that p0 is to see.
      twist: initial twist head, if the loss reads ``log_twist``.
      twist_optimizer: for the twist's parameters; ``optimizer`` if None.
      extra: further state.
      epochs: gradient steps on each batch.
      min_samples: smallest admissible K.
      soft_evidence: refuse hard evidence (reverse KL and squared residuals would be infinite).

    Returns:
      An Algorithm.

    Raises:
      ValueError: from ``step``, while tracing, if K is too small or the evidence is hard where it may not be.
    """
    transforms = {"policy": optimizer, "twist": twist_optimizer or optimizer}
    parts = num_parts(optimizer)

    def init(policy: Policy) -> State:
        optimizers = {"policy": transforms["policy"].init(policy.params)}
        if twist is not None:
            optimizers["twist"] = transforms["twist"].init(twist.params)
        extras = None if extra is None else extra.init(policy)
        return State(policy, twist, optimizers, extras, jnp.zeros((), jnp.int32))

    def descend(state: State, posterior: Posterior, batch: _Seen) -> tuple[State, Info]:
        def objective(params: dict[str, Any], part: _Seen) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            scored = _scored(*_with_params(state, params), posterior, part)
            losses, weight = loss(scored, posterior.evidence, state.extra)
            return jnp.mean(losses), (scored.log_ratio, weight)

        params = _params(state)
        (value, (log_ratio, weight)), grads = value_and_grad(objective, params, batch, parts)
        optimizers, updated = {}, {}
        for name in params:
            updates, optimizers[name] = transforms[name].update(
                grads[name], state.optimizer[name], params[name]
            )
            updated[name] = optax.apply_updates(params[name], updates)
        info = Info(
            loss=value,
            reward=jnp.mean(batch.trajectories.reward),
            log_ratio=jnp.mean(log_ratio),
            ess=weights.effective_sample_size(weight.reshape(-1)) / weight.size,
            grad_norm=optax.tree.norm(grads),
        )
        return State(*_with_params(state, updated), optimizers, state.extra, state.step + 1), info

    def step(state: State, posterior: Posterior, batch: Trajectories) -> tuple[State, Info]:
        if soft_evidence and posterior.evidence.hard:
            raise ValueError(
                f"hard evidence ({type(posterior.evidence).__name__}) has zero-probability strings: "
                "reverse KL and squared residuals are "
                "infinite there; use a filtered-imitation method, or soft evidence (Tilt)"
            )
        check_temperature(posterior.evidence)
        check_trajectories(batch, min_samples=min_samples)
        seen = _Seen(*prepare(batch))
        if extra is not None:
            scored = map_parts(lambda part: _scored(state.policy, state.twist, posterior, part), seen, parts)
            state = state._replace(extra=extra.update(state.extra, state, scored, seen.trajectories))
        if epochs == 1:
            return descend(state, posterior, seen)
        state, infos = jax.lax.scan(lambda s, _: descend(s, posterior, seen), state, None, length=epochs)
        return state, jax.tree.map(lambda x: x[0], infos)

    return Algorithm(init, behaviour, step, deploy)
