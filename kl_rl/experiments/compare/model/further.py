"""Further measurements of a lane and of the references: distances to p*, attractors, a control whose C is known."""

from __future__ import annotations

from typing import Any

import numpy as np

from kl_rl.core.estimate import Estimate, mean_estimate
from kl_rl.experiments.compare.model.ground import ModelGround
from kl_rl.measure.attractors import attractor
from kl_rl.measure.calibration import sampled_budget
from kl_rl.measure.rows import budget_row
from kl_rl.measure.samples import Samples
from kl_rl.methods import laws
from kl_rl.methods.knobs import BETA, aim
from kl_rl.particles.importance import log_normalizer, tilted_expectation
from kl_rl.rewards.lexicon_text import words_in
from kl_rl.runs.choice import Choice
from kl_rl.runs.evaluate import Column
from kl_rl.runs.returns import by_token
from kl_rl.tokenizer import Tokenizer

__all__ = ["further", "references"]

_COIN = 0.8  # of the control: in p0 it is fair


def _with_error(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_stderr": estimate.stderr}


def further(
    tokenizer: Tokenizer, choice: Choice, row: dict[str, Any], tuned: Column, base: Column
) -> dict[str, Any]:
    """What a measurement says beyond its budget.

    Args:
      tokenizer: makes texts of tokens.
      choice: the lane's method and its knob.
      row: the measurement so far.
      tuned: samples of q, scored under p0.
      base: samples of p0, scored under q.

    Returns:
      The mean reward with its error; with base samples as particles, KL(p*||q), KL(q||p*) and H(p*) - H(q), nats; the
      word that q repeats most beyond what its rewards explain; KL(q||law), what training lost on the way to the
      method's own fixed point, if it has one.
    """
    good, whole = np.isfinite(tuned.reward), bool(np.isfinite(base.reward).all())
    found: dict[str, Any] = _with_error("reward", mean_estimate(tuned.reward[good]))
    beta = choice.value if choice.method.knob is BETA else row["beta_fit"]
    found["beta"] = beta
    if beta is not None and np.isfinite(beta) and whole:
        found |= _against_posterior(beta, row["kl"], found["reward"], tuned, base)
    if choice.method.law is not None and good.all() and whole:
        found |= _against_law(choice, tuned, base)
    words = lambda column: [frozenset(words_in(text)) for text in column.texts(tokenizer)]
    seen = attractor(tuned.reward, words(tuned), base.reward, words(base)) if good.all() and whole else None
    return found | {"attractor": seen and seen.name, "attractor_lift": seen and seen.lift}


def _against_posterior(
    beta: float, kl: float, reward: float, tuned: Column, base: Column
) -> dict[str, float]:
    assert base.log_other is not None
    order = base.by_prompt
    exponent, log_base = base.reward[order] / beta, base.log_own[order]
    _, forward = tilted_expectation(exponent, exponent + log_base - base.log_other[order])
    _, free = tilted_expectation(exponent, np.zeros_like(exponent))
    _, cross = tilted_expectation(exponent, log_base + exponent)
    entropy = float(np.mean(-tuned.log_own))
    distances = {"kl_q_pstar": kl - reward / beta - free.value, "entropy_gap": -cross.value - entropy}
    return _with_error("kl_pstar_q", forward) | distances


_POINT = 1e-9  # mass of a completion of q beside those of p0, where a law is evaluated


def _against_law(choice: Choice, tuned: Column, base: Column) -> dict[str, float | None]:
    """``KL(q||law) = E_q [log q - log p0 - log law / p0]``; the last is a function of prompt and reward.

    It is read off the law of p0's samples, to which those of q are added with next to no mass; where q earns less than
    all of p0's for a prompt, the least of these stands for it.
    """
    assert tuned.log_other is not None and choice.method.law is not None
    drawn, points = base.reward[base.by_prompt], tuned.reward[tuned.by_prompt]
    if choice.method.needs.returns:
        drawn, points = by_token(drawn, drawn), by_token(points, drawn)
    points = np.maximum(points, drawn.min(1, keepdims=True))
    log_base = np.full(drawn.shape, -np.log(drawn.shape[1]))
    log_point = np.full(points.shape, np.log(_POINT))
    both = np.concatenate([log_base, log_point], 1), np.concatenate([drawn, points], 1)
    law = choice.method.law(*both, choice.value)[:, drawn.shape[1] :] - log_point
    if not np.isfinite(law).all():
        return {"kl_q_law": None, "kl_q_law_stderr": None}
    log_ratio = (tuned.log_own - tuned.log_other)[tuned.by_prompt]
    found = mean_estimate((log_ratio - law).ravel())
    return {"kl_q_law": found.value, "kl_q_law_stderr": found.stderr}


def _named(method: str, knob: str, value: float) -> dict[str, Any]:
    return {
        "method": method,
        "family": "reference",
        "knob": knob,
        "knob_value": value,
        "seed": 0,
        "rows": 1,
        "lane": f"{method}-{value:g}",
    }


def references(ground: ModelGround) -> list[dict[str, Any]]:
    """Rows that need no training: the base, the posterior at every target, and a control whose C is known.

    Args:
      ground: with samples of p0.

    Returns:
      The rows.
    """
    assert ground.drawn is not None
    nothing = dict.fromkeys(("kl", "P", "S", "C", "C_fwd", "C_JS"), 0.0)
    size = {"samples": ground.reward.size}
    reward = _with_error("reward", mean_estimate(ground.reward))
    rows = [_named("base", "none", 0.0) | nothing | size | reward]
    for mean in ground.targets:
        beta = aim(laws.tilt, ground.log_base, ground.reward, mean, BETA)
        rows.append(_named("p*", "beta", beta) | size | _posterior(ground.reward, beta))
    return [*rows, _named("control", "none", 0.0) | size | reward | _control(ground.drawn)]


def _posterior(reward: np.ndarray, beta: float) -> dict[str, Any]:
    """p*_beta: reward and price by weighted base samples; S = C = 0 (T2.3, T2.4); two-sided log Z."""
    mean, _ = tilted_expectation(reward / beta, reward)
    _, kl = tilted_expectation(reward / beta, reward / beta)
    row: dict[str, Any] = {"beta": beta} | _with_error("reward", mean)
    row |= _with_error("kl", kl) | _with_error("P", kl)
    row |= dict.fromkeys(("S", "C", "C_fwd", "C_JS", "kl_pstar_q", "kl_q_pstar", "entropy_gap"), 0.0)
    if reward.shape[1] < 32:  # too few for groups
        return row
    log_z = log_normalizer(reward, beta, np.random.default_rng(0))
    for side in ("lower", "upper"):
        row |= _with_error(f"log_z_{side}", getattr(log_z, side))
    return row | {"particles": log_z.particles}


def _control(drawn: Column) -> dict[str, Any]:
    """p0 followed by a coin that is fair under p0 and not under q: C = KL(coin || fair coin), whatever the reward.

    Half of p0's samples stand for q, so that nothing else differs. The instrument must find what is known.
    """
    rng, good = np.random.default_rng(0), np.isfinite(drawn.reward)
    coin = np.log(2.0 * np.array([1.0 - _COIN, _COIN]))  # log q / p0 of either side
    tuned = (np.arange(len(drawn.reward)) % 2 == 0) & good
    draw = lambda rows, heads: coin[(rng.random(int(rows.sum())) < heads).astype(int)]

    def samples(rows: np.ndarray, heads: float) -> Samples:
        log_base, prompt = drawn.log_own[rows], drawn.prompt[rows] if drawn.prompt.max() else None
        return Samples(drawn.reward[rows], log_base + draw(rows, heads), log_base, prompt)

    budget = sampled_budget(samples(tuned, _COIN), samples(~tuned & good, 0.5))
    known = _COIN * coin[1] + (1.0 - _COIN) * coin[0]
    return budget_row(budget) | {"known_C": float(known)}
