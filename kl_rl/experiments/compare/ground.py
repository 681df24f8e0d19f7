"""An enumerable world with a frozen base model: everything about it is known exactly, whatever network the base is."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kl_rl import exact, models
from kl_rl.core.policy import Policy, sequence_log_prob
from kl_rl.core.rollouts import sample
from kl_rl.methods.conditioning import return_edges
from kl_rl.methods.laws import normalized
from kl_rl.methods.likelihood import fit_likelihood
from kl_rl.worlds import World

__all__ = [
    "COMPARE_LIMIT",
    "Ground",
    "check_world",
    "exact_law",
    "make_ground",
    "mean_at_fraction",
]

MAX_RETURN_TOKENS = 16
COMPARE_LIMIT = 2**18


class Ground(NamedTuple):
    """A world, its frozen base, and the exact law of the base over all strings.

    Attributes:
      world: process, reward, horizon, prompts.
      base: p0, frozen.
      strings: all completions; N of them.
      log_base: log p0(y | x), float64, normalized; [P, N].
      reward: float64; [P, N].
      levels: distinct rewards [G], and their index [P, N].
      edges: boundaries between return tokens; [R - 1].
      base_loss: held-out loss of the base in nats per token, and the entropy rate of the process it should
        reach.
    """

    world: World
    base: Policy
    strings: exact.Enumeration
    log_base: np.ndarray
    reward: np.ndarray
    levels: exact.Levels
    edges: np.ndarray
    base_loss: tuple[float, float]

    @property
    def prompt(self) -> jax.Array:
        """[P, L]."""
        return jnp.asarray(self.world.prompts)

    @property
    def log_level(self) -> np.ndarray:
        """Log p0(r), the average over prompts; [G]."""
        mass = np.zeros(len(self.levels.value))
        np.add.at(mass, np.asarray(self.levels.index), np.exp(self.log_base) / len(self.log_base))
        with np.errstate(divide="ignore"):
            return np.log(mass)


def _train_base(
    world: World, key: jax.Array, steps: int, num_tokens: int
) -> tuple[Policy, tuple[float, float]]:
    init_key, fit_key, test_key = jax.random.split(key, 3)
    prompt = jnp.asarray(world.prompts)
    context = prompt.shape[1] + world.horizon
    policy = models.transformer_policy(
        init_key, world.vocab, extra=1 + num_tokens, context=context, width=48, layers=1, heads=4
    )

    def batch(key, size=256):
        per_prompt = max(1, size // prompt.shape[0])
        tokens, mask, log_p = sample(
            world.base, key, prompt, num_samples=per_prompt, horizon=world.horizon, end=world.end
        )
        flat = lambda x: x.reshape(-1, x.shape[-1])
        return jnp.repeat(prompt, per_prompt, axis=0), flat(tokens), flat(mask), flat(log_p)

    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps, 0.01))
    fit = jax.jit(
        lambda p, k: fit_likelihood(p, lambda k: batch(k)[:3], k, optimizer=optimizer, num_steps=steps)
    )
    trained, _, _ = fit(policy, fit_key)
    prompts, tokens, mask, log_p = batch(test_key, 8192)
    held_out = -jnp.sum(jax.jit(sequence_log_prob)(trained, prompts, tokens, mask)) / mask.sum()
    entropy = -jnp.sum(log_p * mask) / mask.sum()
    return models.tie_extra_tokens(trained, world.vocab), (float(held_out), float(entropy))


def make_ground(world: World, *, seed: int = 0, base_steps: int = 800) -> Ground:
    """Train a small transformer on samples of the process, freeze it, and enumerate it.

    Args:
      world: must be enumerable.
      seed: of initialization and training samples.
      base_steps: gradient steps of maximum likelihood, batch 256.

    Returns:
      The problem. All exact quantities are about the frozen network, not about the process it was trained on.
    """
    strings = exact.enumerate_strings(world.vocab, world.horizon, end=world.end)
    prompt = jnp.asarray(world.prompts)
    reward = np.stack([np.asarray(world.reward(p, strings.tokens, strings.mask), np.float64) for p in prompt])
    flat = exact.reward_levels(reward.reshape(-1))
    levels = exact.Levels(np.asarray(flat.value, np.float64), np.asarray(flat.index).reshape(reward.shape))
    base, loss = _train_base(world, jax.random.key(seed), base_steps, MAX_RETURN_TOKENS + 1)
    log_base = normalized(exact_law(base, prompt, strings))
    edges = return_edges(reward.ravel(), np.exp(log_base).ravel(), tokens=MAX_RETURN_TOKENS)
    return Ground(world, base, strings, log_base, reward, levels, edges, loss)


@jax.jit
def exact_law(policy: Policy, prompt: jax.Array, strings: exact.Enumeration) -> jax.Array:
    """Log-probabilities of all strings for every prompt; [P, N]."""
    return jax.lax.map(lambda p: exact.log_law(policy, p, strings, batch_size=4096), prompt)


def mean_at_fraction(ground: Ground, fraction: float) -> float:
    """Mean reward a fraction of the way from E_{p0} r to the largest reward."""
    log_level, value = ground.log_level, ground.levels.value
    start = float(np.exp(log_level) @ value)
    return start + fraction * (float(value[np.isfinite(log_level)].max()) - start)


def check_world(world: World) -> None:
    """Refuse worlds that a neural base cannot be enumerated on, before anything is trained.

    Raises:
      ValueError: with the size, the limit and the way out.
    """
    if world.num_strings > COMPARE_LIMIT:
        raise ValueError(
            f"{world.name}: {world.vocab}**{world.horizon} = {world.num_strings} strings; comparing "
            "neural policies exactly needs at most "
            f"{COMPARE_LIMIT}: shorten the horizon or the vocabulary (`kl-rl exact` has no such "
            "limit: it uses dynamic programming)"
        )
