"""The comparison on text: no exact truth, so every number is a two-sided estimate."""

from kl_rl.experiments.compare.text.problem import TextPlan
from kl_rl.experiments.compare.text.report import collect_text
from kl_rl.experiments.compare.text.run import DEFAULT_METHODS, TextResult, run_text

__all__ = ["DEFAULT_METHODS", "TextPlan", "TextResult", "collect_text", "run_text"]
