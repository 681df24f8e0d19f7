"""Rewards on the host: a function of prompt and completion, a word list or patterns, another model."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
