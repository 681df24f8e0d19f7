"""People and programs that judge, as models of themselves; numpyro lives here."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
