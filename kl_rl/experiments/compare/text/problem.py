"""A text with a frozen base model and a reward: no exact truth, but samples to measure and to aim with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.core.policy import Policy, sequence_log_prob
from kl_rl.core.rollouts import sample
from kl_rl.experiments.compare.text.knobs import targets
from kl_rl.measure.samples import Samples
from kl_rl.rewards.lexicon_text import BadReward, TextReward
from kl_rl.worlds.text import Corpus
from kl_rl.worlds.text_base import RETURN_TOKENS, BasePlan, TextBase, load_or_train

__all__ = ["Drawn", "TextPlan", "TextProblem", "draw", "flat_samples", "make_problem", "score"]

Progress = Callable[[float, str], None]
_ROWS = 256  # sequences handled at once


class TextPlan(NamedTuple):
    """Size of a comparison on text.

    Attributes:
      minutes: of pretraining; see `BasePlan`.
      horizon: T, characters of a completion.
      prompts: P real prompts from held-out text; 0: a bare begin mark.
      prompt_length: characters of each real prompt.
      width: of the transformer.
      layers: of the transformer.
      steps: fine-tuning steps.
      num_samples: completions per step, over all prompts.
      learning_rate: of fine-tuning.
      num_tuned: samples of each tuned policy for the measurement.
      num_base: samples of the base for the measurement.
      shifts: where the knobs aim: mean rewards this many base standard deviations above the base's.
    """

    minutes: float = 4.0
    horizon: int = 40
    prompts: int = 0
    prompt_length: int = 16
    width: int = 128
    layers: int = 2
    steps: int = 150
    num_samples: int = 64
    learning_rate: float = 3e-4
    num_tuned: int = 2048
    num_base: int = 4096
    shifts: tuple[float, ...] = (0.5, 1.5)

    @property
    def per_prompt(self) -> int:
        """K, completions per prompt and step; even, for pairs."""
        return 2 * max(1, self.num_samples // max(1, self.prompts) // 2)


class Drawn(NamedTuple):
    """Completions with their log-probability under the policy that drew them, nats, and their rewards."""

    tokens: np.ndarray  # [P, M, T]
    log_prob: np.ndarray  # [P, M]
    reward: np.ndarray  # [P, M]


class TextProblem(NamedTuple):
    """All that a comparison on text knows.

    Attributes:
      corpus: the text.
      base: p0, with its losses.
      reward: the reward, on the host.
      scorer: the same as a jittable pytree.
      prompt: [P, L].
      plan: sizes.
      drawn: samples of the base.
      targets: mean rewards to aim at, the plan's shifts above the base's mean.
      edges: boundaries between return tokens; [R - 1].
      held_out: windows of held-out text; the loss is over their last T characters; [N, W].
    """

    corpus: Corpus
    base: TextBase
    reward: TextReward
    scorer: Any
    prompt: jax.Array
    plan: TextPlan
    drawn: Drawn
    targets: tuple[float, ...]
    edges: np.ndarray
    held_out: np.ndarray


@functools.partial(jax.jit, static_argnames=("num_samples", "horizon"))
def _draw(policy: Policy, scorer: Any, key: jax.Array, prompt: jax.Array, *, num_samples: int, horizon: int):
    tokens, mask, log_probs = sample(policy, key, prompt, num_samples=num_samples, horizon=horizon)
    return tokens, jnp.sum(log_probs, axis=-1), scorer(prompt[:, None], tokens, mask)


@jax.jit
def _score(policy: Policy, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
    return sequence_log_prob(policy, prompt, tokens, jnp.ones(tokens.shape, jnp.float32))


def draw(
    policy: Policy, scorer: Any, prompt: jax.Array, key: jax.Array, *, total: int, horizon: int
) -> Drawn:
    """Completions of a policy, at least `total` over all prompts.

    Args:
      policy: who draws.
      scorer: jittable reward.
      prompt: [P, L].
      key: PRNG key.
      total: completions over all prompts, rounded up.
      horizon: T.

    Returns:
      The samples.
    """
    size = max(1, min(_ROWS, total) // prompt.shape[0])
    rounds = -(-total // (size * prompt.shape[0]))
    parts = [
        jax.device_get(_draw(policy, scorer, k, prompt, num_samples=size, horizon=horizon))
        for k in jax.random.split(key, rounds)
    ]
    tokens, log_prob, reward = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
    return Drawn(tokens, log_prob.astype(np.float64), reward.astype(np.float64))


def score(policy: Policy, prompt: jax.Array, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities of completions under a policy, nats.

    Args:
      policy: who scores.
      prompt: [P, L].
      tokens: [P, M, T].

    Returns:
      float64 [P, M].
    """
    rows, horizon = tokens.reshape(-1, tokens.shape[-1]), tokens.shape[-1]
    prompts = jnp.repeat(prompt, tokens.shape[1], axis=0)
    size = min(_ROWS, len(rows))
    padding = -len(rows) % size  # one shape only, hence one compilation
    rows = np.concatenate([rows, np.zeros((padding, horizon), rows.dtype)])
    prompts = jnp.pad(prompts, ((0, padding), (0, 0)))
    parts = [
        np.asarray(_score(policy, prompts[i : i + size], jnp.asarray(rows[i : i + size])), np.float64)
        for i in range(0, len(rows), size)
    ]
    return np.concatenate(parts)[: len(rows) - padding].reshape(tokens.shape[:2])


