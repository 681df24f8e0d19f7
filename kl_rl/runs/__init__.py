"""Runs that survive: pretraining of a small byte model, fine-tuning by any method of the catalogue with host rewards.

    job = make_job(settings)
    run = start(job)
    run, row = advance(job, run, step)

``train`` is that loop with checkpoints, measurements and files around it.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
