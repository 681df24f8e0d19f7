"""Train one method at all its knobs and seeds as one vmapped program, and measure it exactly along the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl import models
from kl_rl.core.posterior import Posterior
from kl_rl.experiments.compare.catalogue import Context, Method
from kl_rl.experiments.compare.knobs import knob_values
from kl_rl.experiments.compare.problem import Problem, exact_law, normalized
from kl_rl.methods import fit

__all__ = ["Plan", "Trained", "make_context", "train"]


# The programs here run for seconds, so compile time matters as much as speed.
FAST_COMPILE: dict[str, str | bool] = {"xla_backend_optimization_level": "1"}
DENSE = 8  # an early-stopped run is measured this many times more often: its path is its knob


class Plan(NamedTuple):
    """Size of a comparison.

    Attributes:
      seeds: fine-tuning seeds per knob.
      steps: gradient steps.
      num_samples: K, samples per prompt and step.
      checkpoints: measurements along training.
      fractions: where the knobs aim: fractions of the way from E_{p0} r to the largest reward.
      learning_rate: of Adam.
      base_steps: maximum-likelihood steps of the base.
    """

    seeds: int = 4
    steps: int = 200
    num_samples: int = 64
    checkpoints: int = 8
    fractions: tuple[float, ...] = (0.2, 0.4, 0.6)
    learning_rate: float = 3e-3
    base_steps: int = 800


class Trained(NamedTuple):
    """A method after training, for L = knobs x seeds lanes.

    Attributes:
      knob: [L].
      seed: [L].
      steps: gradient steps at each checkpoint; [M].
      log_q: float64, normalized; [M, L, P, N].
      wall: seconds of running, for all lanes together.
      compile: seconds of tracing and compiling.
      ess: mean effective sample size of the last checkpoint's batches, as a fraction; [L].
    """

    knob: np.ndarray
    seed: np.ndarray
    steps: np.ndarray
    log_q: np.ndarray
    wall: float
    compile: float
    ess: np.ndarray


def make_context(problem: Problem, plan: Plan) -> Context:
    """What the methods of the catalogue may know of an enumerable world."""
    world, prompt = problem.world, problem.prompt
    shape: dict[str, Any] = {
        "extra": 2 + len(problem.edges), "context": prompt.shape[1] + world.horizon + 1, "width": 16, "layers": 1
    }  # fmt: skip
    return Context(
        prompt=prompt,
        reward_fn=world.reward,
        horizon=world.horizon,
        end=world.end,
        num_samples=plan.num_samples,
        edges=jnp.asarray(problem.edges, jnp.float32),
        first_token=world.vocab + 1,
        twist=models.transformer_twist(jax.random.key(7), world.vocab, **shape),
        constant=models.constant_twist(),
        learning_rate=plan.learning_rate,
        steps=plan.steps,
        data_size=8 * plan.num_samples,
    )


def _program(method: Method, context: Context, num_steps: int):
    """Two pure functions of (base, knob, ...): begin a run, and advance it one chunk."""

    def setup(base, knob):
        made = method.build(knob, context)
        return made, Posterior(base, made.evidence)

    def begin(base, knob, key):
        made, posterior = setup(base, knob)
        return fit.start(made.algorithm, base, posterior, made.source, key)

    def chunk(base, knob, run):
        made, posterior = setup(base, knob)
        run, info = fit.advance(made.algorithm, run, posterior, made.source, num_steps=num_steps)
        return run, (made.algorithm.deploy(run.state, posterior), jnp.mean(info.ess))

    return begin, chunk


def train(
    method: Method,
    problem: Problem,
    plan: Plan,
    seeds: list[int],
    progress: Callable[[float, str], None] = lambda fraction, message: None,
) -> Trained:
    """Fine-tune at every knob and seed, and enumerate the deployed policy at every checkpoint.

    Args:
      method: from the catalogue.
      problem: world and frozen base.
      plan: sizes.
      seeds: fine-tuning seeds.
      progress: called with a fraction and a message.

    Returns:
      The exact laws along training.
    """
    context = make_context(problem, plan)
    values = knob_values(method, problem, plan.fractions, plan.num_samples)
    knob = np.repeat(values, len(seeds))
    seed = np.tile(seeds, len(values))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seed, jnp.uint32))
    checkpoints = DENSE * plan.checkpoints if method.knob == "steps" else plan.checkpoints
    chunk_steps = max(1, plan.steps // checkpoints)
    checkpoints = plan.steps // chunk_steps
    begin, chunk = _program(method, context, chunk_steps)
    knobs = jnp.asarray(knob, jnp.float32)
    started = time.perf_counter()
    run = jax.jit(jax.vmap(begin, in_axes=(None, 0, 0)))(problem.base, knobs, keys)
    lowered = jax.jit(jax.vmap(chunk, in_axes=(None, 0, 0))).lower(problem.base, knobs, run)
    compiled = lowered.compile(FAST_COMPILE)
    laws_of = jax.jit(
        lambda policies: jax.lax.map(lambda q: exact_law(q, problem.prompt, problem.strings), policies)
    )
    compile_seconds = time.perf_counter() - started
    started, laws, ess = time.perf_counter(), [], np.ones(len(knob))
    for index in range(checkpoints):
        progress(index / checkpoints, f"{method.name}: step {index * chunk_steps} of {plan.steps}")
        run, (policies, ess) = compiled(problem.base, knobs, run)
        if method.family != "conditioning" or index == checkpoints - 1:
            laws.append(normalized(laws_of(policies)))
    steps = chunk_steps * np.arange(1, checkpoints + 1)
    return Trained(
        knob,
        seed,
        steps[-len(laws) :],
        np.stack(laws),
        time.perf_counter() - started,
        compile_seconds,
        np.asarray(ess),
    )
