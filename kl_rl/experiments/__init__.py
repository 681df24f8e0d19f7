"""Studies: the comparison of all families, and what comes beside it. Everything below is a function they call."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
