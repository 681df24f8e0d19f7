"""The optimizer of the library's own runs; anybody else's will do."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from kl_rl.methods.parts import in_parts

__all__ = ["annealed_adam"]


def annealed_adam(
    learning_rate: jax.Array | float, steps: int, *, parts: int = 1
) -> Callable[..., optax.GradientTransformation]:
    """Adam with a global-norm clip and a linear decay to a tenth: averages out sampling noise at the end.

    Args:
      learning_rate: at the start; may be traced.
      steps: of the run.
      parts: in how many parts of a batch gradients are gathered.

    Returns:
      ``(factor=1.0, *, epochs=1) -> optimizer`` at a multiple of the learning rate, for several updates each step.
    """

    def optimizer(factor: float = 1.0, *, epochs: int = 1) -> optax.GradientTransformation:
        peak = learning_rate * factor
        schedule = optax.linear_schedule(peak, 0.1 * peak, steps * epochs)
        return in_parts(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)), parts)

    return optimizer
