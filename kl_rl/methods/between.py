"""Between imitation and RL: the alpha-divergence, from forward KL (alpha = 1) to reverse KL (alpha = 0)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from kl_rl import objectives
from kl_rl.core.policy import Policy
from kl_rl.core.posterior import Tilt
from kl_rl.core.ranges import check_range
from kl_rl.core.trajectories import Trajectories
from kl_rl.methods import laws
from kl_rl.methods.algorithm import Algorithm, Extra, State, gradient_algorithm
from kl_rl.methods.card import Method, Paper
from kl_rl.methods.knobs import BETA
from kl_rl.methods.needs import Needs
from kl_rl.methods.scored import Scored

__all__ = ["METHODS", "alpha_divergence"]

# At p* every weight p*/q is one, whoever drew the string.
_ALPHA = Needs(unrecorded=True, tempered=True, parts=True)


def alpha_divergence(
    alpha: jax.Array | float, *, optimizer: optax.GradientTransformation, memory: float = 0.95
) -> Algorithm:
    """On-policy descent of ``D_alpha(p* || q)`` with a running log Z.

    alpha-DPG (arXiv 2512.05962); f-DPG (Go et al. 2023, arXiv 2302.08215).

    log Z is tracked by an exponential average of the batch means of ``p0 l / q`` (unbiased for Z). Fixed
    point: p*_beta for every alpha in a class that holds it; in a smaller class alpha chooses between covering
    p* and seeking its modes.

    Args:
      alpha: in [0, 1]; may be traced.
      optimizer: for the policy.
      memory: decay of the running average.

    Returns:
      Algorithm; needs K >= 2 and soft evidence. ``State.extra`` is (running Z scaled by its age, age), in
      logs.

    Raises:
      ValueError: an option out of range.
    """
    check_range("alpha", alpha, 0, 1)
    check_range("memory", memory, 0, 1, below=True)

    def loss(scored, evidence, extra):
        log_weight = -scored.delta - (extra[0] - extra[1])
        losses = objectives.alpha_divergence(scored.sequence_log_q, log_weight, alpha=alpha)
        return losses, jnp.exp(jax.lax.stop_gradient(log_weight))

    def track(extra, state: State, scored: Scored, batch: Trajectories):
        fresh = jax.nn.logsumexp(-scored.delta) - jnp.log(scored.delta.size)
        keep, add = jnp.log(memory), jnp.log1p(-memory)
        return jnp.logaddexp(extra[0] + keep, fresh + add), jnp.logaddexp(extra[1] + keep, add)

    def nothing(policy: Policy) -> tuple[jax.Array, jax.Array]:
        empty = jnp.asarray(-jnp.inf, jnp.result_type(float))
        return empty, empty

    return gradient_algorithm(
        loss,
        optimizer=optimizer,
        needs=_ALPHA,
        extra=Extra(nothing, track),
    )


ALPHA_HALF = Method(
    name="alpha-0.5",
    family="between",
    idea="alpha-divergence half-way between imitation and RL",
    function=alpha_divergence,
    build=lambda beta, given, **options: alpha_divergence(optimizer=given.optimizer(), **options),
    evidence=Tilt,
    knob=BETA,
    needs=_ALPHA,
    law=laws.tilt,
    options={"alpha": 0.5},
    assumes=("a class of policies that holds p*",),
    theorems=("T1.8",),
    paper=Paper(
        "Go and others",
        2023,
        "Aligning language models with preferences through f-divergence minimization",
        "2302.08215",
    ),
)
ALPHA_ONE = ALPHA_HALF._replace(name="alpha-1", idea="on-policy forward KL (DPG)", options={"alpha": 1.0})

METHODS = (ALPHA_HALF, ALPHA_ONE)
