"""A read or write of orbax that fails is reported once, by its exception, not again by everything it leaves behind."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections.abc import Iterator
from typing import Any

__all__ = ["only_the_exception"]

_LOGGERS = ("absl", "asyncio")
_WRITERS = ("orbax", "tensorstore", "ocdbt")


def _theirs(*parts: Any) -> bool:
    text = " ".join(str(part) for part in parts).lower()
    return any(word in text for word in _WRITERS)


def _keep_record(record: logging.LogRecord) -> bool:
    told = traceback.format_exception(record.exc_info[1]) if record.exc_info else ()
    return record.levelno < logging.ERROR or not _theirs(record.pathname, record.getMessage(), *told)


def _is_stray(report: Any) -> bool:
    """Whether an unraisable exception comes from a coroutine or a thread that a failed call has left behind."""
    if "Event loop is closed" in str(report.exc_value):
        return True
    code = getattr(report.object, "cr_code", None)
    return code is not None and _theirs(code.co_filename)


@contextlib.contextmanager
def only_the_exception() -> Iterator[None]:
    """Drop what orbax's threads, futures and coroutines report besides the exception of the call in this context.

    They report with a traceback each, some of them when they are collected, long after the call: if it fails, their
    reports are dropped from then on. Those of anything else stay.
    """
    before, loggers = sys.unraisablehook, [logging.getLogger(name) for name in _LOGGERS]
    loggers = [logger for logger in loggers if _keep_record not in logger.filters]  # since an earlier failure

    def others(report: Any) -> None:
        if not _is_stray(report):
            before(report)

    for logger in loggers:
        logger.addFilter(_keep_record)
    sys.unraisablehook = others
    yield
    sys.unraisablehook = before
    for logger in loggers:
        logger.removeFilter(_keep_record)
