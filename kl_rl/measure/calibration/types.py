"""What a calibration measurement returns."""

from __future__ import annotations

from typing import NamedTuple

from kl_rl.core.estimate import Estimate

__all__ = ["Bounded", "SampledBudget"]


class Bounded(NamedTuple):
    """A quantity with its standard error, 95 % limits and, where they exist, stochastic bounds.

    Attributes:
        value: point estimate.  stderr: its standard error (None: unknown).
        lower, upper: limits that hold the truth in at least 95 % of runs; None: the samples cannot give one.
        lower_bound, upper_bound: estimates whose expectations lie below and above the truth.
    """

    value: float | None
    stderr: float | None = None
    lower: float | None = None
    upper: float | None = None
    lower_bound: Estimate | None = None
    upper_bound: Estimate | None = None


class SampledBudget(NamedTuple):
    """All that the samples say about one fine-tune; divergences in nats, averaged over prompts.

    Attributes:
        kl: KL(q || p0), the mean log-ratio.
        P, S, C: price of the reward, shape of its marginal, calibration loss.
        C_fwd, C_JS: the forward twin E_{r~p0} KL(p0(y|r) || q(y|r)), and the symmetric version.
        beta_fit: temperature of the tilt with the same mean reward.
        C_corrected: calibration loss inside the levels against p0 e^{r/beta}; None for exact levels.
        binning_bound: largest C that an exact tilt could show because of the bins; 0 for exact levels.
        beta: the temperature used for these two; None: unknown.
        lambda_spread: standard deviation over prompts of the fitted 1/beta; None: fewer than two prompts
            qualify.
        mean_reward: (under q, under p0).
        n_tuned, n_base: samples used.  num_prompts.
        ess_tuned: effective sample size of the tuned samples as importance samples of p0 (weights e^{-l}).
        ess_base: that of the base samples as samples of q (weights e^{l}); None without them.
        bins: "exact" or "quantile".  num_levels.
        unreached: share of the tuned policy in levels that the base samples are not expected to reach.
        warnings: plain sentences.
    """

    kl: Bounded
    P: Bounded
    S: Bounded
    C: Bounded
    C_fwd: Bounded
    C_JS: Bounded | None
    beta_fit: Bounded
    C_corrected: Bounded | None
    binning_bound: float
    beta: float | None
    lambda_spread: float | None
    mean_reward: tuple[float, float]
    n_tuned: int
    n_base: int
    num_prompts: int
    ess_tuned: float
    ess_base: float | None
    bins: str
    num_levels: int
    unreached: float
    warnings: list[str]
