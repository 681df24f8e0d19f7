"""Another language model as a reward: ``r(x, y) = log p_R(y | x)`` in nats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from kl_rl.policy import Policy
from kl_rl.rollout import score
from kl_rl.streaming import bucket_length, pad_prompts
from kl_rl.training.errors import TrainingError
from kl_rl.training.model import begin_of, load_model
from kl_rl.trajectories import Trajectories

__all__ = ["likelihood_reward"]


@jax.jit
def _log_prob(policy: Policy, prompt: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    batch = Trajectories(prompt, tokens, mask, jnp.ones_like(mask), jnp.zeros_like(mask), mask[..., 0])
    return jnp.sum(score(policy, batch))


def likelihood_reward(folder: Path) -> Callable[[str, str], float]:
    """The log-likelihood of a completion under the causal language model of a folder, by its own tokenizer.

    Args:
      folder: a Hugging Face checkpoint.

    Returns:
      ``(prompt, completion) -> nats``.

    Raises:
      TrainingError: the folder cannot be used.
    """
    model = load_model(folder)
    begin = begin_of(model.tokenizer)

    def reward(prompt: str, completion: str) -> float:
        first = ([] if begin is None else [begin]) + model.tokenizer.encode(prompt)
        ids = model.tokenizer.encode(completion)
        if not first or not ids:
            return 0.0
        if len(first) + len(ids) > model.config.context:
            raise TrainingError(
                f"{len(first) + len(ids)} tokens do not fit the reward model's context of {model.config.context}"
            )
        size = min(bucket_length(len(ids)), model.config.context)
        tokens = jnp.zeros((1, 1, size), jnp.int32).at[0, 0, : len(ids)].set(jnp.asarray(ids, jnp.int32))
        mask = (jnp.arange(size) < len(ids)).astype(jnp.float32)[None, None]
        return float(_log_prob(model.base, jnp.asarray(pad_prompts([first])), tokens, mask))

    return reward
