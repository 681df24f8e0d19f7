"""The sizes of a training step."""

from __future__ import annotations

import dataclasses

from kl_rl.models.config import DecoderConfig
from kl_rl.runs.plan.methods import METHODS

__all__ = ["Setting", "check_setting"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one step of training is given.

    Attributes:
      method: a name in ``METHODS``; "rlhf" is PPO with a twist head.
      prompts: P, prompts per step on all devices together.
      prompt_length: L.
      horizon: T, new tokens.
      samples: K per prompt.
      lora: rank of adapters, or 0: all parameters are trained.
      twist_trunk: the twist has a trunk of its own, trained; otherwise it reads the frozen base.
      parts: of the batch, over which gradients add up.
    """

    method: str = "rlhf"
    prompts: int = 64
    prompt_length: int = 512
    horizon: int = 512
    samples: int = 4
    lora: int = 0
    twist_trunk: bool = False
    parts: int = 1


def check_setting(setting: Setting, config: DecoderConfig) -> None:
    """Refuse sizes that cannot be.

    Raises:
      ValueError: naming the option.
    """
    if setting.method not in METHODS:
        raise ValueError(f"--method {setting.method}: unknown; known: {', '.join(METHODS)}")
    options = {"batch": "prompts", "prompt": "prompt_length", "horizon": "horizon", "samples": "samples"}
    for option, name in options.items():
        if getattr(setting, name) < 1:
            raise ValueError(f"--{option} must be at least 1; got {getattr(setting, name)}")
    if setting.parts < 1 or setting.prompts % setting.parts:
        raise ValueError(
            f"--gradient-accumulation must divide --batch {setting.prompts}; got {setting.parts}"
        )
    if setting.lora < 0:
        raise ValueError(f"--lora must be a rank of at least 1; got {setting.lora}")
    length = setting.prompt_length + setting.horizon
    if length > config.context:
        raise ValueError(
            f"--prompt {setting.prompt_length} and --horizon {setting.horizon} make {length} tokens; "
            f"the model's context is {config.context}"
        )
    least = METHODS[setting.method].min_samples
    if setting.samples < least:
        raise ValueError(
            f"--samples {setting.samples}: {setting.method} compares samples of one prompt and needs {least}"
        )
    if setting.twist_trunk and not METHODS[setting.method].twist:
        raise ValueError(f"--twist trunk: {setting.method} has no twist head")
