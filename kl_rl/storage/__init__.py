"""What a run keeps: checkpoints, files that only grow, a locked folder, a loop that survives. Knows nothing of RL."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
