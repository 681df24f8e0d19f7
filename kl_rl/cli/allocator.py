"""Freed memory stays with the process: the page faults of temporary buffers go away."""

from __future__ import annotations

import ctypes
import platform
import sys

__all__ = ["retain_freed_memory"]

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_GROWTH = 64 << 20  # bytes asked of the kernel at a time


def retain_freed_memory() -> bool:
    """Tell the C library to keep freed memory, before the first computation.

    XLA on a CPU allocates the temporary buffers of a program anew at every call. By default glibc gets large blocks
    from the kernel and gives them back at once, so every step pays for page faults on zeroed pages. With one arena
    that never shrinks and no separate mappings the pages are touched once.

    It costs memory: what a program needed at its peak, fragments included, stays with the process until it ends, and
    threads share one arena's lock (temporary buffers are few and large, so that is rare). Nothing is preloaded and no
    environment variable is needed; it has no effect where another allocator is preloaded, and on GPUs and TPUs it
    concerns host memory only.

    Returns:
      Whether it was done: Linux with glibc only; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # One arena is what matters most: the others serve blocks above 64 MB by mmap whatever the limit on mappings.
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _GROWTH))
    return all([bool(mallopt(name, value)) for name, value in settings])
