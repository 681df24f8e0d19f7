"""The problem: a base policy, and evidence about its samples. p*(y|x) = p0(y|x) l(y|x) / Z(x)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.core.policy import Policy

__all__ = ["Evidence", "Between", "NoEvidence", "Posterior", "Threshold", "Tilt", "check_temperature"]


class Evidence(Protocol):
    """Maps rewards to log-evidence; a pytree, so that its numbers may be traced, swept and vmapped."""

    @property
    def hard(self) -> bool:
        """Whether the evidence can be zero.

        So that reverse KL to the posterior is infinite for full-support policies.
        """
        ...

    def log_evidence(self, reward: jax.Array) -> jax.Array:
        """``log l``, in nats; [...] -> [...]."""
        ...


class Tilt(NamedTuple):
    """Soft evidence ``l = exp(r / beta)``: the optimum of KL-regularized RL (Korbak et al. 2022, arXiv 2205.11275)."""

    beta: jax.Array | float

    @property
    def hard(self) -> bool:
        """Soft: every string keeps some evidence."""
        return False

    def log_evidence(self, reward: jax.Array) -> jax.Array:
        """``r / beta``, in nats."""
        return reward / self.beta


class NoEvidence(NamedTuple):
    """``l = 1``: the posterior is p0. For methods that choose among samples by rank and read no temperature."""

    @property
    def hard(self) -> bool:
        """Soft: every string keeps all of its evidence."""
        return False

    def log_evidence(self, reward: jax.Array) -> jax.Array:
        """0 everywhere."""
        return jnp.zeros_like(reward)


class Threshold(NamedTuple):
    """Hard evidence ``l = 1[r >= tau]``: filtered imitation.

    Reverse KL to this posterior is infinite for full-support q.
    """

    tau: jax.Array | float

    @property
    def hard(self) -> bool:
        """Hard: some strings have no evidence."""
        return True

    def log_evidence(self, reward: jax.Array) -> jax.Array:
        """0 where the reward passes, -inf elsewhere."""
        return jnp.where(reward >= self.tau, 0.0, -jnp.inf)


class Between(NamedTuple):
    """Hard evidence ``l = 1[low <= r <= high]``: conditioning on a return (low = high) or on a quantile."""

    low: jax.Array | float
    high: jax.Array | float

    @property
    def hard(self) -> bool:
        """Hard: some strings have no evidence."""
        return True

    def log_evidence(self, reward: jax.Array) -> jax.Array:
        """0 inside the interval, -inf outside."""
        return jnp.where((reward >= self.low) & (reward <= self.high), 0.0, -jnp.inf)


def check_temperature(evidence: Evidence) -> None:
    """Refuse a temperature that is not positive, where its value is known (not while it is traced).

    Raises:
      ValueError: naming the value.
    """
    beta = getattr(evidence, "beta", None)
    if beta is None or isinstance(beta, jax.core.Tracer):
        return
    if not np.all(np.asarray(beta) > 0):
        raise ValueError(f"beta must be positive (reward units per nat); got {beta}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Posterior:
    """A base policy and evidence; always passed as an argument of ``jit``, so base weights are never constants."""

    base: Policy
    evidence: Evidence

    def __post_init__(self) -> None:
        """Refuse the two in the wrong order; what stands for them inside JAX is let through.

        Raises:
          TypeError: if one is where the other belongs.
        """
        if hasattr(self.base, "log_evidence") or isinstance(self.evidence, Policy):
            raise TypeError(
                "Posterior(base, evidence) takes a policy and evidence in this order; "
                f"got {type(self.base).__name__}, {type(self.evidence).__name__}"
            )
