"""Reference laws on text, known up to sampling error: two-sided log Z, p*, and a positive control."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.core import numerics
from kl_rl.core.estimate import Estimate, mean_estimate
from kl_rl.core.policy import Policy
from kl_rl.experiments.compare.text.problem import TextProblem, draw, flat_samples, score
from kl_rl.measure.samples import Samples
from kl_rl.rewards.lexicon_text import in_word

__all__ = ["Control", "LogZ", "control", "log_normalizer", "posterior_row", "tilted_expectation"]

_GROUPS = 16
_SHARPNESS = 3.0


class LogZ(NamedTuple):
    """Stochastic bounds on log Z, averaged over prompts, nats.

    Attributes:
      lower: expectation at most log Z: the log of a K-sample importance estimate.
      upper: expectation at least log Z: the same with one sample replaced by a posterior particle.
      particles: where the particles come from: "rejection" or "resampling".
    """

    lower: Estimate
    upper: Estimate
    particles: str


def _log_mean(exponent: np.ndarray) -> np.ndarray:
    top = exponent.max(-1, keepdims=True)
    return (top + np.log(np.mean(np.exp(exponent - top), -1, keepdims=True)))[..., 0]


def log_normalizer(reward: np.ndarray, beta: float, rng: np.random.Generator) -> LogZ:
    """Two-sided bounds on ``log E_{p0} e^{r/beta}`` from base samples (Zhao et al. 2024, arXiv 2404.17546).

    The samples of each prompt are cut into 16 groups; the mean over groups of the log of the group's mean
    weight is the lower bound. For the upper bound one member is replaced by a draw from p*, made from the
    other half of the samples: by rejection, with acceptance ``e^{(r - max r)/beta}`` (max: the largest reward
    seen), or by resampling where too few are accepted, which is exact only as the number of samples grows.

    Args:
      reward: of base samples; at least 32 for each prompt; [P, M].
      beta: temperature, reward units per nat.
      rng: for the particles.

    Returns:
      The bounds.
    """
    num_prompts, size = reward.shape
    members = size // _GROUPS
    exponent = reward[:, : members * _GROUPS].reshape(num_prompts, _GROUPS, members) / beta
    halves = exponent.reshape(num_prompts, 2, -1)
    accept = np.log(rng.random(halves.shape)) < halves - exponent.max()
    enough = bool(np.all(accept.sum(-1) >= _GROUPS // 2))
    mixed = exponent.copy()
    for x in range(num_prompts):
        for half in (0, 1):
            pool, kept = halves[x, 1 - half], accept[x, 1 - half]
            weight = kept / kept.sum() if enough else np.exp(pool - pool.max())
            groups = slice(half * _GROUPS // 2, (half + 1) * _GROUPS // 2)
            mixed[x, groups, 0] = rng.choice(pool, _GROUPS // 2, p=weight / weight.sum(), replace=not enough)
    lower, upper = (mean_estimate(_log_mean(e).mean(0)) for e in (exponent, mixed))
    return LogZ(lower, upper, "rejection" if enough else "resampling")


def tilted_expectation(exponent: np.ndarray, value: np.ndarray) -> tuple[Estimate, Estimate]:
    """``E_{p*} value`` and ``E_{p*} value - log Z`` from base samples with weights ``e^exponent``.

    Args:
      exponent: r/beta; [P, M].
      value: [P, M].

    Returns:
      The two estimates, averaged over prompts, with delta-method errors.
    """
    size = exponent.shape[1]
    weight = size * np.asarray(jax.nn.softmax(exponent, axis=-1), np.float64)
    mean = (weight * value).mean(1, keepdims=True)
    changes = (weight * (value - mean), weight * (value - mean) - (weight - 1.0))
    values = (mean.mean(), (mean[:, 0] - _log_mean(exponent)).mean())
    count = float(size**2 / np.square(weight).sum(1).mean() * len(exponent))
    return tuple(
        Estimate(float(v), math.sqrt(float(np.square(c).sum())) / c.size, count)
        for v, c in zip(values, changes, strict=True)
    )  # type: ignore[return-value]


def posterior_row(problem: TextProblem, beta: float, rng: np.random.Generator) -> dict[str, Any]:
    """The row of p*_beta: reward, price and entropy by weighted base samples; S = C = 0 (T2.3, T2.4).

    Args:
      problem: with base samples.
      beta: temperature.
      rng: for the bounds on log Z.

    Returns:
      A row without the fields that say who made it.
    """
    reward, log_base = problem.drawn.reward, problem.drawn.log_prob
    log_z = log_normalizer(reward, beta, rng)
    mean, _ = tilted_expectation(reward / beta, reward)
    _, kl = tilted_expectation(reward / beta, reward / beta)
    _, cross = tilted_expectation(reward / beta, log_base + reward / beta)
    row: dict[str, Any] = {"beta": beta, "reward": mean.value, "reward_stderr": mean.stderr}
    row |= {"kl": kl.value, "kl_stderr": kl.stderr, "P": kl.value, "P_stderr": kl.stderr}
    row |= dict.fromkeys(("S", "C", "C_fwd", "C_JS", "kl_pstar_q", "kl_q_pstar", "entropy_gap"), 0.0)
    row |= {"entropy": -cross.value, "entropy_stderr": cross.stderr, "ess_base": mean.count}
    for side in ("lower", "upper"):
        bound = getattr(log_z, side)
        row |= {f"log_z_{side}": bound.value, f"log_z_{side}_stderr": bound.stderr}
    return row | {"particles": log_z.particles, "n_samples": reward.size}


class Control(NamedTuple):
    """A policy with known calibration loss.

    Attributes:
      tuned: its samples, scored under both.
      base: the base samples, scored under both.
      tokens: its completions; [P, M, T].
      known: KL = C, with the (small) error of averaging an exact conditional divergence over prefixes.
    """

    tuned: Samples
    base: Samples
    tokens: np.ndarray
    known: Estimate


@functools.partial(jax.jit, static_argnames=("inside",))
def _last_step(policy: Policy, prompt: jax.Array, tokens: jax.Array, *, inside: tuple[bool, ...]):
    """Laws of the last character: log p0, and log q sharpened within letters and within the rest; [B, V]."""
    log_p = numerics.safe_log_softmax(policy.logits(prompt, tokens)[..., -1, :])
    in_words = jnp.broadcast_to(jnp.asarray(inside), log_p.shape)

    def sharpened(members):
        log_mass = jax.nn.logsumexp(jnp.where(members, log_p, -jnp.inf), axis=-1, keepdims=True)
        within = numerics.safe_log_softmax(jnp.where(members, _SHARPNESS * log_p, -jnp.inf))
        return log_mass + within

    return log_p, jnp.where(in_words, sharpened(in_words), sharpened(~in_words))


def _last_laws(problem: TextProblem, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two laws of the last character for every completion; [P, M, V] each."""
    inside = tuple(in_word(c) for c in problem.corpus.alphabet)
    flat = tokens.reshape(-1, tokens.shape[-1])
    prompts = jnp.repeat(problem.prompt, tokens.shape[1], axis=0)
    parts = [
        jax.device_get(
            _last_step(problem.base.policy, prompts[i : i + 256], flat[i : i + 256], inside=inside)
        )
        for i in range(0, len(flat), 256)
    ]
    log_p, log_q = (np.concatenate(c).astype(np.float64) for c in zip(*parts, strict=True))
    shape = (*tokens.shape[:2], log_p.shape[-1])
    return log_p.reshape(shape), log_q.reshape(shape)


