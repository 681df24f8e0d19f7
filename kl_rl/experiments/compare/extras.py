"""Further measurements of every row: scores on stated texts, queries, simulation-based calibration, collapse.

All are exact expectations over the enumerated world, in float64 (only the ranks are sampled, with a fixed
seed). Two texts: that of p0 (is the world model still there?) and that of the posterior p* with the policy's
mean reward (is the policy the posterior predictive?); never the policy's own, on which every model is
calibrated. Forecasts are next-token probabilities, all V of them pooled as binary events ("Full-ECE" of Liu et
al. 2024, arXiv 2406.11345, whose sum over the vocabulary is V times our mean over events).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl import measure
from kl_rl.exact.enumeration import Levels
from kl_rl.experiments.compare.ground import Ground
from kl_rl.measure import queries, sbc
from kl_rl.measure.budget import undo_reward
from kl_rl.methods.laws import normalized

__all__ = ["measure_extras"]

NUM_SIMULATIONS = 1000
NUM_DRAWS = 15
SEED = 20230919
LARGEST_KERNEL = 2**24  # entries of p(z_T | y); beyond, the latent query is not asked
NAN = float("nan")

_SCORES = "nll ece ece_mass smece brier brier_reliability brier_resolution log_reliability".split()
_QUERIES = [f"query_{kind}_{suffix}" for suffix in ("p0", "undone", "pstar") for kind in ("next", "infill")]
_OTHERS = "temperature_p0 smece_p0_tempered latent_tv latent_bound sbc_reward_p sbc_logp0_p attractor_lift"
_FIELDS = [f"{name}_{text}" for text in ("p0", "pstar") for name in _SCORES] + _QUERIES + _OTHERS.split()

Row = dict[str, float]


class _Text(NamedTuple):
    """What a text asks and answers, over all prompts.

    Attributes:
      outcome: next-token probabilities at each of M unfinished prefixes of each prompt; [P * M, V].
      weight: how often each prefix is met; [P * M].
    """

    outcome: np.ndarray
    weight: np.ndarray


def _pooled_forecasts(log_law: np.ndarray, tree: queries.Tree) -> tuple[np.ndarray, np.ndarray]:
    """Log-forecasts [P * M, V] and log-masses [P * M] of a law [P, N]."""
    found = [queries.next_token_forecasts(row, tree) for row in log_law]
    return np.concatenate([f.log_conditional for f in found]), np.concatenate([f.log_mass for f in found])


def _text(log_law: np.ndarray, tree: queries.Tree) -> _Text:
    log_conditional, log_mass = _pooled_forecasts(log_law, tree)
    return _Text(np.nan_to_num(np.exp(log_conditional)), np.exp(log_mass))


def _met(forecasts: np.ndarray, text: _Text) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Forecasts, answers and weights where the text asks; None if the model has no forecast somewhere."""
    asked = text.weight > 0
    kept = forecasts[asked]
    return None if np.isnan(kept).any() else (kept, text.outcome[asked], text.weight[asked])


def _score_fields(forecasts: np.ndarray, text: _Text) -> Row:
    """Scores of the forecasts on a text: nll in nats per token, the others per binary event."""
    met = _met(forecasts, text)
    if met is None:
        return dict.fromkeys(_SCORES, NAN) | {"nll": float("inf")}
    log_q, outcome, weight = met
    events = (np.exp(log_q).ravel(), outcome.ravel(), np.repeat(weight, log_q.shape[1]))
    brier, log = measure.brier_decomposition(*events), measure.log_decomposition(*events)
    return {
        "nll": measure.log_score(log_q, outcome, weight),
        "ece": measure.expected_calibration_error(*events),
        "ece_mass": measure.expected_calibration_error(*events, equal_mass=True),
        "smece": measure.smooth_calibration_error(*events),
        "brier": measure.brier_score(*events),
        "brier_reliability": brier.reliability,
        "brier_resolution": brier.resolution,
        "log_reliability": log.reliability,
    }


def _temperature_fields(forecasts: np.ndarray, text: _Text) -> Row:
    """The best temperature on a text, and the smooth calibration error that it leaves."""
    met = _met(forecasts, text)
    temperature = NAN if met is None else measure.fit_temperature(*met)
    if met is None or np.isnan(temperature):
        return {"temperature_p0": NAN, "smece_p0_tempered": NAN}
    log_q, outcome, weight = met
    confidence = np.exp(measure.tempered(log_q, temperature))
    error = measure.smooth_calibration_error(
        confidence.ravel(), outcome.ravel(), np.repeat(weight, log_q.shape[1])
    )
    return {"temperature_p0": temperature, "smece_p0_tempered": error}


def _query_fields(truth: np.ndarray, policy: np.ndarray, tree: queries.Tree, suffix: str) -> Row:
    """Errors of next-token and infill queries, nats per token, averaged over prompts; laws [P, N]."""
    pairs = list(zip(truth, policy, strict=True))
    return {
        f"query_next_{suffix}": float(np.mean([queries.next_token_kl(p, q, tree) for p, q in pairs])),
        f"query_infill_{suffix}": float(np.mean([queries.infill_kl(p, q, tree) for p, q in pairs])),
    }


