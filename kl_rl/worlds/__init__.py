"""Worlds: base processes whose every conditional is known, rewards on their strings, and games of luck."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
