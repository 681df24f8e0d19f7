"""Objectives: pure functions from log-probabilities to unreduced losses. No policy, no sampling, no strings.

Sequence-level arguments are masked sums over tokens, [P, K]. Losses are minimized and in nats, or nats squared.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
