"""The families: every named method is an expression over objectives, behaviours and evidence."""

from kl_rl.families.between import alpha_divergence
from kl_rl.families.conditioning import decision_transformer, greatest_return, tilted_returns, top_quantile
from kl_rl.families.imitation import best_of_n, expert_iteration, filtered, reward_weighted
from kl_rl.families.off_policy import path_consistency, subtrajectory_balance, trajectory_balance, vargrad
from kl_rl.families.preference import dpo, ipo
from kl_rl.families.rlhf import grpo, ppo, reinforce

__all__ = [
    "alpha_divergence",
    "best_of_n",
    "decision_transformer",
    "dpo",
    "expert_iteration",
    "filtered",
    "greatest_return",
    "grpo",
    "ipo",
    "path_consistency",
    "ppo",
    "reinforce",
    "reward_weighted",
    "subtrajectory_balance",
    "tilted_returns",
    "top_quantile",
    "trajectory_balance",
    "vargrad",
]
