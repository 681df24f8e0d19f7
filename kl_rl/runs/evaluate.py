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
from kl_rl.tokenizer import Tokenizer

__all__ = ["Column", "Measured", "base_column", "evaluation"]

_PREVIEWS = 4
_SEED = 2**31  # one for all runs: what they are measured with does not depend on how they were trained


class Measured(NamedTuple):
    """A measurement: one row of numbers, and rows of previews."""

    row: dict[str, Any]
    previews: list[dict[str, Any]]


class Column(NamedTuple):
    """Samples of one policy on P prompts, in several rounds of K completions each.

    Attributes:
      rounds: as they were drawn.
      prompt: number of the prompt; [N].
      reward: [N].
      log_own: under the policy that drew them, nats; [N].
      log_other: under the other policy, once it is known; [N].
    """

    rounds: list[Rewarded]
    prompt: np.ndarray
    reward: np.ndarray
    log_own: np.ndarray
    log_other: np.ndarray | None = None

    @property
    def by_prompt(self) -> np.ndarray:
        """The order that sorts the samples by prompt; [P, M] of N = P M."""
        return np.argsort(self.prompt, kind="stable").reshape(self.rounds[0].reward.shape[0], -1)

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        """The completions; N of them."""
        return [
            text
            for r in self.rounds
            for text in decoded(tokenizer, *map(np.asarray, (r.drawn.tokens, r.drawn.mask)))
        ]

    @property
    def entropy(self) -> float:
        """Nats per token."""
        tokens = sum(np.asarray(r.drawn.mask).sum() for r in self.rounds)
        return float(-self.log_own.sum() / max(tokens, 1.0))


def _column(rounds: list[Rewarded]) -> Column:
    flat = lambda x: np.asarray(x, np.float64).ravel()
    prompts, samples = rounds[0].reward.shape
    number = np.tile(np.repeat(np.arange(prompts), samples), len(rounds))
    reward = np.concatenate([flat(r.reward) for r in rounds])
    if np.isfinite(reward).sum() < 2:
        raise BadRewardValue("the reward function failed on every held-out completion; mend it")
    own = np.concatenate([flat(np.asarray(r.drawn.log_model).sum(-1, dtype=np.float64)) for r in rounds])
    return Column(rounds, number, reward, own)


def base_column(job: Job) -> Column:
    """Samples of p0 on the held-out prompts, the same for every run that shares them.

    Args:
      job: a run's fixed parts.

    Returns:
      At least ``eval_samples`` of each prompt.
    """
    rounds = range(-(-job.sizes.eval_samples // job.sizes.num_samples))

    def one(r: int) -> Rewarded:
        return of_base(job, f"held-out-{r}", job.inputs.held_out, lambda: _key(job, 0, r), plain=True)

    return _column([one(r) for r in rounds])


def _key(job: Job, who: int, number: int) -> jax.Array:
    """Of round ``number`` of p0 (0) or of the tuned policy (1)."""
    return job.placed(jax.random.fold_in(jax.random.fold_in(jax.random.key(_SEED), who), number))


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
    ids, kept = job.array(prompts.ids), list[Column]()

    def under(policy: Policy, column: Column) -> Column:
        score = lambda drawn: whole(programs.score(policy, ids, drawn.tokens, drawn.mask))
        found = [score(r.drawn).astype(np.float64).ravel() for r in column.rounds]
        return column._replace(log_other=np.concatenate(found))

    def measure(held: Held, step: int) -> Measured:
        policy = programs.deployed(base, held, job.knobs)
        if not kept:
            kept.append(base_column(job))
        rounds = range(len(kept[0].rounds))
        own = _column([draw(job, policy, _key(job, 1, r), prompts, plain=True) for r in rounds])
        tuned, base_samples = under(base, own), under(policy, kept[0])
        row = {"step": step, **_measured(tuned, base_samples), "held_out": job.is_held_out}
        if job.extras is not None:
            row |= job.extras(row, tuned, base_samples)
        return Measured(row, _previews(tuned, prompts.texts, job.inputs.model.tokenizer, step))

    return measure


def _measured(tuned: Column, base: Column) -> dict[str, Any]:
    """The numbers of a measurement."""
    assert tuned.log_other is not None and base.log_other is not None
    budget = sampled_budget(
        _samples(tuned, tuned.log_own, tuned.log_other), _samples(base, base.log_other, base.log_own)
    )
    forgotten = mean_estimate(base.log_own - base.log_other)
    failed = int(sum(np.isnan(column.reward).sum() for column in (tuned, base)))
    return budget_row(budget) | {
        "reward": float(np.nanmean(tuned.reward)),
        "base_reward": float(np.nanmean(base.reward)),
        "entropy": tuned.entropy,
        "kl_base": forgotten.value,
        "kl_base_stderr": forgotten.stderr,
        "bad_rewards": failed,
    }


def _samples(column: Column, log_tuned: np.ndarray, log_base: np.ndarray) -> Samples:
    good = np.isfinite(column.reward)
    prompt = column.prompt[good] if column.prompt.max() else None
    return Samples(column.reward[good], log_tuned[good], log_base[good], prompt)


def _previews(tuned: Column, prompts: Any, tokenizer: Tokenizer, step: int) -> list[dict[str, Any]]:
    """The first completion of the first few prompts."""
    assert tuned.log_other is not None
    drawn, samples = tuned.rounds[0].drawn, tuned.rounds[0].reward.shape[1]
    some = slice(0, min(_PREVIEWS, len(prompts)))
    texts = decoded(tokenizer, np.asarray(drawn.tokens)[some, 0], np.asarray(drawn.mask)[some, 0])
    return [
        {
            "step": step,
            "prompt": prompts[i],
            "completion": text,
            "reward": float(tuned.reward[i * samples]),
            "log_ratio": float(tuned.log_own[i * samples] - tuned.log_other[i * samples]),
        }
        for i, text in enumerate(texts)
    ]
