"""One run: its beginning, and one step; sampling and learning are compiled, rewards come from the host between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from kl_rl.core.policy import Policy
from kl_rl.core.trajectories import Trajectories
from kl_rl.methods.memory import Ring
from kl_rl.methods.needs import base_policy
from kl_rl.rewards.host import HostReward, rewards_of
from kl_rl.runs.job import Job
from kl_rl.runs.programs import Drawn, Held, Knobs
from kl_rl.runs.prompts import Prompts
from kl_rl.runs.returns import RETURN_TOKENS, padded_edges
from kl_rl.sharding.processes import whole
from kl_rl.storage.errors import BadRewardValue
from kl_rl.tokenizer import Tokenizer

__all__ = ["Diverged", "Rewarded", "blank", "decoded", "draw", "of_base", "open_run", "rewarded", "take_step"]

_PROBES = 256  # samples of the base from which the return tokens are cut, where there are no data
_FILLING = 2**30  # folded into keys of what is drawn before the first step


class Diverged(ValueError):
    """The loss or its gradient is not a number any more; what was saved before is intact."""


class Rewarded(NamedTuple):
    """Completions with their rewards, on the host.

    Attributes:
      drawn: tokens and log-probabilities.
      reward: NaN where it failed; [P, K].
    """

    drawn: Drawn
    reward: np.ndarray


def decoded(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Texts of completions, without special tokens; [..., T] -> one for each row."""
    rows, real = tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]) > 0
    return [tokenizer.decode(row[kept]) for row, kept in zip(rows, real, strict=True)]


def rewarded(
    drawn: Drawn, prompts: Prompts, reward: HostReward, tokenizer: Tokenizer, *, skip: bool
) -> Rewarded:
    """Score completions on the host.

    Args:
      drawn: K completions of each prompt, on the host.
      prompts: P of them.
      reward: what scores.
      tokenizer: makes texts of them.
      skip: whether a reward that fails is NaN; else it raises.

    Returns:
      The completions with their rewards.

    Raises:
      BadRewardValue: the reward raised or gave no finite number.
    """
    tokens, mask = np.asarray(drawn.tokens), np.asarray(drawn.mask)
    texts = decoded(tokenizer, tokens, mask)
    each = [text for text in prompts.texts for _ in range(tokens.shape[1])]
    return Rewarded(drawn, rewards_of(reward, each, texts, skip=skip).reshape(tokens.shape[:2]))


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
    return batch.map_samples(lambda x: x[group[:, None], sample], prompt=batch.prompt[group])


def _batch(prompts: Prompts, found: Rewarded) -> Trajectories:
    """What the method learns from."""
    drawn: Any = found.drawn
    tokens, mask, log_behaviour = (np.asarray(x) for x in drawn[:3])
    arrays: tuple[Any, ...] = (
        prompts.ids,
        tokens,
        mask,
        np.ones_like(mask),
        log_behaviour,
        found.reward,
    )
    batch, bad = Trajectories(*arrays), np.isnan(found.reward)
    return _mended(batch, bad) if bad.any() else batch


def blank(job: Job) -> Held:
    """A run of the right structure, shapes and placement, before any sample: what a checkpoint is restored onto."""
    edges = job.array(np.full(RETURN_TOKENS - 1, np.inf, np.float32))
    held = job.programs.begin(job.inputs.base, job.knobs, edges, job.key())
    filling = job.choice.method.memory.filling
    if not filling:
        return held
    groups, train = filling * job.sizes.batch, job.inputs.train
    shape = (groups, job.sizes.num_samples, job.sizes.horizon)
    wide = lambda *size: np.zeros(size, np.float32)
    drawn: Any = Drawn(np.zeros(shape, np.int32), *(wide(*shape) for _ in range(3)))  # type: ignore[arg-type]
    empty = Prompts(np.zeros((groups, train.ids.shape[1]), np.int32), ())
    return _with_memory(job, held, _batch(empty, Rewarded(drawn, wide(*shape[:2]))))


def _with_memory(job: Job, held: Held, data: Trajectories) -> Held:
    return held._replace(memory=job.placed(Ring(data, job.array(np.int32(0)))))


def draw(job: Job, policy: Policy, key: jax.Array, prompts: Prompts, *, plain: bool = False) -> Rewarded:
    """K completions of each prompt with their rewards.

    Args:
      job: of the run.
      policy: who draws.
      key: PRNG key.
      prompts: P of them.
      plain: from the policy itself, whatever the run's temperature.

    Returns:
      The completions, on the host.
    """
    inputs, temperature = job.inputs, None if plain else job.knobs.temperature
    drawn = whole(job.programs.draw(policy, key, job.array(prompts.ids), temperature))
    return rewarded(drawn, prompts, inputs.reward, inputs.model.tokenizer, skip=job.skip_bad)


