"""Off-policy RL: squared residuals that vanish at p* whatever the samples' law, so replay and logged data are sound.

One residual generates the family: ``Delta_ij = log_twist_i + sum_{i<=t<j} (log q - log p0)_t - log_twist_j``,
with the evidence as last twist.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from kl_rl import objectives
from kl_rl.core.posterior import Tilt
from kl_rl.core.ranges import check_range
from kl_rl.core.twist import Twist
from kl_rl.methods import laws
from kl_rl.methods.algorithm import Algorithm, gradient_algorithm
from kl_rl.methods.card import Method, Paper
from kl_rl.methods.knobs import BETA
from kl_rl.methods.memory import logged, replay
from kl_rl.methods.needs import Head, Needs

__all__ = ["METHODS", "path_consistency", "subtrajectory_balance", "trajectory_balance", "vargrad"]

_ANYBODY = Needs(samples=1, foreign=True, unrecorded=True, tempered=True, parts=True)
_VARGRAD = _ANYBODY._replace(samples=2)
_TB = _ANYBODY._replace(heads=(Head.LOG_Z,))
_PATHS = _ANYBODY._replace(heads=(Head.VALUE,))


def vargrad(*, optimizer: optax.GradientTransformation) -> Algorithm:
    """Log-variance loss (Richter et al. 2020, arXiv 2010.10436): no log Z, no critic.

    Fixed point: p*_beta, from any covering samples.

    Args:
      optimizer: for the policy.

    Returns:
      Algorithm; needs K >= 2 and soft evidence.
    """

    def loss(scored, evidence, extra):
        losses = objectives.log_variance(scored.delta)
        return losses, jnp.ones_like(losses)

    return gradient_algorithm(loss, optimizer=optimizer, needs=_VARGRAD)


_COVERING = ("samples that cover p*", "a class of policies that holds p*")

VARGRAD_REPLAY = Method(
    name="vargrad-replay",
    family="off-policy",
    idea="log-variance loss, replay",
    function=vargrad,
    build=lambda beta, given: vargrad(optimizer=given.optimizer()),
    evidence=Tilt,
    knob=BETA,
    needs=_VARGRAD,
    memory=replay(),
    law=laws.tilt,
    assumes=_COVERING,
    theorems=("T1.5",),
    paper=Paper(
        "Richter and others",
        2020,
        "VarGrad: A low-variance gradient estimator for variational inference",
        "2010.10436",
    ),
)
VARGRAD_LOGGED = VARGRAD_REPLAY._replace(
    name="vargrad-logged", idea="log-variance loss on a fixed data set", memory=logged()
)


def trajectory_balance(
    *,
    optimizer: optax.GradientTransformation,
    twist: Twist,
    twist_optimizer: optax.GradientTransformation | None = None,
) -> Algorithm:
    """Trajectory balance with learned log Z, relative to p0 (= Trust-PCL on full paths).

    Malkin et al. 2022, arXiv 2201.13259.
    The learned log Z is the twist of the empty prefix: one number (``kl_rl.models.constant_twist``) or a function
      of the prompt. Fixed point: p*_beta.

    Args:
      optimizer: for the policy.
      twist: its value at position 0 is log Z.
      twist_optimizer: usually with a larger learning rate.

    Returns:
      Algorithm; needs soft evidence.
    """

    def loss(scored, evidence, extra):
        losses = objectives.trajectory_balance(scored.delta, scored.heads[Head.LOG_Z])
        return losses, jnp.ones_like(losses)

    return gradient_algorithm(
        loss, optimizer=optimizer, needs=_TB, heads={Head.LOG_Z: twist}, head_optimizer=twist_optimizer
    )


TB_REPLAY = Method(
    name="tb-replay",
    family="off-policy",
    idea="trajectory balance, learned log Z, replay",
    function=trajectory_balance,
    build=lambda beta, given, **options: trajectory_balance(
        optimizer=given.optimizer(),
        twist=given.head(Head.LOG_Z),
        twist_optimizer=given.optimizer(10.0),
        **options,
    ),
    evidence=Tilt,
    knob=BETA,
    needs=_TB,
    memory=replay(),
    law=laws.tilt,
    assumes=_COVERING,
    theorems=("T1.4", "T1.5"),
    paper=Paper(
        "Malkin and others", 2022, "Trajectory balance: Improved credit assignment in GFlowNets", "2201.13259"
    ),
)


def subtrajectory_balance(
    *,
    optimizer: optax.GradientTransformation,
    twist: Twist,
    decay: jax.Array | float = 1.0,
    twist_optimizer: optax.GradientTransformation | None = None,
) -> Algorithm:
    """Sub-trajectory balance (lambda) (Madan et al. 2023, arXiv 2209.12782).

    All sub-paths, weighted ``decay**length``. Fixed point: p*_beta.

    Args:
      optimizer: for the policy.
      twist: head over prefixes.
      decay: lambda; small is one-step bootstrapping, large is trajectory balance.
      twist_optimizer: for the head.

    Returns:
      Algorithm; needs soft evidence.

    Raises:
      ValueError: an option out of range.
    """
    check_range("decay", decay, 0, above=True)

    def loss(scored, evidence, extra):
        losses = objectives.subtrajectory_balance(
            scored.log_q - scored.log_base, scored.heads[Head.VALUE], scored.mask, decay=decay
        )
        return losses, jnp.ones_like(losses)

    return gradient_algorithm(
        loss, optimizer=optimizer, needs=_PATHS, heads={Head.VALUE: twist}, head_optimizer=twist_optimizer
    )


SUBTB_REPLAY = Method(
    name="subtb-replay",
    family="off-policy",
    idea="sub-trajectory balance, twist head, replay",
    function=subtrajectory_balance,
    build=lambda beta, given, **options: subtrajectory_balance(
        optimizer=given.optimizer(),
        twist=given.head(Head.VALUE),
        twist_optimizer=given.optimizer(2.0),
        **options,
    ),
    evidence=Tilt,
    knob=BETA,
    needs=_PATHS,
    memory=replay(),
    law=laws.tilt,
    options={"decay": 1.5},
    assumes=_COVERING,
    theorems=("T1.4",),
    paper=Paper(
        "Madan and others",
        2023,
        "Learning GFlowNets from partial episodes for improved convergence and stability",
        "2209.12782",
    ),
)


def path_consistency(
    *,
    optimizer: optax.GradientTransformation,
    twist: Twist,
    window: int = 1,
    twist_optimizer: optax.GradientTransformation | None = None,
) -> Algorithm:
    """Path consistency learning (Nachum et al. 2017, arXiv 1702.08892; window 1 is soft Q-learning's residual).

    Fixed point: p*_beta.

    Args:
      optimizer: for the policy.
      twist: head over prefixes, soft value / beta.
      window: steps between the two ends of a path.
      twist_optimizer: for the head.

    Returns:
      Algorithm; needs soft evidence.

    Raises:
      ValueError: an option out of range.
    """
    check_range("window", window, 1)

    def loss(scored, evidence, extra):
        losses = objectives.path_consistency(
            scored.log_q - scored.log_base, scored.heads[Head.VALUE], scored.mask, window=window
        )
        return losses, jnp.ones_like(losses)

    return gradient_algorithm(
        loss, optimizer=optimizer, needs=_PATHS, heads={Head.VALUE: twist}, head_optimizer=twist_optimizer
    )


PCL_REPLAY = Method(
    name="pcl-replay",
    family="off-policy",
    idea="path consistency, twist head, replay",
    function=path_consistency,
    build=lambda beta, given, **options: path_consistency(
        optimizer=given.optimizer(),
        twist=given.head(Head.VALUE),
        twist_optimizer=given.optimizer(2.0),
        **options,
    ),
    evidence=Tilt,
    knob=BETA,
    needs=_PATHS,
    memory=replay(),
    law=laws.tilt,
    options={"window": 2},
    assumes=_COVERING,
    theorems=("T1.4",),
    paper=Paper(
        "Nachum and others",
        2017,
        "Bridging the gap between value and policy based reinforcement learning",
        "1702.08892",
    ),
)

METHODS = (VARGRAD_REPLAY, VARGRAD_LOGGED, TB_REPLAY, SUBTB_REPLAY, PCL_REPLAY)
