"""RLHF: on-policy reverse KL to p*.

The KL to p0 sits in the reward (k1, detached), where its gradient is right (T1.6).
"""

from __future__ import annotations

import jax
import optax

from kl_rl import objectives
from kl_rl.core import numerics
from kl_rl.core.policy import Policy
from kl_rl.methods.algorithm import Algorithm, gradient_algorithm
from kl_rl.objectives import credit
from kl_rl.objectives.kl import k2

__all__ = ["grpo", "ppo", "reinforce"]

stop = jax.lax.stop_gradient


def reinforce(*, optimizer: optax.GradientTransformation, kl_weight: float = 1.0) -> Algorithm:
    """REINFORCE with leave-one-out baseline (RLOO; Ahmadian et al. 2024, arXiv 2402.14740).

    Advantage: leave-one-out of ``r/beta - kl_weight (log q - log p0)``. Fixed point: p*_beta (at kl_weight 1,
      in a class that holds it).
    With ``kl_weight = 0`` nothing but early stopping holds the policy back, and the fixed point is the set of
    maximizers of r.

    Args:
      optimizer: for the policy.
      kl_weight: 1 for the posterior, 0 for no KL term.

    Returns:
      Algorithm; needs K >= 2 and soft evidence.
    """

    def loss(scored, evidence, extra):
        value = stop(scored.log_evidence - kl_weight * scored.log_ratio)
        losses = objectives.score_function(scored.sequence_log_q, credit.leave_one_out(value))
        return losses, jax.numpy.ones_like(losses)

    return gradient_algorithm(loss, optimizer=optimizer, min_samples=2, soft_evidence=True)


def ppo(
    *,
    optimizer: optax.GradientTransformation,
    twist: Policy,
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
    """

    def loss(scored, evidence, extra):
        value = stop(scored.log_twist)
        token_reward = scored.log_base - scored.log_behaviour
        advantage = credit.generalized_advantage(token_reward, value, scored.live, decay=decay)
        target = advantage + value[..., :-1]
        error = numerics.masked_sum((scored.log_twist[..., :-1] - target) ** 2, scored.mask)
        surrogate = objectives.clipped_surrogate(
            scored.log_q, scored.log_behaviour, advantage, scored.mask, clip=clip
        )
        weight = stop(jax.numpy.exp(scored.sequence_log_q - scored.log_behaviour.sum(-1)))
        return surrogate + value_weight * error, weight

    return gradient_algorithm(loss, optimizer=optimizer, twist=twist, epochs=epochs, soft_evidence=True)


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
    """

    def loss(scored, evidence, extra):
        advantage = credit.group_normalized(scored.reward)[..., None] / evidence.beta
        advantage = jax.numpy.broadcast_to(advantage, scored.log_q.shape)
        surrogate = objectives.clipped_surrogate(
            scored.log_q, scored.log_behaviour, advantage, scored.mask, clip=clip
        )
        penalty = k2(scored.sequence_log_q, scored.log_base.sum(-1))
        return surrogate + penalty, jax.numpy.ones_like(penalty)

    return gradient_algorithm(loss, optimizer=optimizer, epochs=epochs, min_samples=2, soft_evidence=True)
