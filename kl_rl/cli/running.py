"""What the commands that train have in common: the folder, its lock, and how a run that stops is spoken of."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["held", "said_how_to_resume"]


@contextlib.contextmanager
def _opened(folder: Path, settings: dict[str, Any], resume: bool) -> Iterator[None]:
    from kl_rl.sharding.processes import is_first, same
    from kl_rl.storage.folder import OutputError, opened, provenance, write_atomically

    if not same(json.dumps(settings, sort_keys=True)):
        raise OutputError("the processes were not asked the same: give all the same options and files")
    if not is_first():
        yield
        return
    with opened(folder, json.loads(json.dumps(settings)), resume=resume):
        if not (folder / "provenance.json").exists():
            write_atomically(folder / "provenance.json", json.dumps(provenance(), indent=2) + "\n")
        yield


@contextlib.contextmanager
def held(folder: Path, settings: dict[str, Any], *, resume: bool) -> Iterator[None]:
    """The folder of a run, locked by the first process; ``run.json`` and ``provenance.json`` are in it.

    If a new run fails before its first checkpoint its files are taken out again, so that it can be asked for otherwise.

    Args:
      folder: made if missing.
      settings: what is asked; must be the same on resume.
      resume: go on with the run that is there.

    Raises:
      OutputError: held by another process, of another run, or not to be written.
    """
    from kl_rl.sharding.processes import agreed, is_first
    from kl_rl.storage.folder import OutputError

    with contextlib.ExitStack() as stack:
        problem: Exception | None = None
        new = is_first() and not (folder / "run.json").exists()
        try:
            stack.enter_context(_opened(folder, settings, resume))
        except (OutputError, OSError) as error:
            problem = error
        if (message := agreed(None if problem is None else str(problem))) is not None:
            raise OutputError(message) from problem
        try:
            yield
        except BaseException:
            if new and not _has_begun(folder):
                _withdraw(folder)
            raise


def _has_begun(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from."""
    return any(path.name.isdigit() for path in folder.glob("checkpoints/*"))


def _withdraw(folder: Path) -> None:
    """Take out what a run without a checkpoint has put into its folder; the session takes out its settings."""
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in folder.glob("*.jsonl"):
        path.unlink()


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
