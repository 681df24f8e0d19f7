"""Only what orbax leaves behind is kept quiet, and only after a failure of its own."""

import asyncio
import gc
import logging
import sys

import pytest

from kl_rl.storage.strays import only_the_exception


@pytest.fixture
def reports(monkeypatch):
    """What reaches the hook for unraisable exceptions; everything global is put back at the end."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: seen.append(str(report.exc_value)))
    filters = {name: list(logging.getLogger(name).filters) for name in ("absl", "asyncio")}
    yield seen
    for name, before in filters.items():
        logging.getLogger(name).filters[:] = before


def leave_behind(filename):
    """A coroutine, suspended, whose code lies in a file of that name; it complains when it is collected."""
    source = (
        "async def read(future):\n  try:\n    await future\n  except BaseException:\n"
        "    raise RuntimeError('left by ' + __name__)"
    )
    namespace = {"__name__": filename}
    exec(compile(source, filename, "exec"), namespace)
    loop = asyncio.new_event_loop()
    coroutine = namespace["read"](loop.create_future())
    coroutine.send(None)
    del coroutine
    gc.collect()
    loop.close()


def fail():
    with pytest.raises(ValueError, match="the one report"), only_the_exception():
        raise ValueError("the one report")


def test_after_a_failure_only_orbax_is_quiet(reports):
    leave_behind("orbax/reader.py")
    fail()
    leave_behind("orbax/reader.py")
    leave_behind("somebody/else.py")
    assert reports == ["left by orbax/reader.py", "left by somebody/else.py"]


def test_a_call_that_succeeds_leaves_everything_as_it_was(reports):
    before = sys.unraisablehook
    with only_the_exception():
        pass
    assert sys.unraisablehook is before
    leave_behind("orbax/reader.py")
    assert reports == ["left by orbax/reader.py"]


def test_logged_errors_of_others_stay_and_a_later_success_does_not_undo(reports, caplog):
    fail()
    with only_the_exception():
        pass
    logger = logging.getLogger("asyncio")
    logger.error("Future exception was never retrieved: OCDBT database")
    logger.warning("orbax is slow")
    logger.error("a server of the user's own has failed")
    assert [r.getMessage() for r in caplog.records] == [
        "orbax is slow",
        "a server of the user's own has failed",
    ]
