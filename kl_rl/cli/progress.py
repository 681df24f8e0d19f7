"""Live progress on standard error: a bar with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

__all__ = ["live_progress"]


@contextlib.contextmanager
def live_progress() -> Iterator[Callable[[float, str], None]]:
    """Yields ``progress(fraction, message)``."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<38.38}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("starting", total=1.0)
            yield lambda fraction, message: bar.update(task, completed=fraction, description=message)
        return
    started, last = time.monotonic(), [""]
    begun: list[tuple[float, float]] = []  # when the first of the work was done: compiling, or an earlier run

    def line(fraction: float, message: str) -> None:
        stage = message.split(":")[0]
        if stage == last[0] and not message.endswith(" s"):
            return
        last[0] = stage
        elapsed = time.monotonic() - started
        if fraction > 0 and not begun:
            begun.append((elapsed, fraction))
        left = ""
        if begun and fraction > begun[0][1] + 0.02:
            seconds = (elapsed - begun[0][0]) * (1 - fraction) / (fraction - begun[0][1])
            left = f", about {seconds:.0f} s left"
        print(f"[{100 * fraction:3.0f} %] {elapsed:4.0f} s{left}: {message}", file=sys.stderr, flush=True)

    yield line
