"""Calibration loss of anybody's fine-tune from samples: estimators, stochastic bounds, honest intervals. numpy only."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
