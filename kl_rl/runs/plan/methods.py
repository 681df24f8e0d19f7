"""Methods that can be planned: what their steps do is what matters, not their hyperparameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import optax

from kl_rl import methods
from kl_rl.core.policy import Policy
from kl_rl.methods.algorithm import Algorithm

__all__ = ["METHODS", "Method"]

Optimizer: TypeAlias = optax.GradientTransformation


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method is made.

    Attributes:
      make: ``(optimizer, twist or None) -> Algorithm``, one gradient step per batch.
      twist: whether it has a twist head.
      min_samples: samples per prompt that it needs.
      samples_base: whether its batches are drawn from the base and not from the policy.
    """

    make: Callable[[Optimizer, Policy | None], Algorithm]
    twist: bool = False
    min_samples: int = 2
    samples_base: bool = False


def _ppo(optimizer: Optimizer, twist: Policy | None) -> Algorithm:
    assert twist is not None
    return methods.ppo(optimizer=optimizer, twist=twist, epochs=1)


METHODS: dict[str, Method] = {
    "rlhf": Method(_ppo, twist=True, min_samples=1),
    "reinforce": Method(lambda optimizer, _: methods.reinforce(optimizer=optimizer)),
    "grpo": Method(lambda optimizer, _: methods.grpo(optimizer=optimizer)),
    "best-of-n": Method(lambda optimizer, _: methods.best_of_n(2, optimizer=optimizer), samples_base=True),
    "dpo": Method(lambda optimizer, _: methods.dpo(optimizer=optimizer)),
}
