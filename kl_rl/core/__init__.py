"""The problem: trajectories, policies, posteriors, and a sampler that records what it drew."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
