"""What training has done to the model so far: the calibration budget on held-out prompts, and a few samples to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from kl_rl.core.estimate import mean_estimate
from kl_rl.core.policy import Policy
from kl_rl.measure.calibration import sampled_budget
from kl_rl.measure.rows import budget_row
from kl_rl.measure.samples import Samples
from kl_rl.runs.job import Job
from kl_rl.runs.programs import Held
from kl_rl.runs.step import Rewarded, decoded, draw, of_base
from kl_rl.sharding.processes import whole
from kl_rl.storage.errors import BadRewardValue

__all__ = ["Measured", "evaluation"]

_PREVIEWS = 4
_SEED = 2**31  # one for all runs: what they are measured with does not depend on how they were trained


class Measured(NamedTuple):
    """A measurement: one row of numbers, and rows of previews."""

    row: dict[str, Any]
    previews: list[dict[str, Any]]


class _Column(NamedTuple):
    """Samples of one policy on P prompts, in several rounds of K completions each.

    Attributes:
      rounds: as they were drawn.
      prompt: number of the prompt; [N].
      reward: [N].
      log_own: under the policy that drew them, nats; [N].
    """

    rounds: list[Rewarded]
    prompt: np.ndarray
    reward: np.ndarray
    log_own: np.ndarray

    @property
    def entropy(self) -> float:
        """Nats per token."""
        tokens = sum(np.asarray(r.drawn.mask).sum() for r in self.rounds)
        return float(-self.log_own.sum() / max(tokens, 1.0))


def _column(rounds: list[Rewarded]) -> _Column:
    flat = lambda x: np.asarray(x, np.float64).ravel()
    prompts, samples = rounds[0].reward.shape
    number = np.tile(np.repeat(np.arange(prompts), samples), len(rounds))
    reward = np.concatenate([flat(r.reward) for r in rounds])
    if np.isfinite(reward).sum() < 2:
        raise BadRewardValue("the reward function failed on every held-out completion; mend it")
    own = np.concatenate([flat(np.asarray(r.drawn.log_model).sum(-1, dtype=np.float64)) for r in rounds])
    return _Column(rounds, number, reward, own)


def evaluation(job: Job) -> Callable[[Held, int], Measured]:
    """A function that measures a run.

    Samples of the tuned and of the base policy, each scored under both; the base's are drawn once. Keys are the same
    every time, so that measurements differ by what was learned alone.

    Args:
      job: the run's fixed parts.

    Returns:
      ``(held, steps done) -> Measured``: in nats the budget with its 95 % limits, and its warnings; the mean rewards of
      the samples of either policy; the entropy of the tuned one, per token; KL(p0 || q). Raises ``BadRewardValue`` if
      rewards fail and are not to be skipped.
    """
    prompts, programs, base = job.inputs.held_out, job.programs, job.inputs.base
    key, ids = jax.random.key(_SEED), job.array(prompts.ids)
    rounds, kept = range(-(-job.sizes.eval_samples // job.sizes.num_samples)), list[_Column]()
    own_key = lambda who, r: job.placed(jax.random.fold_in(jax.random.fold_in(key, who), r))

    def under(policy: Policy, column: _Column) -> np.ndarray:
        score = lambda drawn: whole(programs.score(policy, ids, drawn.tokens, drawn.mask))
        return np.concatenate([score(r.drawn).astype(np.float64).ravel() for r in column.rounds])

    def measure(held: Held, step: int) -> Measured:
        policy = programs.deployed(base, held, job.knobs)
        if not kept:
            of = lambda r: of_base(job, f"held-out-{r}", prompts, lambda: own_key(0, r), plain=True)
            kept.append(_column([of(r) for r in rounds]))
        tuned = _column([draw(job, policy, own_key(1, r), prompts, plain=True) for r in rounds])
        row, under_base = _measured(tuned, kept[0], under(base, tuned), under(policy, kept[0]))
        previews = _previews(tuned, prompts.texts, job.inputs.model.tokenizer, under_base, step)
        return Measured({"step": step, **row, "held_out": job.is_held_out}, previews)

    return measure


def _measured(
    tuned: _Column, base: _Column, tuned_under_base: np.ndarray, base_under_tuned: np.ndarray
) -> tuple[dict[str, Any], np.ndarray]:
    """The numbers of a measurement, and log p0 of the tuned samples."""
    budget = sampled_budget(
        _samples(tuned, tuned.log_own, tuned_under_base), _samples(base, base_under_tuned, base.log_own)
    )
    forgotten = mean_estimate(base.log_own - base_under_tuned)
    failed = int(sum(np.isnan(column.reward).sum() for column in (tuned, base)))
    row = budget_row(budget) | {
        "reward": float(np.nanmean(tuned.reward)),
        "base_reward": float(np.nanmean(base.reward)),
        "entropy": tuned.entropy,
        "kl_base": forgotten.value,
        "kl_base_stderr": forgotten.stderr,
        "bad_rewards": failed,
    }
    return row, tuned_under_base


def _samples(column: _Column, log_tuned: np.ndarray, log_base: np.ndarray) -> Samples:
    good = np.isfinite(column.reward)
    prompt = column.prompt[good] if column.prompt.max() else None
    return Samples(column.reward[good], log_tuned[good], log_base[good], prompt)


def _previews(
    tuned: _Column, prompts: Any, tokenizer: Any, under_base: np.ndarray, step: int
) -> list[dict[str, Any]]:
    """The first completion of the first few prompts."""
    drawn, samples = tuned.rounds[0].drawn, tuned.rounds[0].reward.shape[1]
    some = slice(0, min(_PREVIEWS, len(prompts)))
    texts = decoded(tokenizer, np.asarray(drawn.tokens)[some, 0], np.asarray(drawn.mask)[some, 0])
    return [
        {
            "step": step,
            "prompt": prompts[i],
            "completion": text,
            "reward": float(tuned.reward[i * samples]),
            "log_ratio": float(tuned.log_own[i * samples] - under_base[i * samples]),
        }
        for i, text in enumerate(texts)
    ]
