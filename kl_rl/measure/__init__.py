"""Measurement: what fine-tuning did to a model. Exact where strings can be enumerated, else with honest intervals.

``KL(q || p0) = P + S + C``: the price of the reward, the shape of its marginal, calibration loss. What works on samples
needs numpy only and starts without jax.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
