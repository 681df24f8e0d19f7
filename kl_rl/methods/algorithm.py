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
import optax

from kl_rl.core.policy import Policy
from kl_rl.core.posterior import Evidence, Posterior
from kl_rl.core.ranges import check_range
from kl_rl.core.trajectories import Trajectories
from kl_rl.core.twist import Twist
from kl_rl.methods.needs import Behaviour, Head, Needs, own_policy
from kl_rl.methods.parts import map_parts, num_parts, value_and_grad
from kl_rl.methods.scored import Scored, Seen, as_it_is, check_batch, scored_by
from kl_rl.objectives import weights

__all__ = ["Algorithm", "Extra", "Info", "Mix", "State", "gradient_algorithm"]


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


def _params(state: State) -> dict[str, Any]:
    return {"policy": state.policy.params} | {name: twist.params for name, twist in state.heads.items()}


def _with_params(state: State, params: dict[str, Any]) -> tuple[Policy, dict[str, Twist]]:
    heads = {name: twist.with_params(params[name]) for name, twist in state.heads.items()}
    return state.policy.with_params(params["policy"]), heads


def gradient_algorithm(
    loss: LossFn,
    *,
    optimizer: optax.GradientTransformation,
    needs: Needs,
    deploy: Callable[[State, Posterior], Policy] = own_policy,
    prepare: Callable[[Trajectories], tuple[Trajectories, jax.Array]] = as_it_is,
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
      ValueError: at once, if heads are missing, a slow copy follows at a rate out of range or gradients may not be
        gathered in parts; from ``step``, while tracing, if K is too small, the evidence is hard or comparisons are
        missing where they may not be; where its value is known, if a reward is not finite or a token is no id.
    """
    if set(heads) != set(needs.heads):
        missing, found = ([h.value for h in hs] for hs in (needs.heads, heads))
        raise ValueError(f"this method needs the heads {missing}; got {found}")
    if unknown := set(targets) - set(heads):
        raise ValueError(f"slow copies are of heads; this method has none called {min(unknown)!r}")
    for head, rate in targets.items():
        check_range(f"targets[{head.value!r}]", rate, 0, 1, above=True)
    parts = num_parts(optimizer)
    if parts > 1 and not needs.parts:
        raise ValueError("this method looks at its batch as a whole: gradients cannot be gathered in parts")
    transforms = {"policy": optimizer} | {head.value: head_optimizer or optimizer for head in heads}

    def init(policy: Policy) -> State:
        own = {head.value: twist for head, twist in heads.items()}
        copied = lambda twist: twist.with_params(
            jax.tree.map(jnp.copy, twist.params)
        )  # what is shared stays so
        slow = {head.value: copied(own[head.value]) for head in targets}
        state = State(policy, own, slow, None, None if extra is None else extra.init(policy), jnp.int32(0))
        return state._replace(
            optimizer={name: transforms[name].init(p) for name, p in _params(state).items()}
        )

    def look(state: State, posterior: Posterior, seen: Seen) -> Scored:
        return scored_by(state.policy, state.heads, state.targets, posterior, seen, statistics)

    def descend(state: State, posterior: Posterior, both: tuple[Seen, Any]) -> tuple[State, Info]:
        def objective(params: dict[str, Any], part: tuple[Seen, Any]):
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
        follow = lambda head, rate: state.targets[head].with_params(
            optax.incremental_update(own[head].params, state.targets[head].params, rate)
        )
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
        check_batch(needs, state.policy, posterior, batch, other, mix is not None)
        seen = Seen(*prepare(batch))
        both = (seen, None if other is None else Seen(*as_it_is(other)))
        if extra is not None:
            scored = map_parts(lambda part: look(state, posterior, part), seen, parts)
            state = state._replace(extra=extra.update(state.extra, state, scored, seen.trajectories))
        if epochs == 1:
            return descend(state, posterior, both)
        state, infos = jax.lax.scan(lambda s, _: descend(s, posterior, both), state, None, length=epochs)
        return state, jax.tree.map(lambda x: x[0], infos)

    return Algorithm(init, needs.behaviour, step, deploy, needs)
