"""The comparison: one base model fine-tuned by every family, each measured exactly, side by side at matched reward."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
