"""The loop, as one pure function: draw a batch, take a step, again. Anyone may write their own; it is five lines."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from kl_rl.core.policy import Policy
from kl_rl.core.posterior import Posterior
from kl_rl.methods.algorithm import Algorithm, Info, State
from kl_rl.methods.memory import Source

__all__ = ["Run", "advance", "start"]


class Run(NamedTuple):
    """A run in progress: the algorithm's state, the source's memory and the key; a pytree, so it can be saved whole."""

    state: State
    memory: Any
    key: jax.Array


def start(algorithm: Algorithm, policy: Policy, posterior: Posterior, source: Source, key: jax.Array) -> Run:
    """Begin a run from an initial policy (usually a copy of the base).

    Raises:
      ValueError: the source keeps samples, and the method learns from fresh ones only.
    """
    if source.memory.filling and not algorithm.needs.foreign:
        raise ValueError(
            "this method learns from samples of its own (Needs.foreign is False): its source can keep none"
        )
    run_key, memory_key = jax.random.split(key)
    return Run(algorithm.init(policy), source.init(memory_key, posterior), run_key)


def advance(
    algorithm: Algorithm, run: Run, posterior: Posterior, source: Source, *, num_steps: int
) -> tuple[Run, Info]:
    """``num_steps`` of sampling and learning in one compiled scan; vmappable over runs and posteriors.

    Args:
      algorithm: the method.
      run: from ``start`` or an earlier ``advance``.
      posterior: base policy and evidence, arguments and never constants.
      source: where batches come from.
      num_steps: length of the scan.

    Returns:
      The run, and Info with a leading axis [num_steps].
    """

    def body(run: Run, _):
        key, draw_key = jax.random.split(run.key)
        behaviour = algorithm.behaviour(run.state, posterior)
        batch, memory = source.draw(run.memory, draw_key, behaviour)
        state, info = algorithm.step(run.state, posterior, batch)
        return Run(state, memory, key), info

    return jax.lax.scan(body, run, None, length=num_steps)
