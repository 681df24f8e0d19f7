"""kl_rl: fine-tuning as KL-regularized posterior inference, and what it does to a model.

One idea: a base model and evidence define a posterior ``p*(y|x) = p0(y|x) l(y|x) / Z(x)``; every method fits
a policy to it, or samples from it. Names below are imported on first use, so that ``import kl_rl`` stays
cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Trajectories": "core.trajectories",
    "Policy": "core.policy",
    "from_nnx": "core.policy",
    "mixture": "core.policy",
    "sequence_log_prob": "core.policy",
    "Posterior": "core.posterior",
    "Tilt": "core.posterior",
    "Threshold": "core.posterior",
    "Interval": "core.posterior",
    "sample": "core.rollout",
    "generate": "core.sampler",
    "Transform": "core.transform",
    "score": "core.rollout",
    "Algorithm": "algorithm",
    "Info": "algorithm",
    "State": "algorithm",
    "gradient_algorithm": "algorithm",
    "Source": "sources",
    "fresh": "sources",
    "logged": "sources",
    "replay": "sources",
    "comparisons": "sources",
    "start": "fit",
    "advance": "fit",
    "fit_likelihood": "pretrain",
    "reinforce": "families",
    "ppo": "families",
    "grpo": "families",
    "filtered": "families",
    "best_of_n": "families",
    "reward_weighted": "families",
    "expert_iteration": "families",
    "decision_transformer": "families",
    "vargrad": "families",
    "trajectory_balance": "families",
    "subtrajectory_balance": "families",
    "path_consistency": "families",
    "alpha_divergence": "families",
    "dpo": "families",
    "ipo": "families",
    "enumerate_strings": "exact",
    "log_prob": "exact",
    "reward_levels": "exact",
    "Estimate": "core.estimate",
    "calibration_budget": "calibration",
    "read_samples": "samples",
    "Samples": "samples",
}
_MODULES = (
    "advantages automaton budget calibration checkpoint core data dynamic exact families fit "
    "flows hidden_markov huggingface kl models objectives plan pretrain queries samples sbc "
    "scores sharding sources tokenizer training weights worlds "
).split()

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"kl_rl.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"kl_rl.{name}")
    raise AttributeError(f"module 'kl_rl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
