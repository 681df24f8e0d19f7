"""The exact posteriors of a world in numbers, by enumeration or by dynamic programming."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl import exact
from kl_rl.core.estimate import Estimate, mean_estimate
from kl_rl.worlds.enumeration import Leaves, walk_strings
from kl_rl.worlds.world import World

__all__ = [
    "ENUMERATION_LIMIT",
    "ScoreLaw",
    "Tilted",
    "entropy",
    "group_scores",
    "solve_by_dynamic_programming",
    "solve_by_enumeration",
    "tilt",
]

ENUMERATION_LIMIT = 2**20
_SAMPLES = 4096
_GRAPH_LIMIT = 2**25  # entries of one step over (hidden state, automaton state, score, token)


class Tilted(NamedTuple):
    """A discrete law tilted by `e^{r / beta}`.

    Attributes:
      log_z: log of the normalizer, nats.
      log_prob: tilted log-probabilities; [N].
      mean: tilted mean of the score.
      kl: KL(tilted || original), nats.
    """

    log_z: float
    log_prob: np.ndarray
    mean: float
    kl: float


class ScoreLaw(NamedTuple):
    """The law of a score: distinct values, ascending, and their log-probabilities; [G] each."""

    value: np.ndarray
    log_prob: np.ndarray


def tilt(log_prob: np.ndarray, score: np.ndarray, beta: float) -> Tilted:
    """Tilt a law: `p*_i = p_i e^{r_i / beta} / Z`, without overflow or cancellation at any beta.

    KL is summed as `sum_i p_i f(d_i)`, `f(d) = d e^d - (e^d - 1) >= 0`, `d = log p*/p`, whose terms are all
    positive.

    Args:
      log_prob: finite log-probabilities that sum to one, nats; [N].
      score: [N].
      beta: temperature > 0, score units per nat.

    Returns:
      The tilted law.
    """
    prob = np.exp(log_prob)
    gentle = (score.max() - score.min()) / beta < 1.0
    center = float(prob @ score / prob.sum()) if gentle else float(score.max())
    shifted = (score - center) / beta
    if gentle:
        log_norm = math.log1p(float(np.sum(prob * np.expm1(shifted)) / prob.sum()))
    else:
        top = float(np.max(log_prob + shifted))
        log_norm = top + math.log(float(np.sum(np.exp(log_prob + shifted - top))))
    log_ratio = shifted - log_norm
    tilted = np.exp(log_prob + log_ratio)
    series = prob * log_ratio**2 * (0.5 + log_ratio / 3.0 + log_ratio**2 / 8.0)
    terms = np.where(np.abs(log_ratio) < 1e-3, series, tilted * log_ratio - tilted + prob)
    mean = center + float(np.sum(tilted * (score - center)))
    return Tilted(center / beta + log_norm, log_prob + log_ratio, mean, max(0.0, float(np.sum(terms))))


def entropy(log_prob: np.ndarray) -> float:
    """`-sum p log p` in nats, for log-probabilities [N] that may underflow."""
    return max(0.0, -float(np.sum(np.exp(log_prob) * log_prob)))


def group_scores(leaves: Leaves) -> ScoreLaw:
    """The law of the score; scores that differ by less than 1e-9 of the largest are one level."""
    order = np.argsort(leaves.score, kind="stable")
    score, prob = leaves.score[order], np.exp(leaves.log_prob[order])
    scale = float(np.abs(score).max())
    first = np.flatnonzero(np.concatenate([[True], np.diff(score) > 1e-9 * scale]))
    bounds = [*first.tolist(), len(score)]
    mass = [math.fsum(prob[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    keep = np.array(mass) > 0
    return ScoreLaw(score[first][keep], np.log(np.array(mass)[keep]))


def _pairs(value: np.ndarray, log_prob: np.ndarray) -> list[list[float]]:
    return [[float(v), float(p)] for v, p in zip(value, np.exp(log_prob), strict=True)]


def _tilt_levels(levels: ScoreLaw, beta: float) -> np.ndarray:
    """Log-law of the score under p*; [G]."""
    return tilt(levels.log_prob, levels.value, beta).log_prob


def solve_by_enumeration(world: World, prompt: np.ndarray, betas: list[float]) -> list[dict[str, Any]]:
    """All exact quantities of p* by summing over every string.

    Args:
      world: a world of at most `ENUMERATION_LIMIT` strings.
      prompt: one row of `world.prompts`; [L].
      betas: temperatures > 0.

    Returns:
      One dict for each beta, with the keys of the `posteriors` that `kl-rl exact --json` prints.
    """
    leaves = walk_strings(world, prompt)
    levels = group_scores(leaves)
    mean = float(np.sum(np.exp(leaves.log_prob) * leaves.score))
    base_entropy = entropy(leaves.log_prob)
    base_law = _pairs(*levels)
    entries = []
    for beta in betas:
        tilted = tilt(leaves.log_prob, leaves.score, beta)
        law = _pairs(levels.value, _tilt_levels(levels, beta))
        entry: dict[str, Any] = {"beta": beta, "log_z": tilted.log_z}
        entry |= {"reward_mean_p0": mean, "reward_mean_pstar": tilted.mean, "kl_pstar_p0": tilted.kl}
        entry |= {"entropy_p0": base_entropy, "entropy_pstar": entropy(tilted.log_prob)}
        entries.append(entry | {"reward_distribution_p0": base_law, "reward_distribution_pstar": law})
    return entries


def solve_by_dynamic_programming(
    world: World, prompt: np.ndarray, betas: list[float]
) -> list[dict[str, Any]]:
    """All exact quantities of p* by dynamic programming over hidden state, automaton state and score.

    Entropies are exact where strings determine hidden paths (Markov and n-gram bases) or can be enumerated;
    else they are means over exact samples, and the entry also holds `entropy_p0_stderr` and
    `entropy_pstar_stderr`. Without a score lattice the two reward distributions are None and the entry says
    why in `note`.

    Args:
      world: any world.
      prompt: one row of `world.prompts`; [L].
      betas: temperatures > 0.

    Returns:
      One dict for each beta, as `solve_by_enumeration`.
    """
    try:
        levels = _level_law(world, prompt)
    except exact.NoLattice as error:
        levels, note = None, str(error)
    small = world.num_strings <= ENUMERATION_LIMIT and not exact.is_unifilar(world.process)
    leaves = walk_strings(world, prompt) if small else None
    base_entropy = _entropy(world, prompt, math.inf, leaves)
    entries = []
    for beta in betas:
        entry: dict[str, Any] = {"beta": beta}
        entry |= _moments(world, prompt, beta) if levels is None else _level_moments(levels, beta)
        posterior_entropy = _entropy(world, prompt, beta, leaves)
        entry |= {"entropy_p0": base_entropy.value, "entropy_pstar": posterior_entropy.value}
        if base_entropy.stderr > 0:
            errors = base_entropy.stderr, posterior_entropy.stderr
            entry |= {"entropy_p0_stderr": errors[0], "entropy_pstar_stderr": errors[1]}
        law, tilted_law = None, None
        if levels is not None:
            law, tilted_law = _pairs(*levels), _pairs(levels.value, _tilt_levels(levels, beta))
        entry |= {"reward_distribution_p0": law, "reward_distribution_pstar": tilted_law}
        entries.append(entry if levels is not None else entry | {"note": note})
    return entries


def _level_law(world: World, prompt: np.ndarray) -> ScoreLaw:
    """The exact law of the score under p0, on its lattice."""
    states, vocab = world.automaton.next.shape
    limit = _GRAPH_LIMIT // (world.process.log_initial.shape[0] * (states + 1) * vocab)
    lattice = exact.score_lattice(world.automaton, world.horizon, world.end, limit=max(1, min(4096, limit)))
    law = exact.reward_distribution(
        world.process, world.automaton, jnp.asarray(prompt), world.horizon, lattice, world.end
    )
    log_prob = np.asarray(law, np.float64)
    reachable = log_prob > -np.inf
    return ScoreLaw(lattice.values[reachable], log_prob[reachable])


def _level_moments(levels: ScoreLaw, beta: float) -> dict[str, float]:
    tilted = tilt(levels.log_prob, levels.value, beta)
    mean = float(np.sum(np.exp(levels.log_prob) * levels.value))
    return {
        "log_z": tilted.log_z,
        "reward_mean_p0": mean,
        "reward_mean_pstar": tilted.mean,
        "kl_pstar_p0": tilted.kl,
    }


def _moments(world: World, prompt: np.ndarray, beta: float) -> dict[str, float]:
    problem = world.process, world.automaton, jnp.asarray(prompt), world.horizon
    base = exact.posterior_moments(*problem, math.inf, world.end)
    tilted = exact.posterior_moments(*problem, beta, world.end)
    return {
        "log_z": float(tilted.log_z),
        "reward_mean_p0": float(base.reward_mean),
        "reward_mean_pstar": float(tilted.reward_mean),
        "kl_pstar_p0": max(0.0, float(tilted.kl)),
    }


def _entropy(world: World, prompt: np.ndarray, beta: float, leaves: Leaves | None) -> Estimate:
    """Entropy of p* (of p0 for beta = inf): exact with stderr 0 if possible, else a mean over samples."""
    problem = world.process, world.automaton, jnp.asarray(prompt), world.horizon
    if exact.is_unifilar(world.process):
        return Estimate(max(0.0, float(exact.path_entropy(*problem, beta, world.end))), 0.0, math.inf)
    if leaves is not None:
        log_prob = leaves.log_prob if beta == math.inf else tilt(leaves.log_prob, leaves.score, beta).log_prob
        return Estimate(entropy(log_prob), 0.0, math.inf)
    key = jax.random.key(0)
    return mean_estimate(np.asarray(exact.sampled_entropies(key, *problem, beta, _SAMPLES, world.end)))
