"""Other language models as rewards: a reward model with an output of its own, or the likelihood under a model, nats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.core.policy import Policy
from kl_rl.core.rollouts import score
from kl_rl.core.streaming import bucket_length, pad_prompts
from kl_rl.core.trajectories import Trajectories
from kl_rl.huggingface import CheckpointError, is_reward_model, load_reward_model
from kl_rl.huggingface.opened import begin_of, load_model
from kl_rl.models import DecoderConfig, last_hidden
from kl_rl.rewards.values import Values, one_by_one
from kl_rl.storage.errors import RunError
from kl_rl.tokenizer import check_vocabulary, load_tokenizer

__all__ = ["likelihood_reward", "model_reward", "scored_reward"]

_ROWS = 32  # texts scored at once, at most
Ids = tuple[list[int], ...]


@jax.jit
def _log_probs(policy: Policy, prompt: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    batch = Trajectories(prompt, tokens, mask, jnp.ones_like(mask), jnp.zeros_like(mask), mask[..., 0])
    return jnp.sum(score(policy, batch), axis=(-2, -1))


def _conversation(prompt: str, tokenizer: Any) -> tuple[dict[str, str], ...] | None:
    """The messages of a prompt that was given as a conversation, for a model that has been trained on them."""
    return getattr(prompt, "messages", None) if tokenizer.chat_template is not None else None


def _check_length(count: int, config: DecoderConfig) -> None:
    if count > config.context:
        raise RunError(f"{count} tokens do not fit the reward model's context of {config.context}")


def _width(rows: Sequence[Sequence[int]], config: DecoderConfig) -> int:
    return min(bucket_length(max(map(len, rows))), config.context)


def _batched(ids_of: Callable[[str, str], Any], score_rows: Callable[[list[Ids]], jax.Array]) -> Values:
    """Texts of like length are scored together.

    Args:
      ids_of: ``(prompt, completion) -> tuple of token lists``; anything else is the reward itself.
      score_rows: of a power of two of such tuples; -> [rows].

    Returns:
      The reward of texts.
    """

    def values(prompts: Sequence[str], completions: Sequence[str]) -> list[Any]:
        found = list(one_by_one(ids_of)(prompts, completions))
        lengths = {i: sum(map(len, ids)) for i, ids in enumerate(found) if isinstance(ids, tuple)}
        order = sorted(lengths, key=lambda i: (lengths[i], i))
        for start in range(0, len(order), _ROWS):
            chunk = order[start : start + _ROWS]
            rows = [found[i] for i in chunk]
            rows += rows[-1:] * ((1 << (len(rows) - 1).bit_length()) - len(rows))  # few programs
            for i, value in zip(chunk, np.asarray(score_rows(rows)), strict=False):
                found[i] = float(value)
        return found

    return values


def model_reward(folder: Path) -> Values:
    """The reward that a folder stands for: a reward model's score, or a language model's log-likelihood.

    Args:
      folder: a Hugging Face checkpoint, or the output of a run.

    Returns:
      ``(prompts, completions) -> numbers``.

    Raises:
      RunError: the folder cannot be used.
    """
    try:
        classifier = is_reward_model(folder)
    except CheckpointError as error:
        raise RunError(str(error)) from error
    return scored_reward(folder) if classifier else likelihood_reward(folder)


def scored_reward(folder: Path) -> Values:
    """``r(x, y) = w . h_last`` of a reward model: transformers' sequence classification with one label.

    Args:
      folder: a Hugging Face checkpoint with its tokenizer.

    Returns:
      ``(prompts, completions) -> rewards`` of the two texts one after the other, behind the begin mark if there is one.
      A prompt that was given as a conversation goes through the reward model's own chat template, if it has one, with
      the completion as what the assistant says.

    Raises:
      RunError: the folder cannot be used.
    """
    try:
        model, tokenizer = load_reward_model(folder), load_tokenizer(folder)
        check_vocabulary(tokenizer, model.config, folder)
    except (CheckpointError, OSError, ValueError) as error:
        raise RunError(str(error)) from error
    begin = begin_of(tokenizer)

    @jax.jit
    def scored(weights: Any, output: jax.Array, ids: jax.Array) -> jax.Array:
        return last_hidden(model.config, weights, ids).astype(output.dtype) @ output

    def ids_of(prompt: str, completion: str) -> Ids:
        said = _conversation(prompt, tokenizer)
        if said is None:
            ids = ([] if begin is None else [begin]) + tokenizer.encode(prompt + completion)
        else:
            answer = {"role": "assistant", "content": completion}
            ids = tokenizer.encode(tokenizer.apply_chat([*said, answer], add_generation_prompt=False))
        if not ids:
            raise RunError("the reward model was given an empty text")
        _check_length(len(ids), model.config)
        return (ids,)

    def score_rows(rows: list[Ids]) -> jax.Array:
        texts = [ids for (ids,) in rows]
        padded = pad_prompts(texts, _width(texts, model.config))
        return scored(model.weights, model.score, jnp.asarray(padded))

    return _batched(ids_of, score_rows)


def likelihood_reward(folder: Path) -> Values:
    """The log-likelihood of a completion under the causal language model of a folder, by its own tokenizer.

    A prompt that was given as a conversation goes through that model's own chat template, if it has one.

    Args:
      folder: a Hugging Face checkpoint.

    Returns:
      ``(prompts, completions) -> nats``.

    Raises:
      RunError: the folder cannot be used.
    """
    model = load_model(folder)
    begin = begin_of(model.tokenizer)

    def ids_of(prompt: str, completion: str) -> Ids | float:
        said = _conversation(prompt, model.tokenizer)
        if said is None:
            first = ([] if begin is None else [begin]) + model.tokenizer.encode(prompt)
        else:
            first = model.tokenizer.encode(model.tokenizer.apply_chat(said))
        ids = model.tokenizer.encode(completion)
        if not first or not ids:
            return 0.0
        _check_length(len(first) + len(ids), model.config)
        return first, ids

    def score_rows(rows: list[Ids]) -> jax.Array:
        size = _width([ids for _, ids in rows], model.config)
        tokens, mask = np.zeros((len(rows), 1, size), np.int32), np.zeros((len(rows), 1, size), np.float32)
        for i, (_, ids) in enumerate(rows):
            tokens[i, 0, : len(ids)], mask[i, 0, : len(ids)] = ids, 1.0
        prompts = pad_prompts([first for first, _ in rows])
        return _log_probs(model.base, jnp.asarray(prompts), jnp.asarray(tokens), jnp.asarray(mask))

    return _batched(ids_of, score_rows)
