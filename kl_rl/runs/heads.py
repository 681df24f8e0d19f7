"""What training adds to a base: an adapter, and heads on its hidden states."""

from __future__ import annotations

from collections.abc import Callable

import jax

from kl_rl.core.policy import Policy
from kl_rl.core.twist import Twist
from kl_rl.methods.needs import Head
from kl_rl.models import DecoderConfig, constant_twist, decoder_twist, lora_policy

__all__ = ["first_policy", "heads_on"]


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


def heads_on(
    config: DecoderConfig, base: Policy, *, train_trunk: bool, many_prompts: bool
) -> Callable[[Head], Twist]:
    """Initial heads of a run.

    Args:
      config: of the base.
      base: p0, on whose hidden states they stand.
      train_trunk: whether values have a trunk of their own, as critics usually do, or look at the base's.
      many_prompts: whether log Z is a function of the prompt, or one number.

    Returns:
      ``Head -> Twist``, zero everywhere.
    """
    execution = getattr(base.apply, "execution", None)

    def head(kind: Head) -> Twist:
        if kind is Head.LOG_Z and not many_prompts:
            return constant_twist()
        trunk = train_trunk and kind is not Head.LOG_Z
        actions = kind in (Head.Q, Head.Q_TWIN)
        return decoder_twist(config, base.params, execution, train_trunk=trunk, actions=actions)

    return head
