"""Which method: the comparison's catalogue under friendly names, its knob, and what it keeps between steps."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from kl_rl.experiments.compare.catalogue import CATALOGUE, Method
from kl_rl.runs import memory
from kl_rl.runs.memory import Memory
from kl_rl.runs.settings import Settings, Task
from kl_rl.storage.errors import TrainingError

__all__ = ["ALIASES", "TAKES_SAMPLES_AS_DRAWN", "Chosen", "choose"]

ALIASES: Mapping[str, str] = {
    "rlhf": "rloo",
    "reinforce": "rloo",
    "reward-weighted": "rwr",
    "decision-transformer": "dt-tilted",
    "vargrad": "vargrad-replay",
    "trajectory-balance": "tb-replay",
    "subtrajectory-balance": "subtb-replay",
    "path-consistency": "pcl-replay",
    "dpg": "alpha-1",
}

TAKES_SAMPLES_AS_DRAWN = frozenset(
    "rloo-free ppo grpo filter best-of-n expert-iteration dt-tilted dt-max dt-quantile ipo".split()
)
"""Methods whose target follows the sampler: with tempered samples they would not approach the law they are for."""

_FRESH, _REPLAY, _LOGGED, _COMPARED = memory.fresh(), memory.replay(), memory.logged(), memory.compared()
_GIVEN = memory.given()
_NEEDS_ITS_OWN = frozenset("rloo rloo-free ppo grpo alpha-0.5 alpha-1 expert-iteration".split())
_MEMORY: Mapping[str, Memory] = {
    "rwr-logged": _LOGGED,
    "vargrad-logged": _LOGGED,
    "vargrad-replay": _REPLAY,
    "tb-replay": _REPLAY,
    "subtb-replay": _REPLAY,
    "pcl-replay": _REPLAY,
    "dpo": _COMPARED,
    "ipo": _COMPARED,
}

_KNOBS: Mapping[str, Callable[[Task], float | None]] = {
    "beta": lambda task: task.beta,
    "beta_over_std": lambda task: task.beta,
    "beta_win_rate": lambda task: task.beta,
    "steps": lambda task: task.beta,
    "greatest": lambda task: task.beta,
    "n": lambda task: task.n,
    "threshold": lambda task: task.threshold,
    "fraction": lambda task: task.fraction,
}


class Chosen(NamedTuple):
    """A method ready to be built.

    Attributes:
      method: row of the catalogue.
      knob: its value.
      memory: what it keeps.
      returns: whether prompts begin with a return token.
    """

    method: Method
    knob: float
    memory: Memory
    returns: bool

    @property
    def drawn_from(self) -> str:
        """Whose completions the batches hold: "policy" (at least in part), "p0" (or a frozen policy), or "data"."""
        if self.memory is _GIVEN:
            return "data"
        own = self.memory.samples and self.method.family in ("rlhf", "off-policy", "between")
        return "policy" if own else "p0"

    @property
    def compares(self) -> bool:
        """Whether it learns from comparisons and not from rewards."""
        return self.method.family == "preference"

    @property
    def needs_groups(self) -> bool:
        """Whether it compares the completions of one prompt with each other."""
        return self.method.name in ("best-of-n", "vargrad-replay", "vargrad-logged")

    @property
    def weighs_behaviour(self) -> bool:
        """Whether it reads the log-probabilities under whatever drew its samples."""
        return self.method.name.startswith("rwr")


def _check(method: Method, settings: Settings) -> None:
    task, samples = settings.task, settings.sizes.num_samples
    if method.knob == "threshold" and task.threshold is None:
        raise TrainingError(f"{task.method} needs --threshold, the least reward of a sample that is imitated")
    if task.data is not None and method.name in _NEEDS_ITS_OWN:
        raise TrainingError(
            f"{task.method} learns from samples of its own policy and cannot use --data; dpo, ipo, rwr, filter, "
            "best-of-n, vargrad, trajectory-balance, path-consistency and dt-* can"
        )
    if method.knob == "n" and task.data is None and task.n > samples:
        raise TrainingError(f"--n must be at most --num-samples = {samples}; got {task.n:g}")
    if method.family == "preference" and samples % 2:
        raise TrainingError(f"{task.method} compares pairs: --num-samples must be even; got {samples}")
    if settings.learning.temperature != 1.0 and method.name in TAKES_SAMPLES_AS_DRAWN:
        raise TrainingError(
            f"{task.method} takes its samples as they are drawn: another --temperature than 1 would move what it "
            "learns; rlhf, reward-weighted, dpo and the off-policy methods correct for it"
        )
    if settings.sizes.gradient_accumulation > 1 and method.name.startswith("rwr"):
        raise TrainingError(
            f"{task.method} normalizes its weights over the whole batch: it cannot have --gradient-accumulation"
        )
    if samples < 2:
        raise TrainingError(f"--num-samples must be at least 2; got {samples}")


def choose(settings: Settings) -> Chosen:
    """Find the method and its knob.

    Args:
      settings: of the run.

    Returns:
      The method.

    Raises:
      TrainingError: no such method, or settings that it cannot work with.
    """
    name = ALIASES.get(settings.task.method, settings.task.method)
    found = {method.name: method for method in CATALOGUE}.get(name)
    if found is None:
        known = [*ALIASES, *(m.name for m in CATALOGUE)]
        near = difflib.get_close_matches(name.lower().replace("_", "-"), known, 1, 0.7)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise TrainingError(f"unknown method {settings.task.method!r}{meant} (known: {', '.join(known)})")
    _check(found, settings)
    knob = _KNOBS[found.knob](settings.task)
    assert knob is not None
    kept = _MEMORY.get(found.name, _FRESH) if settings.task.data is None else _GIVEN
    return Chosen(found, float(knob), kept, found.family == "conditioning")
