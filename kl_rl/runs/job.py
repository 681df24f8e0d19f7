"""A run's fixed parts, put together from what is asked: method, inputs, programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kl_rl.core.policy import Policy
from kl_rl.core.trajectories import Trajectories
from kl_rl.huggingface.opened import Model, architecture, load_model
from kl_rl.models import DecoderConfig, Execution
from kl_rl.rewards.host import HostReward, load_reward
from kl_rl.runs.choice import Choice, choose
from kl_rl.runs.logged import load_logged
from kl_rl.runs.programs import Knobs, Programs, Shape, make_programs
from kl_rl.runs.prompts import Prompts, load_prompts, order_of, reader_of, split_rows
from kl_rl.runs.returns import with_returns
from kl_rl.runs.settings import Learning, Settings, Sizes, Task
from kl_rl.sharding import AXES, check_mesh, make_mesh, place, put, replicated
from kl_rl.storage.errors import RunError

__all__ = ["Inputs", "Job", "assemble", "execution_of", "make_job", "mesh_of", "open_inputs"]


def _everywhere(x: Any, mesh: Mesh | None) -> jax.Array:
    return jnp.asarray(x) if mesh is None else put(jnp.asarray(x), replicated(mesh))


class Inputs(NamedTuple):
    """What is read before a run begins.

    Attributes:
      model: the base with its tokenizer; with return tokens, if the method needs them.
      base: p0; on the mesh, if there is one.
      train: prompts to learn from.
      held_out: prompts to measure on.
      data: what is learned from instead of samples, rows as in ``train``, host arrays; None: samples.
      reward: on the host.
    """

    model: Model
    base: Policy
    train: Prompts
    held_out: Prompts
    data: Trajectories | None
    reward: HostReward


class Job(NamedTuple):
    """What does not change during a run.

    Attributes:
      choice: the method, and who draws its samples.
      inputs: what was read.
      sizes: how much is sampled.
      skip_bad: whether samples whose reward fails are replaced.
      seed: of everything random.
      lora: rank of the adapter; 0: none.
      order: ``step -> index`` of its prompts.
      programs: compiled parts.
      knobs: numbers that the programs take.
      mesh: devices; None: the default one.
      extras: ``(row, tuned samples, base samples) -> row``: further measurements; None: none.
      pool: ``(name, draw) -> samples``: hands out samples of p0 that several runs share, drawing them if they are not
        there yet; None: this run draws its own.
    """

    choice: Choice
    inputs: Inputs
    sizes: Sizes
    skip_bad: bool
    seed: int
    lora: int
    order: Callable[[int], np.ndarray]
    programs: Programs
    knobs: Knobs
    mesh: Mesh | None
    extras: Callable[..., dict[str, Any]] | None = None
    pool: Callable[..., Any] | None = None

    @property
    def is_held_out(self) -> bool:
        """Whether what is measured on is kept from training; of very few prompts none is."""
        return not set(self.inputs.held_out.texts) & set(self.inputs.train.texts)

    def placed(self, tree: Any) -> Any:
        """Host arrays on the devices; every process has all of them, and gives its devices their parts."""
        return jax.tree.map(jnp.asarray, tree) if self.mesh is None else place(tree, self.mesh)

    def array(self, x: Any) -> jax.Array:
        """A small array on the devices, whole on each."""
        return _everywhere(x, self.mesh)

    def key(self) -> jax.Array:
        """The PRNG key of the run's seed, on the devices."""
        key = jax.random.key(self.seed)
        return key if self.mesh is None else place(key, self.mesh)


def mesh_of(
    axes: Mapping[str, int],
    batch: int,
    parts: int,
    config: DecoderConfig,
    devices: Sequence[Any] | None = None,
) -> Mesh | None:
    """The mesh of a run; None for no axes.

    Args:
      axes: sizes of data, fsdp and tensor.
      batch: B, prompts per step.
      parts: of the batch, in which gradients are gathered.
      config: of the model.
      devices: None: those of this run.

    Returns:
      The mesh.

    Raises:
      RunError: it does not divide the batch or the model, or leaves devices out.
    """
    if not axes:
        return None
    rows = axes.get("data", 1) * axes.get("fsdp", 1)
    if batch % (rows * parts):
        raise RunError(
            f"--batch {batch}{f' in {parts} parts' if parts > 1 else ''} cannot be split over "
            f"data x fsdp = {rows} devices: use a multiple of {rows * parts}"
        )
    try:
        mesh = make_mesh(*(axes.get(name, 1) for name in AXES), devices=devices)
        if devices is None and jax.process_count() > 1 and mesh.size != jax.device_count():
            raise ValueError(
                f"{mesh.size} devices, but the processes have {jax.device_count()}: use all of them"
            )
        check_mesh(config, mesh)
    except ValueError as error:
        raise RunError(f"--mesh: {error}") from error
    return mesh


