"""Policies in games of luck: plans as policies, and batches in which chance draws every other token.

Tokens: action a is a, outcome o is A + o, the begin mark is A + O; actions stand at even positions, outcomes
at odd.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kl_rl.core import numerics
from kl_rl.core.policy import Policy
from kl_rl.core.trajectories import Trajectories
from kl_rl.exact.luck import Game, Plan, game_return

__all__ = ["action_policy", "plan_policy", "play"]


@dataclasses.dataclass(frozen=True)
class _PlanApply:
    actions: int
    outcomes: int

    def __call__(self, params: Plan, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        batch = jnp.broadcast_shapes(prompt.shape[:-1], tokens.shape[:-1])
        tokens = jnp.broadcast_to(tokens, (*batch, tokens.shape[-1]))
        history, rows = jnp.zeros(batch, jnp.int32), []
        vocab = self.actions + self.outcomes
        chance = jnp.where(jnp.arange(vocab) < self.actions, -jnp.inf, 0.0)
        chance = jnp.broadcast_to(chance.reshape((1,) * len(batch) + (vocab,)), (*batch, vocab))
        for t, table in enumerate(params[: (tokens.shape[-1] + 1) // 2]):
            pad = [(0, 0)] * len(batch) + [(0, self.outcomes)]
            rows += [jnp.pad(table[history], pad, constant_values=-jnp.inf), chance.astype(table.dtype)]
            if 2 * t + 1 < tokens.shape[-1]:
                outcome = jnp.clip(tokens[..., 2 * t + 1] - self.actions, 0, self.outcomes - 1)
                action = jnp.minimum(tokens[..., 2 * t], self.actions - 1)
                history = (history * self.actions + action) * self.outcomes + outcome
        return jnp.stack(rows[: tokens.shape[-1]], axis=-2)


def plan_policy(game: Game, plan: Plan) -> Policy:
    """A plan as a policy over A + O tokens; uniform at outcome positions, which are never scored."""
    _, actions, outcomes = game.payoff.shape
    return Policy(plan, _PlanApply(actions, outcomes))


@dataclasses.dataclass(frozen=True)
class _ActionApply:
    inner: Callable[..., jax.Array]
    actions: int

    def __call__(self, params: object, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
        logits = self.inner(params, prompt, tokens)
        position, token = jnp.arange(logits.shape[-2])[:, None], jnp.arange(logits.shape[-1])[None]
        legal = (position % 2 == 0) == (token < self.actions)
        legal = jnp.broadcast_to(legal.reshape((1,) * (logits.ndim - 2) + legal.shape), logits.shape)
        return jnp.where(legal, logits, -jnp.inf)


def action_policy(policy: Policy, num_actions: int) -> Policy:
    """Any policy over A + O tokens, restricted to actions at even and to outcomes at odd positions."""
    return Policy(policy.params, _ActionApply(policy.apply, num_actions))


def play(
    policy: Policy, key: jax.Array, game: Game, prompt: jax.Array, *, num_samples: int, decisions: int
) -> Trajectories:
    """Let a policy act and chance answer: an on-policy batch with uncontrolled tokens.

    Args:
      policy: over A + O tokens; it must put no mass on outcomes at even positions (`action_policy` sees to
      that).
      key: PRNG key.
      game: the game.
      prompt: [P, L].
      num_samples: K.
      decisions: D; strings have T = 2 D tokens.

    Returns:
      Trajectories with `controlled` = 1, 0, 1, 0, ... and `log_behaviour` 0 on the uncontrolled tokens.
    """
    actions = game.log_prior.shape[0]
    flat = jnp.repeat(prompt, num_samples, axis=0)
    size = flat.shape[0]

    def body(carry, inputs):
        tokens, log_probs, state = carry
        t, key = inputs
        act_key, chance_key = jax.random.split(key)
        row = jax.lax.dynamic_index_in_dim(policy.logits(flat, tokens), 2 * t, axis=1, keepdims=False)
        row = numerics.safe_log_softmax(row.astype(log_probs.dtype))
        action = jax.random.categorical(act_key, row)
        outcome = jax.random.categorical(chance_key, game.log_chance[state, action])
        pair = jnp.stack([action, actions + outcome], axis=1).astype(tokens.dtype)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, pair, 2 * t, axis=1)
        chosen = jnp.take_along_axis(row, action[:, None], axis=1)
        log_probs = jax.lax.dynamic_update_slice_in_dim(log_probs, chosen, 2 * t, axis=1)
        return (tokens, log_probs, game.next[state, action, outcome]), None

    tokens = jnp.zeros((size, 2 * decisions), jnp.int32)
    log_probs = jnp.zeros(tokens.shape, jnp.result_type(float))
    first = tokens, log_probs, jnp.broadcast_to(game.start, (size,))
    steps = jnp.arange(decisions), jax.random.split(key, decisions)
    (tokens, log_probs, _), _ = jax.lax.scan(body, first, steps)
    shape = (prompt.shape[0], num_samples, 2 * decisions)
    tokens, log_probs = tokens.reshape(shape), log_probs.reshape(shape)
    mask = jnp.ones(shape, jnp.float32)
    controlled = jnp.broadcast_to((jnp.arange(shape[-1]) % 2 == 0).astype(jnp.float32)[None, None], shape)
    return Trajectories(prompt, tokens, mask, controlled, log_probs, game_return(game, tokens))
