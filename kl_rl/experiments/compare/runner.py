"""Train one method at all its knobs and seeds as one vmapped program, and measure it exactly along the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl import models
from kl_rl.core.mixtures import Mixture
from kl_rl.core.posterior import Posterior
from kl_rl.core.twist import Twist
from kl_rl.experiments.compare.ground import Ground, exact_law, mean_at_fraction
from kl_rl.methods import fit, laws
from kl_rl.methods.card import Given, Method
from kl_rl.methods.knobs import BETA, aim
from kl_rl.methods.laws import normalized
from kl_rl.methods.memory import Source, fresh
from kl_rl.methods.needs import Head
from kl_rl.methods.optimizers import annealed_adam

__all__ = ["Scale", "Trained", "knob_values", "train"]


# The programs here run for seconds, so compile time matters as much as speed.
FAST_COMPILE: dict[str, str | bool] = {"xla_backend_optimization_level": "1"}
DENSE = 8  # an early-stopped run is measured this many times more often: its path is its knob
GROUPS = 8  # of a prompt's samples, where groups are kept between steps: the finer, the better they mix


class Scale(NamedTuple):
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


def _heads(ground: Ground) -> Callable[[Head], Twist]:
    """Initial heads: log Z is one number for a single prompt."""
    world, prompt = ground.world, ground.prompt
    shape: dict[str, Any] = {
        "extra": 2 + len(ground.edges), "context": prompt.shape[1] + world.horizon + 1, "width": 16, "layers": 1
    }  # fmt: skip
    network = models.transformer_twist(jax.random.key(7), world.vocab, **shape)
    return lambda head: (models.constant_twist() if head is Head.LOG_Z and prompt.shape[0] == 1 else network)


def _source(method: Method, ground: Ground, num_samples: int) -> Source:
    groups = GROUPS if method.memory.filling and num_samples % GROUPS == 0 else 1
    prompt = jnp.repeat(ground.prompt, groups, axis=0)
    options: dict[str, Any] = {"horizon": ground.world.horizon, "end": ground.world.end}
    return fresh(
        prompt, ground.world.reward, num_samples=num_samples // groups, memory=method.memory, **options
    )


def _program(method: Method, ground: Ground, sizes: Scale, num_steps: int):
    """Two pure functions of (base, knob, ...): begin a run, and advance it one chunk."""
    source = _source(method, ground, sizes.num_samples)
    given = Given(
        optimizer=annealed_adam(sizes.learning_rate, sizes.steps),
        head=_heads(ground),
        steps=sizes.steps,
        edges=jnp.asarray(ground.edges, jnp.float32),
        first_token=ground.world.vocab + 1,
    )

    def begin(base, knob, key):
        posterior = Posterior(base, method.evidence(knob))
        return fit.start(method.made(knob, given), base, posterior, source, key)

    def chunk(base, knob, run):
        algorithm, posterior = method.made(knob, given), Posterior(base, method.evidence(knob))
        run, info = fit.advance(algorithm, run, posterior, source, num_steps=num_steps)
        return run, (algorithm.deploy(run.state, posterior), jnp.mean(info.ess))

    return begin, chunk


def knob_values(method: Method, ground: Ground, sizes: Scale) -> list[float]:
    """Settings of a method's knob that aim at mean rewards some fractions of the way up.

    Args:
      method: its card.
      ground: world and frozen base.
      sizes: of the comparison.

    Returns:
      Values, without repetitions; one arbitrary value where nothing can be aimed with.
    """
    means = [mean_at_fraction(ground, f) for f in sizes.fractions]
    to = lambda law, mean, knob: aim(
        law, ground.log_base, ground.reward, mean, knob, samples=sizes.num_samples
    )
    if method.knob is None or method.law is None:
        return [to(laws.tilt, means[len(means) // 2], BETA)]
    return list(dict.fromkeys(to(method.law, mean, method.knob) for mean in means))


def train(
    method: Method,
    ground: Ground,
    sizes: Scale,
    seeds: list[int],
    progress: Callable[[float, str], None] = lambda fraction, message: None,
) -> Trained:
    """Fine-tune at every knob and seed, and enumerate the deployed policy at every checkpoint.

    Args:
      method: its card.
      ground: world and frozen base.
      sizes: of the comparison.
      seeds: fine-tuning seeds.
      progress: called with a fraction and a message.

    Returns:
      The exact laws along training.
    """
    values = knob_values(method, ground, sizes)
    knob = np.repeat(values, len(seeds))
    seed = np.tile(seeds, len(values))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seed, jnp.uint32))
    stopped = method.knob is not None and method.knob.stops
    checkpoints = DENSE * sizes.checkpoints if stopped else sizes.checkpoints
    chunk_steps = max(1, sizes.steps // checkpoints)
    checkpoints = sizes.steps // chunk_steps
    begin, chunk = _program(method, ground, sizes, chunk_steps)
    knobs = jnp.asarray(knob, jnp.float32)
    started = time.perf_counter()
    run = jax.jit(jax.vmap(begin, in_axes=(None, 0, 0)))(ground.base, knobs, keys)
    lowered = jax.jit(jax.vmap(chunk, in_axes=(None, 0, 0))).lower(ground.base, knobs, run)
    compiled = lowered.compile(FAST_COMPILE)
    laws_of = jax.jit(
        lambda policies: jax.lax.map(lambda q: exact_law(q, ground.prompt, ground.strings), policies)
    )
    compile_seconds = time.perf_counter() - started
    started, laws, ess = time.perf_counter(), [], np.ones(len(knob))
    for index in range(checkpoints):
        progress(index / checkpoints, f"{method.name}: step {index * chunk_steps} of {sizes.steps}")
        run, (policies, ess) = compiled(ground.base, knobs, run)
        costly = isinstance(policies.params, Mixture)  # as much as all of its components
        if not costly or index == checkpoints - 1:
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
