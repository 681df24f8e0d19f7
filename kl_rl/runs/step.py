"""One run: its beginning, and one step; sampling and learning are compiled, rewards come from the host between."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from kl_rl.core.trajectories import Trajectories
from kl_rl.rewards.host import rewards_of
from kl_rl.runs.job import Job
from kl_rl.runs.memory import Ring
from kl_rl.runs.programs import Drawn, Knobs, Run
from kl_rl.runs.prompts import Prompts
from kl_rl.runs.returns import RETURN_TOKENS, return_edges
from kl_rl.sharding.processes import whole
from kl_rl.storage.errors import BadRewardValue
from kl_rl.tokenizer import Tokenizer

__all__ = ["Diverged", "Rewarded", "advance", "blank", "decoded", "rewarded", "start"]

_PROBES = 256  # samples of the base from which the return tokens are cut, where there are no data


class Diverged(ValueError):
    """The loss or its gradient is not a number any more; what was saved before is intact."""


class Rewarded(NamedTuple):
    """A batch with its rewards.

    Attributes:
      batch: host arrays.
      reward: as returned, NaN where bad; [P, K].
    """

    batch: Trajectories
    reward: np.ndarray


def decoded(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Texts of completions, without special tokens; [..., T] -> one for each row."""
    rows, real = tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]) > 0
    return [tokenizer.decode(row[kept]) for row, kept in zip(rows, real, strict=True)]


def _trajectories(*leaves: Any) -> Trajectories:
    """Of host arrays."""
    return Trajectories(*leaves)


def _mended(batch: Trajectories, bad: np.ndarray) -> Trajectories:
    """Bad samples replaced by good ones of the same prompt; groups without any, by whole other groups."""
    good_groups = np.flatnonzero(~bad.all(axis=1))
    if not len(good_groups):
        raise BadRewardValue("the reward function failed on every completion of a batch; mend it")
    group: np.ndarray = np.arange(len(bad))
    for i in np.flatnonzero(bad.all(axis=1)):
        group[i] = good_groups[i % len(good_groups)]
    sample = np.tile(np.arange(bad.shape[1]), (len(bad), 1))
    for row, is_bad in enumerate(bad[group]):
        good, wrong = np.flatnonzero(~is_bad), np.flatnonzero(is_bad)
        sample[row, wrong] = good[np.arange(len(wrong)) % len(good)]
    pick = lambda x: x[group[:, None], sample]
    return _trajectories(batch.prompt[group], *(pick(leaf) for leaf in batch[1:]))


def rewarded(job: Job, prompts: Prompts, drawn: Drawn) -> Rewarded:
    """Score completions on the host.

    Args:
      job: reward, tokenizer, and what to do about bad values.
      prompts: P of them.
      drawn: their completions, on the host.

    Returns:
      The batch; bad samples are replaced if they are to be skipped.

    Raises:
      BadRewardValue: naming prompt and completion.
    """
    tokens, mask, log_behaviour = (np.asarray(x) for x in drawn[:3])
    texts = decoded(job.model.tokenizer, tokens, mask)
    each = [text for text in prompts.texts for _ in range(tokens.shape[1])]
    skip = job.settings.saving.on_bad_reward == "skip"
    reward = rewards_of(job.reward, each, texts, skip=skip).reshape(tokens.shape[:2])
    batch = _trajectories(prompts.ids, tokens, mask, np.ones_like(mask), log_behaviour, reward)
    bad = np.isnan(reward)
    return Rewarded(_mended(batch, bad) if bad.any() else batch, reward)


def blank(job: Job) -> Run:
    """A run of the right structure, shapes and placement, before any sample: what a checkpoint is restored onto."""
    edges = job.array(np.full(RETURN_TOKENS - 1, np.inf, np.float32))
    run = job.programs.begin(job.base, job.knobs, edges, job.key())
    if not job.chosen.memory.filling:
        return run
    groups = job.chosen.memory.filling * job.settings.sizes.batch
    shape = (groups, job.settings.sizes.num_samples, job.settings.sizes.horizon)
    zeros = lambda dtype, *size: np.zeros(size or shape, dtype)
    data = _trajectories(
        zeros(np.int32, groups, job.train.ids.shape[1]), zeros(np.int32),
        *(zeros(np.float32) for _ in range(3)), zeros(np.float32, *shape[:2]),
    )  # fmt: skip
    return _with_memory(job, run, data)


