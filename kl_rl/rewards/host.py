"""Rewards on the host: a Python function, a word list, or another model."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kl_rl.core.named import object_named
from kl_rl.rewards.lexicon_text import TextReward
from kl_rl.rewards.values import Values, one_by_one
from kl_rl.sharding.processes import agreed, share, summed
from kl_rl.storage.errors import BadRewardValue, RunError

__all__ = ["HostReward", "lexicon_reward", "load_reward", "rewards_of"]


_KINDS = "a reward is module:function, a word list (.json, .tsv, .txt), a model folder or a hub name"


class HostReward(NamedTuple):
    """A reward with its name.

    Attributes:
      name: for messages.
      values: ``(prompts, completions) -> finite numbers``, for N texts each; an exception in place of a value that
        could not be had. A value must depend on its texts alone, or a resumed run will not equal an uninterrupted one.
      note: how it was read, where that is not evident; a line, or "".
    """

    name: str
    values: Values
    note: str = ""


def load_reward(spec: str) -> HostReward:
    """Open a reward.

    Args:
      spec: ``module:function`` or ``file.py:function``, called as ``function(prompt, completion)``, where
        ``prompt.messages`` is the conversation if the prompt was given as one; a word list or patterns
        (.json), or lines of token, tab, valence (.tsv, .txt: VADER); a Hugging Face folder: a reward model (sequence
        classification with one label), or a causal language model, whose log-likelihood of the completion, in nats, is
        the reward; or such a model's name on the hub.

    Returns:
      The reward.

    Raises:
      RunError: it cannot be found or imported.
      BadReward: a word list that cannot be used.
    """
    path = Path(spec).expanduser()
    if not spec.strip():
        raise RunError(f"--reward is empty; {_KINDS}")
    if path.is_dir():
        from kl_rl.rewards.models import model_reward

        return HostReward(spec, model_reward(path))
    if path.suffix in (".json", ".tsv", ".txt") or (path.is_file() and path.suffix != ".py"):
        from kl_rl.rewards.lexicon import load_lexicon

        return lexicon_reward(spec, load_lexicon(path))
    if path.suffix == ".py":
        raise RunError(f"reward {spec}: name the function too: {spec}:function")
    if ":" not in spec:
        return HostReward(spec, _of_hub(spec))
    return HostReward(spec, one_by_one(_function(spec)))


def _of_hub(name: str) -> Values:
    from kl_rl.huggingface import resolve
    from kl_rl.rewards.models import model_reward

    try:
        return model_reward(resolve(name))
    except OSError as error:
        raise RunError(f"{error}; {_KINDS}") from error


def lexicon_reward(name: str, lexicon: TextReward) -> HostReward:
    """A word list or patterns as a reward."""
    values = one_by_one(lambda prompt, completion: lexicon.score(completion, prompt))
    return HostReward(name, values, lexicon.summary)


def _function(spec: str) -> Callable[[str, str], Any]:
    try:
        function = object_named(spec)
    except ValueError as error:
        raise RunError(f"reward {error}") from error
    if not callable(function):
        raise RunError(f"reward {spec}: is a {type(function).__name__}, not a function")
    return function


def _checked(reward: HostReward, value: Any, prompt: str, completion: str) -> float:
    said = f"for prompt {prompt!r:.300} and completion {completion!r:.300}"
    if isinstance(value, Exception):
        raise BadRewardValue(
            f"reward {reward.name} raised {type(value).__name__}: {' '.join(str(value).split())[:200]} {said}"
        ) from value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real):
        kind = type(value).__name__
        raise BadRewardValue(f"reward {reward.name} returned {value!r:.60} ({kind}), not a number, {said}")
    if not math.isfinite(float(value)) or abs(float(value)) > 1e30:
        raise BadRewardValue(f"reward {reward.name} returned {float(value)!r}, not a finite number, {said}")
    return float(value)


def rewards_of(
    reward: HostReward, prompts: Sequence[str], completions: Sequence[str], *, skip: bool
) -> np.ndarray:
    """Score N completions; in many processes each scores its share, and all have the result.

    Args:
      reward: the function.
      prompts: N texts.
      completions: N texts.
      skip: bad values become NaN instead of raising.

    Returns:
      float32 [N].

    Raises:
      BadRewardValue: naming prompt and completion; if bad values are skipped, when all are bad.
    """
    values, own = np.zeros(len(prompts), np.float32), share(len(prompts))
    problem = None
    try:
        values[own] = _scored(reward, prompts[own], completions[own], skip=skip)
    except BadRewardValue as error:
        problem = error
    if (message := agreed(None if problem is None else str(problem))) is not None:
        raise BadRewardValue(message) from problem
    return summed(values)


def _scored(
    reward: HostReward, prompts: Sequence[str], completions: Sequence[str], *, skip: bool
) -> list[float]:
    values, problem = [], None
    for found in zip(reward.values(prompts, completions), prompts, completions, strict=True):
        try:
            values.append(_checked(reward, *found))
        except BadRewardValue as error:
            if not skip:
                raise
            values.append(np.nan)
            problem = problem or error
    if problem is not None and np.isnan(values).all():
        raise BadRewardValue(
            f"the reward function failed on every completion, as here: {problem}"
        ) from problem
    return values
