"""Calibration loss of anybody's fine-tune from samples: estimators, stochastic bounds, honest intervals. numpy only."""

from kl_rl.calibration.sampled import calibration_budget
from kl_rl.calibration.types import Bounded, Budget

__all__ = ["Bounded", "Budget", "calibration_budget"]