def execution_of(learning: Learning) -> Execution:
    """How the model is run."""
    return Execution(
        compute_dtype=learning.compute_dtype,
        scan_layers=learning.scan_layers,
        remat=learning.remat,
        fuse=dict(learning.mesh).get("tensor", 1) == 1,
    )


def open_inputs(
    task: Task, choice: Choice, sizes: Sizes, execution: Execution, mesh: Mesh | None, seed: int
) -> Inputs:
    """Open model, prompts or data, and reward.

    Args:
      task: where they are.
      choice: the method.
      sizes: T and the number of prompts held out.
      execution: how the model is run.
      mesh: devices, each of which reads its own part only.
      seed: of the choice of held-out prompts.

    Returns:
      The inputs.

    Raises:
      RunError, DataError: naming what cannot be used.
    """
    reward, returns = load_reward(task.reward), choice.method.needs.returns
    model = load_model(task.base, execution, mesh)
    if returns:
        model = with_returns(model, execution)
    base = place(model.base, mesh) if returns and mesh is not None else model.base
    reader = reader_of(model, sizes.horizon, place=returns)
    if task.data is None:
        assert task.prompts is not None
        prompts, data = load_prompts(task.prompts, task.prompt_length, task.num_prompts, reader), None
    else:
        prompts, data = load_logged(task.data, choice, reader)
    rows, kept = split_rows(prompts.texts, sizes.held_out, seed)
    of_rows = None if data is None else data.map_prompts(lambda x: x[rows])
    return Inputs(model, base, prompts.take(rows), prompts.take(kept), of_rows, reward)


def assemble(
    choice: Choice, inputs: Inputs, sizes: Sizes, learning: Learning, mesh: Mesh | None, *, skip_bad: bool
) -> Job:
    """Prepare (but not yet compile) the programs of a run.

    Args:
      choice: the method.
      inputs: what was read.
      sizes: how much is sampled.
      learning: how the policy is trained.
      mesh: devices.
      skip_bad: whether samples whose reward fails are replaced.

    Returns:
      The job.
    """
    model = inputs.model
    shape = Shape(
        choice.method,
        sizes,
        model.config,
        model.first_token,
        stop=tuple(end for end in model.tokenizer.end_ids if end < model.config.vocab),
        lora=learning.lora,
        train_trunk=learning.trains_trunk,
        many_prompts=len(inputs.train.texts) > 1,
        mesh=mesh,
    )
    number = lambda x: _everywhere(np.float32(x), mesh)
    warm = None if learning.temperature == 1.0 else number(learning.temperature)
    return Job(
        choice,
        inputs,
        sizes,
        skip_bad,
        learning.seed,
        learning.lora,
        order_of(inputs.train, sizes.batch, learning.seed),
        make_programs(shape),
        Knobs(number(choice.value), number(learning.learning_rate), warm),
        mesh,
    )


def make_job(settings: Settings) -> Job:
    """Everything that a run needs, from what is asked.

    Args:
      settings: of the run.

    Returns:
      The job.

    Raises:
      RunError, DataError: naming the option or the file that cannot be used.
    """
    task, sizes, learning = settings.task, settings.sizes, settings.learning
    choice = choose(task, sizes, learning)
    axes = dict(learning.mesh)
    mesh = mesh_of(axes, sizes.batch, sizes.gradient_accumulation, architecture(task.base)) if axes else None
    inputs = open_inputs(task, choice, sizes, execution_of(learning), mesh, learning.seed)
    return assemble(choice, inputs, sizes, learning, mesh, skip_bad=settings.saving.on_bad_reward == "skip")
