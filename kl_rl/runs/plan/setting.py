"""The sizes of a training step, in the terms of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kl_rl.methods.catalogue import method_named
from kl_rl.models.config import DecoderConfig
from kl_rl.runs.choice import Choice, choose
from kl_rl.runs.settings import Learning, Sizes, Task

__all__ = ["Setting"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one step of training is given: options of `kl-rl train`, with defaults for large models.

    Attributes:
      method: as for `kl-rl train`.
      batch: P, prompts of a step on all devices together.
      prompt_length: L, tokens.
      horizon: T, new tokens.
      num_samples: K, completions of each prompt.
      lora: rank of the adapter; 0: all weights are trained.
      twist: values on a "trunk" of their own or as a "head" on the base; None: as `kl-rl train` does.
      gradient_accumulation: parts of the batch in which gradients are gathered; divides P.
      compute_dtype: of matrix products; weights are float32.
      scan_layers: one compiled layer in a loop.
      remat: recompute activations in the backward pass.
    """

    method: str = "rlhf"
    batch: int = 64
    prompt_length: int = 512
    horizon: int = 512
    num_samples: int = 4
    lora: int = 0
    twist: str | None = None
    gradient_accumulation: int = 1
    compute_dtype: str = "bfloat16"
    scan_layers: bool = True
    remat: bool = True

    @property
    def sizes(self) -> Sizes:
        """How much is sampled."""
        return Sizes(
            batch=self.batch,
            gradient_accumulation=self.gradient_accumulation,
            num_samples=self.num_samples,
            horizon=self.horizon,
        )

    def learning(self, mesh: Mapping[str, int]) -> Learning:
        """How the policy is trained, on a mesh."""
        return Learning(
            lora=self.lora,
            twist=self.twist,
            mesh=tuple(mesh.items()),
            compute_dtype=self.compute_dtype,
            scan_layers=self.scan_layers,
            remat=self.remat,
        )

    def choice(self) -> Choice:
        """The method; its knob stands anywhere, since no program depends on it."""
        knob = method_named(self.method).knob
        anywhere: dict[str, Any] = {} if knob is None or knob.default is not None else {knob.option: 0.0}
        task = Task(self.method, base="", prompts="", reward="", **anywhere)
        return choose(task, self.sizes, Learning(twist=self.twist))

    def check(self, config: DecoderConfig) -> None:
        """Refuse sizes that cannot be.

        Raises:
          ValueError: naming the option as the command has it.
        """
        self.sizes, self.learning({}), self.choice()  # each refuses what is its own
        if self.prompt_length < 1:
            raise ValueError(f"--prompt-length must be at least 1; got {self.prompt_length}")
        length = self.prompt_length + self.horizon
        if length > config.context:
            raise ValueError(
                f"--prompt-length {self.prompt_length} and --horizon {self.horizon} make {length} tokens; "
                f"the model's context is {config.context}"
            )