@jax.jit
def _undone(log_q: jax.Array, log_base: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
    return jax.vmap(lambda q, p, i: undo_reward(q, p, Levels(value, i)))(log_q, log_base, index)


def _reward_undone(ground: Ground, log_q: np.ndarray) -> np.ndarray:
    """The policy with its reward undone, ``q(y) p0(r) / q(r)``; [P, N]."""
    with jax.enable_x64(True):
        arrays = (log_q, ground.log_base, ground.levels.value, ground.levels.index)
        return np.asarray(_undone(*map(jnp.asarray, arrays)))


def _latent_fields(ground: Ground, log_q: np.ndarray, kernels: list[np.ndarray], loss: float) -> Row:
    """Mean total variation of the last hidden state given the reward, and the bound that C sets on it."""
    index = np.asarray(ground.levels.index)
    found = [
        queries.latent_state_tv(p, q, i, kernel)
        for p, q, i, kernel in zip(ground.log_base, log_q, index, kernels, strict=bool(kernels))
    ]
    return {
        "latent_tv": float(np.mean(found)) if found else NAN,
        "latent_bound": queries.latent_state_bound(loss),
    }


def _sbc_p_value(ground: Ground, log_pstar: np.ndarray, log_q: np.ndarray, statistic: np.ndarray) -> float:
    """p-value of uniform ranks given half of the text, simulations spread evenly over the prompts."""
    rng = np.random.default_rng(SEED)
    each = -(-NUM_SIMULATIONS // len(log_q))
    half = ground.world.horizon // 2
    ranks = [
        sbc.prefix_ranks(p, q, ground.strings, s, half, each, NUM_DRAWS, rng)
        for p, q, s in zip(log_pstar, log_q, statistic, strict=True)
    ]
    if any(len(found) == 0 for found in ranks):
        return NAN
    return sbc.uniformity(np.concatenate(ranks), NUM_DRAWS).p_value


def _matched_posterior(ground: Ground, budget: Row) -> np.ndarray | None:
    """p* with the policy's mean reward, else with the row's beta; None if there is no such number; [P, N]."""
    beta = budget["beta_fit"] if np.isfinite(budget["beta_fit"]) else budget["beta"]
    if not abs(beta) > 0:
        return None
    return normalized(ground.log_base + ground.reward / beta)


def _posterior_fields(ground: Ground, log_q: np.ndarray, log_pstar: np.ndarray, grams: queries.NGrams) -> Row:
    """Comparisons with the posterior itself: ranks, attractors, and what the prompt still decides."""
    lifts = [queries.attractor_lift(q, p, grams) for q, p in zip(log_q, log_pstar, strict=True)]
    row = {
        "sbc_reward_p": _sbc_p_value(ground, log_pstar, log_q, ground.reward),
        "sbc_logp0_p": _sbc_p_value(ground, log_pstar, log_q, ground.log_base),
        "attractor_lift": float(np.mean(lifts)),
    }
    if len(log_q) > 1:
        information = queries.prompt_information
        row["information_gap"] = information(log_pstar) - information(log_q)
    return row


def measure_extras(ground: Ground) -> Callable[[np.ndarray, Row], Row]:
    """What a comparison reports about a law beyond its budget; what depends on the world alone is done once.

    Args:
      ground: an enumerated world.

    Returns:
      ``(log_q [P, N], budget row) -> row``: scores and calibration errors ``nll_ ece_ ece_mass_ smece_ brier_
      brier_reliability_ brier_resolution_ log_reliability_`` on the text of ``p0`` and ``pstar``;
      ``temperature_p0``, ``smece_p0_tempered``; ``query_next_ query_infill_`` on ``p0``, ``pstar`` and, after
      undoing the reward, ``undone``; ``latent_tv``, ``latent_bound``; ``sbc_reward_p``, ``sbc_logp0_p``;
      ``attractor_lift`` (nats, bigrams); ``information_gap`` (nats, if P > 1). Scores and ranks pool the
      prompts, the others are means over them. NaN is undefined, e.g. the forecasts of a filter where it
      excludes the prefix.
    """
    world, strings = ground.world, ground.strings
    tree = queries.string_tree(strings, world.vocab)
    grams = queries.ngrams(strings, min(2, world.horizon))
    base_text = _text(ground.log_base, tree)
    asks_state = len(ground.reward[0]) * len(world.process.log_initial) <= LARGEST_KERNEL
    prompts = world.prompts if asks_state else ()
    kernels = [queries.last_state_kernel(world.process, prompt, strings) for prompt in prompts]

    def of_law(log_q: np.ndarray, budget: Row) -> Row:
        log_q, log_pstar = np.asarray(log_q, np.float64), _matched_posterior(ground, budget)
        if log_pstar is None or np.isnan(log_q).any():
            return dict.fromkeys(_FIELDS, NAN)
        forecasts, text = _pooled_forecasts(log_q, tree)[0], _text(log_pstar, tree)
        row = {f"{name}_p0": value for name, value in _score_fields(forecasts, base_text).items()}
        row |= {f"{name}_pstar": value for name, value in _score_fields(forecasts, text).items()}
        row |= _temperature_fields(forecasts, base_text)
        row |= _query_fields(ground.log_base, log_q, tree, "p0")
        row |= _query_fields(ground.log_base, _reward_undone(ground, log_q), tree, "undone")
        row |= _query_fields(log_pstar, log_q, tree, "pstar")
        row |= _latent_fields(ground, log_q, kernels, budget["C"])
        return row | _posterior_fields(ground, log_q, log_pstar, grams)

    return of_law
