"""Preferences: the evidence is implied by comparisons of two samples; larger ``label`` marks the preferred one."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from kl_rl import objectives
from kl_rl.core.posterior import Tilt
from kl_rl.core.trajectories import pairs
from kl_rl.methods import laws
from kl_rl.methods.algorithm import Algorithm, gradient_algorithm
from kl_rl.methods.card import Method, Paper
from kl_rl.methods.knobs import BETA, BETA_WIN_RATE
from kl_rl.methods.memory import rated
from kl_rl.methods.needs import Feed, Needs, base_policy

__all__ = ["METHODS", "dpo", "ipo"]

_DPO = Needs(base_policy, Feed.PAIRS, foreign=True, unrecorded=True, tempered=True, parts=True)
_IPO = _DPO._replace(tempered=False)  # its target is measured against whoever draws the pairs


def dpo(*, optimizer: optax.GradientTransformation) -> Algorithm:
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290).

    Fixed point under Bradley-Terry comparisons of r with full coverage: p*_beta. Finite pairs fix l only on
    the components of the comparison graph.

    Args:
      optimizer: for the policy.

    Returns:
      Algorithm; K must be even (pairs), the evidence a Tilt.
    """

    def loss(scored, evidence, extra):
        losses = objectives.direct_preference(scored.log_ratio, scored.label, beta=evidence.beta)
        return losses, jnp.ones_like(scored.reward)

    return gradient_algorithm(loss, optimizer=optimizer, needs=_DPO, prepare=pairs)


DPO = Method(
    name="dpo",
    family="preference",
    idea="logistic loss on Bradley-Terry comparisons",
    function=dpo,
    build=lambda beta, given: dpo(optimizer=given.optimizer()),
    evidence=Tilt,
    knob=BETA,
    needs=_DPO,
    memory=rated(),
    law=laws.tilt,
    assumes=("Bradley-Terry raters", "pairs that cover all strings", "a class of policies that holds p*"),
    paper=Paper(
        "Rafailov and others",
        2023,
        "Direct preference optimization: Your language model is secretly a reward model",
        "2305.18290",
    ),
)


def ipo(*, optimizer: optax.GradientTransformation) -> Algorithm:
    """Identity preference optimization (Azar et al. 2023, arXiv 2310.12036), sums over tokens.

    Fixed point with full coverage by pairs of p0: ``p0 exp(w / beta)`` with ``w(y) = P(y beats a sample of p0)``, a
    function of r, so C = 0; 1/beta in nats.

    Args:
      optimizer: for the policy.

    Returns:
      Algorithm; K must be even (pairs), the evidence a Tilt.
    """

    def loss(scored, evidence, extra):
        losses = objectives.identity_preference(scored.log_ratio, scored.label, beta=evidence.beta)
        return losses, jnp.ones_like(scored.reward)

    return gradient_algorithm(loss, optimizer=optimizer, needs=_IPO, prepare=pairs)


IPO = Method(
    name="ipo",
    family="preference",
    idea="squared loss on comparisons",
    function=ipo,
    build=lambda beta, given: ipo(optimizer=given.optimizer()),
    evidence=Tilt,
    knob=BETA_WIN_RATE,
    needs=_IPO,
    memory=rated(),
    law=laws.win_rate_tilt,
    assumes=("Bradley-Terry raters", "pairs drawn from p0", "a class of policies that holds the law"),
    paper=Paper(
        "Azar and others",
        2023,
        "A general theoretical paradigm to understand learning from human preferences",
        "2310.12036",
    ),
)

METHODS = (DPO, IPO)
