"""RLHF: on-policy reverse KL to p*.

The KL to p0 sits in the reward (k1, detached), where its gradient is right (T1.6).
"""

from __future__ import annotations

import jax
import optax

from kl_rl import objectives
from kl_rl.core import numerics
from kl_rl.core.posterior import Tilt
from kl_rl.core.ranges import check_range
from kl_rl.core.twist import Twist
from kl_rl.methods import laws
from kl_rl.methods.algorithm import Algorithm, gradient_algorithm
from kl_rl.methods.card import Method, Paper
from kl_rl.methods.knobs import BETA, BETA_OVER_STD, STOP
from kl_rl.methods.needs import Head, Needs
from kl_rl.objectives import credit
from kl_rl.objectives.kl import k2

__all__ = ["METHODS", "grpo", "ppo", "reinforce"]

stop = jax.lax.stop_gradient

# At p* the advantage is the same for every string, whoever drew it.
_RLOO = Needs(unrecorded=True, tempered=True, parts=True)
_FREE = _RLOO._replace(tempered=False)  # it has no p*
_PPO = Needs(samples=1, heads=(Head.VALUE,), parts=True)
_GRPO = Needs(parts=True)


def reinforce(*, optimizer: optax.GradientTransformation, kl_weight: float = 1.0) -> Algorithm:
    """REINFORCE with leave-one-out baseline (RLOO; Ahmadian et al. 2024, arXiv 2402.14740).

    The advantage is the leave-one-out of ``r/beta - kl_weight (log q - log p0)``. Fixed point: p*_beta (at kl_weight 1,
    in a class that holds it). With ``kl_weight = 0`` nothing but early stopping holds the policy back, and the fixed
    point is the set of maximizers of r.

    Args:
      optimizer: for the policy.
      kl_weight: 1 for the posterior, 0 for no KL term.

    Returns:
      Algorithm; needs K >= 2 and soft evidence.

    Raises:
      ValueError: an option out of range.
    """
    check_range("kl_weight", kl_weight, 0)

    def loss(scored, evidence, extra):
        value = stop(scored.log_evidence - kl_weight * scored.log_ratio)
        losses = objectives.score_function(scored.sequence_log_q, credit.leave_one_out(value))
        return losses, jax.numpy.ones_like(losses)

    return gradient_algorithm(loss, optimizer=optimizer, needs=_RLOO if kl_weight else _FREE)


RLOO = Method(
    name="rloo",
    family="rlhf",
    idea="REINFORCE, leave-one-out baseline, KL in the reward",
    function=reinforce,
    build=lambda beta, given, **options: reinforce(optimizer=given.optimizer(), **options),
    evidence=Tilt,
    knob=BETA,
    needs=_RLOO,
    law=laws.tilt,
    assumes=("a class of policies that holds p*",),
    theorems=("T1.5",),
    paper=Paper(
        "Ahmadian and others",
        2024,
        "Back to basics: Revisiting REINFORCE style optimization for learning from human feedback in LLMs",
        "2402.14740",
    ),
)
RLOO_FREE = RLOO._replace(
    name="rloo-free",
    idea="REINFORCE without KL, stopped early",
    knob=STOP,
    needs=_FREE,
    law=None,
    options={"kl_weight": 0.0},
    assumes=("there is no fixed point but the best strings: training is stopped",),
    theorems=("T2.6",),
)


