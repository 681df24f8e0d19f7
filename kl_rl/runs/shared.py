"""One copy of the base: a run's state is donated and saved without the arrays that belong to the base."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kl_rl.core.policy import Weighted

__all__ = ["attach", "detach"]


def _is_weighted(x: Any) -> bool:
    return isinstance(x, Weighted)


def detach(tree: Any) -> Any:
    """Every policy and twist that shares arrays is left with an empty place for them.

    Args:
      tree: a state of an algorithm.

    Returns:
      The tree without the shared arrays.
    """

    def one(x: Any) -> Any:
        return dataclasses.replace(x, shared=()) if _is_weighted(x) and x.shared is not None else x

    return jax.tree.map(one, tree, is_leaf=_is_weighted)


def attach(tree: Any, shared: Any) -> Any:
    """The inverse, inside the program that has the base as an argument.

    Args:
      tree: from ``detach``.
      shared: the base's weights.

    Returns:
      The tree with the shared arrays in their places.
    """

    def one(x: Any) -> Any:
        return dataclasses.replace(x, shared=shared) if _is_weighted(x) and x.shared == () else x

    return jax.tree.map(one, tree, is_leaf=_is_weighted)
