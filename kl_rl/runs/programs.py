"""The compiled parts of a run; between them the host computes rewards.

The base, the knob, the learning rate and the keys are arguments: changing them compiles nothing, and no weights are
constants of a program. The run's arrays are donated to ``step``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kl_rl.core.policy import Policy
from kl_rl.core.posterior import Posterior
from kl_rl.core.rollouts import score
from kl_rl.core.sampler import generate
from kl_rl.core.trajectories import Trajectories
from kl_rl.core.transform import Transform
from kl_rl.experiments.compare.catalogue import Context, Method
from kl_rl.methods.algorithm import Algorithm, Info, State
from kl_rl.models import DecoderConfig, constant_twist
from kl_rl.runs.heads import first_policy, twist_head
from kl_rl.runs.memory import Memory
from kl_rl.runs.returns import RETURN_TOKENS
from kl_rl.runs.settings import Sizes
from kl_rl.runs.shared import attach, detach
from kl_rl.sharding import shardings

__all__ = ["Drawn", "Knobs", "Plan", "Programs", "Run", "make_programs"]


class Knobs(NamedTuple):
    """Numbers that may change without compiling; scalars. No temperature: 1."""

    value: jax.Array
    learning_rate: jax.Array
    temperature: jax.Array | None


class Run(NamedTuple):
    """A run in progress; a pytree that can be donated and saved whole.

    Attributes:
      state: of the algorithm, without the base's arrays.
      memory: what is kept between steps; () if nothing.
      key: PRNG key of the whole run.
      edges: boundaries between return tokens; [R - 1], infinite where unused.
    """

    state: State
    memory: Any
    key: jax.Array
    edges: jax.Array


class Drawn(NamedTuple):
    """Completions of a batch of prompts.

    Attributes:
      tokens: [P, K, T].
      mask: [P, K, T].
      log_behaviour: per token, nats; [P, K, T].
      log_model: per token under the plain model, nats; [P, K, T].
    """

    tokens: jax.Array
    mask: jax.Array
    log_behaviour: jax.Array
    log_model: jax.Array


class Programs(NamedTuple):
    """What is compiled for a method, and who acts; sampling and scoring are shared by all methods.

    Attributes:
      begin: ``(base, knobs, edges, key) -> Run``, jitted.
      step: ``(base, run, knobs, batch, step) -> Run, Info``, jitted; the run is donated.
      behaviour: ``(base, run, knobs) -> Policy`` that draws the next batch; moves no array.
      deployed: ``(base, run, knobs) -> Policy`` that has been learned; moves no array.
      trained: ``(base, run) -> Policy`` whose parameters are trained; moves no array.
      draw: ``(policy, key, prompt, temperature or None) -> Drawn``, jitted.
      score: ``(policy, prompt, tokens, mask) -> [P, K]``, nats, jitted.
    """

    begin: Callable[..., Run]
    step: Callable[..., tuple[Run, Info]]
    behaviour: Callable[..., Policy]
    deployed: Callable[..., Policy]
    trained: Callable[..., Policy]
    draw: Callable[..., Drawn]
    score: Callable[..., jax.Array]


class Plan(NamedTuple):
    """All that a compiled program depends on; hashable, so that equal runs share their programs.

    Attributes:
      method: row of the catalogue.
      memory: what it keeps.
      sizes: of the run.
      config: architecture.
      first_token: id of return token 0, or -1.
      stop: tokens that end a completion.
      lora: rank of the adapter; 0: none.
      many_prompts: log Z is a function of the prompt, not one number.
      mesh: devices; None: wherever the arguments are.
    """

    method: Method
    memory: Memory
    sizes: Sizes
    config: DecoderConfig
    first_token: int
    stop: tuple[int, ...]
    lora: int = 0
    many_prompts: bool = True
    mesh: Mesh | None = None


def _context(plan: Plan, base: Policy, knobs: Knobs, edges: jax.Array) -> Context:
    """What a method of the catalogue may know; the reward is not computed in its programs."""
    sizes = plan.sizes
    head = twist_head(plan.config, base, train_trunk=not plan.lora)
    constant = twist_head(plan.config, base, train_trunk=False) if plan.many_prompts else constant_twist()
    return Context(
        prompt=jnp.zeros((sizes.batch, 1), jnp.int32),
        reward_fn=lambda prompt, tokens, mask: jnp.sum(mask, axis=-1),
        horizon=sizes.horizon,
        end=None,
        num_samples=sizes.num_samples,
        edges=edges,
        first_token=plan.first_token,
        twist=head,
        constant=constant,
        learning_rate=knobs.learning_rate,  # type: ignore[arg-type]
        steps=sizes.steps,
        data_size=sizes.num_samples,
        parts=sizes.gradient_accumulation,
    )


@functools.partial(jax.jit, static_argnames=("num_samples", "horizon", "stop"))
def _draw(
    policy: Policy,
    key: jax.Array,
    prompt: jax.Array,
    temperature: jax.Array | None,
    *,
    num_samples: int,
    horizon: int,
    stop: tuple[int, ...],
) -> Drawn:
    transform = Transform(temperature=temperature)
    found = generate(
        policy, key, prompt, num_samples=num_samples, horizon=horizon, transform=transform, stop=stop
    )
    return Drawn(jnp.where(found.mask > 0, found.tokens, 0), *found[1:])


@jax.jit
def _score(policy: Policy, prompt: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    batch = Trajectories(prompt, tokens, mask, jnp.ones_like(mask), jnp.zeros_like(mask), mask[..., 0])
    return jnp.sum(score(policy, batch), axis=-1)


def _within(mesh: Mesh | None, program: Callable[..., Any]) -> Callable[..., Any]:
    """Calls with the mesh in context, so that the models' hints about activations act."""
    if mesh is None:
        return program

    def call(*args: Any) -> Any:
        with jax.set_mesh(mesh):
            return program(*args)

    return call