def control(problem: TextProblem, seed: int) -> Control:
    """Positive control for word lists: p0 with the law of the *last* character sharpened, words kept words.

    Given all before it, the last character is drawn from ``p0^3`` renormalized within letters and within the
    rest, so that each class keeps its mass. The reward only depends on the class: S = P = 0, and ``C = KL =
    E_{p0} KL(last character)``, of which every term is computed exactly.

    Args:
      problem: with a word list as reward.
      seed: of the samples.

    Returns:
      Samples and the known value.
    """
    key, last_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 3))
    plan, policy = problem.plan, problem.base.policy
    drawn = draw(policy, problem.scorer, problem.prompt, key, total=plan.num_tuned, horizon=plan.horizon)
    log_p, log_q = _last_laws(problem, drawn.tokens)
    last = np.asarray(jax.random.categorical(last_key, jnp.asarray(log_q)))
    pick = lambda law, index: np.take_along_axis(law, index[..., None], -1)[..., 0]
    tokens = np.concatenate([drawn.tokens[..., :-1], last[..., None].astype(np.int32)], axis=-1)
    log_base = score(policy, problem.prompt, tokens)
    tuned = flat_samples(drawn._replace(tokens=tokens), log_base + pick(log_q - log_p, last), log_base)
    base_p, base_q = _last_laws(problem, problem.drawn.tokens)
    change = pick(base_q - base_p, problem.drawn.tokens[..., -1])
    base = flat_samples(problem.drawn, problem.drawn.log_prob + change, problem.drawn.log_prob)
    exact = np.concatenate(
        [np.sum(np.exp(q) * (q - p), -1) for p, q in ((log_p, log_q), (base_p, base_q))], axis=1
    )
    return Control(tuned, base, tokens, mean_estimate(exact))
