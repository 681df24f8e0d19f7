"""What training adds to a base: an adapter, and heads on its hidden states."""

from __future__ import annotations

import jax

from kl_rl.core.policy import Policy
from kl_rl.models import DecoderConfig, decoder_twist, lora_policy

__all__ = ["first_policy", "twist_head"]


def first_policy(base: Policy, key: jax.Array, rank: int, returns: int) -> Policy:
    """The policy that training starts from: p0 itself, or p0 under an adapter that does nothing yet.

    Args:
      base: p0 (an argument of the program).
      key: PRNG key.
      rank: of the adapter; 0: none.
      returns: number of return tokens, whose embeddings are trained too.

    Returns:
      The policy.
    """
    if not rank:
        return base
    return lora_policy(base, key, rank=rank, extra=returns)


def twist_head(config: DecoderConfig, base: Policy, *, train_trunk: bool) -> Policy:
    """A twist (critic, state flow, log Z) on the base's hidden states; see ``kl_rl.models.decoder_twist``."""
    execution = getattr(base.apply, "execution", None)
    return decoder_twist(config, base.params, execution, train_trunk=train_trunk)
