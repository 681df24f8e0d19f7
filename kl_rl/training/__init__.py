"""Runs that survive: pretraining of a small byte model, fine-tuning by any method of the catalogue with host rewards.

    job = make_job(settings)
    run = start(job)
    run, row = advance(job, run, step)

``train`` is that loop with checkpoints, measurements and files around it.
"""

from kl_rl.huggingface.opened import load_model
from kl_rl.storage.errors import BadRewardValue, Stopped, TrainingError
from kl_rl.training.evaluate import Measured, evaluation
from kl_rl.training.export import export
from kl_rl.training.job import Job, make_job
from kl_rl.training.pretraining import pretrain
from kl_rl.training.programs import Run
from kl_rl.training.run import Diverged, advance, start
from kl_rl.training.settings import Learning, PretrainPlan, Saving, Settings, Sizes, Task
from kl_rl.training.train import train

__all__ = [
    "BadRewardValue",
    "Diverged",
    "Job",
    "Learning",
    "Measured",
    "PretrainPlan",
    "Run",
    "Saving",
    "Settings",
    "Sizes",
    "Stopped",
    "Task",
    "TrainingError",
    "advance",
    "evaluation",
    "export",
    "load_model",
    "make_job",
    "pretrain",
    "start",
    "train",
]
