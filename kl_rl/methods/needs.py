"""What a method needs of its batches: one object, on the algorithm and on the card, read by everybody who feeds it.

Every default is the strictest, so that a forgotten fact refuses and never accepts.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

from kl_rl.core.policy import Policy
from kl_rl.core.posterior import Posterior

__all__ = ["Behaviour", "PERMISSIONS", "Feed", "Head", "Needs", "base_policy", "frozen_policy", "own_policy"]

Behaviour = Callable[[Any, Posterior], Policy]


def own_policy(state: Any, posterior: Posterior) -> Policy:
    """On-policy: the policy being fitted draws the samples."""
    return state.policy


def base_policy(state: Any, posterior: Posterior) -> Policy:
    """Imitation: samples come from p0."""
    return posterior.base


def frozen_policy(state: Any, posterior: Posterior) -> Policy:
    """An earlier copy of the policy draws the samples; the method keeps it as ``state.extra.policy``."""
    return state.extra.policy


class Feed(enum.Enum):
    """What a batch says of its samples."""

    REWARDS = "completions with rewards"
    LABELS = "completions with labels"
    PAIRS = "comparisons of two completions"
    RANKINGS = "rankings of completions"
    EPISODES = "episodes"


class Head(enum.StrEnum):
    """What a network beside the policy is for; see ``kl_rl.core.Twist``."""

    LOG_Z = "log_z"  # one number for each prompt
    VALUE = "value"  # one for each prefix: critic, state flow, twist
    Q = "q"  # one for each prefix and token that may follow
    Q_TWIN = "q_twin"  # a second one, for the lesser of the two


PERMISSIONS = ("hard", "foreign", "unrecorded", "tempered", "parts")


class Needs(NamedTuple):
    """What a method needs, and what it permits.

    Attributes:
      behaviour: who draws the samples: ``own_policy``, ``base_policy`` or ``frozen_policy``, compared by identity.
      feed: what a batch says of its samples.
      samples: least K, samples of each prompt.
      heads: networks beside the policy.
      returns: return tokens: ids of their own, and a place for one in every prompt.
      hard: takes evidence that is zero somewhere.
      foreign: takes data that somebody else drew.
      unrecorded: does without the log-probabilities of whoever drew them.
      tempered: keeps its fixed point when the sampler has another temperature, and can still write every string.
      parts: its loss is a mean over prompts, so that gradients may be gathered in parts.
    """

    behaviour: Behaviour = own_policy
    feed: Feed = Feed.REWARDS
    samples: int = 2
    heads: tuple[Head, ...] = ()
    returns: bool = False
    hard: bool = False
    foreign: bool = False
    unrecorded: bool = False
    tempered: bool = False
    parts: bool = False
