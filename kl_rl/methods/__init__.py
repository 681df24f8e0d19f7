"""The solver: methods as expressions over objectives, behaviours and evidence, their cards, and the loop."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
