"""What a model answers when asked about a text, against the exact answer: queries on enumerated laws.

A law is ``log q(y)`` of all N strings, in nats. Every query compares the answers of two laws at questions
drawn from the truth; by data processing no answer can be further off than the whole law is. Everything is
float64 on the host, and ``Tree`` holds what depends on the strings alone, so that many laws can be asked.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kl_rl.exact.enumeration import Enumeration
from kl_rl.exact.hidden_markov import HiddenMarkov

__all__ = [
    "Forecasts",
    "NGrams",
    "Tree",
    "attractor_lift",
    "infill_kl",
    "last_state_kernel",
    "latent_state_bound",
    "latent_state_tv",
    "log_marginals",
    "next_token_forecasts",
    "next_token_kl",
    "ngrams",
    "prompt_information",
    "string_tree",
]


class Tree(NamedTuple):
    """The prefix tree of the strings: N leaves of a full V-ary tree of depth T.

    Attributes:
      vocab: V.
      horizon: T.
      code: place of each string among all V**T, lexicographic; [N].
      alive: for every t < T, which prefixes of t tokens have not ended and ask for a next one; [V**t] each.
    """

    vocab: int
    horizon: int
    code: np.ndarray
    alive: tuple[np.ndarray, ...]


class Forecasts(NamedTuple):
    """Next-token forecasts of one law at its M unfinished prefixes, shortest first.

    Attributes:
      log_conditional: log q(v | prefix), nats; NaN where q never reaches the prefix; [M, V].
      log_mass: log q(prefix), nats; [M].
    """

    log_conditional: np.ndarray
    log_mass: np.ndarray


class NGrams(NamedTuple):
    """Which n-grams occur in which strings, as the E nonzero entries of an incidence matrix.

    Attributes:
      string: row of each entry; [E].
      gram: column of each entry; [E].
      tokens: the G n-grams; [G, n].
    """

    string: np.ndarray
    gram: np.ndarray
    tokens: np.ndarray


def _logsumexp(x: np.ndarray, axis: int) -> np.ndarray:
    """``log sum exp`` with ``log 0 = -inf``."""
    top = x.max(axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - top).sum(axis)) + np.squeeze(top, axis)


def _log_ratio_terms(truth: np.ndarray, policy: np.ndarray) -> np.ndarray:
    """``p (log p - log q)`` with 0 log 0 = 0; inf where q excludes what p allows."""
    p = np.exp(truth)
    with np.errstate(invalid="ignore"):
        return np.where(p > 0, p * (truth - policy), 0.0)


def string_tree(strings: Enumeration, vocab: int) -> Tree:
    """The prefix tree of an enumeration.

    Args:
      strings: from ``kl_rl.exact.enumerate_strings``, with or without an end token.
      vocab: V.

    Returns:
      The tree.
    """
    tokens, mask = np.asarray(strings.tokens, np.int64), np.asarray(strings.mask) > 0
    horizon = tokens.shape[1]
    prefix, alive = np.zeros(len(tokens), np.int64), []
    for t in range(horizon):
        reached = np.zeros(vocab**t, bool)
        reached[prefix[mask[:, t]]] = True
        alive.append(reached)
        prefix = prefix * vocab + tokens[:, t]
    return Tree(vocab, horizon, prefix, tuple(alive))


def _dense(log_q: np.ndarray, tree: Tree) -> np.ndarray:
    """The law on all V**T places; -inf where there is no string; [N] -> [V**T]."""
    law = np.full(tree.vocab**tree.horizon, -np.inf)
    law[tree.code] = log_q
    return law


def log_marginals(log_q: np.ndarray, tree: Tree) -> tuple[np.ndarray, ...]:
    """``log q(y_1 .. y_t)`` of every prefix, for t = 0 .. T.

    Args:
      log_q: log-probabilities of the strings, nats; [N].
      tree: their prefix tree.

    Returns:
      T + 1 arrays, the t-th of shape [V**t], in lexicographic order.
    """
    levels = [_dense(log_q, tree)]
    for _ in range(tree.horizon):
        levels.append(_logsumexp(levels[-1].reshape(-1, tree.vocab), 1))
    return tuple(levels[::-1])


def next_token_forecasts(log_q: np.ndarray, tree: Tree) -> Forecasts:
    """``q(v | y_<t) = q(y_<t v) / q(y_<t)`` at every unfinished prefix, whoever made the law.

    Args:
      log_q: log-probabilities of the strings, nats; [N].
      tree: their prefix tree.

    Returns:
      Forecasts; two laws on one tree have their rows in the same order.
    """
    levels = log_marginals(log_q, tree)
    conditional, mass = [], []
    for t, alive in enumerate(tree.alive):
        parent = levels[t][alive]
        with np.errstate(invalid="ignore"):
            conditional.append(levels[t + 1].reshape(-1, tree.vocab)[alive] - parent[:, None])
        mass.append(parent)
    return Forecasts(np.concatenate(conditional), np.concatenate(mass))


def _expected_length(log_p: np.ndarray, tree: Tree) -> float:
    """Mean number of tokens, the end token included."""
    levels = log_marginals(log_p, tree)
    return float(sum(np.exp(level[alive]).sum() for level, alive in zip(levels, tree.alive, strict=False)))


def next_token_kl(log_truth: np.ndarray, log_policy: np.ndarray, tree: Tree) -> float:
    """Mean KL per token from the true next-token law to the forecast, at prefixes of the truth.

    ``sum_prefix p(prefix) KL(p(.|prefix) || q(.|prefix)) / sum_prefix p(prefix)``; by the chain rule this is
    ``KL(p || q) / E_p[length]``.

    Args:
      log_truth: log p of the strings, nats; [N].
      log_policy: log q of the strings, nats; [N].
      tree: the strings' prefix tree.

    Returns:
      Nats per token; inf if q excludes what p allows.
    """
    truth, policy = next_token_forecasts(log_truth, tree), next_token_forecasts(log_policy, tree)
    mass = np.exp(truth.log_mass)
    joint = np.exp(truth.log_conditional) * mass[:, None]
    possible = joint > 0  # neither 0 nor NaN
    forecast = policy.log_conditional[possible]
    ratio = truth.log_conditional[possible] - np.where(np.isnan(forecast), -np.inf, forecast)
    return float(np.sum(joint[possible] * ratio) / mass.sum())


def infill_kl(log_truth: np.ndarray, log_policy: np.ndarray, tree: Tree) -> float:
    """Mean KL of the law of one token given all the others, over texts and positions of the truth.

    ``E_p [ sum_t KL(p(y_t | y_-t) || q(y_t | y_-t)) ] / E_p[length]``, t over the tokens of y (behind the end
    there is nothing to guess). The terms are computed as ``KL(p || q) - KL(p(y_-t) || q(y_-t))``.

    Args:
      log_truth: log p of the strings, nats; [N].
      log_policy: log q of the strings, nats; [N].
      tree: the strings' prefix tree.

    Returns:
      Nats per token; inf if q excludes what p allows.
    """
    p, q = _dense(log_truth, tree), _dense(log_policy, tree)
    divergence, total = _log_ratio_terms(p, q).sum(), 0.0
    if not np.isfinite(divergence):
        return float(divergence)
    for t in range(tree.horizon):
        context = (_logsumexp(law.reshape(tree.vocab**t, tree.vocab, -1), 1) for law in (p, q))
        total += float(divergence - _log_ratio_terms(*context).sum())
    return max(total, 0.0) / _expected_length(log_truth, tree)


def last_state_kernel(process: HiddenMarkov, prompt: np.ndarray, strings: Enumeration) -> np.ndarray:
    """``p(z_t | prompt, y)`` at the last token of y: the process's belief over hidden states, filtered.

    The same kernel is applied to every law (common noise), so that differences are the law's alone. Tokens
    that the process excludes teach nothing: they are passed over.

    Args:
      process: log-probabilities, nats.
      prompt: token ids; those >= V are begin marks; [L].
      strings: enumeration; N strings.

    Returns:
      Probabilities; [N, S].
    """
    initial, transition, emission = (np.exp(np.asarray(table, np.float64)) for table in process)
    tokens, mask = np.asarray(strings.tokens), np.asarray(strings.mask) > 0
    predicted = initial / initial.sum()
    for token in np.asarray(prompt):
        if token < emission.shape[1]:
            seen = predicted * emission[:, token]
            predicted = seen / seen.sum() @ transition
    belief = np.broadcast_to(predicted, (len(tokens), len(initial)))
    for t in range(tokens.shape[1]):
        seen = (belief @ transition if t else belief) * emission.T[tokens[:, t]]
        total = seen.sum(1, keepdims=True)
        belief = np.where(mask[:, t, None] & (total > 0), seen / np.where(total > 0, total, 1.0), belief)
    return belief


def latent_state_tv(
    log_truth: np.ndarray, log_policy: np.ndarray, level: np.ndarray, kernel: np.ndarray
) -> float:
    """``E_{r~q} TV(q(z|r), p(z|r))`` for a query z answered through a common kernel ``K(z|y)``.

    At most ``latent_state_bound(C)`` (T3.4). A level that the truth excludes counts as 1.

    Args:
      log_truth: log p0 of the strings, nats; [N].
      log_policy: log q of the strings, nats; [N].
      level: index of each string's reward; [N].
      kernel: K(z|y), rows sum to one; [N, S].

    Returns:
      Total variation, between 0 and 1.
    """
    size = int(level.max()) + 1

    def joint(law: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mass = np.exp(law)
        table = np.stack([np.bincount(level, mass * column, size) for column in kernel.T], axis=1)
        return table, np.bincount(level, mass, size)

    (p, p_level), (q, q_level) = joint(log_truth), joint(log_policy)
    known = p_level > 0
    expected = p[known] * (q_level[known] / p_level[known])[:, None]
    return float(0.5 * np.abs(q[known] - expected).sum() + q_level[~known].sum())


def latent_state_bound(calibration_loss: float) -> float:
    """``sqrt(C / 2)``, the bound on the mean total variation of any query (T3.4: Pinsker, Jensen)."""
    return float(np.sqrt(max(calibration_loss, 0.0) / 2.0))


def prompt_information(log_q: np.ndarray) -> float:
    """``I(prompt; y) = mean_x KL(q(.|x) || mean_x' q(.|x'))`` for uniform prompts, in nats; at most log P.

    Args:
      log_q: log-probabilities of the strings under every prompt, nats; [P, N].

    Returns:
      Nats; 0 when the answer does not depend on the prompt.
    """
    mixture = _logsumexp(log_q, 0) - np.log(len(log_q))
    return float(np.mean([_log_ratio_terms(row, mixture).sum() for row in log_q]))


def ngrams(strings: Enumeration, n: int) -> NGrams:
    """The n-grams of every string, the end token included, padding not.

    Args:
      strings: enumeration.
      n: length, 1 to T.

    Returns:
      Incidence of n-grams; a gram that occurs twice in a string is listed once.

    Raises:
      ValueError: if n is outside 1 .. T.
    """
    tokens, mask = np.asarray(strings.tokens, np.int64), np.asarray(strings.mask) > 0
    horizon = tokens.shape[1]
    if not 1 <= n <= horizon:
        raise ValueError(f"n must be between 1 and the horizon {horizon}, got {n}")
    base = int(tokens.max()) + 1
    width = horizon - n + 1
    code = sum(tokens[:, j : j + width] * base ** (n - 1 - j) for j in range(n))
    row, start = np.nonzero(mask[:, n - 1 :])
    pair = np.unique(row * base**n + code[row, start])
    found, gram = np.unique(pair % base**n, return_inverse=True)
    powers = base ** np.arange(n)[::-1]
    return NGrams(pair // base**n, gram, found[:, None] // powers % base)


def attractor_lift(log_policy: np.ndarray, log_posterior: np.ndarray, grams: NGrams) -> float:
    """``max_g log P_q(g in y) / P_p*(g in y)`` over n-grams g: the attractor that is not the posterior's.

    Args:
      log_policy: log q of the strings, nats; [N].
      log_posterior: log p* of the strings, nats; [N].
      grams: from ``ngrams``.

    Returns:
      Nats; 0 if q = p*, inf if q says what p* never does.
    """

    def occurs(law: np.ndarray) -> np.ndarray:
        return np.bincount(grams.gram, np.exp(law)[grams.string], len(grams.tokens))

    q, p = occurs(log_policy), occurs(log_posterior)
    with np.errstate(divide="ignore"):
        lift = np.log(q[q > 0]) - np.log(p[q > 0])
    return float(lift.max())
