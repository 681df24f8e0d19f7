"""What all lanes stand on: one base, its prompts and reward, its samples, and the mean rewards to aim at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kl_rl.experiments.compare.model.pool import SharedSamples
from kl_rl.huggingface.opened import load_model
from kl_rl.methods import laws
from kl_rl.methods.card import Method
from kl_rl.methods.catalogue import METHODS
from kl_rl.methods.knobs import BETA, aim
from kl_rl.rewards.host import HostReward, load_reward
from kl_rl.runs.choice import Choice, check_choice
from kl_rl.runs.evaluate import Column, base_column
from kl_rl.runs.job import Inputs, Job, assemble, execution_of
from kl_rl.runs.prompts import load_prompts, reader_of, split_rows
from kl_rl.runs.returns import by_token, with_returns
from kl_rl.runs.settings import Learning, Sizes
from kl_rl.storage.errors import RunError

__all__ = ["Comparison", "ModelGround", "Question", "open_ground"]


@dataclasses.dataclass(frozen=True)
class Question:
    """What is compared.

    Attributes:
      base: Hugging Face folder, hub name, or output of a run.
      prompts: file of prompts.
      reward: see ``kl_rl.rewards.load_reward``.
      prompt_length: cut a .txt file into prompts of so many tokens.
      num_prompts: use at most so many.
      shifts: where the knobs aim: mean rewards this many standard deviations of the base's above its mean.
    """

    base: str
    prompts: str
    reward: str
    prompt_length: int | None = None
    num_prompts: int | None = None
    shifts: tuple[float, ...] = (0.5, 1.5)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison: the question, and how much is spent on each lane."""

    question: Question
    sizes: Sizes = Sizes()
    learning: Learning = Learning()
    seeds: int = 1


class ModelGround(NamedTuple):
    """What all lanes share.

    Attributes:
      comparison: what was asked.
      inputs: base, prompts, reward.
      conditional: the same with return tokens.
      folder: of shared samples.
      between: called before anything is drawn.
      drawn: samples of p0 on the held-out prompts.
      targets: mean rewards to aim at, ascending.
    """

    comparison: Comparison
    inputs: Inputs
    conditional: Inputs
    folder: Path
    between: Callable[[], None]
    drawn: Column | None = None
    targets: tuple[float, ...] = ()

    @property
    def reward(self) -> np.ndarray:
        """Of p0's samples on the held-out prompts, failures replaced by the prompt's mean; [P, M]."""
        assert self.drawn is not None
        reward = self.drawn.reward[self.drawn.by_prompt]
        mean = np.nanmean(reward, axis=1, keepdims=True)
        return np.where(np.isnan(reward), mean, reward)

    @property
    def log_base(self) -> np.ndarray:
        """The empirical law of these samples; [P, M]."""
        return np.full(self.reward.shape, -np.log(self.reward.shape[1]))

    def job(self, choice: Choice, seed: int) -> Job:
        """The fixed parts of one lane."""
        comparison = self.comparison
        inputs = self.conditional if choice.method.needs.returns else self.inputs
        learning = dataclasses.replace(comparison.learning, seed=seed)
        made = assemble(choice, inputs, comparison.sizes, learning, None, skip_bad=True)
        return made._replace(pool=self.pool(seed))

    def pool(self, seed: int) -> Callable[..., object]:
        """Samples of p0: those to measure with are of all lanes, those to learn from of one seed."""
        common = SharedSamples(self.folder / "measured", self.between)
        own = SharedSamples(self.folder / f"seed-{seed}", self.between)
        return lambda name, draw: (common if name.startswith("held-out") else own)(name, draw)

    def values(self, method: Method) -> list[float]:
        """Where the knob stands to reach each target, without repetitions.

        Early stopping is one lane for all targets, at the strongest tilt; without a knob there is one lane.

        Raises:
          NoFixedPoint: the method has none on these samples.
        """
        samples = self.comparison.sizes.num_samples
        reward = by_token(self.reward, self.reward) if method.needs.returns else self.reward
        to = lambda law, mean, knob: aim(law, self.log_base, reward, mean, knob, samples=samples)
        if method.knob is None:
            return [0.0]
        if method.law is None:
            return [to(laws.tilt, self.targets[-1], BETA)]
        return list(dict.fromkeys(to(method.law, mean, method.knob) for mean in self.targets))


def _targets(reward: np.ndarray, shifts: tuple[float, ...]) -> tuple[float, ...]:
    """Mean rewards some standard deviations above the base's, at most 0.9 of the way to the largest seen."""
    top = reward.max(1).mean() - reward.mean()
    return tuple(dict.fromkeys(float(reward.mean() + min(s * reward.std(), 0.9 * top)) for s in shifts))


def open_ground(
    comparison: Comparison,
    folder: Path,
    between: Callable[[], None],
    reward: HostReward | None = None,
) -> ModelGround:
    """Open base, prompts and reward, and sample the base.

    Args:
      comparison: what is asked.
      folder: of shared samples.
      between: called before anything is drawn; may raise, to stop.
      reward: what scores, if it is not named in the question.

    Returns:
      The ground.

    Raises:
      RunError, DataError: naming what cannot be used.
    """
    question, sizes, execution = comparison.question, comparison.sizes, execution_of(comparison.learning)
    scored = load_reward(question.reward) if reward is None else reward
    model = load_model(question.base, execution)
    reader = reader_of(model, sizes.horizon, place=True)
    prompts = load_prompts(question.prompts, question.prompt_length, question.num_prompts, reader)
    rows, kept = split_rows(prompts.texts, sizes.held_out, comparison.learning.seed)
    inputs = Inputs(model, model.base, prompts.take(rows), prompts.take(kept), None, scored)
    returning = with_returns(model, execution)
    conditional = inputs._replace(model=returning, base=returning.base)
    ground = ModelGround(comparison, inputs, conditional, folder, between)
    job = ground.job(Choice(METHODS[0], 1.0), seed=comparison.learning.seed)
    ground = ground._replace(drawn=base_column(job))
    if np.ptp(ground.reward) == 0:
        raise RunError(
            f"--reward {scored.name}: all {ground.reward.size} completions of the base model score "
            f"{ground.reward.flat[0]:g}: there is nothing to aim at; use another reward, a longer --horizon or "
            "other prompts"
        )
    return ground._replace(targets=_targets(ground.reward, question.shifts))


def check_methods(methods: tuple[Method, ...], sizes: Sizes, learning: Learning) -> None:
    """Refuse, before anything is opened, what a method needs and these sizes do not give.

    Raises:
      RunError: naming the option.
    """
    for method in methods:
        low = 1.0 if method.knob is None or method.knob.option == "n" else 0.5
        check_choice(Choice(method, low), sizes, learning)