def _with_memory(job: Job, run: Run, data: Trajectories) -> Run:
    return run._replace(memory=job.placed(Ring(data, job.array(np.int32(0)))))


def _base_rounds(job: Job, rounds: int) -> list[Rewarded]:
    """Batches of p0's samples, before the first step."""
    key = jax.random.fold_in(job.key(), 2**30)
    found = []
    for index in range(rounds):
        prompts = job.train.take(job.order(index))
        prompt = job.array(prompts.ids)
        drawn = job.programs.draw(job.base, jax.random.fold_in(key, index), prompt, job.knobs.temperature)
        found.append(rewarded(job, prompts, whole(drawn)))
    return found


def start(job: Job) -> Run:
    """The run at its beginning: return tokens cut, memory filled with p0's samples.

    Args:
      job: the run's fixed parts.

    Returns:
      The run.

    Raises:
      TrainingError: a reward that fails, or that is the same for everything.
    """
    sizes, run = job.settings.sizes, blank(job)
    if job.chosen.returns and job.data is not None:
        run = run._replace(edges=job.array(return_edges(np.asarray(job.data.reward).ravel())))
    elif job.chosen.returns:
        rounds = _base_rounds(job, max(1, _PROBES // (sizes.batch * sizes.num_samples)))
        seen = np.concatenate([r.reward[np.isfinite(r.reward)] for r in rounds])
        run = run._replace(edges=job.array(return_edges(seen)))
    if job.chosen.memory.filling:
        batches = [r.batch for r in _base_rounds(job, job.chosen.memory.filling)]
        run = _with_memory(
            job, run, _trajectories(*(np.concatenate(leaf) for leaf in zip(*batches, strict=True)))
        )
    return run


def advance(job: Job, run: Run, step: int) -> tuple[Run, dict[str, Any]]:
    """One step: sample, reward, learn.

    Args:
      job: the run's fixed parts.
      run: is used up.
      step: steps done before.

    Returns:
      The run, and a row of metrics: means over the batch; ``log_ratio`` in nats, ``entropy`` in nats per token of
      whoever drew the samples, ``skipped`` samples with a bad reward.

    Raises:
      BadRewardValue: before anything of the run is used up.
      Diverged: the loss or the norm of its gradient is not finite.
    """
    number, prompts = job.array(np.int32(step)), job.train.take(job.order(step))
    row: dict[str, Any] = {"step": step + 1}
    if job.chosen.memory.samples:
        behaviour, key = (
            job.programs.behaviour(job.base, run, job.knobs),
            jax.random.fold_in(run.key, 2 * step),
        )
        drawn = whole(job.programs.draw(behaviour, key, job.array(prompts.ids), job.knobs.temperature))
        batch, reward = rewarded(job, prompts, drawn)
        row |= _sampled(drawn, reward)
    elif job.data is not None:
        batch = Trajectories(*(leaf[job.order(step)] for leaf in job.data))
    else:
        batch = _placeholder(job, prompts)
    run, info = job.programs.step(job.base, run, _warmed(job, step), job.placed(batch), number)
    values = {name: float(x) for name, x in jax.device_get(info)._asdict().items()}
    for name in ("loss", "grad_norm"):
        if not np.isfinite(values[name]):
            raise Diverged(f"step {step + 1}: {name} is {values[name]}")
    return run, values | row


def _warmed(job: Job, step: int) -> Knobs:
    """The learning rate rises over the first tenth of the steps, at most 10: Adam's first steps have full size."""
    warm = max(1, min(10, job.settings.sizes.steps // 10))
    rate = job.knobs.learning_rate * np.float32(min(1.0, (step + 1) / warm))
    return job.knobs._replace(learning_rate=rate)


def _sampled(drawn: Drawn, reward: np.ndarray) -> dict[str, Any]:
    length = np.asarray(drawn.mask).sum()
    return {
        "reward": float(np.nanmean(reward)),
        "entropy": float(-np.asarray(drawn.log_model, np.float64).sum() / max(length, 1.0)),
        "length": float(length / reward.size),
        "skipped": int(np.isnan(reward).sum()),
    }


def _placeholder(job: Job, prompts: Prompts) -> Trajectories:
    """Stands for the fresh batch of a method that draws none; only its shape is looked at."""
    shape = (len(prompts.ids), job.settings.sizes.num_samples, job.settings.sizes.horizon)
    zeros = np.zeros(shape, np.float32)
    return _trajectories(prompts.ids, zeros.astype(np.int32), zeros, zeros, zeros, zeros[..., 0])
