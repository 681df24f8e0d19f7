"""A run's fixed parts, put together from its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kl_rl.core.policy import Policy
from kl_rl.core.trajectories import Trajectories
from kl_rl.huggingface.opened import Model, architecture, load_model
from kl_rl.models import Execution
from kl_rl.rewards.host import HostReward, load_reward
from kl_rl.runs.logged import load_logged
from kl_rl.runs.methods import Chosen, choose
from kl_rl.runs.programs import Knobs, Plan, Programs, make_programs
from kl_rl.runs.prompts import Prompts, load_prompts, order_of, split_rows
from kl_rl.runs.returns import with_returns
from kl_rl.runs.settings import Settings
from kl_rl.sharding import AXES, check_mesh, make_mesh, place, put, replicated
from kl_rl.storage.errors import TrainingError

__all__ = ["Job", "make_job"]


def _everywhere(x: Any, mesh: Mesh | None) -> jax.Array:
    return jnp.asarray(x) if mesh is None else put(jnp.asarray(x), replicated(mesh))


class Job(NamedTuple):
    """What does not change during a run.

    Attributes:
      settings: as asked.
      chosen: the method.
      model: base and tokenizer.
      base: p0, placed on the mesh.
      reward: on the host.
      train: prompts to train on.
      held_out: prompts to measure on.
      order: ``step -> indices of the training prompts`` [B].
      programs: compiled parts.
      knobs: their numbers.
      mesh: devices; None: one.
      data: what is learned from instead of samples, a row for each training prompt; None: samples.
    """

    settings: Settings
    chosen: Chosen
    model: Model
    base: Policy
    reward: HostReward
    train: Prompts
    held_out: Prompts
    order: Callable[[int], np.ndarray]
    programs: Programs
    knobs: Knobs
    mesh: Mesh | None
    data: Trajectories | None = None

    @property
    def is_held_out(self) -> bool:
        """Whether what is measured on is kept from training; of very few prompts none is."""
        return not set(self.held_out.texts) & set(self.train.texts)

    def placed(self, tree: Any) -> Any:
        """Host arrays on the devices; every process has all of them, and gives its devices their parts."""
        return jax.tree.map(jnp.asarray, tree) if self.mesh is None else place(tree, self.mesh)

    def array(self, x: Any) -> jax.Array:
        """A small array on the devices, whole on each."""
        return _everywhere(x, self.mesh)

    def key(self) -> jax.Array:
        """The PRNG key of the run's seed, on the devices."""
        key = jax.random.key(self.settings.learning.seed)
        return key if self.mesh is None else place(key, self.mesh)


def _mesh(settings: Settings) -> Mesh | None:
    axes = dict(settings.learning.mesh)
    if not axes:
        return None
    config, sizes = architecture(settings.task.base), settings.sizes
    devices, parts = axes.get("data", 1) * axes.get("fsdp", 1), sizes.gradient_accumulation
    if sizes.batch % (devices * parts):
        raise TrainingError(
            f"--batch {sizes.batch}{f' in {parts} parts' if parts > 1 else ''} cannot be split over "
            f"data x fsdp = {devices} devices: use a multiple of {devices * parts}"
        )
    try:
        mesh = make_mesh(*(axes.get(name, 1) for name in AXES))
        if jax.process_count() > 1 and mesh.size != jax.device_count():
            raise ValueError(
                f"{mesh.size} devices, but the processes have {jax.device_count()}: use all of them"
            )
        check_mesh(config, mesh)
    except ValueError as error:
        raise TrainingError(f"--mesh: {error}") from error
    return mesh


def make_job(settings: Settings) -> Job:
    """Open model, prompts and reward, and prepare (but not yet compile) the programs.

    Args:
      settings: of the run.

    Returns:
      The job.

    Raises:
      TrainingError, DataError, BadReward: for input that cannot be used.
    """
    chosen = choose(settings)
    learning, whole_heads = settings.learning, dict(settings.learning.mesh).get("tensor", 1) == 1
    execution = Execution(
        compute_dtype=learning.compute_dtype,
        scan_layers=learning.scan_layers,
        remat=learning.remat,
        fuse=whole_heads,
    )
    reward = load_reward(settings.task.reward)
    mesh = _mesh(settings)
    model = load_model(settings.task.base, execution, mesh)
    base = model.base  # each device has read its own part
    if chosen.returns:
        model = with_returns(model, execution)
        base = model.base if mesh is None else place(model.base, mesh)
    logged = None if settings.task.data is None else load_logged(settings, model, chosen)
    prompts = load_prompts(settings, model) if logged is None else logged.prompts
    rows, kept = split_rows(prompts.texts, settings.sizes.held_out, settings.learning.seed)
    train, held_out = prompts.take(rows), prompts.take(kept)
    plan = Plan(
        chosen.method,
        chosen.memory,
        settings.sizes,
        model.config,
        model.first_token,
        stop=tuple(end for end in model.tokenizer.end_ids if end < model.config.vocab),
        lora=settings.learning.lora,
        many_prompts=len(train.texts) > 1,
        mesh=mesh,
    )
    programs = make_programs(plan)
    number = lambda x: _everywhere(np.float32(x), mesh)
    warm = None if learning.temperature == 1.0 else number(learning.temperature)
    knobs = Knobs(number(chosen.knob), number(learning.learning_rate), warm)
    order = order_of(train, settings.sizes.batch, settings.learning.seed)
    batches = None if logged is None else logged.take(rows).batch
    return Job(settings, chosen, model, base, reward, train, held_out, order, programs, knobs, mesh, batches)
