"""Plans: the programs of a fine-tune compiled ahead of time for devices that are not there, and what they need."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
