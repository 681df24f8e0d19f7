"""The trained model as a Hugging Face folder: an adapter merged, a conditional model with its return prior."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from kl_rl.huggingface import save_checkpoint
from kl_rl.models import merge_lora
from kl_rl.runs.job import Job
from kl_rl.runs.programs import Held
from kl_rl.runs.returns import write_returns
from kl_rl.sharding.processes import whole
from kl_rl.tokenizer import Tokenizer

__all__ = ["export"]


class _Conditional(NamedTuple):
    """What is written beside the weights of a conditional model: its tokenizer and its return prior."""

    tokenizer: Tokenizer
    first_token: int
    log_prior: np.ndarray
    edges: np.ndarray

    def save(self, folder: Path) -> None:
        """Write all files."""
        self.tokenizer.save(folder)
        write_returns(folder, self.first_token, self.log_prior, self.edges)


def export(job: Job, held: Held, folder: Path) -> None:
    """Write what was learned so that transformers and ``kl-rl sample`` open it.

    Args:
      job: the run's fixed parts.
      held: by the run at its end, in every process.
      folder: made by the first process, or replaced as a whole.

    Raises:
      OSError: the disk is full or cannot be written.
    """
    model, base = job.inputs.model, job.inputs.base
    policy = job.programs.trained(base, held)
    weights = merge_lora(policy) if job.lora else policy.params
    tokenizer, beside = model.tokenizer, None
    if job.choice.method.needs.returns:
        mixed = job.programs.deployed(base, held, job.knobs)
        beside = _Conditional(tokenizer, model.first_token, *whole((mixed.params.log_prior, held.edges)))
    save_checkpoint(folder, model.config, weights, like=model.checkpoint, tokenizer_from=beside or tokenizer)
