"""Numbers at public borders: refused, where they are known, if they are out of range."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

__all__ = ["check_range"]


def check_range(
    name: str,
    value: Any,
    low: float = -np.inf,
    high: float = np.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """Refuse a number that is not finite or out of range; not while it is traced.

    Args:
      name: as the user knows it.
      value: number or array.
      low: least value.
      high: greatest value.
      above: whether ``low`` itself is refused.
      below: whether ``high`` itself is refused.

    Raises:
      ValueError: naming the option, its range and the value.
    """
    if isinstance(value, jax.core.Tracer):
        return
    found = np.asarray(value, np.float64)
    over = found > low if above else found >= low
    under = found < high if below else found <= high
    if np.all(np.isfinite(found) & over & under):
        return
    said = [f"{'above' if above else 'at least'} {low:g}"] if np.isfinite(low) else []
    said += [f"{'below' if below else 'at most'} {high:g}"] if np.isfinite(high) else []
    raise ValueError(f"{name} must be {' and '.join(said or ['finite'])}; got {value}")
