"""Proper scores and calibration errors of probability forecasts; outcomes may be probabilities.

An event is a forecast f in [0, 1] (the confidence), an outcome o and a weight. With o in {0, 1} these are the
usual sample statistics; with o the true probability of the event they are exact expectations: a known world
needs no sampling. A calibration error is about a text: use text of the base or of the posterior. On text that
the model wrote itself every model is perfectly calibrated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import fft

__all__ = [
    "Decomposition",
    "brier_decomposition",
    "brier_score",
    "expected_calibration_error",
    "fit_temperature",
    "log_decomposition",
    "log_score",
    "smooth_calibration_error",
    "smoothed_residual",
    "tempered",
]

_ROUNDING = 1e-9


class Decomposition(NamedTuple):
    """A proper score in parts, an identity: ``score = uncertainty - resolution + reliability + within``.

    Attributes:
      reliability: distance of the bins' mean forecast from their outcome frequency; 0 if calibrated.
      resolution: how far the bins' frequencies are from the overall one.
      uncertainty: score of the best constant forecast.
      within: what varies inside the bins; 0 if all forecasts of a bin are equal.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within: float

    @property
    def score(self) -> float:
        """The score that was decomposed."""
        return self.uncertainty - self.resolution + self.reliability + self.within


class _Events(NamedTuple):
    confidence: np.ndarray  # [M]
    outcome: np.ndarray  # [M]
    weight: np.ndarray  # [M], sums to one


def _weights(weight: np.ndarray | None, size: int) -> np.ndarray:
    """Weights that sum to one; equal ones if None."""
    if size == 0:
        raise ValueError("there are no events: pass at least one forecast")
    if weight is None:
        return np.full(size, 1.0 / size)
    array = np.asarray(weight, np.float64)
    if array.shape != (size,):
        raise ValueError(f"weight must have shape ({size},), got {array.shape}")
    total = array.sum()
    if not (np.isfinite(total) and total > 0 and array.min() >= 0):
        raise ValueError("weight must be finite and nonnegative, with a positive sum")
    return array / total


def _probabilities(name: str, value: np.ndarray) -> np.ndarray:
    array = np.asarray(value, np.float64)
    if not np.all((array >= -_ROUNDING) & (array <= 1 + _ROUNDING)):
        raise ValueError(f"{name} must lie in [0, 1] and not be NaN")
    return np.clip(array, 0.0, 1.0)


def _events(confidence: np.ndarray, outcome: np.ndarray, weight: np.ndarray | None) -> _Events:
    f, o = _probabilities("confidence", confidence), _probabilities("outcome", outcome)
    if f.ndim != 1 or f.shape != o.shape:
        raise ValueError(f"confidence and outcome must both have shape (M,), got {f.shape} and {o.shape}")
    return _Events(f, o, _weights(weight, len(f)))


def _bins(events: _Events, num_bins: int, equal_mass: bool) -> np.ndarray:
    """Bin of each event: cells [b/B, (b+1)/B) of the confidence or of its quantile, ties together; [M]."""
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    position = events.confidence
    if equal_mass:
        _, index = np.unique(events.confidence, return_inverse=True)
        mass = np.bincount(index, events.weight)
        position = (np.cumsum(mass) - 0.5 * mass)[index]
    return np.minimum((position * num_bins).astype(np.int64), num_bins - 1)


def _bin_means(events: _Events, index: np.ndarray, num_bins: int) -> _Events:
    """Mean confidence and outcome of every bin (0 where empty) and the bins' weights; B events."""
    weight = np.bincount(index, events.weight, num_bins)
    safe = np.where(weight > 0, weight, 1.0)
    f = np.bincount(index, events.weight * events.confidence, num_bins) / safe
    o = np.bincount(index, events.weight * events.outcome, num_bins) / safe
    return _Events(np.minimum(f, 1.0), np.minimum(o, 1.0), weight)


def expected_calibration_error(
    confidence: np.ndarray,
    outcome: np.ndarray,
    weight: np.ndarray | None = None,
    *,
    num_bins: int = 15,
    equal_mass: bool = False,
) -> float:
    """``ECE = sum_b w_b |mean outcome - mean confidence|`` over bins of the confidence.

    With sampled outcomes it is biased up by about ``sqrt(B / M)``, and it jumps with the bins. Naeini et al.
    2015; Guo et al. 2017 (arXiv 1706.04599).

    Args:
      confidence: forecasts in [0, 1]; [M].
      outcome: 0 or 1, or the true probability of the event; [M].
      weight: nonnegative; equal if None; [M].
      num_bins: B.
      equal_mass: bins of equal weight instead of equal width.

    Returns:
      A probability.

    Raises:
      ValueError: for shapes that differ, values outside [0, 1] or no weight.
    """
    events = _events(confidence, outcome, weight)
    means = _bin_means(events, _bins(events, num_bins, equal_mass), num_bins)
    return float(means.weight @ np.abs(means.outcome - means.confidence))


