"""The two programs of a training step, as shapes: sampling, and the update. They are the library's own functions."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kl_rl.core.policy import Policy
from kl_rl.core.posterior import Posterior, Tilt
from kl_rl.core.rollouts import sample
from kl_rl.core.trajectories import Trajectories
from kl_rl.methods.algorithm import Algorithm, State
from kl_rl.methods.parts import in_parts
from kl_rl.models.config import DecoderConfig, Execution
from kl_rl.models.decoder import decoder_policy
from kl_rl.models.lora import lora_policy
from kl_rl.models.twist import decoder_twist
from kl_rl.models.weights import init_weights
from kl_rl.runs.plan.methods import METHODS
from kl_rl.runs.plan.setting import Setting
from kl_rl.sharding import jit_step, replicated, shardings

__all__ = ["Problem", "build", "lower_sampling", "lower_update", "placed"]

BASE_DTYPE = jnp.bfloat16  # frozen weights are kept as they are computed with; trained ones in float32
CAST = frozenset({"kernel", "table"})  # cast to the compute dtype before use anyway


class Problem(NamedTuple):
    """Shapes of everything a step reads, split over a mesh.

    Attributes:
      algorithm: the method.
      state: what is trained: parameters, optimizer, twist; without the arrays of the base.
      base: the frozen policy.
      shares: whether policy and twist read the base's arrays.
      batch: trajectories.
      execution: how the model is run.
    """

    algorithm: Algorithm
    state: State
    base: Policy
    shares: tuple[bool, bool]
    batch: Trajectories
    execution: Execution


def placed(tree: Any, mesh: Mesh) -> Any:
    """Shapes with their shardings."""
    where = shardings(tree, mesh)
    with_sharding = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(with_sharding, tree, where)


def plan_execution(config: DecoderConfig) -> Execution:
    """Bfloat16, scanned and rematerialized layers; logits of 512 positions on each device at a time, all entries."""
    return Execution(
        "bfloat16", scan_layers=True, remat=True, chunk_rows=512, chunk_vocab=config.vocab, fuse=False
    )


def _batch(setting: Setting) -> Trajectories:
    pair, token = (setting.prompts, setting.samples), (setting.prompts, setting.samples, setting.horizon)
    shape: Any = jax.ShapeDtypeStruct
    wide = shape(token, jnp.float32)
    prompt = shape((setting.prompts, setting.prompt_length), jnp.int32)
    return Trajectories(prompt, shape(token, jnp.int32), wide, wide, wide, shape(pair, jnp.float32))


def _without_shared(state: State) -> State:
    twist = None if state.twist is None else dataclasses.replace(state.twist, shared=None)
    return state._replace(policy=dataclasses.replace(state.policy, shared=None), twist=twist)


def _policies(config: DecoderConfig, execution: Execution, setting: Setting, base: Any, own: Any):
    """Policy and twist, from the base's weights and from weights of their own."""
    frozen = decoder_policy(config, base, execution)
    if setting.lora:
        policy = lora_policy(frozen, jax.random.key(0), rank=setting.lora)
    else:
        policy = decoder_policy(config, own, execution)
    if not METHODS[setting.method].twist:
        return policy, None
    return policy, decoder_twist(
        config, own if setting.twist_trunk else base, execution, train_trunk=setting.twist_trunk
    )


def build(config: DecoderConfig, setting: Setting, mesh: Mesh) -> Problem:
    """Shapes of a step; nothing is computed.

    Args:
      config: the architecture.
      setting: method and sizes.
      mesh: of described or simulated devices.

    Returns:
      The problem.
    """
    execution = plan_execution(config)
    method, optimizer = METHODS[setting.method], in_parts(optax.adamw(1e-5), setting.parts)
    shape_of = lambda dtype: jax.eval_shape(lambda: init_weights(jax.random.key(0), config, dtype))
    base_weights = shape_of(BASE_DTYPE)

    def start(base, own):
        policy, twist = _policies(config, execution, setting, base, own)
        return _without_shared(method.make(optimizer, twist).init(policy))

    own = shape_of(jnp.float32)
    policy, twist = jax.eval_shape(
        lambda b, o: _policies(config, execution, setting, b, o), base_weights, own
    )
    return Problem(
        method.make(optimizer, twist),
        placed(jax.eval_shape(start, base_weights, own), mesh),
        decoder_policy(config, placed(base_weights, mesh), execution),
        (policy.shared is not None, twist is not None and twist.shared is not None),
        placed(_batch(setting), mesh),
        execution,
    )


def lower_update(problem: Problem, mesh: Mesh) -> Any:
    """The program that scores a batch under policy, base and twist and updates, in place.

    Args:
      problem: from ``build``.
      mesh: the mesh.

    Returns:
      The lowered program.
    """

    def update(state: State, base: Policy, beta: jax.Array, batch: Trajectories):
        lend = lambda function, lent: dataclasses.replace(function, shared=base.params) if lent else function
        whole = state._replace(
            policy=lend(state.policy, problem.shares[0]), twist=lend(state.twist, problem.shares[1])
        )
        after, info = problem.algorithm.step(whole, Posterior(base, Tilt(beta)), batch)
        return _without_shared(after), info

    beta = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    return jit_step(update, problem.state, mesh).lower(problem.state, problem.base, beta, problem.batch)


def _computing(weights: Any) -> Any:
    """Matrices in the dtype they are computed with, once before the loop over tokens; the result does not change."""
    cast = lambda path, x: x.astype(BASE_DTYPE) if path[-1].key in CAST else x
    return jax.tree.map_with_path(cast, weights)


def lower_sampling(problem: Problem, setting: Setting, mesh: Mesh) -> Any:
    """The program that runs the prompts and draws K completions of each.

    Args:
      problem: from ``build``.
      setting: method and sizes.
      mesh: the mesh.

    Returns:
      The lowered program.
    """

    def draw(policy: Policy, base: Policy | None, key: jax.Array, prompt: jax.Array):
        if base is not None:
            policy = dataclasses.replace(policy, shared=base.params)
        else:
            policy = policy.with_params(_computing(policy.params))
        return sample(policy, key, prompt, num_samples=setting.samples, horizon=setting.horizon)

    samples_base = METHODS[setting.method].samples_base
    policy = problem.base if samples_base else problem.state.policy
    base = problem.base if problem.shares[0] and not samples_base else None
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), mesh)
    rows = problem.batch.tokens.sharding
    with jax.set_mesh(mesh):
        return jax.jit(draw, out_shardings=rows).lower(policy, base, key, problem.batch.prompt)
