"""Compiled programs are kept between runs of the commands."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["use_cache"]


def use_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless the user has said where or that they do not want it."""
    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "kl_rl" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
