"""Rows of results: exact measurements of a law, joined with who produced it; JSON lines in, JSON lines out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.exact.enumeration import Levels
from kl_rl.experiments.compare.ground import Ground
from kl_rl.measure.budget import Budget, exact_budget
from kl_rl.methods.card import Method
from kl_rl.methods.laws import NoFixedPoint

__all__ = ["against_law", "exact_budgets", "sampled_interval", "target_law"]


@jax.jit
def _budgets(log_q, log_base, reward, value, index, beta):
    """Budgets of many laws, averaged over prompts; log_q [B, P, N], beta [B] (NaN: use the fitted one)."""

    def one(log_q, log_base, reward, index, beta):
        levels = Levels(value, index)
        fitted = exact_budget(log_q, log_base, reward, levels, jnp.asarray(1.0, log_q.dtype)).beta_fit
        return exact_budget(log_q, log_base, reward, levels, jnp.where(jnp.isnan(beta), fitted, beta))

    per_prompt = jax.vmap(one, in_axes=(0, 0, 0, 0, None))
    law = lambda pair: jax.tree.map(jnp.mean, per_prompt(pair[0], log_base, reward, index, pair[1]))
    return jax.lax.map(law, (log_q, beta))


def exact_budgets(ground: Ground, log_q: np.ndarray, beta: Iterable[float | None]) -> list[dict[str, float]]:
    """Exact budgets of B laws in double precision.

    Args:
      ground: the world.
      log_q: [B, P, N].
      beta: temperature of the posterior each law is compared with; None means the fitted one.

    Returns:
      One dict of floats per law, the fields of ``Budget`` and ``beta``.
    """
    betas = np.array([np.nan if b is None else b for b in beta], np.float64)
    with jax.enable_x64(True):
        arrays = (ground.log_base, ground.reward, ground.levels.value, ground.levels.index)
        result = jax.tree.map(
            np.asarray, _budgets(jnp.asarray(log_q), *map(jnp.asarray, arrays), jnp.asarray(betas))
        )
    rows = []
    for i, given in enumerate(betas):
        row = {name: float(getattr(result, name)[i]) for name in Budget._fields}
        row["beta"] = row["beta_fit"] if np.isnan(given) else float(given)
        rows.append(row)
    return rows


def sampled_interval(
    ground: Ground, log_q: np.ndarray, rng: np.random.Generator, size: int
) -> dict[str, Any]:
    """Calibration loss as an outsider would estimate it.

    From ``size`` samples of q and of p0 and their log-probabilities.

    Args:
      ground: the world.
      log_q: one law; [P, N].
      rng: numpy generator.
      size: samples of each, per prompt.

    Returns:
      ``C_lower, C_upper`` (95 %), ``C_fwd_lower, C_fwd_upper``.
    """
    from kl_rl.measure.calibration import sampled_budget
    from kl_rl.measure.samples import Samples

    def draw(law: np.ndarray) -> Samples:
        reward, ratio, prompt = [], [], []
        for i, (row, q) in enumerate(zip(law, log_q, strict=True)):
            probability = np.exp(row)
            index = rng.choice(len(row), size, p=probability / probability.sum())
            reward.append(ground.reward[i][index])
            ratio.append(q[index] - ground.log_base[i][index])
            prompt.append(np.full(size, i))
        one = len(log_q) == 1
        return Samples.from_log_ratio(
            np.concatenate(reward), np.concatenate(ratio), None if one else np.concatenate(prompt)
        )

    base = draw(ground.log_base)
    finite = np.isfinite(base.log_ratio).all()
    measured = sampled_budget(draw(log_q), base if finite else None, bins="exact")
    return {
        "C_lower": measured.C.lower,
        "C_upper": measured.C.upper,
        "C_fwd_lower": measured.C_fwd.lower,
        "C_fwd_upper": measured.C_fwd.upper,
    }


def target_law(method: Method, ground: Ground, value: float) -> np.ndarray | None:
    """What a method would learn without error; None if it has no fixed point (there); [P, N]."""
    if method.law is None:
        return None
    try:
        return method.law(ground.log_base, ground.reward, value)
    except NoFixedPoint:
        return None


def _divergence(log_q: np.ndarray, log_p: np.ndarray) -> float:
    """``KL(q || p)``, averaged over prompts; infinite where q goes and p does not."""
    q = np.exp(log_q)
    with np.errstate(invalid="ignore"):
        terms = np.where(q > 0, q * (log_q - log_p), 0.0)
    return float(terms.sum(-1).mean())


def against_law(ground: Ground, law: np.ndarray | None, log_q: np.ndarray) -> dict[str, float | None]:
    """What was lost by the target and what by training.

    Args:
      ground: world and frozen base.
      law: the method's fixed point, or None; [P, N].
      log_q: what was learned; [P, N].

    Returns:
      ``kl_q_law = KL(q || law)``, ``kl_law_q`` the other way round, and C and S of the law itself; nats.
    """
    names = ("kl_q_law", "kl_law_q", "law_C", "law_S")
    if law is None:
        return dict.fromkeys(names)
    own = exact_budgets(ground, law[None], [None])[0]
    return dict(
        zip(names, (_divergence(log_q, law), _divergence(law, log_q), own["C"], own["S"]), strict=True)
    )
