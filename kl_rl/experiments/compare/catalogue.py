"""The methods that ``kl-rl compare`` runs: each a name, a family, a knob, and an expression that builds it.

``build(knob, context)`` is called inside ``jit`` with a traced knob, so a whole sweep of knobs and seeds is
one program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kl_rl import methods
from kl_rl.core.policy import Policy
from kl_rl.core.posterior import Evidence, Threshold, Tilt
from kl_rl.core.rollouts import RewardFn
from kl_rl.methods import sources
from kl_rl.methods.algorithm import Algorithm
from kl_rl.methods.conditioning import ReturnPrior
from kl_rl.methods.parts import in_parts
from kl_rl.methods.sources import Source

__all__ = ["CATALOGUE", "Context", "Method", "Setup", "methods_named"]


class Context(NamedTuple):
    """What a method may use of a world: all it knows, besides samples and rewards.

    Attributes:
      prompt: [P, L], first column the begin mark.
      reward_fn: jittable.
      horizon: T.
      end: end token or None.
      num_samples: K per prompt and step.
      edges: boundaries between return tokens; [R - 1].
      first_token: id of return token 0.
      twist: a freshly initialized twist head.
      constant: a freshly initialized constant twist (the log Z of trajectory balance).
      learning_rate: peak learning rate of the policy.
      steps: gradient steps planned, for the schedule.
      data_size: samples per prompt of a logged data set.
      parts: of a batch, over which gradients add up.
    """

    prompt: jax.Array
    reward_fn: RewardFn
    horizon: int
    end: int | None
    num_samples: int
    edges: jax.Array
    first_token: int
    twist: Policy
    constant: Policy
    learning_rate: float
    steps: int
    data_size: int
    parts: int = 1

    def optimizer(self, factor: float = 1.0, *, epochs: int = 1) -> optax.GradientTransformation:
        """Adam with a global-norm clip and a linear decay to a tenth: averages out sampling noise at the end."""
        peak = self.learning_rate * factor
        schedule = optax.linear_schedule(peak, 0.1 * peak, self.steps * epochs)
        return in_parts(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)), self.parts)

    def fresh(self) -> Source:
        """On-policy or base samples, as the method asks."""
        return sources.fresh(
            self.prompt, self.reward_fn, num_samples=self.num_samples, horizon=self.horizon, end=self.end
        )


class Setup(NamedTuple):
    """One method at one knob: the solver, the evidence and the source of its batches."""

    algorithm: Algorithm
    evidence: Evidence
    source: Source


class Method(NamedTuple):
    """A row of the comparison.

    Attributes:
      name: as on the command line.
      family: of DESIGN's table.
      knob: what is swept: "beta" (reward units per nat), "beta_over_std" (a pure number),
        "beta_win_rate" (per nat), "n", "threshold" (reward), "fraction" (of p0's samples), "steps",
        "greatest" (nothing to sweep).
      build: ``(knob, context) -> Setup``; traced.
      summary: one line for the report.
    """

    name: str
    family: str
    knob: str
    build: Callable[[Any, Context], Setup]
    summary: str


def _reinforce(beta: Any, c: Context) -> Setup:
    return Setup(methods.reinforce(optimizer=c.optimizer()), Tilt(beta), c.fresh())


def _reinforce_free(beta: Any, c: Context) -> Setup:
    return Setup(methods.reinforce(optimizer=c.optimizer(), kl_weight=0.0), Tilt(beta), c.fresh())


def _ppo(beta: Any, c: Context) -> Setup:
    epochs = 2
    algorithm = methods.ppo(optimizer=c.optimizer(epochs=epochs), twist=c.twist, epochs=epochs)
    return Setup(algorithm, Tilt(beta), c.fresh())


def _grpo(beta: Any, c: Context) -> Setup:
    return Setup(methods.grpo(optimizer=c.optimizer()), Tilt(beta), c.fresh())


def _filtered(tau: Any, c: Context) -> Setup:
    return Setup(methods.filtered(optimizer=c.optimizer()), Threshold(tau), c.fresh())


def _best_of_n(n: Any, c: Context) -> Setup:
    return Setup(methods.best_of_n(n, optimizer=c.optimizer()), Tilt(jnp.inf), c.fresh())


def _reward_weighted(beta: Any, c: Context) -> Setup:
    return Setup(methods.reward_weighted(optimizer=c.optimizer()), Tilt(beta), c.fresh())


def _reward_weighted_logged(beta: Any, c: Context) -> Setup:
    return Setup(
        methods.reward_weighted(optimizer=c.optimizer()),
        Tilt(beta),
        sources.logged(c.fresh(), size=c.data_size),
    )


def _expert_iteration(n: Any, c: Context) -> Setup:
    refresh = max(1, c.steps // 3)
    return Setup(
        methods.expert_iteration(n, optimizer=c.optimizer(), refresh=refresh), Tilt(jnp.inf), c.fresh()
    )


def _conditioning(beta: Any, c: Context, prior: ReturnPrior) -> Setup:
    algorithm = methods.decision_transformer(
        optimizer=c.optimizer(), edges=c.edges, first_token=c.first_token, return_prior=prior
    )
    return Setup(algorithm, Tilt(beta), c.fresh())


def _decision_transformer(beta: Any, c: Context) -> Setup:
    return _conditioning(beta, c, methods.tilted_returns)


def _decision_transformer_max(beta: Any, c: Context) -> Setup:
    return _conditioning(beta, c, methods.greatest_return)


def _quantile_tokens(fraction: Any, c: Context) -> Setup:
    return _conditioning(jnp.inf, c, methods.top_quantile(fraction))


def _replayed(c: Context) -> Source:
    return sources.replay(c.fresh(), capacity=8 * c.num_samples)


def _vargrad(beta: Any, c: Context) -> Setup:
    return Setup(methods.vargrad(optimizer=c.optimizer()), Tilt(beta), _replayed(c))


def _vargrad_logged(beta: Any, c: Context) -> Setup:
    return Setup(
        methods.vargrad(optimizer=c.optimizer()), Tilt(beta), sources.logged(c.fresh(), size=c.data_size)
    )


def _trajectory_balance(beta: Any, c: Context) -> Setup:
    algorithm = methods.trajectory_balance(
        optimizer=c.optimizer(), twist=c.constant, twist_optimizer=c.optimizer(10.0)
    )
    return Setup(algorithm, Tilt(beta), _replayed(c))


def _subtrajectory_balance(beta: Any, c: Context) -> Setup:
    algorithm = methods.subtrajectory_balance(
        optimizer=c.optimizer(), twist=c.twist, decay=1.5, twist_optimizer=c.optimizer(2.0)
    )
    return Setup(algorithm, Tilt(beta), _replayed(c))


def _path_consistency(beta: Any, c: Context) -> Setup:
    algorithm = methods.path_consistency(
        optimizer=c.optimizer(), twist=c.twist, window=2, twist_optimizer=c.optimizer(2.0)
    )
    return Setup(algorithm, Tilt(beta), _replayed(c))


def _alpha(alpha: float) -> Callable[[Any, Context], Setup]:
    def build(beta: Any, c: Context) -> Setup:
        return Setup(methods.alpha_divergence(alpha, optimizer=c.optimizer()), Tilt(beta), c.fresh())

    return build


def _dpo(beta: Any, c: Context) -> Setup:
    return Setup(methods.dpo(optimizer=c.optimizer()), Tilt(beta), sources.comparisons(c.fresh()))


def _ipo(beta: Any, c: Context) -> Setup:
    return Setup(methods.ipo(optimizer=c.optimizer()), Tilt(beta), sources.comparisons(c.fresh()))


CATALOGUE: tuple[Method, ...] = (
    Method("rloo", "rlhf", "beta", _reinforce, "REINFORCE, leave-one-out baseline, KL in the reward"),
    Method("rloo-free", "rlhf", "steps", _reinforce_free, "the same without KL, stopped early"),
    Method("ppo", "rlhf", "beta", _ppo, "clipped surrogate, critic, GAE, KL in the reward"),
    Method("grpo", "rlhf", "beta_over_std", _grpo, "group-normalized rewards, KL as k2 in the loss"),
    Method("filter", "imitation", "threshold", _filtered, "imitate samples of p0 above a threshold"),
    Method("best-of-n", "imitation", "n", _best_of_n, "distil the best of n samples of p0"),
    Method("rwr", "imitation", "beta", _reward_weighted, "reward-weighted imitation of p0"),
    Method("rwr-logged", "imitation", "beta", _reward_weighted_logged, "the same from a fixed data set"),
    Method("expert-iteration", "imitation", "n", _expert_iteration, "best-of-n distilled three times over"),
    Method("dt-tilted", "conditioning", "beta", _decision_transformer, "return tokens, tilted return prior"),
    Method("dt-max", "conditioning", "greatest", _decision_transformer_max, "return tokens, greatest return"),
    Method("dt-quantile", "conditioning", "fraction", _quantile_tokens, "return tokens, top quantile"),
    Method("vargrad-replay", "off-policy", "beta", _vargrad, "log-variance loss, replay"),
    Method("vargrad-logged", "off-policy", "beta", _vargrad_logged, "log-variance loss on a fixed data set"),
    Method(
        "tb-replay", "off-policy", "beta", _trajectory_balance, "trajectory balance, learned log Z, replay"
    ),
    Method(
        "subtb-replay",
        "off-policy",
        "beta",
        _subtrajectory_balance,
        "sub-trajectory balance, twist head, replay",
    ),
    Method("pcl-replay", "off-policy", "beta", _path_consistency, "path consistency, twist head, replay"),
    Method("alpha-0.5", "between", "beta", _alpha(0.5), "alpha-divergence half-way between imitation and RL"),
    Method("alpha-1", "between", "beta", _alpha(1.0), "on-policy forward KL (DPG)"),
    Method("dpo", "preference", "beta", _dpo, "logistic loss on Bradley-Terry comparisons"),
    Method("ipo", "preference", "beta_win_rate", _ipo, "squared loss on comparisons"),
)


def methods_named(names: list[str] | None) -> tuple[Method, ...]:
    """The methods with these names (or of these families), in catalogue order; all of them for None.

    Raises:
      ValueError: naming the unknown method and listing the known ones.
    """
    if not names:
        return CATALOGUE
    known = {m.name for m in CATALOGUE} | {m.family for m in CATALOGUE}
    for name in names:
        if name not in known:
            raise ValueError(
                f"unknown method {name!r}; methods: {', '.join(m.name for m in CATALOGUE)}; "
                f"families: {', '.join(dict.fromkeys(m.family for m in CATALOGUE))}"
            )
    return tuple(m for m in CATALOGUE if m.name in names or m.family in names)
