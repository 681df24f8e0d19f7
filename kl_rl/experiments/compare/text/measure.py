"""Measure one tuned policy on text: sampled budget, entropy, distance to p*, held-out loss, attractors."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from kl_rl.core.estimate import Estimate, mean_estimate
from kl_rl.core.policy import Policy
from kl_rl.experiments.compare.text.problem import Drawn, TextProblem, draw, flat_samples, score
from kl_rl.experiments.compare.text.reference import tilted_expectation
from kl_rl.measure.calibration import Bounded, SampledBudget, sampled_budget
from kl_rl.rewards.lexicon_text import words_in
from kl_rl.worlds.text_base import held_out_loss

__all__ = ["attractor", "base_row", "budget_row", "measure", "previews"]

_BOUNDED = ("kl", "P", "S", "C", "C_fwd", "C_JS")


def budget_row(budget: SampledBudget) -> dict[str, Any]:
    """A sampled budget as flat fields: `C`, `C_stderr`, `C_lower`, `C_upper` and so on; nats.

    Args:
      budget: from `sampled_budget`.

    Returns:
      The fields.
    """
    row: dict[str, Any] = {}
    for name in (*_BOUNDED, "beta_fit"):
        entry = getattr(budget, name) or Bounded(None)
        row[name] = entry.value
        row |= {f"{name}_{part}": getattr(entry, part) for part in ("stderr", "lower", "upper")}
    row |= {"levels": budget.num_levels, "bins": budget.bins, "unreached": budget.unreached}
    return row | {
        "ess_tuned": budget.ess_tuned,
        "ess_base": budget.ess_base,
        "warnings": list(budget.warnings),
    }


def _mean(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_stderr": estimate.stderr}


def _against_posterior(
    problem: TextProblem, beta: float, budget: SampledBudget, log_tuned_of_base: np.ndarray, entropy: float
) -> dict[str, float]:
    """``KL(p*||q)``, ``KL(q||p*)`` and ``H(p*) - H(q)``, with log Z and p* by weighted base samples."""
    reward, log_base = problem.drawn.reward, problem.drawn.log_prob
    exponent = reward / beta
    _, forward = tilted_expectation(exponent, exponent + log_base - log_tuned_of_base)
    _, free = tilted_expectation(exponent, np.zeros_like(exponent))
    _, cross = tilted_expectation(exponent, log_base + exponent)
    reverse = (budget.kl.value or 0.0) - budget.mean_reward[0] / beta - free.value
    return _mean("kl_pstar_q", forward) | {"kl_q_pstar": reverse, "entropy_gap": -cross.value - entropy}


def _words(problem: TextProblem, tokens: np.ndarray) -> list[frozenset[str]]:
    """The set of finished words of every completion."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    return [frozenset(words_in(problem.corpus.decode(row))) for row in rows]


def attractor(
    problem: TextProblem, drawn: Drawn, base_words: list[frozenset[str]], errors: float = 4.0
) -> tuple[str | None, float | None]:
    """The word that q repeats most beyond what its rewards explain.

    Lift: ``log P_q(word occurs) - log E_{p0}[w(r) 1(word occurs)]`` with ``w = q(r)/p0(r)``, i.e. against the
    base tilted to q's own reward law. The word with the greatest lower limit (4 standard errors: thousands of
    words are looked at) is reported if that limit is above 0.

    Args:
      problem: with base samples.
      drawn: samples of q.
      base_words: words of the base samples, as sets.
      errors: width of the limit.

    Returns:
      The word and its lift in nats; None, None if no lift is shown.
    """
    reward, base = drawn.reward.ravel(), problem.drawn.reward.ravel()
    levels, of_base = np.unique(base, return_inverse=True)
    near = np.clip(np.searchsorted(levels, reward), 0, len(levels) - 1)
    weight = (np.bincount(near, minlength=len(levels)) / np.bincount(of_base))[of_base]
    weight = weight / weight.sum()
    spread = float(np.square(weight).sum())
    count: dict[str, int] = {}
    for words in _words(problem, drawn.tokens):
        for word in words:
            count[word] = count.get(word, 0) + 1
    share = dict.fromkeys(count, 0.0)
    for words, w in zip(base_words, weight, strict=True):
        for word in words & share.keys():
            share[word] += float(w)
    best: tuple[float, str | None, float | None] = (0.0, None, None)
    for word, seen in count.items():
        p, p0 = seen / reward.size, max(share[word], 0.5 * spread)
        lift = math.log(p / p0)
        limit = lift - errors * math.sqrt((1 - p) / seen + spread * (1 - p0) / p0)
        best = max(best, (limit, word, lift), key=lambda entry: entry[0])
    return best[1], best[2]


