"""An object by its name, as people type it: ``module:name`` or ``file.py:name``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["object_named"]


def _module(place: str) -> Any:
    """A module by name, the working folder included, or by its file."""
    if place.endswith(".py"):
        found = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return module
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(place)


def object_named(spec: str) -> Any:
    """Import what a name stands for.

    Args:
      spec: ``module:name``, the working folder included, or ``file.py:name``.

    Returns:
      The object.

    Raises:
      ValueError: there is none, or its module cannot be imported.
    """
    place, _, name = spec.rpartition(":")
    try:
        module = _module(place)
    except (Exception, SystemExit) as error:  # whatever the user's file does when it is imported
        raise ValueError(f"{spec}: cannot import {place}: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"{spec}: {place} has no {name!r}")
    return getattr(module, name)
