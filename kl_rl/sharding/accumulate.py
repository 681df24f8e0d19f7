"""Gradient accumulation: a batch that does not fit, in parts, with one update at the end."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from kl_rl.algorithm import Algorithm, Info, State
from kl_rl.posterior import Posterior
from kl_rl.trajectories import Trajectories

__all__ = ["accumulated"]


def _parts(batch: Trajectories, num_parts: int) -> Trajectories:
    """[P, ...] -> [parts, P / parts, ...], part i holding the prompts i, i + parts, ...: a split batch stays split."""
    count = batch.prompt.shape[0]
    if count % num_parts:
        raise ValueError(f"{count} prompts cannot be split into {num_parts} parts of equal size")
    split = lambda x: jnp.moveaxis(x.reshape(count // num_parts, num_parts, *x.shape[1:]), 1, 0)
    return jax.tree.map(split, batch)


def accumulated(
    make: Callable[[optax.GradientTransformation], Algorithm],
    optimizer: optax.GradientTransformation,
    num_parts: int,
    *,
    epochs: int = 1,
) -> Algorithm:
    """A method whose step goes through the batch in parts and updates once, with ``optax.MultiSteps``.

    ``g = (1 / n) sum_i g_i`` over the parts: equal to the whole batch up to rounding where the loss is a mean over
    prompts and nothing else is carried from step to step but sums. That holds for REINFORCE, PPO, GRPO, trajectory and
    subtrajectory balance, VarGrad, path consistency, best-of-n, filtering, return conditioning, DPO and IPO.

    It does NOT hold where prompts are coupled or steps are counted: weights normalized over the whole batch
    (``reward_weighted`` unless ``per_prompt``) are normalized within each part, the running log Z of
    ``alpha_divergence`` moves with each part, and ``expert_iteration`` counts parts as steps. ``Info`` is the mean over
    the parts: ``grad_norm`` is that of a part and ``ess`` is within a part.

    Args:
      make: ``optimizer -> Algorithm``, with ``epochs=1`` inside.
      optimizer: as for the whole batch.
      num_parts: n; divides the number of prompts.
      epochs: passes over the batch, one update each.

    Returns:
      Algorithm.

    Raises:
      ValueError: from ``step``, if the parts do not divide the prompts.
    """
    wide = jnp.result_type(float)  # optax would add up in float32 whatever the parameters are
    steps = optax.MultiSteps(optimizer, every_k_schedule=num_parts, accumulator_dtype=wide)
    inner = make(steps.gradient_transformation())

    def step(state: State, posterior: Posterior, batch: Trajectories) -> tuple[State, Info]:
        parts, count = _parts(batch, num_parts), state.step

        def part(state, batch):
            state, info = inner.step(state, posterior, batch)
            return state._replace(step=count), info

        def epoch(state, _):
            state, info = jax.lax.scan(part, state, parts)
            return state, jax.tree.map(jnp.mean, info)

        state, infos = jax.lax.scan(epoch, state, None, length=epochs)
        return state._replace(step=count + 1), jax.tree.map(lambda x: x[0], infos)

    return Algorithm(inner.init, inner.behaviour, step, inner.deploy)
