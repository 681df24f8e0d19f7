"""Runs a peer's script unchanged, one step at a time: started by benchmarks/engine.py with the peer's own interpreter.

The scripts time themselves with ``StepTimer`` and report with ``emit`` of their ``peer_common``. Both are replaced here
by versions that write a line of JSON after each step (wall and CPU seconds, peak memory) and then wait for a line on
stdin, so that peers and the library take turns. After the end of stdin the script runs on without waiting.

python engine_peer.py FOLDER SCRIPT [OPTIONS...]      # standard library only
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
import time


def usage() -> tuple[float, int]:
    """CPU seconds (user and system, all threads) and peak resident bytes of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return used.ru_utime + used.ru_stime, peak


def taken_over(common, out) -> None:
    """Replace the timer and the report of a ``peer_common`` module by those of the protocol."""

    class StepTimer(common.StepTimer):
        """Writes a line after each step and waits for one."""

        def __init__(self):
            super().__init__()
            self.used = usage()[0]

        def mark(self):
            now, (cpu, peak) = time.perf_counter(), usage()
            self.t.append(now - self.t0)
            print(
                json.dumps({"wall": self.t[-1], "cpu": cpu - self.used, "peak": peak}), file=out, flush=True
            )
            sys.stdin.readline()
            self.t0, self.used = time.perf_counter(), usage()[0]

    def emit(peer, a, timer_stats, **about):
        kept = {name: about[name] for name in ("params", "versions") if name in about}
        print(json.dumps({"about": {"settings": vars(a), **kept}}), file=out, flush=True)

    common.StepTimer, common.emit = StepTimer, emit


def main() -> None:
    folder, script = sys.argv[1:3]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print must not mix with the protocol
    sys.path.insert(0, folder)
    import peer_common

    taken_over(peer_common, out)
    sys.argv = sys.argv[2:]
    runpy.run_path(os.path.join(folder, script), run_name="__main__")


if __name__ == "__main__":
    main()
