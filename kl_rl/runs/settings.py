"""What a run is asked to do: small frozen groups of plain values, kept in ``run.json`` and compared on resume."""

from __future__ import annotations

import dataclasses
from typing import Any

from kl_rl.storage.errors import RunError

__all__ = ["Learning", "Pretraining", "Saving", "Settings", "Sizes", "Task"]


def _option(name: str) -> str:
    return "--lr" if name == "learning_rate" else f"--{name.replace('_', '-')}"


def _at_least(group: Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(group, name)
        if value is not None and not value >= least:
            raise RunError(f"{_option(name)} must be at least {least:g}; got {value}")


def _positive(group: Any, *names: str) -> None:
    for name in names:
        value = getattr(group, name)
        if value is not None and not 0 < value < float("inf"):
            raise RunError(f"{_option(name)} must be positive and finite; got {value}")


def _seed(group: Any) -> None:
    if not 0 <= group.seed < 2**32:  # of what keys are made of
        raise RunError(f"--seed must be at least 0 and less than 2**32; got {group.seed}")


@dataclasses.dataclass(frozen=True)
class Task:
    """The problem and the method.

    Attributes:
      method: a card's name, a family (its first card), or ``module:NAME`` of a card of one's own.
      base: folder of the base model.
      prompts: file of prompts; None: those of the data.
      reward: see ``kl_rl.rewards.load_reward``.
      beta, n, threshold, fraction: where the method's knob stands, if it is this one; None: its default.
      options: of the method, "NAME=VALUE" each.
      prompt_length: cut a .txt file into prompts of this many tokens; None: its lines are the prompts.
      num_prompts: use this many prompts at most, spread over the file; None: all.
      data: file to learn from instead of samples: comparisons, or completions with rewards; None: samples.
    """

    method: str
    base: str
    prompts: str | None
    reward: str
    beta: float | None = None
    n: float | None = None
    threshold: float | None = None
    fraction: float | None = None
    options: tuple[str, ...] = ()
    prompt_length: int | None = None
    num_prompts: int | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be.

        Raises:
          RunError: naming the option.
        """
        _at_least(self, 1, "prompt_length", "num_prompts")
        if (self.prompts is None) == (self.data is None):
            raise RunError("give --prompts, to draw completions, or --data, to learn from those in a file")
        if self.data is not None and (self.prompt_length or self.num_prompts) is not None:
            raise RunError("--prompt-length and --num-prompts are about --prompts, not about --data")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is sampled.

    Attributes:
      steps: training steps.
      batch: B, prompts per step.
      gradient_accumulation: gradients add up over this many parts of the batch; divides B.
      num_samples: K, completions of each prompt.
      horizon: T, longest completion, tokens.
      held_out: prompts kept from training, to measure on.
      eval_every: steps between two measurements; 0: only at the beginning and at the end.
      eval_samples: completions of each held-out prompt in a measurement, of either policy.
    """

    steps: int = 200
    batch: int = 8
    gradient_accumulation: int = 1
    num_samples: int = 8
    horizon: int = 48
    held_out: int = 8
    eval_every: int = 0
    eval_samples: int = 32

    def __post_init__(self) -> None:
        """Refuse values that cannot be.

        Raises:
          RunError: naming the option.
        """
        _at_least(self, 1, "steps", "batch", "gradient_accumulation", "num_samples", "horizon")
        _at_least(self, 0, "held_out", "eval_every")
        if self.batch % self.gradient_accumulation:
            raise RunError(
                f"--gradient-accumulation must divide --batch = {self.batch}; got {self.gradient_accumulation}"
            )
        _at_least(self, 2, "eval_samples")


@dataclasses.dataclass(frozen=True)
class Learning:
    """How the policy is trained.

    Attributes:
      learning_rate: peak, after a short warm-up; decays linearly to a tenth.
      lora: rank of the adapter; 0: all weights are trained.
      twist: values (critic, state flow) as a "trunk" of their own, or as a "head" on the base; None: a trunk, beside an
        adapter a head.
      temperature: of the sampler.
      seed: of samples, prompt order and initialization.
      mesh: devices along ``data``, ``fsdp`` and ``tensor``.
      compute_dtype: of matrix products.
      scan_layers: one compiled layer in a loop: deep models compile fast.
      remat: recompute each layer in the backward pass instead of keeping its activations.
    """

    learning_rate: float = 1e-4
    lora: int = 0
    twist: str | None = None
    temperature: float = 1.0
    seed: int = 0
    mesh: tuple[tuple[str, int], ...] = ()
    compute_dtype: str = "float32"
    scan_layers: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        """Refuse values that cannot be.

        Raises:
          RunError: naming the option.
        """
        _positive(self, "learning_rate", "temperature")
        _at_least(self, 0, "lora")
        _seed(self)
        if self.twist not in (None, "head", "trunk"):
            raise RunError(f"--twist must be head or trunk; got {self.twist}")

    @property
    def trains_trunk(self) -> bool:
        """Whether values have a network of their own."""
        return self.twist == "trunk" if self.twist else not self.lora


@dataclasses.dataclass(frozen=True)
class Saving:
    """What may differ between a run and its continuation.

    Attributes:
      save_every: steps between two checkpoints.
      on_bad_reward: "stop", or "skip": the sample is replaced by a good one of its group.
    """

    save_every: int = 20
    on_bad_reward: str = "stop"

    def __post_init__(self) -> None:
        """Refuse values that cannot be.

        Raises:
          RunError: naming the option.
        """
        _at_least(self, 1, "save_every")
        if self.on_bad_reward not in ("stop", "skip"):
            raise RunError(f"--on-bad-reward must be stop or skip; got {self.on_bad_reward}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides what a run does: task, sizes, learning, saving."""

    task: Task
    sizes: Sizes = Sizes()
    learning: Learning = Learning()
    saving: Saving = Saving()

    def compared(self) -> dict[str, Any]:
        """What a resumed run must have been asked alike, by option name; plain JSON.

        The mesh may change: the checkpoint is restored onto the new one, and what follows is equal to rounding.
        """
        flat: dict[str, Any] = {}
        for group in (self.task, self.sizes, self.learning):
            flat |= dataclasses.asdict(group)
        del flat["mesh"]
        return flat


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """A small byte model and its training.

    Attributes:
      minutes: on two ordinary CPU cores; fixes the number of steps, so that a run can be repeated.
      steps: overrides the minutes.
      width: d.
      layers: N.
      heads: H, divides d.
      context: bytes of context, the begin mark included.
      batch: windows per step.
      learning_rate: peak, after a linear warm-up and before a cosine decay.
      seed: of initialization and windows.
    """

    minutes: float = 5.0
    steps: int | None = None
    width: int = 128
    layers: int = 3
    heads: int = 4
    context: int = 128
    batch: int = 32
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot be.

        Raises:
          RunError: naming the option.
        """
        _positive(self, "minutes", "learning_rate")
        _at_least(self, 1, "steps", "width", "layers", "heads", "batch")
        _at_least(self, 8, "context")
        _seed(self)
        if self.width % self.heads:
            raise RunError(f"--width must be a multiple of --heads, {self.heads}; got {self.width}")
