"""Processes that take steps on demand and are stopped in between, and races between them."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO, Any, NamedTuple


class Failed(Exception):
    """A process ended or hung where a step was expected."""


class Step(NamedTuple):
    """One step of a process: wall and CPU seconds, and its peak resident bytes so far."""

    wall: float
    cpu: float
    peak: int


class Stepper:
    """A process that takes its first step on its own, and each further step when asked.

    Between its steps the whole process is stopped (SIGSTOP), so that no thread of it works or spins in another's turn.

    Args:
      command: program and arguments; writes ``{"wall", "cpu", "peak"}`` after each step, then waits for a line.
      env: its environment.
      warmup: steps that are not counted after the first.
      limit: seconds a step may take.
    """

    def __init__(self, command: Sequence[str], env: dict[str, str], warmup: int, limit: float = 240.0):
        self.command, self.env, self.warmup, self.limit = list(command), env, warmup, limit
        self.about: dict[str, Any] = {}
        self.peak = 0
        started = time.perf_counter()
        self.first = self._start()
        self.until_first = time.perf_counter() - started
        self._warm()

    def _start(self) -> Step:
        self.log: IO[str] = tempfile.TemporaryFile("w+")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            self.command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, env=self.env
        )
        first = self._read()
        if first is None:
            raise Failed(self._why())
        return first

    def _warm(self) -> None:
        for _ in range(self.warmup):
            self._ask()

    def _read(self) -> Step | None:
        """The next step's line; None at the end of the process."""
        watch = threading.Timer(self.limit, self.process.kill)
        watch.start()
        try:
            line = self.process.stdout.readline()
        finally:
            watch.cancel()
        message = json.loads(line) if line else {}
        if "about" in message:
            self.about = message["about"]
            return self._read()
        if not message:
            return None
        self.process.send_signal(signal.SIGSTOP)
        step = Step(message["wall"], message["cpu"], message["peak"])
        self.peak = max(self.peak, step.peak)
        return step

    def _ask(self) -> Step | None:
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._read()

    def _why(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        last = [line.strip() for line in self.log if line.strip()][-3:]
        self._close_files()
        return f"exit status {code}: " + " | ".join(last or ["no message"])

    def step(self) -> Step:
        """One more step; a script that has come to its end is started again and warmed up.

        Raises:
          Failed: with the last lines of its error output.
        """
        step = self._ask()
        if step is None:
            why = self._why()
            if self.process.returncode:
                raise Failed(why)
            self._start()
            self._warm()
            step = self._ask()
        if step is None:
            raise Failed(self._why())
        return step

    def _close_files(self) -> None:
        for file in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):
                file.close()

    def kill(self) -> None:
        """End it at once, if it has not ended: a stopped process would stay for ever."""
        self.process.kill()
        self.process.wait()
        self._close_files()

    def close(self) -> None:
        """Let it come to its end, which it reports on, and reap it."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.send_signal(signal.SIGCONT)
        while self._read() is not None:
            self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        self.kill()


def race(racers: dict[str, Stepper], rounds: int) -> tuple[dict[str, list[Step]], dict[str, str]]:
    """Each takes one step a round; who begins changes from round to round.

    Args:
      racers: by name.
      rounds: number of rounds.

    Returns:
      The steps of each that took them all, and why others failed.
    """
    steps: dict[str, list[Step]] = {name: [] for name in racers}
    failed: dict[str, str] = {}
    for number in range(rounds):
        names = list(steps)
        turn = number % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            try:
                steps[name].append(racers[name].step())
            except Failed as error:
                failed[name] = str(error)
                del steps[name]
    return steps, failed