def measure(
    problem: TextProblem,
    policy: Policy,
    key: jax.Array,
    *,
    beta: float | None,
    base_words: list[frozenset[str]],
) -> dict[str, Any]:
    """Draw from a tuned policy, score its samples and the base's under both, and report.

    Args:
      problem: with base samples.
      policy: q.
      key: of its samples.
      beta: temperature of the posterior it aimed at; None: the fitted one.
      base_words: words of the base samples.

    Returns:
      A row without the fields that say who made it; with `failed` and little else if q is not finite.
    """
    plan, base = problem.plan, problem.base.policy
    drawn = draw(policy, problem.scorer, problem.prompt, key, total=plan.num_tuned, horizon=plan.horizon)
    of_base = score(policy, problem.prompt, problem.drawn.tokens)
    if not (np.isfinite(drawn.log_prob).all() and np.isfinite(of_base).all()):
        return {
            "failed": "the log-probabilities are not finite: training diverged; use a smaller learning rate"
        }
    log_base = score(base, problem.prompt, drawn.tokens)
    tuned = flat_samples(drawn, drawn.log_prob, log_base)
    budget = sampled_budget(tuned, flat_samples(problem.drawn, of_base, problem.drawn.log_prob), beta=beta)
    entropy = mean_estimate(-drawn.log_prob)
    row = {"beta": budget.beta} | budget_row(budget) | _mean("reward", mean_estimate(drawn.reward))
    row |= _mean("entropy", entropy)
    if budget.beta is not None:
        row |= _against_posterior(problem, budget.beta, budget, of_base, entropy.value)
    start = problem.held_out.shape[1] - plan.horizon
    loss = held_out_loss(policy, problem.held_out, problem.corpus.begin, start)
    word, lift = attractor(problem, drawn, base_words)
    row |= _mean("held_out_loss", mean_estimate(loss)) | {"attractor": word, "attractor_lift": lift}
    return row | {"n_samples": drawn.reward.size, "preview": previews(problem, drawn.tokens)}


def previews(problem: TextProblem, tokens: np.ndarray, count: int = 3) -> list[str]:
    """The first completions as text.

    Args:
      problem: for the alphabet.
      tokens: [P, M, T].
      count: how many.

    Returns:
      Strings of T characters.
    """
    return [problem.corpus.decode(row) for row in tokens.reshape(-1, tokens.shape[-1])[:count]]


def base_row(problem: TextProblem) -> dict[str, Any]:
    """The row of q = p0: everything is 0 by definition; its rewards, entropy and held-out loss are estimates.

    Args:
      problem: with base samples.

    Returns:
      A row without the fields that say who made it.
    """
    drawn, start = problem.drawn, problem.held_out.shape[1] - problem.plan.horizon
    loss = held_out_loss(problem.base.policy, problem.held_out, problem.corpus.begin, start)
    row: dict[str, Any] = {"beta": None} | dict.fromkeys(_BOUNDED, 0.0)
    row |= _mean("reward", mean_estimate(drawn.reward)) | _mean("entropy", mean_estimate(-drawn.log_prob))
    row |= _mean("held_out_loss", mean_estimate(loss))
    return row | {"n_samples": drawn.reward.size, "preview": previews(problem, drawn.tokens)}
