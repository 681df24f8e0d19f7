"""What reading a checkpoint complains about."""

from __future__ import annotations

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as asked; the message names file and field or tensor."""
