"""``kl-rl pretrain``: a small byte model from a text file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from kl_rl.cli.parsing import Subparsers, add_command

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Train a small byte-level language model on a text, in the shape of GPT-2, and write it as a Hugging Face folder,
DIR/model. The minutes are reckoned for two CPU cores and fix the number of steps, so that a run can be repeated.
"""
EXAMPLES = """\
examples:
  kl-rl pretrain --text book.txt --out runs/base                about five minutes
  kl-rl pretrain --text book.txt --out runs/base --resume       go on after an interruption
  kl-rl sample --model runs/base --prompt 'Once upon'           what it writes
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add ``pretrain`` to the commands."""
    parser = add_command(
        subparsers, run, "pretrain", "make a small byte model from a text", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("--text", metavar="FILE", required=True, help="the text; its bytes are learned")
    parser.add_argument("--out", metavar="DIR", required=True, help="output folder")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, metavar="M", help="training time (default 5)")
    length.add_argument("--steps", type=int, metavar="N", help="training steps instead")
    parser.add_argument("--width", type=int, metavar="D", help="model width (default 128)")
    parser.add_argument("--layers", type=int, metavar="N", help="layers (default 3)")
    parser.add_argument("--heads", type=int, metavar="H", help="attention heads (default 4)")
    parser.add_argument(
        "--context", type=int, metavar="S", help="bytes of prompt and completion (default 128)"
    )
    parser.add_argument("--batch", type=int, metavar="B", help="windows per step (default 32)")
    parser.add_argument("--lr", type=float, metavar="R", help="peak learning rate (default 3e-3)")
    parser.add_argument("--seed", type=int, metavar="N", help="of initialization and windows (default 0)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """The command.

    Returns:
      0; 1 if a checkpoint could not be written; 143 or 130 if it was stopped by a signal and has saved.
    """
    from kl_rl.cli.allocator import retain_freed_memory
    from kl_rl.cli.cache import use_cache
    from kl_rl.cli.progress import live_progress
    from kl_rl.cli.running import said_how_to_resume
    from kl_rl.runs.pretrain import pretrain, read_text
    from kl_rl.runs.settings import Pretraining
    from kl_rl.storage.fingerprint import fingerprint
    from kl_rl.storage.held import held

    names = {field.name for field in dataclasses.fields(Pretraining)}
    given = {**vars(args), "learning_rate": args.lr}
    plan = Pretraining(**{k: v for k, v in given.items() if k in names and v is not None})
    text, folder = read_text(args.text, plan.context), Path(args.out)
    retain_freed_memory()
    use_cache()
    settings = {"command": "pretrain", "text": args.text, **dataclasses.asdict(plan)}
    started = time.monotonic()
    with (
        held(folder, settings | {"inputs": fingerprint(args.text)}, resume=args.resume),
        said_how_to_resume("pretrain", folder) as code,
        live_progress() as progress,
    ):
        quiet = lambda fraction, message: None
        result = pretrain(plan, text, folder, progress=quiet if args.quiet else progress)
    if code:
        return code[0]
    if args.json:
        print(json.dumps(result))
        return 0
    print(
        f"{folder / 'model'}: {result['parameters']:,} parameters, {result['steps']} steps, held-out loss "
        f"{result['held_out_loss']:.3f} nats per byte (a memoryless model: {result['unigram_entropy']:.3f})  "
        f"({time.monotonic() - started:.0f} s)"
    )
    return 0
