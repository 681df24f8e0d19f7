"""Several processes that run the same program: how they start, agree on what happened, and put their parts together.

Every function is trivial in one process. In many, all processes must call it, in the same order.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

__all__ = ["Group", "agreed", "is_first", "join", "named", "same", "share", "summed", "whole"]

_LONGEST = 2048  # bytes of a message


class Group(NamedTuple):
    """Processes that run one program.

    Attributes:
      address: HOST:PORT, where process 0 listens.
      total: how many.
      number: which one this is.
    """

    address: str
    total: int
    number: int


def named(text: str) -> Group:
    """A group from "HOST:PORT,COUNT,NUMBER".

    Raises:
      ValueError: not of this form.
    """
    address, *numbers = text.split(",")
    if ":" not in address or len(numbers) != 2 or not all(n.isdigit() for n in numbers):
        raise ValueError(
            f"{text!r} is not HOST:PORT,COUNT,NUMBER (address of process 0, how many, which one this is)"
        )
    group = Group(address, int(numbers[0]), int(numbers[1]))
    if group.number >= group.total:
        raise ValueError(f"{text!r}: {group.total} processes are numbered 0 to {group.total - 1}")
    return group


def join(group: Group | None) -> None:
    """Join the other processes, through ``jax.distributed``, before anything is computed.

    Args:
      group: which; None: found by jax itself, on Cloud TPU pods, Slurm, Open MPI and Kubernetes.

    Raises:
      ValueError: the others were not found.
    """
    try:
        jax.distributed.initialize(*(group or ()))
    except (RuntimeError, ValueError) as error:
        hint = "" if group else "; where no cluster is found by itself, give HOST:PORT,COUNT,NUMBER"
        raise ValueError(f"cannot join the other processes: {str(error).splitlines()[0]}{hint}") from error


def is_first() -> bool:
    """Whether this process writes the files that there is one of."""
    return jax.process_index() == 0


def share(count: int) -> slice:
    """The part of ``count`` rows that this process works on."""
    bounds = [count * i // jax.process_count() for i in range(jax.process_count() + 1)]
    return slice(bounds[jax.process_index()], bounds[jax.process_index() + 1])


def summed(x: np.ndarray) -> np.ndarray:
    """The sum over processes of host arrays of one shape; of parts, zero elsewhere: their union."""
    return x if jax.process_count() == 1 else np.sum(process_allgather(x), axis=0, dtype=x.dtype)


def agreed(message: str | None) -> str | None:
    """The message of the first process that has one, for all: none goes on alone.

    Args:
      message: what happened here, or None.

    Returns:
      A message, or None if nothing happened anywhere.
    """
    if jax.process_count() == 1:
        return message
    said = np.zeros(_LONGEST, np.uint8)
    raw = np.frombuffer((message or "").encode()[:_LONGEST], np.uint8)
    said[: len(raw)] = raw
    heard = [row[row > 0].tobytes().decode(errors="ignore") for row in process_allgather(said)]
    return next(filter(None, heard), None)


def same(text: str) -> bool:
    """Whether all processes have the same text."""
    mine = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return jax.process_count() == 1 or bool((process_allgather(mine) == mine).all())


def whole(tree: Any) -> Any:
    """Host arrays with all values, in every process; one array at a time, so that devices hold one more at most."""

    def one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(one, tree)
