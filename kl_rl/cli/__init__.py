"""The command ``kl-rl``: compare, methods, exact, measure, pretrain, train, sample, plan."""

from __future__ import annotations

import argparse
import importlib
import sys

__all__ = ["build_parser", "main"]

DESCRIPTION = """\
Fine-tuning as KL-regularized posterior inference: what did it do to the model?

  kl-rl compare               fine-tune one base model by every family of methods and say what each lost
  kl-rl methods [NAME]        what is known about each method: formula, fixed point, what it costs, paper
  kl-rl exact W.json --beta 1 exact posterior of a small world
  kl-rl measure samples.jsonl calibration loss of anybody's fine-tune, from log-probabilities alone
  kl-rl pretrain --text F     a small byte model from a text
  kl-rl train METHOD ...      fine-tune a language model; survives interruption, bit for bit
  kl-rl sample --model DIR    what a model writes
  kl-rl plan --model 7b ...   memory and collectives of an RLHF step on a TPU slice, without one
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser with all sub-commands; importing it does not import jax."""
    parser = argparse.ArgumentParser(
        prog="kl-rl", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in ("compare", "methods", "exact", "measure", "pretrain", "train", "sample", "plan"):
        importlib.import_module(f"kl_rl.cli.{name}").add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
      0 on success, 1 if a run was interrupted or failed half-way, 2 for bad input, 130 for Ctrl-C.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from importlib.metadata import version

        print(version("kl-rl"))
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return args.run(args)
    except ValueError as error:
        print(f"kl-rl {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"kl-rl {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"kl-rl {args.command}: {where}{error.strerror or error}", file=sys.stderr)
        return 1
