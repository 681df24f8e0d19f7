"""What training has done to the model so far: the calibration budget on held-out prompts, and a few samples to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from kl_rl.measure.calibration import Bounded, sampled_budget
from kl_rl.measure.samples import Samples
from kl_rl.rewards.host import rewards_of
from kl_rl.runs.job import Job
from kl_rl.runs.programs import Drawn, Run
from kl_rl.runs.step import decoded
from kl_rl.sharding.processes import whole
from kl_rl.storage.errors import BadRewardValue

__all__ = ["Measured", "evaluation"]

_PREVIEWS = 4


class Measured(NamedTuple):
    """A measurement: one row of numbers, and rows of previews."""

    row: dict[str, Any]
    previews: list[dict[str, Any]]


class _Column(NamedTuple):
    """Samples of one policy on the held-out prompts; arrays [N]."""

    drawn: list[Drawn]
    texts: list[str]
    prompt: np.ndarray
    reward: np.ndarray
    log_own: np.ndarray


def evaluation(job: Job) -> Callable[[Run, int], Measured]:
    """A function that measures a run.

    Samples of the tuned and of the base policy, each scored under both; the base's are drawn once. Keys are the same
    every time, so that measurements differ by what was learned alone.

    Args:
      job: the run's fixed parts.

    Returns:
      ``(run, steps done) -> Measured``: in nats the budget with its 95 % limits, and its warnings; the mean rewards of
      the samples of either policy; the entropy of the tuned one, per token. Raises ``BadRewardValue`` if rewards fail
      and are not to be skipped.
    """
    key = jax.random.fold_in(job.key(), 2**30 + 1)
    prompt, kept = job.array(job.held_out.ids), list[_Column]()

    def base_samples() -> _Column:
        if not kept:
            draw = lambda k: job.programs.draw(job.base, k, prompt, None)
            kept.append(_column(job, draw, jax.random.fold_in(key, 0)))
        return kept[0]

    def measure(run: Run, step: int) -> Measured:
        policy = job.programs.deployed(job.base, run, job.knobs)
        draw = lambda k: job.programs.draw(policy, k, prompt, None)
        tuned, base = _column(job, draw, jax.random.fold_in(key, 1)), base_samples()
        under = lambda who, column: _scored(
            lambda d: job.programs.score(who, prompt, d.tokens, d.mask), column.drawn
        )
        under_base, under_tuned = under(job.base, tuned), under(policy, base)
        budget = sampled_budget(
            _samples(tuned, tuned.log_own, under_base), _samples(base, under_tuned, base.log_own)
        )
        row = {
            "step": step,
            **_row(budget),
            "reward": float(np.nanmean(tuned.reward)),
            "base_reward": float(np.nanmean(base.reward)),
            "entropy": _entropy(tuned),
            "bad_rewards": _bad(tuned, base),
            "held_out": job.is_held_out,
            "warnings": budget.warnings,
        }
        return Measured(row, _previews(job, tuned, under_base, step))

    return measure


def _column(job: Job, draw: Callable[[jax.Array], Drawn], key: jax.Array) -> _Column:
    rounds = -(-job.settings.sizes.eval_samples // job.settings.sizes.num_samples)
    drawn = [whole(draw(jax.random.fold_in(key, r))) for r in range(rounds)]
    texts = [text for d in drawn for text in decoded(job.model.tokenizer, d.tokens, d.mask)]
    shape, skip = drawn[0].tokens.shape[:2], job.settings.saving.on_bad_reward == "skip"
    number = np.tile(np.repeat(np.arange(shape[0]), shape[1]), rounds)
    reward = rewards_of(job.reward, [job.held_out.texts[i] for i in number], texts, skip=skip)
    if np.isfinite(reward).sum() < 2:
        raise BadRewardValue("the reward function failed on every held-out completion; mend it")
    own = np.concatenate([d.log_model.sum(-1, dtype=np.float64).ravel() for d in drawn])
    return _Column(drawn, texts, number, reward.astype(np.float64), own)


def _scored(score: Callable[[Drawn], jax.Array], drawn: list[Drawn]) -> np.ndarray:
    return np.concatenate([whole(score(d)).astype(np.float64).ravel() for d in drawn])


def _samples(column: _Column, log_tuned: np.ndarray, log_base: np.ndarray) -> Samples:
    good = np.isfinite(column.reward)
    prompt = column.prompt[good] if column.prompt.max() else None
    return Samples(column.reward[good], log_tuned[good], log_base[good], prompt)


def _bad(*columns: _Column) -> int:
    return int(sum(np.isnan(c.reward).sum() for c in columns))


def _entropy(column: _Column) -> float:
    """Nats per token."""
    return float(-column.log_own.sum() / max(sum(d.mask.sum() for d in column.drawn), 1.0))


def _row(budget: Any) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in ("kl", "P", "S", "C", "C_fwd", "C_JS"):
        part: Bounded | None = getattr(budget, name)
        if part is not None:
            row |= {name: part.value, f"{name}_lower": part.lower, f"{name}_upper": part.upper}
    sizes = {"ess_tuned": budget.ess_tuned, "ess_base": budget.ess_base, "unreached": budget.unreached}
    return row | {"samples": budget.n_tuned, **sizes}


def _previews(job: Job, tuned: _Column, under_base: np.ndarray, step: int) -> list[dict[str, Any]]:
    """The first completion of the first few prompts."""
    first = [int(np.flatnonzero(tuned.prompt == i)[0]) for i in range(min(_PREVIEWS, tuned.prompt.max() + 1))]
    return [
        {
            "step": step,
            "prompt": job.held_out.texts[tuned.prompt[i]],
            "completion": tuned.texts[i],
            "reward": float(tuned.reward[i]),
            "log_ratio": float(tuned.log_own[i] - under_base[i]),
        }
        for i in first
    ]