def ppo(
    *,
    optimizer: optax.GradientTransformation,
    twist: Twist,
    clip: float = 0.2,
    decay: float = 0.95,
    value_weight: float = 0.5,
    epochs: int = 2,
) -> Algorithm:
    """PPO with a critic (Schulman et al. 2017, arXiv 1707.06347; in RLHF: Ouyang et al. 2022, arXiv 2203.02155).

    Token rewards are ``-(log behaviour - log p0)_t``, as recorded, and ``r/beta`` at the end; the critic is
    the twist head, whose target is the GAE return. Fixed point: p*_beta, where the critic equals the
    log-twist, i.e. soft value / beta.

    Args:
      optimizer: for policy and critic.
      twist: initial critic.
      clip: half-width of the trust interval.
      decay: lambda of GAE.
      value_weight: weight of the critic's squared error.
      epochs: gradient steps on each batch.

    Returns:
      Algorithm; needs soft evidence.

    Raises:
      ValueError: an option out of range.
    """
    check_range("clip", clip, 0, above=True)
    check_range("decay", decay, 0, 1)
    check_range("value_weight", value_weight, 0)
    check_range("epochs", epochs, 1)

    def loss(scored, evidence, extra):
        log_twist = scored.heads[Head.VALUE]
        value = stop(log_twist)
        token_reward = scored.log_base - scored.log_behaviour
        advantage = credit.generalized_advantage(token_reward, value, scored.live, decay=decay)
        target = advantage + value[..., :-1]
        error = numerics.masked_sum((log_twist[..., :-1] - target) ** 2, scored.mask)
        surrogate = objectives.clipped_surrogate(
            scored.log_q, scored.log_behaviour, advantage, scored.mask, clip=clip
        )
        weight = stop(jax.numpy.exp(scored.sequence_log_q - scored.log_behaviour.sum(-1)))
        return surrogate + value_weight * error, weight

    return gradient_algorithm(loss, optimizer=optimizer, needs=_PPO, heads={Head.VALUE: twist}, epochs=epochs)


PPO = Method(
    name="ppo",
    family="rlhf",
    idea="clipped surrogate, critic, GAE, KL in the reward",
    function=ppo,
    build=lambda beta, given, *, epochs=2, **options: ppo(
        optimizer=given.optimizer(epochs=epochs), twist=given.head(Head.VALUE), epochs=epochs, **options
    ),
    evidence=Tilt,
    knob=BETA,
    needs=_PPO,
    law=laws.tilt,
    assumes=("a class of policies that holds p*", "samples of the policy itself"),
    theorems=("T1.4", "T1.5"),
    paper=Paper("Schulman and others", 2017, "Proximal policy optimization algorithms", "1707.06347"),
)


def grpo(*, optimizer: optax.GradientTransformation, clip: float = 0.2, epochs: int = 1) -> Algorithm:
    """GRPO: rewards normalized by group mean and standard deviation, KL as k2 in the loss.

    Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300).
    The paper's k3 in the loss follows the *forward* KL; k2 has the gradient of KL(q||p0) (T1.6).
    Normalization divides the reward by its spread, so as K grows the fixed point is the tilt at ``beta_x =
    beta * std_q(r | x)`` with beta read as a pure number: C = 0, but a different temperature for each prompt.

    Args:
      optimizer: for the policy.
      clip: half-width of the trust interval.
      epochs: gradient steps on each batch.

    Returns:
      Algorithm; needs K >= 2 and a Tilt.

    Raises:
      ValueError: an option out of range.
    """
    check_range("clip", clip, 0, above=True)
    check_range("epochs", epochs, 1)

    def loss(scored, evidence, extra):
        advantage = credit.group_normalized(scored.reward)[..., None] / evidence.beta
        advantage = jax.numpy.broadcast_to(advantage, scored.log_q.shape)
        surrogate = objectives.clipped_surrogate(
            scored.log_q, scored.log_behaviour, advantage, scored.mask, clip=clip
        )
        penalty = k2(scored.sequence_log_q, scored.log_base.sum(-1))
        return surrogate + penalty, jax.numpy.ones_like(penalty)

    return gradient_algorithm(loss, optimizer=optimizer, needs=_GRPO, epochs=epochs)


GRPO = Method(
    name="grpo",
    family="rlhf",
    idea="group-normalized rewards, KL as k2 in the loss",
    function=grpo,
    build=lambda beta, given, *, epochs=1, **options: grpo(
        optimizer=given.optimizer(epochs=epochs), epochs=epochs, **options
    ),
    evidence=Tilt,
    knob=BETA_OVER_STD,
    needs=_GRPO,
    law=laws.standardized_tilt,
    assumes=("many samples of each prompt", "samples of the policy itself"),
    theorems=("T1.6",),
    paper=Paper(
        "Shao and others",
        2024,
        "DeepSeekMath: Pushing the limits of mathematical reasoning in open language models",
        "2402.03300",
    ),
)

METHODS = (RLOO, RLOO_FREE, PPO, GRPO)
