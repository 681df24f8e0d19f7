"""One compiled training step that updates its state in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from kl_rl.sharding.placement import is_frozen, replicated, shardings

__all__ = ["ShardedStep", "jit_step"]


class ShardedStep:
    """A compiled ``(carried, *rest) -> (carried, info)``; made by ``jit_step``."""

    def __init__(self, step: Callable[..., Any], carried: Any, mesh: Mesh, donate: bool):
        """Remember which leaves move and compile on the first call."""
        paths, self._structure = jax.tree.flatten_with_path(carried)
        self._frozen = [is_frozen(path) for path, _ in paths]
        where = jax.tree.leaves(shardings(carried, mesh))
        kept = [sharding for sharding, frozen in zip(where, self._frozen, strict=True) if not frozen]

        self._compiled: Any = None

        def run(moving, still, *rest):
            after, info = step(self._join(moving, still), *rest)
            return self._split(after)[0], info

        self._mesh = mesh
        self._jitted = jax.jit(
            run, out_shardings=(kept, replicated(mesh)), donate_argnums=(0,) if donate else ()
        )

    def _split(self, carried: Any) -> tuple[list[Any], list[Any]]:
        leaves = jax.tree.leaves(carried)
        if len(leaves) != len(self._frozen):
            raise ValueError(
                f"the step was made for a state of {len(self._frozen)} arrays; got {len(leaves)}"
            )
        pairs = list(zip(leaves, self._frozen, strict=True))
        return [x for x, frozen in pairs if not frozen], [x for x, frozen in pairs if frozen]

    def _join(self, moving: list[Any], still: list[Any]) -> Any:
        two = (iter(moving), iter(still))
        return jax.tree.unflatten(self._structure, [next(two[frozen]) for frozen in self._frozen])

    def __call__(self, carried: Any, *rest: Any) -> tuple[Any, Any]:
        """One step; ``carried`` is used up if it is donated."""
        moving, still = self._split(carried)
        with jax.set_mesh(self._mesh):
            moved, info = (self._compiled or self._jitted)(moving, still, *rest)
        return self._join(moved, still), info

    def lower(self, carried: Any, *rest: Any) -> Any:
        """The lowered program, for ahead-of-time compilation; arguments may be ``ShapeDtypeStruct``."""
        with jax.set_mesh(self._mesh):
            return self._jitted.lower(*self._split(carried), *rest)

    def compile(self, carried: Any, *rest: Any) -> Any:
        """Compile now, for calls with arguments like these; returns the program, to read off what it needs."""
        self._compiled = self.lower(carried, *rest).compile()
        return self._compiled


def jit_step(step: Callable[..., Any], carried: Any, mesh: Mesh, *, donate: bool = True) -> ShardedStep:
    """Compile a step whose first argument comes back changed: ``algorithm.step``, or ``kl_rl.advance`` of a run.

    What is carried leaves with the shardings it came with, so that no call recompiles, and its memory is used again for
    the result. Frozen arrays (``Policy.shared``) are passed through and neither donated nor copied.

    Args:
      step: ``(carried, *rest) -> (carried, info)``.
      carried: a placed state or run (or shapes), to read its structure from.
      mesh: from ``make_mesh``.
      donate: whether the state that goes in may be overwritten.

    Returns:
      The compiled step; with ``donate`` the state that went in must not be used again.
    """
    return ShardedStep(step, carried, mesh, donate)
