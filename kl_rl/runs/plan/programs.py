"""The two programs of a training step, lowered on shapes: those that `kl-rl train` runs, and no others."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kl_rl.core.policy import Policy
from kl_rl.core.trajectories import Trajectories
from kl_rl.methods.memory import Ring
from kl_rl.models.config import DecoderConfig
from kl_rl.models.decoder import decoder_policy
from kl_rl.models.parameters import init_weights
from kl_rl.runs.job import execution_of
from kl_rl.runs.plan.setting import Setting
from kl_rl.runs.programs import Held, Knobs, Shape, make_programs
from kl_rl.runs.returns import RETURN_TOKENS
from kl_rl.sharding import shardings

__all__ = ["Lowered", "lower"]


class Lowered(NamedTuple):
    """A step on a mesh, before it is compiled.

    Attributes:
      sampling: the program that draws a batch, or None: this method draws none.
      update: the program that scores it and learns, in place.
      held: shapes of what a run holds between steps.
      base: shapes of the frozen policy.
      batch: shapes of what is sampled.
    """

    sampling: Any
    update: Any
    held: Held
    base: Policy
    batch: Trajectories


def _placed(tree: Any, mesh: Mesh) -> Any:
    """Shapes with their shardings."""
    where = shardings(tree, mesh)
    with_sharding = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(with_sharding, tree, where)


def _batch(setting: Setting, groups: int, kind: Any) -> Trajectories:
    pair = (groups, setting.num_samples)
    wide = kind((*pair, setting.horizon), jnp.float32)
    tokens = kind((*pair, setting.horizon), jnp.int32)
    prompt = kind((groups, setting.prompt_length), jnp.int32)
    return Trajectories(prompt, tokens, wide, wide, wide, kind(pair, jnp.float32))


def lower(config: DecoderConfig, setting: Setting, mesh: Mesh) -> Lowered:
    """Lower sampling and update of a run for devices that need not be there.

    Args:
      config: of the base.
      setting: sizes.
      mesh: devices.

    Returns:
      The programs and what they work on.
    """
    choice, learning = setting.choice(), setting.learning(mesh.shape)
    method = choice.method
    first_token = -1
    if method.needs.returns:
        config = dataclasses.replace(config, extra=config.extra + RETURN_TOKENS)
        first_token = config.vocab + config.extra - RETURN_TOKENS
    shape = Shape(
        method,
        setting.sizes,
        config,
        first_token,
        stop=(),
        lora=setting.lora,
        train_trunk=learning.trains_trunk,
        mesh=mesh,
    )
    programs, kind = make_programs(shape), jax.ShapeDtypeStruct
    number: Any = kind((), jnp.float32)
    edges = kind((RETURN_TOKENS - 1,), jnp.float32)
    weights = jax.eval_shape(lambda: init_weights(jax.random.key(0), config))
    key, knobs = jax.eval_shape(lambda: jax.random.key(0)), Knobs(number, number, None)
    key, knobs, edges, weights = (_placed(tree, mesh) for tree in (key, knobs, edges, weights))
    base = decoder_policy(config, weights, execution_of(learning))
    begun = programs.begin.lower(base, knobs, edges, key).out_info
    held = _placed(jax.tree.map(lambda x: kind(x.shape, x.dtype), begun), mesh)
    cursor: Any = kind((), jnp.int32)
    if method.memory.filling:
        groups = method.memory.filling * setting.batch
        held = held._replace(memory=_placed(Ring(_batch(setting, groups, kind), cursor), mesh))
    batch = _placed(_batch(setting, setting.batch, kind), mesh)
    step = _placed(cursor, mesh)
    return Lowered(
        _lower_sampling(programs, base, held, knobs, key, batch.prompt) if method.memory.samples else None,
        programs.step.lower(base, held, knobs, batch, step),
        held,
        base,
        batch,
    )


def _lower_sampling(programs: Any, base: Policy, held: Held, knobs: Knobs, key: Any, prompt: Any) -> Any:
    """By whoever draws: the base itself, or a policy made of what the run holds."""
    policy = _placed(jax.eval_shape(programs.behaviour, base, held, knobs), prompt.sharding.mesh)
    return programs.draw.lower(policy, key, prompt, None)
