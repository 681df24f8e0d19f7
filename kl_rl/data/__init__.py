"""Data files: prompts, logged trajectories, comparisons, rankings and episodes; and windows of a long text.

    records, skipped = load_records("logged.jsonl", LoggedRecord)
    batch = encode_logged(records, Encoder(tokenizer, Limits(context=512)))

Files are checked as they are read; every complaint names file, line and field.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
