"""Gradient accumulation: a batch whose activations do not fit, in parts, with one update at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["in_parts", "map_parts", "num_parts", "split_parts", "value_and_grad"]


class _InParts(optax.GradientTransformationExtraArgs):
    num_parts: int


def in_parts(optimizer: optax.GradientTransformation, num_parts: int) -> optax.GradientTransformation:
    """An optimizer that asks for gradients gathered from parts of the batch: ``g = (1 / n) sum_i g_i``.

    Every method that ``gradient_algorithm`` makes with it then needs the activations of P / n prompts at a time, and
    one more copy of the gradient while it adds up; nothing more is kept between steps. The step, with its ``Info``,
    equals that of the whole batch up to rounding wherever the loss is a mean over prompts (``Needs.parts``): for all
    methods of the library but ``reward_weighted`` with weights normalized over the batch (``per_prompt=False``), which
    refuses.

    Args:
      optimizer: as for the whole batch. Wrap last: ``optax.chain`` around the result forgets the parts.
      num_parts: n; divides the number of prompts.

    Returns:
      The optimizer: the same updates.

    Raises:
      ValueError: if there is less than one part; from ``step``, if the parts do not divide the prompts.
    """
    if num_parts < 1:
        raise ValueError(f"a batch has at least one part; got {num_parts}")
    made = _InParts(*optax.with_extra_args_support(optimizer))
    made.num_parts = num_parts
    return made


def num_parts(optimizer: optax.GradientTransformation) -> int:
    """In how many parts an optimizer wants its gradients gathered; 1 for an ordinary one."""
    return getattr(optimizer, "num_parts", 1)


def split_parts(batch: Any, num_parts: int) -> Any:
    """``[P, ...]`` to ``[n, P / n, ...]``; part i holds prompts i, i + n, ...: a batch split over devices stays split.

    Raises:
      ValueError: if the parts do not divide the prompts.
    """

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % num_parts:
            raise ValueError(f"{x.shape[0]} prompts cannot be split into {num_parts} parts of equal size")
        return jnp.moveaxis(x.reshape(x.shape[0] // num_parts, num_parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)


def _join_parts(parts: Any) -> Any:
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
    return jax.tree.map(join, parts)


def map_parts(function: Callable[[Any], Any], batch: Any, num_parts: int) -> Any:
    """``function(batch)``, where each row of the result depends on the same row of the batch only, part by part."""
    if num_parts == 1:
        return function(batch)
    return _join_parts(jax.lax.map(function, split_parts(batch, num_parts)))


def value_and_grad(
    objective: Callable[[Any, Any], tuple[jax.Array, Any]], params: Any, batch: Any, num_parts: int
) -> tuple[tuple[jax.Array, Any], Any]:
    """Value and gradient of a mean over the batch; the gradient adds up in float32 at least.

    Args:
      objective: ``(params, batch) -> (mean over the batch, rows [P, ...])``.
      params: with respect to which.
      batch: rows [P, ...].
      num_parts: n; divides P.

    Returns:
      ``((value, rows), gradient)`` as of ``jax.value_and_grad(..., has_aux=True)`` on the whole batch.
    """
    gradient = jax.value_and_grad(objective, has_aux=True)
    if num_parts == 1:
        return gradient(params, batch)
    wide = lambda x: jnp.promote_types(x.dtype, jnp.float32)

    def add(total: Any, part: Any) -> tuple[Any, tuple[jax.Array, Any]]:
        found, grads = gradient(params, part)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), found

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x)), params)
    total, (values, rows) = jax.lax.scan(add, zeros, split_parts(batch, num_parts))
    mean = jax.tree.map(lambda t, x: (t / num_parts).astype(x.dtype), total, params)
    return (jnp.mean(values), _join_parts(rows)), mean
