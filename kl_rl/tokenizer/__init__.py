"""Text to ids and back: bytes, or the tokenizer.json of a checkpoint with its chat template."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
