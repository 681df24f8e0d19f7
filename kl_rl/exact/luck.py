"""Games of luck: strings in which the agent's actions alternate with outcomes drawn by chance.

With chance inside the string, conditioning on a good return also conditions on good luck; control holds the
dynamics fixed. Both plans below are one backward recursion over histories and differ in one line: how a
chance node averages what follows (log-mean-exp: luck is inferred; mean: luck is expected). Without noise they
coincide (Levine 2018, arXiv 1805.00909; Paster et al. 2022, arXiv 2205.15967).

Shape letters: D decisions, A actions, O outcomes, S states; H = (A O)^t histories before decision t, the pair
(a, o) being digit `a O + o`. Tokens: action a is a, outcome o is A + o, the begin mark is A + O.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kl_rl.core import numerics
from kl_rl.core.posterior import Evidence, Tilt

__all__ = [
    "Game",
    "Plan",
    "condition_on_return",
    "control_objective",
    "expected_return",
    "gambling_table",
    "game_return",
    "joint_tilt",
    "kl_control",
    "prior_plan",
    "with_noise",
]

Plan = tuple[jax.Array, ...]


class Game(NamedTuple):
    """A finite game against chance: action a in state s has outcome o with the law `log_chance[s, a]`.

    Attributes:
      log_prior: behaviour prior over actions, nats; [A].
      log_chance: [S, A, O], nats.
      next: next state; [S, A, O].
      payoff: reward units; [S, A, O].
      start: start state; [].
    """

    log_prior: jax.Array
    log_chance: jax.Array
    next: jax.Array
    payoff: jax.Array
    start: jax.Array


def gambling_table(payoff: jax.Array, probability: jax.Array | None = None) -> Game:
    """One-state game with a uniform prior: payoff [A, O]; outcome probabilities [O], equal if None."""
    actions, outcomes = payoff.shape
    law = jnp.full(outcomes, 1.0 / outcomes) if probability is None else probability
    chance = jnp.broadcast_to(numerics.safe_log(law)[None, None], (1, actions, outcomes))
    prior = jnp.full(actions, -jnp.log(actions))
    following = jnp.zeros((1, actions, outcomes), jnp.int32)
    return Game(prior, chance, following, payoff[None], jnp.zeros((), jnp.int32))


def with_noise(game: Game, noise: jax.Array | float) -> Game:
    """The game whose outcome is 0 with probability 1 - noise and drawn by chance otherwise."""
    first = jnp.arange(game.log_chance.shape[-1]) == 0
    sure = jnp.broadcast_to(first[None, None], game.log_chance.shape)
    chance = (1.0 - noise) * sure + noise * jnp.exp(game.log_chance)
    return game._replace(log_chance=numerics.safe_log(chance))


def _histories(game: Game, decisions: int) -> tuple[list[jax.Array], jax.Array]:
    """State before each decision, one [H] for each t, and the return of every complete history [(A O)^D]."""
    state, total = game.start[None], jnp.zeros(1, game.payoff.dtype)
    states = []
    for _ in range(decisions):
        states.append(state)
        total = (total[:, None, None] + game.payoff[state]).reshape(-1)
        state = game.next[state].reshape(-1)
    return states, total


def _mean_exp(log_chance: jax.Array, value: jax.Array) -> jax.Array:
    """Chance node of inference: `log sum_o p(o) e^{v(o)}`."""
    return jax.nn.logsumexp(log_chance + value, axis=-1)


def _mean(log_chance: jax.Array, value: jax.Array) -> jax.Array:
    """Chance node of control: `sum_o p(o) v(o)`."""
    return jnp.sum(numerics.multiply_no_nan(value, jnp.exp(log_chance)), axis=-1)


def _backward(
    game: Game, decisions: int, evidence: Evidence, average: Callable[[jax.Array, jax.Array], jax.Array]
) -> Plan:
    """`pi_t(a | h)` proportional to `prior(a) e^{Q_t(h, a)}`, `Q = average_o V`, `V = log E_prior e^Q`."""
    states, total = _histories(game, decisions)
    value, plan = evidence.log_evidence(total), []
    for state in reversed(states):
        log_chance = game.log_chance[state]  # [H, A, O]
        score = game.log_prior[None] + average(log_chance, value.reshape(log_chance.shape))
        value = jax.nn.logsumexp(score, axis=-1)
        hopeless = (value == -jnp.inf)[:, None]
        score = jnp.where(hopeless, game.log_prior[None], score)
        plan.append(numerics.safe_log_softmax(score))
    return tuple(reversed(plan))


def condition_on_return(game: Game, decisions: int, evidence: Evidence) -> Plan:
    """Act as the prior does in the histories that satisfy evidence about the return: `p(a | h, R in event)`.

    Args:
      game: the game.
      decisions: D; the (A O)^D histories are enumerated.
      evidence: `Between`, `Threshold`, or any other; luck is inferred together with the actions.

    Returns:
      Log-probabilities of actions, [H, A] for each decision; the prior where the event has become impossible.
    """
    return _backward(game, decisions, evidence, _mean_exp)


def joint_tilt(game: Game, decisions: int, beta: jax.Array | float) -> Plan:
    """Condition on soft evidence `e^{R / beta}`: actions score `beta log E e^{R / beta}` and seek risk."""
    return condition_on_return(game, decisions, Tilt(beta))


def kl_control(game: Game, decisions: int, beta: jax.Array | float) -> Plan:
    """The maximizer of `E R - beta KL(pi || prior)` with the dynamics held fixed: the action scores `E R`."""
    return _backward(game, decisions, Tilt(beta), _mean)


def prior_plan(game: Game, decisions: int) -> Plan:
    """The behaviour prior as a plan."""
    return tuple(
        jnp.broadcast_to(game.log_prior[None], (state.shape[0], game.log_prior.shape[0]))
        for state in _histories(game, decisions)[0]
    )


def _law(game: Game, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Log-law of complete histories when the plan meets true chance [(A O)^D], and `KL(plan || prior)` []."""
    log_law, kl = jnp.zeros(1, game.payoff.dtype), jnp.zeros((), game.payoff.dtype)
    for state, log_policy in zip(_histories(game, len(plan))[0], plan, strict=True):
        local = numerics.xlogy_difference(jnp.exp(log_policy), log_policy, game.log_prior[None])
        kl = kl + jnp.sum(jnp.exp(log_law) * jnp.sum(local, axis=-1))
        step = log_policy[:, :, None] + game.log_chance[state]
        log_law = (log_law[:, None, None] + step).reshape(-1)
    return log_law, kl


def expected_return(game: Game, plan: Plan) -> jax.Array:
    """Exact mean return of a plan under true chance, in reward units; []."""
    total = _histories(game, len(plan))[1]
    return jnp.sum(total * jnp.exp(_law(game, plan)[0]))


def control_objective(game: Game, plan: Plan, beta: jax.Array | float) -> jax.Array:
    """`E R - beta KL(pi || prior)` of a plan, exactly, in reward units; []."""
    return expected_return(game, plan) - beta * _law(game, plan)[1]


def game_return(game: Game, tokens: jax.Array) -> jax.Array:
    """Return of strings of alternating actions and outcomes; [..., 2 D] -> [...]."""
    actions = game.log_prior.shape[0]
    pairs = jnp.moveaxis(tokens.reshape(*tokens.shape[:-1], -1, 2), -2, 0)

    def body(carry, pair):
        state, total = carry
        index = state, pair[..., 0], pair[..., 1] - actions
        return (game.next[index], total + game.payoff[index]), None

    batch = tokens.shape[:-1]
    first = jnp.broadcast_to(game.start, batch), jnp.zeros(batch, game.payoff.dtype)
    return jax.lax.scan(body, first, pairs)[0][1]
