"""Reference laws, exact and without training.

What each family would give with infinite data and capacity, and a control.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.exact.flows import vanilla_gradient_flow
from kl_rl.experiments.compare.ground import Ground, mean_at_fraction
from kl_rl.experiments.compare.runner import Scale
from kl_rl.methods import laws
from kl_rl.methods.knobs import BETA, DRAWS, LEVEL, Knob, aim
from kl_rl.methods.laws import normalized

__all__ = ["ReferenceLaw", "control_law", "flow_curves", "reference_laws"]


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
    knob: Knob
    knob_value: float
    log_q: np.ndarray
    known_C: float | None


def control_law(ground: Ground, beta: float, strength: float) -> tuple[np.ndarray, float]:
    """A tilt spoiled inside each level by a known amount: the positive control.

    ``q = p*_beta(r) p0(y|r) e^{+-strength} / norm(r)``, + where the first token is in the lower half of the
    vocabulary. With
    ``h = p0(first half | r)`` and ``g = q(first half | r)``, C is the mean under q of the binary divergence
    ``kl(g(r), h(r))``: a closed form.

    Returns:
      log q [P, N] and C in nats (mean over prompts).
    """
    spoiled, losses = [], []
    lower_half = np.asarray(ground.strings.tokens)[:, 0] < ground.world.vocab // 2
    for log_base, reward, index in zip(ground.log_base, ground.reward, ground.levels.index, strict=True):
        tilted = np.exp(normalized(log_base + reward / beta))
        size = len(ground.levels.value)
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
        spoiled.append(normalized(np.log(tilted) + shift))
    return np.stack(spoiled), float(np.mean(losses))


def reference_laws(ground: Ground, sizes: Scale) -> list[ReferenceLaw]:
    """Exact rows: the posterior, best-of-n and the filter at the mean rewards aimed at, and the control.

    Args:
      ground: world and frozen base.
      sizes: of the comparison; where the knobs aim.

    Returns:
      The laws.
    """
    rows = []
    means = [mean_at_fraction(ground, fraction) for fraction in sizes.fractions]
    for mean in means:
        beta = aim(laws.tilt, ground.log_base, ground.reward, mean, BETA)
        tilt = laws.tilt(ground.log_base, ground.reward, beta)
        rows.append(ReferenceLaw("exact-posterior", BETA, beta, tilt, 0.0))
        spoiled, known = control_law(ground, beta, 0.5)
        rows.append(ReferenceLaw("control", BETA, beta, spoiled, known))
    for name, law, knob in (
        ("exact-best-of-n", laws.best_of_n, DRAWS),
        ("exact-filter", laws.filtered, LEVEL),
    ):
        to = lambda mean, law=law, knob=knob: aim(
            law, ground.log_base, ground.reward, mean, knob, samples=sizes.num_samples
        )
        for value in dict.fromkeys(map(to, means)):
            rows.append(ReferenceLaw(name, knob, value, law(ground.log_base, ground.reward, value), 0.0))
    return rows


def flow_curves(
    ground: Ground, beta: float, *, num_steps: int = 4000, step_size: float = 4.0
) -> dict[str, np.ndarray]:
    """Exact gradient flows over the full table for the first prompt, with and without a KL term (T2.6).

    Returns:
      ``{"vanilla flow, no KL": log q [M, N], "vanilla flow, KL": ...}``.
    """
    with jax.enable_x64(True):
        base, reward = jnp.asarray(ground.log_base[0]), jnp.asarray(ground.reward[0])
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
