"""How the commands that train speak of a run that stops."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["said_how_to_resume"]


@contextlib.contextmanager
def said_how_to_resume(command: str, folder: Path, *, skips: bool = False) -> Iterator[list[int]]:
    """Turns a stop or a failure in the middle of a run into a line; the list yielded holds the exit status, if any.

    ``skips``: bad rewards are skipped already. In many processes all have the same status, and the first speaks.
    """
    from kl_rl.runs import Diverged
    from kl_rl.sharding.processes import is_first
    from kl_rl.storage.checkpoint import SaveError, is_full
    from kl_rl.storage.errors import BadRewardValue, Stopped

    say = lambda text: print(f"kl-rl {command}: {text}", file=sys.stderr) if is_first() else None
    code: list[int] = []
    advice = f"go on with the same options and --out {folder} --resume"
    try:
        yield code
    except Stopped as stop:
        say(f"{stop.signal}: saved after step {stop.step}; {advice}")
        code.append(stop.code)
    except BadRewardValue as error:
        say(f"{error}; nothing is lost: {advice}{'' if skips else '; or --on-bad-reward skip'}")
        code.append(2)
    except Diverged as error:
        say(f"{error}; start again in another --out with a smaller --lr or a larger --beta")
        code.append(2)
    except SaveError as error:
        say(f"{error}; make room, then {advice}")
        code.append(1)
    except OSError as error:
        if not is_full(error):
            raise
        say(f"{folder}: the disk is full; make room, then {advice}")
        code.append(1)