def of_base(
    job: Job, name: str, prompts: Prompts, key: Callable[[], jax.Array], *, plain: bool = False
) -> Rewarded:
    """Samples of p0, which are the same for every method: drawn once, where they are shared.

    Args:
      job: of the run.
      name: of what is drawn, among runs with the same seed.
      prompts: P of them.
      key: makes the PRNG key.
      plain: as for ``draw``.

    Returns:
      The completions, on the host.
    """
    drawing = lambda: draw(job, job.inputs.base, key(), prompts, plain=plain)
    return drawing() if job.pool is None else job.pool(name, drawing)


def _base_rounds(job: Job, rounds: int) -> list[tuple[Prompts, Rewarded]]:
    """Batches of p0's samples, before the first step."""
    key = jax.random.fold_in(job.key(), _FILLING)
    found = []
    for index in range(rounds):
        prompts = job.inputs.train.take(job.order(index))
        own = lambda index=index: jax.random.fold_in(key, index)
        found.append((prompts, of_base(job, f"filling-{index}", prompts, own)))
    return found


def open_run(job: Job) -> Held:
    """The run at its beginning: return tokens cut, memory filled with p0's samples.

    Args:
      job: of the run.

    Returns:
      What the run holds.

    Raises:
      BadRewardValue, RunError: the reward cannot be used, or never differs.
    """
    sizes, held, needs = job.sizes, blank(job), job.choice.method.needs
    if needs.returns:
        if job.inputs.data is None:
            rounds = _base_rounds(job, max(1, _PROBES // (sizes.batch * sizes.num_samples)))
            seen = np.concatenate([r.reward[np.isfinite(r.reward)] for _, r in rounds])
        else:
            seen = np.asarray(job.inputs.data.reward).ravel()
        held = held._replace(edges=job.array(padded_edges(seen)))
    if filling := job.choice.method.memory.filling:
        batches = [_batch(prompts, found) for prompts, found in _base_rounds(job, filling)]
        join: Any = lambda *leaves: np.concatenate(leaves)
        held = _with_memory(job, held, batches[0].map_prompts(join, *batches[1:]))
    return held


def take_step(job: Job, held: Held, step: int) -> tuple[Held, dict[str, Any]]:
    """One step: sample, reward, learn.

    Args:
      job: of the run.
      held: what it holds; its arrays are used up.
      step: number of the step, from 0.

    Returns:
      What the run holds now, and a row of numbers.

    Raises:
      BadRewardValue: the reward failed; ``held`` is intact.
      Diverged: the loss is not a number.
    """
    number, prompts = job.array(np.int32(step)), job.inputs.train.take(job.order(step))
    row: dict[str, Any] = {"step": step + 1}
    method = job.choice.method
    if method.memory.samples:
        found = _sampled(job, held, prompts, step)
        batch = _batch(prompts, found)
        row |= _about(found)
    elif job.inputs.data is not None:
        batch = job.inputs.data.map_prompts(lambda x: x[job.order(step)])
    else:
        batch = _placeholder(job, prompts)
    held, info = job.programs.step(job.inputs.base, held, _warmed(job, step), job.placed(batch), number)
    values = {name: float(x) for name, x in jax.device_get(info)._asdict().items()}
    for name in ("loss", "grad_norm"):
        if not np.isfinite(values[name]):
            raise Diverged(f"step {step + 1}: {name} is {values[name]}")
    return held, values | row


def _sampled(job: Job, held: Held, prompts: Prompts, step: int) -> Rewarded:
    key = lambda: jax.random.fold_in(held.key, 2 * step)
    if job.choice.method.needs.behaviour is base_policy:
        return of_base(job, f"step-{step}", prompts, key)
    return draw(job, job.programs.behaviour(job.inputs.base, held, job.knobs), key(), prompts)


def _warmed(job: Job, step: int) -> Knobs:
    """The learning rate rises over the first tenth of the steps, at most 10: Adam's first steps have full size."""
    warm = max(1, min(10, job.sizes.steps // 10))
    rate = job.knobs.learning_rate * np.float32(min(1.0, (step + 1) / warm))
    return job.knobs._replace(learning_rate=rate)


def _about(found: Rewarded) -> dict[str, Any]:
    """What the completions of a step were like."""
    drawn, reward = found
    length = np.asarray(drawn.mask).sum()
    return {
        "reward": float(np.nanmean(reward)),
        "entropy": float(-np.asarray(drawn.log_model, np.float64).sum() / max(length, 1.0)),
        "length": float(length / reward.size),
        "skipped": int(np.isnan(reward).sum()),
    }


def _placeholder(job: Job, prompts: Prompts) -> Trajectories:
    """Stands for the fresh batch of a method that draws none; only its shape is looked at."""
    shape = (len(prompts.ids), job.sizes.num_samples, job.sizes.horizon)
    zeros = np.zeros(shape, np.float32)
    drawn: Any = Drawn(zeros.astype(np.int32), zeros, zeros, zeros)  # type: ignore[arg-type]
    return _batch(prompts, Rewarded(drawn, zeros[..., 0]))
