"""Networks, leaves of the library: anything with ``apply(params, prompt, tokens)`` may stand in their place."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
