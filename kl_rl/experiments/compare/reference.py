"""Reference laws, exact and without training.

What each family would give with infinite data and capacity, and a control.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.exact.flows import vanilla_gradient_flow
from kl_rl.experiments.compare.problem import Problem, mean_at_fraction, normalized

__all__ = ["ReferenceLaw", "best_of_n_law", "control_law", "flow_curves", "reference_laws"]


class ReferenceLaw(NamedTuple):
    """An exact law over all strings.

    Attributes:
      method: name of the row.
      knob: what is swept.
      knob_value: its value.
      log_q: [P, N].
      known_C: calibration loss from a closed form, where there is one, in nats.
    """

    method: str
    knob: str
    knob_value: float
    log_q: np.ndarray
    known_C: float | None


def best_of_n_law(log_base: np.ndarray, reward: np.ndarray, n: float) -> np.ndarray:
    """``log p0(y) + log[(F^n - F-^n) / (F - F-)]``, ties broken at random (Beirami et al. 2024, arXiv 2401.01879).

    Args:
      log_base: [N], normalized.
      reward: [N].
      n: number of draws, any real >= 1.

    Returns:
      [N].
    """
    values, index = np.unique(reward, return_inverse=True)
    mass = np.zeros(len(values))
    np.add.at(mass, index, np.exp(log_base))
    upper = np.cumsum(mass)
    upper = np.minimum(upper / upper[-1], 1.0)
    lower = np.concatenate([[0.0], upper[:-1]])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(mass > 0, (upper**n - lower**n) / np.where(mass > 0, mass, 1.0), 0.0)
        return normalized(log_base + np.log(ratio)[index])


def control_law(problem: Problem, beta: float, strength: float) -> tuple[np.ndarray, float]:
    """A tilt spoiled inside each level by a known amount: the positive control.

    ``q = p*_beta(r) p0(y|r) e^{+-strength} / norm(r)``, + where the first token is in the lower half of the
    vocabulary. With
    ``h = p0(first half | r)`` and ``g = q(first half | r)``, C is the mean under q of the binary divergence
    ``kl(g(r), h(r))``: a closed form.

    Returns:
      log q [P, N] and C in nats (mean over prompts).
    """
    laws, losses = [], []
    lower_half = np.asarray(problem.strings.tokens)[:, 0] < problem.world.vocab // 2
    for log_base, reward, index in zip(problem.log_base, problem.reward, problem.levels.index, strict=True):
        tilted = np.exp(normalized(log_base + reward / beta))
        size = len(problem.levels.value)
        level = np.bincount(index, tilted, size)
        half = np.bincount(index, tilted * lower_half, size)
        h = np.where(level > 0, half / np.where(level > 0, level, 1.0), 0.5)
        up, down = h * np.exp(strength), (1 - h) * np.exp(-strength)
        g = up / (up + down)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(g > 0, g * np.log(g / h), 0) + np.where(
                g < 1, (1 - g) * np.log((1 - g) / (1 - h)), 0
            )
        losses.append(float(level @ terms))
        shift = np.where(lower_half, strength, -strength) - np.log(up + down)[index]
        laws.append(normalized(np.log(tilted) + shift))
    return np.stack(laws), float(np.mean(losses))


def _prompts(problem: Problem, law) -> np.ndarray:
    return np.stack([law(b, r) for b, r in zip(problem.log_base, problem.reward, strict=True)])


def reference_laws(problem: Problem, fractions: tuple[float, ...]) -> list[ReferenceLaw]:
    """Exact rows: the posterior, best-of-n, the filter, the quantilizer of the same strength.

    And the positive control.
    """
    rows = []
    value, mass = problem.levels.value, np.exp(problem.log_level)
    for fraction in fractions:
        mean, beta = mean_at_fraction(problem, fraction)
        tilt = _prompts(problem, lambda b, r, beta=beta: normalized(b + r / beta))
        rows.append(ReferenceLaw("exact-posterior", "beta", beta, tilt, 0.0))
        spoiled, known = control_law(problem, beta, 0.5)
        rows.append(ReferenceLaw("control", "beta", beta, spoiled, known))
    for n in (3.0, 8.0, 32.0):
        law = _prompts(problem, lambda b, r, n=n: best_of_n_law(b, r, n))
        rows.append(ReferenceLaw("exact-best-of-n", "n", n, law, 0.0))
    present = value[mass > 1e-12]
    for tau in np.unique(present[[len(present) // 3, len(present) // 2, 2 * len(present) // 3]]):
        with np.errstate(divide="ignore"):
            law = _prompts(problem, lambda b, r, t=tau: normalized(np.where(r >= t, b, -np.inf)))
        rows.append(ReferenceLaw("exact-filter", "threshold", float(tau), law, 0.0))
    return rows


def flow_curves(
    problem: Problem, beta: float, *, num_steps: int = 4000, step_size: float = 4.0
) -> dict[str, np.ndarray]:
    """Exact gradient flows over the full table for the first prompt, with and without a KL term (T2.6).

    Returns:
      ``{"vanilla flow, no KL": log q [M, N], "vanilla flow, KL": ...}``.
    """
    with jax.enable_x64(True):
        base, reward = jnp.asarray(problem.log_base[0]), jnp.asarray(problem.reward[0])
        run = jax.jit(
            lambda inverse: vanilla_gradient_flow(
                base, reward, step_size=step_size, num_steps=num_steps, inverse_kl_weight=inverse
            )
        )
        keep = np.unique(np.geomspace(1, num_steps, 60).astype(int))
        return {
            "exact flow without KL": np.asarray(run(jnp.asarray(np.inf)))[keep],
            "exact flow with KL": np.asarray(run(jnp.asarray(1.0 / beta)))[keep],
        }