@functools.lru_cache(maxsize=16)
def make_programs(plan: Plan) -> Programs:
    """Everything that is compiled for a run.

    Args:
      plan: what the programs depend on.

    Returns:
      The programs; the same ones for an equal plan.
    """
    sizes, mesh = plan.sizes, plan.mesh
    returns = RETURN_TOKENS if plan.first_token >= 0 else 0

    def settled(run: Run) -> Run:
        return run if mesh is None else jax.lax.with_sharding_constraint(run, shardings(run, mesh))

    def made(base: Policy, knobs: Knobs, edges: jax.Array) -> tuple[Algorithm, Posterior]:
        setup = plan.method.build(knobs.value, _context(plan, base, knobs, edges))
        return setup.algorithm, Posterior(base, setup.evidence)

    def begin(base: Policy, knobs: Knobs, edges: jax.Array, key: jax.Array) -> Run:
        algorithm, _ = made(base, knobs, edges)
        first, kept = jax.random.split(key)
        state = detach(algorithm.init(first_policy(base, first, plan.lora, returns)))
        copied = jax.tree.map(jnp.copy, state)  # never an alias of the base, which would be donated
        return settled(Run(copied, (), kept, edges))

    def step(base: Policy, run: Run, knobs: Knobs, batch: Trajectories, step: jax.Array) -> tuple[Run, Info]:
        algorithm, posterior = made(base, knobs, run.edges)
        key = jax.random.fold_in(run.key, 2 * step + 1)
        batch, memory = plan.memory.draw(run.memory, key, batch)
        state, info = algorithm.step(attach(run.state, base.params), posterior, batch)
        return settled(Run(detach(state), memory, run.key, run.edges)), info

    def behaviour(base: Policy, run: Run, knobs: Knobs) -> Policy:
        algorithm, posterior = made(base, knobs, run.edges)
        return algorithm.behaviour(attach(run.state, base.params), posterior)

    def deployed(base: Policy, run: Run, knobs: Knobs) -> Policy:
        algorithm, posterior = made(base, knobs, run.edges)
        return algorithm.deploy(attach(run.state, base.params), posterior)

    draw = functools.partial(_draw, num_samples=sizes.num_samples, horizon=sizes.horizon, stop=plan.stop)
    return Programs(
        begin=_within(mesh, jax.jit(begin)),
        step=_within(mesh, jax.jit(step, donate_argnums=1)),
        behaviour=behaviour,
        deployed=deployed,
        trained=lambda base, run: attach(run.state, base.params).policy,
        draw=_within(mesh, draw),
        score=_within(mesh, _score),
    )
