"""Other language models as rewards: a reward model with an output of its own, or the likelihood under a model, nats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kl_rl.huggingface import CheckpointError, is_reward_model, load_reward_model
from kl_rl.models import DecoderConfig, last_hidden
from kl_rl.policy import Policy
from kl_rl.rollout import score
from kl_rl.streaming import bucket_length, pad_prompts
from kl_rl.tokenizer import check_vocabulary, load_tokenizer
from kl_rl.training.errors import TrainingError
from kl_rl.training.model import begin_of, load_model
from kl_rl.trajectories import Trajectories

__all__ = ["likelihood_reward", "model_reward", "scored_reward"]

TextReward = Callable[[str, str], float]


@jax.jit
def _log_prob(policy: Policy, prompt: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    batch = Trajectories(prompt, tokens, mask, jnp.ones_like(mask), jnp.zeros_like(mask), mask[..., 0])
    return jnp.sum(score(policy, batch))


def _check_length(count: int, config: DecoderConfig) -> None:
    if count > config.context:
        raise TrainingError(f"{count} tokens do not fit the reward model's context of {config.context}")


def model_reward(folder: Path) -> TextReward:
    """The reward that a folder stands for: a reward model's score, or a language model's log-likelihood.

    Args:
      folder: a Hugging Face checkpoint, or the output of a run.

    Returns:
      ``(prompt, completion) -> number``.

    Raises:
      TrainingError: the folder cannot be used.
    """
    try:
        classifier = is_reward_model(folder)
    except CheckpointError as error:
        raise TrainingError(str(error)) from error
    return scored_reward(folder) if classifier else likelihood_reward(folder)


def scored_reward(folder: Path) -> TextReward:
    """``r(x, y) = w . h_last`` of a reward model: transformers' sequence classification with one label.

    Args:
      folder: a Hugging Face checkpoint with its tokenizer.

    Returns:
      ``(prompt, completion) -> reward`` of the two texts one after the other, behind the begin mark if there is one.

    Raises:
      TrainingError: the folder cannot be used.
    """
    try:
        model, tokenizer = load_reward_model(folder), load_tokenizer(folder)
        check_vocabulary(tokenizer, model.config, folder)
    except (CheckpointError, OSError, ValueError) as error:
        raise TrainingError(str(error)) from error
    begin = begin_of(tokenizer)

    @jax.jit
    def scored(weights: Any, output: jax.Array, ids: jax.Array) -> jax.Array:
        return last_hidden(model.config, weights, ids)[0].astype(output.dtype) @ output

    def reward(prompt: str, completion: str) -> float:
        ids = ([] if begin is None else [begin]) + tokenizer.encode(prompt + completion)
        if not ids:
            raise TrainingError("the reward model was given an empty text")
        _check_length(len(ids), model.config)
        row = pad_prompts([ids], min(bucket_length(len(ids)), model.config.context))
        return float(scored(model.weights, model.score, jnp.asarray(row)))

    return reward


def likelihood_reward(folder: Path) -> TextReward:
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
        _check_length(len(first) + len(ids), model.config)
        size = min(bucket_length(len(ids)), model.config.context)
        tokens = jnp.zeros((1, 1, size), jnp.int32).at[0, 0, : len(ids)].set(jnp.asarray(ids, jnp.int32))
        mask = (jnp.arange(size) < len(ids)).astype(jnp.float32)[None, None]
        return float(_log_prob(model.base, jnp.asarray(pad_prompts([first])), tokens, mask))

    return reward