def flat_samples(drawn: Drawn, log_tuned: np.ndarray, log_base: np.ndarray) -> Samples:
    """Samples [P, M] as flat columns, with prompt numbers where there are several prompts.

    Args:
      drawn: completions.
      log_tuned: nats; [P, M].
      log_base: nats; [P, M].

    Returns:
      The samples; P * M of them.
    """
    prompt = np.repeat(np.arange(len(drawn.reward)), drawn.reward.shape[1])
    one = len(drawn.reward) == 1
    return Samples(drawn.reward.ravel(), log_tuned.ravel(), log_base.ravel(), None if one else prompt)


def _edges(reward: np.ndarray) -> np.ndarray:
    """At most `RETURN_TOKENS - 2` return tokens, finer towards high rewards, split between levels."""
    values = np.unique(reward)
    middles = 0.5 * (values[1:] + values[:-1])
    below = np.array([np.mean(reward < m) for m in middles])
    wanted = 1.0 - np.geomspace(0.7, 0.01, RETURN_TOKENS - 3)
    return np.unique(middles[[int(np.argmin(np.abs(below - w))) for w in wanted]])


def make_problem(
    corpus: Corpus, reward: TextReward, plan: TextPlan, folder: Path | None, seed: int, progress: Progress
) -> TextProblem:
    """Train or load the base model, sample it, and choose mean rewards to aim at.

    Args:
      corpus: the text.
      reward: of completions.
      plan: sizes.
      folder: where the base model is kept; None: nowhere.
      seed: of the base model and its samples.
      progress: called with a fraction and a message.

    Returns:
      The problem.

    Raises:
      BadReward: if the reward is the same for everything that the base writes.
      BadText: if the folder holds another base model.
    """
    scorer = reward.compile(corpus.alphabet)
    context = plan.prompt_length * (plan.prompts > 0)
    base_plan = BasePlan(context + plan.horizon, plan.minutes, plan.width, plan.layers, seed=seed)
    base = load_or_train(corpus, folder, base_plan, lambda f, m: progress(0.95 * f, m))
    prompt = jnp.asarray(corpus.prompts(plan.prompts, plan.prompt_length))
    progress(0.95, "samples of the base model")
    key = jax.random.fold_in(jax.random.key(seed), 2)
    drawn = draw(base.policy, scorer, prompt, key, total=plan.num_base, horizon=plan.horizon)
    if np.ptp(drawn.reward) == 0:
        raise BadReward(
            f"{reward.name}: all {drawn.reward.size} completions of the base model score "
            f"{drawn.reward.flat[0]:g}; use words or patterns that are common in {corpus.name}"
        )
    return TextProblem(
        corpus=corpus,
        base=base,
        reward=reward,
        scorer=scorer,
        prompt=prompt,
        plan=plan,
        drawn=drawn,
        targets=targets(drawn.reward, plan.shifts),
        edges=_edges(drawn.reward),
        held_out=corpus.held_out_windows(256, context + plan.horizon),
    )
