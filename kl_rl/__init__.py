"""kl_rl: fine-tuning as KL-regularized posterior inference, and what it does to a model.

One idea: a base model and evidence define a posterior ``p*(y|x) = p0(y|x) l(y|x) / Z(x)``; every method fits
a policy to it, or samples from it. The public names are in ``__init__.pyi``, here and in every room
(SPEC 1 of Scientific Python): they are imported on first use, so that ``import kl_rl`` stays cheap.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
