"""The bridge to numpyro, an independent oracle: a posterior over the strings of a tiny world as a numpyro model."""

from __future__ import annotations

from collections.abc import Callable

import jax

__all__ = ["as_numpyro"]


def as_numpyro(log_base: jax.Array, log_evidence: jax.Array) -> Callable[[], None]:
    """The model ``y ~ p0; factor(log l(y))``, whose evidence is Z and whose posterior is p*.

    Args:
      log_base: log p0 of every string, nats; [N].
      log_evidence: log l of every string, nats; [N].

    Returns:
      A numpyro model; with a guide that samples ``y`` from q, ``-Trace_ELBO`` estimates ``log Z - KL(q || p*)``.
    """
    import numpyro
    import numpyro.distributions as dist

    def model() -> None:
        index = numpyro.sample("y", dist.Categorical(logits=log_base))
        numpyro.factor("evidence", log_evidence[index])

    return model