def _residual_spectrum(events: _Events, num_cells: int) -> np.ndarray:
    """Cosine transform of the binned residual measure ``sum_i w_i (o_i - f_i) delta_{f_i}``; [cells]."""
    cell = np.minimum((events.confidence * num_cells).astype(np.int64), num_cells - 1)
    residual = events.weight * (events.outcome - events.confidence)
    return fft.dct(np.bincount(cell, residual, num_cells), type=2, norm="ortho")


def _smoothed_mass(spectrum: np.ndarray, sigma: float) -> float:
    """Mass of residual * K_sigma; a reflected Gaussian is diagonal in cosines, e^{-(pi k sigma)^2 / 2}."""
    damping = np.exp(-0.5 * (np.pi * sigma * np.arange(len(spectrum))) ** 2)
    return float(np.abs(fft.idct(spectrum * damping, type=2, norm="ortho")).sum())


def smoothed_residual(
    confidence: np.ndarray,
    outcome: np.ndarray,
    sigma: float,
    weight: np.ndarray | None = None,
    *,
    num_cells: int = 4096,
) -> float:
    """``smECE_sigma = int_0^1 |E[(o - f) K_sigma(t, f)]| dt``, K_sigma the Gaussian reflected at 0 and 1.

    It does not increase with sigma (>= 0). Other arguments and errors as in ``smooth_calibration_error``.
    """
    return _smoothed_mass(_residual_spectrum(_events(confidence, outcome, weight), num_cells), sigma)


def smooth_calibration_error(
    confidence: np.ndarray, outcome: np.ndarray, weight: np.ndarray | None = None, *, num_cells: int = 4096
) -> float:
    """smECE, the fixed point ``sigma = smECE_sigma``: a consistent calibration measure without bins.

    Forecasts are rounded to a grid of cells, so differences below ``1 / num_cells`` are smoothed away.
    Blasiok and Nakkiran 2023 (arXiv 2309.12236).

    Args:
      confidence: forecasts in [0, 1]; [M].
      outcome: 0 or 1, or the true probability of the event; [M].
      weight: nonnegative; equal if None; [M].
      num_cells: cells of the grid on [0, 1].

    Returns:
      A probability; errors as in ``expected_calibration_error``.
    """
    spectrum = _residual_spectrum(_events(confidence, outcome, weight), num_cells)
    low, high = 0.0, 1.0
    for _ in range(48):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _smoothed_mass(spectrum, middle) > middle else (low, middle)
    return low


def brier_score(confidence: np.ndarray, outcome: np.ndarray, weight: np.ndarray | None = None) -> float:
    """``E (f - Y)^2 = mean (f - o)^2 + o (1 - o)`` of binary events (Brier 1950).

    Arguments and errors as in ``expected_calibration_error``.

    Returns:
      Between 0 (perfect) and 1; 1/V times the multiclass score if the V events of a forecast are pooled.
    """
    f, o, w = _events(confidence, outcome, weight)
    return float(np.sum(w * ((f - o) ** 2 + o * (1 - o))))


def brier_decomposition(
    confidence: np.ndarray,
    outcome: np.ndarray,
    weight: np.ndarray | None = None,
    *,
    num_bins: int = 15,
    equal_mass: bool = False,
) -> Decomposition:
    """Brier score in parts, over bins k with weight w_k, mean forecast f_k and frequency o_k.

    ``reliability = sum w_k (f_k - o_k)^2``, ``resolution = sum w_k (o_k - o)^2``,
    ``uncertainty = o (1 - o)``, ``within = sum_i w_i [(f_i - f_k)^2 - 2 (f_i - f_k)(o_i - o_k)]``.
    Arguments and errors as in ``expected_calibration_error``. Murphy 1973; Stephenson et al. 2008.
    """
    events = _events(confidence, outcome, weight)
    index = _bins(events, num_bins, equal_mass)
    f, o, w = _bin_means(events, index, num_bins)
    mean = float(np.sum(events.weight * events.outcome))
    df, do = events.confidence - f[index], events.outcome - o[index]
    return Decomposition(
        reliability=float(w @ (f - o) ** 2),
        resolution=float(w @ (o - mean) ** 2),
        uncertainty=mean * (1 - mean),
        within=float(np.sum(events.weight * (df * df - 2 * df * do))),
    )


