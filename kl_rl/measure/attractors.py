"""Attractors: what a tuned model repeats beyond what its rewards explain, from samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence, Set
from typing import NamedTuple

import numpy as np

__all__ = ["Attractor", "attractor"]


class Attractor(NamedTuple):
    """A thing that occurs too often, and how much: ``log P_q(occurs) - log P(occurs)`` expected, nats."""

    name: str
    lift: float


def attractor(
    reward: np.ndarray,
    found: Sequence[Set[str]],
    base_reward: np.ndarray,
    base_found: Sequence[Set[str]],
    errors: float = 4.0,
) -> Attractor | None:
    """The thing that q repeats most beyond what its rewards explain.

    Lift: ``log P_q(w occurs) - log E_{p0}[v(r) 1(w occurs)]`` with ``v = q(r)/p0(r)``, i.e. against the base tilted to
    q's own reward law. The thing with the greatest lower limit (4 standard errors: thousands are looked at) is
    reported if that limit is above 0.

    Args:
      reward: of samples of q; [N].
      found: what occurs in each of them: words, n-grams.
      base_reward: of samples of p0; [M].
      base_found: what occurs in each of them.
      errors: width of the limit.

    Returns:
      The attractor, or None if no lift is shown.
    """
    levels, of_base = np.unique(base_reward, return_inverse=True)
    near = np.clip(np.searchsorted(levels, reward), 0, len(levels) - 1)
    weight = (np.bincount(near, minlength=len(levels)) / np.bincount(of_base))[of_base]
    weight = weight / weight.sum()
    spread = float(np.square(weight).sum())
    count = Counter(name for names in found for name in names)
    share = dict.fromkeys(count, 0.0)
    for names, w in zip(base_found, weight, strict=True):
        for name in names & share.keys():
            share[name] += float(w)
    best: tuple[float, Attractor | None] = (0.0, None)
    for name, seen in count.items():
        p, p0 = seen / reward.size, max(share[name], 0.5 * spread)
        lift = math.log(p / p0)
        limit = lift - errors * math.sqrt((1 - p) / seen + spread * (1 - p0) / p0)
        if limit > best[0]:
            best = (limit, Attractor(name, lift))
    return best[1]
