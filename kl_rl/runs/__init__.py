"""Runs that survive: pretraining of a small byte model, fine-tuning by any method with host rewards.

    job = make_job(settings)
    held = open_run(job)
    held, row = take_step(job, held, step)

``train(job, files, preemption)`` is that loop with checkpoints, measurements and files around it.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