def _cross(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
    """``p log(q / r)``; 0 where p = 0 or q = r, inf where only r = 0."""
    counts = (p > 0) & (q != r)
    with np.errstate(divide="ignore"):
        return p * (np.log(np.where(counts, q, 1.0)) - np.log(np.where(counts, r, 1.0)))


def _binary_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return _cross(p, p, q) + _cross(1 - p, 1 - p, 1 - q)


def log_decomposition(
    confidence: np.ndarray,
    outcome: np.ndarray,
    weight: np.ndarray | None = None,
    *,
    num_bins: int = 15,
    equal_mass: bool = False,
) -> Decomposition:
    """Log score ``E[-o log f - (1 - o) log(1 - f)]`` of binary events in parts, nats.

    ``reliability = sum w_k kl(o_k || f_k)``, ``resolution = sum w_k kl(o_k || o)``, ``uncertainty = H(o)``,
    ``within = sum_i w_i [o_i log(f_k / f_i) + (1 - o_i) log((1 - f_k) / (1 - f_i))]``, kl and H of coins.
    A forecast that excludes what happens makes ``within`` (or ``reliability``) infinite.
    Arguments and errors as in ``expected_calibration_error``. Broecker 2009 (arXiv 0806.0813).
    """
    events = _events(confidence, outcome, weight)
    index = _bins(events, num_bins, equal_mass)
    f, o, w = _bin_means(events, index, num_bins)
    mean = np.sum(events.weight * events.outcome)
    inside = _cross(events.outcome, f[index], events.confidence)
    inside = inside + _cross(1 - events.outcome, 1 - f[index], 1 - events.confidence)
    counted, used = events.weight > 0, w > 0
    return Decomposition(
        reliability=float(w[used] @ _binary_kl(o[used], f[used])),
        resolution=float(w[used] @ _binary_kl(o[used], np.broadcast_to(mean, o[used].shape))),
        uncertainty=float(_cross(mean, np.ones(()), mean) + _cross(1 - mean, np.ones(()), 1 - mean)),
        within=float(np.sum(events.weight[counted] * inside[counted])),
    )


def _expected_log(log_probs: np.ndarray, outcome_probs: np.ndarray) -> np.ndarray:
    """``sum_v o_v log q_v`` with 0 * -inf = 0; [M, V] -> [M]."""
    possible = outcome_probs > 0
    return np.where(possible, outcome_probs * np.where(possible, log_probs, 0.0), 0.0).sum(1)


def log_score(log_probs: np.ndarray, outcome_probs: np.ndarray, weight: np.ndarray | None = None) -> float:
    """``E[-log q(Y)] = -mean sum_v o_v log q_v``: the multiclass log score, nats (Good 1952).

    Args:
      log_probs: log-forecasts, nats; [M, V].
      outcome_probs: one-hot outcomes or the true probabilities; [M, V].
      weight: nonnegative; equal if None; [M].

    Returns:
      Nats per forecast; inf if a forecast excludes what can happen.

    Raises:
      ValueError: for shapes that differ, outcomes outside [0, 1] or no weight.
    """
    log_q, o, w = _table(log_probs, outcome_probs, weight)
    counted = w > 0
    return float(-np.sum(w[counted] * _expected_log(log_q[counted], o[counted])))


def _table(
    log_probs: np.ndarray, outcome_probs: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    log_q, o = np.asarray(log_probs, np.float64), _probabilities("outcome_probs", outcome_probs)
    if log_q.ndim != 2 or log_q.shape != o.shape:
        shapes = f"{log_q.shape} and {o.shape}"
        raise ValueError(f"log_probs and outcome_probs must both have shape (M, V), got {shapes}")
    return log_q, o, _weights(weight, len(log_q))


def tempered(log_probs: np.ndarray, temperature: float) -> np.ndarray:
    """``q^(1/T) / sum q^(1/T)`` of every row, in nats; [M, V] -> [M, V]."""
    scaled = np.asarray(log_probs, np.float64) / temperature
    scaled = scaled - scaled.max(1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(1, keepdims=True))


def fit_temperature(
    log_probs: np.ndarray,
    outcome_probs: np.ndarray,
    weight: np.ndarray | None = None,
    *,
    limits: tuple[float, float] = (1e-2, 1e2),
) -> float:
    """The temperature T at which ``q^(1/T)`` has the least log score, a convex problem in 1/T.

    There ``E sum_v q_T log q = E sum_v o log q``. T > 1: the model is overconfident. Guo et al. 2017.

    Args:
      log_probs: log-forecasts, nats; [M, V].
      outcome_probs: one-hot outcomes or the true probabilities; [M, V].
      weight: nonnegative; equal if None; [M].
      limits: smallest and largest T.

    Returns:
      T, clipped to the limits; NaN if a forecast excludes what can happen. Errors as in ``log_score``.
    """
    log_q, o, w = _table(log_probs, outcome_probs, weight)
    log_q, o, w = log_q[w > 0], o[w > 0], w[w > 0]
    target = float(np.sum(w * _expected_log(log_q, o)))
    if not np.isfinite(target):
        return float("nan")
    columns = np.ascontiguousarray(log_q.T)  # sums over V are then sums of rows
    centred, finite = columns - columns.max(0), np.where(np.isfinite(columns), columns, 0.0)
    low, high = np.log(limits[0]), np.log(limits[1])
    for _ in range(50):
        middle = 0.5 * (low + high)
        power = np.exp(centred * np.exp(-middle))
        too_sharp = np.sum(w * (power * finite).sum(0) / power.sum(0)) > target
        low, high = (middle, high) if too_sharp else (low, middle)
    return float(np.exp(0.5 * (low + high)))
