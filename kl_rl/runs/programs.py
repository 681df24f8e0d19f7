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
from kl_rl.methods.algorithm import Algorithm, State
from kl_rl.methods.card import Given, Method
from kl_rl.methods.optimizers import annealed_adam
from kl_rl.models import DecoderConfig
from kl_rl.runs.heads import first_policy, heads_on
from kl_rl.runs.returns import RETURN_TOKENS
from kl_rl.runs.settings import Sizes
from kl_rl.runs.shared import attach, detach
from kl_rl.sharding import shardings

__all__ = ["Drawn", "Held", "Knobs", "Program", "Programs", "Shape", "make_programs"]


class Knobs(NamedTuple):
    """Numbers that may change without compiling; scalars. No temperature: 1."""

    value: jax.Array
    learning_rate: jax.Array
    temperature: jax.Array | None


class Held(NamedTuple):
    """All that a run holds between steps; a pytree that can be donated and saved whole.

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


class Program:
    """A jitted function, called and lowered with the mesh in context, so that the models' layout hints act."""

    def __init__(self, function: Callable[..., Any], mesh: Mesh | None, **fixed: Any):
        self._function, self._mesh, self._fixed = function, mesh, fixed

    def _within(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self._mesh is None:
            return function(*args, **self._fixed)
        with jax.set_mesh(self._mesh):
            return function(*args, **self._fixed)

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        return self._within(self._function, args)

    def cache_size(self) -> int:
        """How many times it has been compiled."""
        return self._function._cache_size()  # type: ignore[attr-defined]

    def lower(self, *args: Any) -> Any:
        """The program for arguments of these shapes, not yet compiled."""
        return self._within(self._function.lower, args)  # type: ignore[attr-defined]


class Programs(NamedTuple):
    """What is compiled for a method, and who acts; sampling and scoring are shared by all methods.

    Attributes:
      begin: ``(base, knobs, edges, key) -> held``, memory still empty.
      step: ``(base, held, knobs, batch, step) -> held, info``; donates ``held``.
      behaviour: ``(base, held, knobs) -> policy`` that draws the next batch; not compiled.
      deployed: ``(base, held, knobs) -> policy``, what has been learned; not compiled.
      trained: ``(base, held) -> policy`` whose parameters are exported; not compiled.
      draw: ``(policy, key, prompt, temperature or None) -> drawn``.
      score: ``(policy, prompt, tokens, mask) -> log-probabilities``, nats; [P, K].
    """

    begin: Program
    step: Program
    behaviour: Callable[..., Policy]
    deployed: Callable[..., Policy]
    trained: Callable[..., Policy]
    draw: Program
    score: Program


class Shape(NamedTuple):
    """All that a compiled program depends on; hashable, so that equal runs share their programs.

    Attributes:
      method: its card.
      sizes: K, T, steps, parts of a batch.
      config: of the model.
      first_token: id of return token 0; -1: none.
      stop: ids that end a completion.
      lora: rank of the adapter; 0: all weights are trained.
      train_trunk: whether values have a network of their own, or are heads on the base.
      many_prompts: whether log Z depends on the prompt.
      mesh: devices; None: the default one.
    """

    method: Method
    sizes: Sizes
    config: DecoderConfig
    first_token: int
    stop: tuple[int, ...]
    lora: int = 0
    train_trunk: bool = False
    many_prompts: bool = True
    mesh: Mesh | None = None


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


def _made(shape: Shape, base: Policy, knobs: Knobs, edges: jax.Array) -> tuple[Algorithm, Posterior]:
    """The method at its knob, on this base."""
    given = Given(
        optimizer=annealed_adam(
            knobs.learning_rate, shape.sizes.steps, parts=shape.sizes.gradient_accumulation
        ),
        head=heads_on(shape.config, base, train_trunk=shape.train_trunk, many_prompts=shape.many_prompts),
        steps=shape.sizes.steps,
        edges=edges,
        first_token=shape.first_token,
    )
    return shape.method.made(knobs.value, given), Posterior(base, shape.method.evidence(knobs.value))


@functools.lru_cache(maxsize=16)
def make_programs(shape: Shape) -> Programs:
    """Everything that is compiled for a run.

    Args:
      shape: what it depends on.

    Returns:
      The programs.
    """
    mesh, memory = shape.mesh, shape.method.memory
    returns = RETURN_TOKENS if shape.first_token >= 0 else 0

    def settled(held: Held) -> Held:
        return held if mesh is None else jax.lax.with_sharding_constraint(held, shardings(held, mesh))

    def begin(base: Policy, knobs: Knobs, edges: jax.Array, key: jax.Array) -> Held:
        algorithm, _ = _made(shape, base, knobs, edges)
        first, kept = jax.random.split(key)
        state = detach(algorithm.init(first_policy(base, first, shape.lora, returns)))
        copied = jax.tree.map(jnp.copy, state)  # never an alias of the base, which would be donated
        return settled(Held(copied, (), kept, edges))

    def step(base: Policy, held: Held, knobs: Knobs, batch: Trajectories, step: jax.Array):
        algorithm, posterior = _made(shape, base, knobs, held.edges)
        key = jax.random.fold_in(held.key, 2 * step + 1)
        batch, kept = memory.draw(held.memory, key, batch)
        state, info = algorithm.step(attach(held.state, base.params), posterior, batch)
        return settled(Held(detach(state), kept, held.key, held.edges)), info

    def acting(base: Policy, held: Held, knobs: Knobs, *, learned: bool) -> Policy:
        algorithm, posterior = _made(shape, base, knobs, held.edges)
        act = algorithm.deploy if learned else algorithm.behaviour
        return act(attach(held.state, base.params), posterior)

    return Programs(
        begin=Program(jax.jit(begin), mesh),
        step=Program(jax.jit(step, donate_argnums=1), mesh),
        behaviour=functools.partial(acting, learned=False),
        deployed=functools.partial(acting, learned=True),
        trained=lambda base, held: attach(held.state, base.params).policy,
        draw=Program(
            _draw, mesh, num_samples=shape.sizes.num_samples, horizon=shape.sizes.horizon, stop=shape.stop
        ),
        score=Program(_score, mesh),
    )
