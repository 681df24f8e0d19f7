"""How every sub-command is added to the parser of ``kl-rl``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

__all__ = ["Subparsers", "add_command"]

Subparsers = Any  # what ``ArgumentParser.add_subparsers`` returns


def add_command(
    subparsers: Subparsers,
    run: Callable[[argparse.Namespace], int],
    name: str,
    summary: str,
    description: str,
    epilog: str,
) -> argparse.ArgumentParser:
    """Add a sub-command.

    Args:
      subparsers: of ``kl-rl``.
      run: ``arguments -> exit status``.
      name: of the command.
      summary: one line for the list of commands.
      description: before the options, printed as it is.
      epilog: behind them.

    Returns:
      The command's parser.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        name, help=summary, description=description, epilog=epilog, formatter_class=raw
    )
    parser.set_defaults(run=run)
    return parser
