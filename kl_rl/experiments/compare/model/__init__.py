"""The comparison on a language model: every family on one checkpoint, each lane a survivable run of its own."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
