"""``kl-rl compare``: fine-tune one base model by every family of methods, and say what each did to it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kl_rl.cli.parsing import Subparsers, add_command

if TYPE_CHECKING:
    from kl_rl.experiments.compare.model.ground import Comparison
    from kl_rl.experiments.compare.model.lanes import Clock
    from kl_rl.experiments.compare.runner import Scale

__all__ = ["add_parser", "run"]

Progress = Callable[[float, str], None]

DESCRIPTION = """\
Fine-tune one base model by RLHF, filtered imitation, decision-transformer conditioning, off-policy RL and
preferences, and measure exactly (on a checkpoint, by two-sided estimates) what each did to calibrated
conditional inference. Writes results.jsonl, curves.jsonl, summary.json, report.html and the figures as PNG.
"""
EXAMPLES = """\
examples:
  kl-rl compare                                     default world (4 096 strings), all methods, 4 seeds
  kl-rl compare --methods rlhf imitation --seeds 8  two families, more seeds
  kl-rl compare --world W.json --out runs/w         your own world (`kl-rl exact --schema`: the format)
  kl-rl compare --full --out runs/full              65 536 strings, 8 seeds, longer training
  kl-rl compare --base DIR --prompts F --reward R   every family on your checkpoint
  kl-rl compare --base DIR --prompts F --reward R --methods rloo best-of-n dt-tilted tb-replay --minutes 30
  kl-rl compare --text FILE --reward LEXICON        the same on a small model that is first trained on a text
  kl-rl compare --out runs/w --world W.json --resume    go on after an interruption

Without --out a new folder runs/compare-<time> is made.
Ctrl-C keeps what is finished and still writes the report; --resume goes on, and repeats nothing.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add ``compare`` to the commands."""
    parser = add_command(
        subparsers,
        run,
        "compare",
        "fine-tune one base model by every family and say what each lost",
        DESCRIPTION,
        EXAMPLES,
    )
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--world", metavar="W.json", help="an enumerable world (default: a built-in one with 4 096 strings)"
    )
    where.add_argument(
        "--base", metavar="DIR", help="a checkpoint: Hugging Face folder, hub name, output of a run"
    )
    where.add_argument(
        "--text", metavar="FILE", nargs="?", const="",
        help="pretrain a small byte model on a text first; without FILE: English text that ships with Python",
    )  # fmt: skip
    add("--prompts", metavar="FILE", help="with --base: prompts, as for `kl-rl train`")
    add("--prompt-length", type=int, metavar="L", help="cut a .txt file of prompts into pieces of L tokens")
    add("--num-prompts", type=int, metavar="N", help="use at most N prompts, spread over the file")
    add(
        "--reward",
        metavar="R",
        help="with --base or --text: as for `kl-rl train` (--text: default a word list)",
    )
    add(
        "--methods", nargs="+", metavar="NAME", help="methods, families, or module:NAME for cards of your own"
    )
    add("--seeds", type=int, metavar="N", help="seeds per knob (default 4; 8 with --full; else 1)")
    add("--steps", type=int, metavar="N", help="training steps (default 200; --base 60; --text 150)")
    add("--full", action="store_true", help="65 536 strings, 8 seeds, longer training")
    add("--minutes", type=float, metavar="M", help="with --base: time for all; with --text: for pretraining")
    add("--lora", type=int, metavar="RANK", help="with --base: train adapters of this rank, not all weights")
    add("--lr", type=float, metavar="R", help="with --base: peak learning rate (default 1e-4)")
    add("--batch", type=int, metavar="B", help="with --base: prompts per step (default 8)")
    add("--num-samples", type=int, metavar="K", help="with --base: completions of each prompt (default 8)")
    add("--horizon", type=int, metavar="T", help="with --base: longest completion, tokens (default 48)")
    add("--held-out", type=int, metavar="N", help="with --base: prompts kept to measure on (default 8)")
    add("--eval-samples", type=int, metavar="N", help="with --base: completions of each of them (default 32)")
    add(
        "--compute-dtype",
        choices=("float32", "bfloat16"),
        help="with --base: of matrix products (default float32)",
    )
    add("--scan-layers", action="store_true", help="with --base: one compiled layer in a loop")
    add("--out", metavar="DIR", help="output folder")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--json", action="store_true", help="print the summary as one JSON object")


WORLD, MODEL, TEXT = "an enumerable world", "--base", "--text"
# Option -> what it goes with.
GOES_WITH = {
    "full": (WORLD,),
    "prompts": (MODEL,),
    "prompt_length": (MODEL,),
    "num_prompts": (MODEL,),
    "reward": (MODEL, TEXT),
    "lora": (MODEL,),
    "lr": (MODEL,),
    "batch": (MODEL,),
    "num_samples": (MODEL,),
    "horizon": (MODEL,),
    "held_out": (MODEL,),
    "eval_samples": (MODEL,),
    "compute_dtype": (MODEL,),
    "scan_layers": (MODEL,),
    "minutes": (MODEL, TEXT),
}


def _kind(args: argparse.Namespace) -> str:
    return MODEL if args.base is not None else TEXT if args.text is not None else WORLD


def _check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    kind = _kind(args)
    for name, kinds in GOES_WITH.items():
        if getattr(args, name) not in (None, False) and kind not in kinds:
            raise ValueError(f"--{name.replace('_', '-')} goes with {' or '.join(kinds)}, not with {kind}")
    for name in ("seeds", "steps", "minutes"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be positive; got {value}")
    for name in ("prompts", "reward"):
        if kind == MODEL and getattr(args, name) is None:
            raise ValueError(f"--base needs --{name}")
    if args.resume and not args.out:
        raise ValueError("--resume needs --out, the folder of the run to go on with")


def _sizes(args: argparse.Namespace) -> Scale:
    from kl_rl.experiments.compare.runner import Scale

    plan = (
        Scale(seeds=8, steps=800, checkpoints=10, base_steps=2500, learning_rate=2e-3)
        if args.full
        else Scale()
    )
    plan = plan._replace(seeds=args.seeds or plan.seeds, steps=args.steps or plan.steps)
    return plan._replace(checkpoints=min(plan.checkpoints, plan.steps))


def _run_world(args: argparse.Namespace, folder: Path, progress) -> dict[str, Any]:
    from kl_rl import storage
    from kl_rl.experiments.compare import main, tabular
    from kl_rl.experiments.compare.extras import measure_extras
    from kl_rl.experiments.compare.ground import check_world
    from kl_rl.methods import methods_named
    from kl_rl.worlds import default_world, full_world, load_world

    methods, plan = methods_named(args.methods), _sizes(args)
    world = load_world(args.world) if args.world else full_world() if args.full else default_world()
    check_world(world)
    settings = {"world": world.spec, "methods": [m.name for m in methods], **plan._asdict()}
    settings = json.loads(json.dumps(settings))
    with storage.opened(folder, settings, resume=args.resume) as opened:
        ended: dict[str, Any] = {}
        try:
            tabular.run_tabular(world, methods, plan, opened, progress, measure_extras)
        except KeyboardInterrupt:
            ended = {"stopped": "interrupted", "code": 130}
        if not opened.rows("results.jsonl"):
            raise KeyboardInterrupt
        progress(1.0, "report")
        data = main.finish(opened, json.loads((folder / "world.json").read_text()))
    return data | ended


def _comparison(args: argparse.Namespace) -> Comparison:
    """What is asked of a checkpoint."""
    from kl_rl.experiments.compare.model.ground import Comparison, Question
    from kl_rl.runs.settings import Learning, Sizes

    given = {name: value for name, value in vars(args).items() if value is not None}
    of = lambda kind: {f.name: given[f.name] for f in dataclasses.fields(kind) if f.name in given}
    learning = Learning(**(of(Learning) | ({"learning_rate": args.lr} if args.lr is not None else {})))
    sizes = dataclasses.replace(Sizes(), steps=60)
    return Comparison(
        Question(**of(Question)), dataclasses.replace(sizes, **of(Sizes)), learning, args.seeds or 1
    )


def _run_model(args: argparse.Namespace, folder: Path, progress: Progress) -> dict[str, Any]:
    """The comparison on a checkpoint, or on one that is first made from a text."""
    from kl_rl import storage
    from kl_rl.experiments.compare import main
    from kl_rl.experiments.compare.model import collect_model, compare_on_model
    from kl_rl.experiments.compare.model.ground import check_methods
    from kl_rl.experiments.compare.model.lanes import Clock
    from kl_rl.experiments.compare.model.text import TEXT_SIZES
    from kl_rl.huggingface.opened import model_folder
    from kl_rl.methods import methods_named, representatives
    from kl_rl.rewards.host import load_reward
    from kl_rl.runs.settings import Learning
    from kl_rl.storage.fingerprint import fingerprint

    methods, reward = methods_named(args.methods) if args.methods else representatives(), None
    for name in ("base", "prompts", "reward", "text"):
        if getattr(args, name):
            setattr(args, name, os.path.normpath(getattr(args, name)))  # ./base is base
    asked: dict[str, Any] = {"command": "compare", "methods": [m.name for m in methods]}
    files = {name: getattr(args, name) for name in ("prompts", "reward", "text") if getattr(args, name)}
    inputs = {name: fingerprint(file) for name, file in files.items()}
    if args.text is None:
        comparison = _comparison(args)
        asked |= dataclasses.asdict(comparison)
        inputs["base"] = fingerprint(model_folder(args.base))
    else:
        asked |= {"text": args.text, "reward": args.reward, "seeds": args.seeds or 1, "steps": args.steps}
        asked |= {"minutes": args.minutes}
        if args.reward is not None:
            reward = load_reward(args.reward)  # before four minutes of pretraining
        check_methods(methods, TEXT_SIZES, Learning())
    settings = json.loads(json.dumps(asked | {"inputs": inputs}))
    with (
        storage.opened(folder, settings, resume=args.resume) as opened,
        Clock(args.minutes if args.text is None else None) as clock,
    ):
        about, part = {}, progress
        if args.text is not None:
            made, part = _text_comparison(args, folder, clock, progress)
            comparison, built_in, about = made
            reward = reward or built_in
        outcome = compare_on_model(comparison, methods, opened, clock, part, reward=reward, about=about)
        if not opened.rows("results.jsonl"):
            raise ValueError(
                f"--minutes {args.minutes:g}: the time is over, and the base model is not measured yet; "
                f"go on with the same options and --out {folder} --resume"
            )
        progress(1.0, "report")
        data = main.finish(opened, json.loads((folder / "world.json").read_text()), collect_model)
    return data | {"missing": outcome.missing, "stopped": outcome.stopped, "code": outcome.code}


def _text_comparison(args: argparse.Namespace, folder: Path, clock: Clock, progress: Progress) -> Any:
    """A base made from a text; the comparison on it, its built-in reward, facts; and what is left of the progress."""
    from kl_rl.experiments.compare.model.text import TEXT_SIZES, on_text, text_base

    whole = lambda start, end: lambda f, message: progress(start + f * (end - start), message)
    base = text_base(args.text, args.minutes, folder, clock, whole(0.0, 0.25))
    sizes = dataclasses.replace(TEXT_SIZES, steps=args.steps or TEXT_SIZES.steps)
    comparison, reward = on_text(base, args.reward, sizes=sizes, seeds=args.seeds or 1)
    return (comparison, reward, {"checks": base.checks, "name": args.text or "a text"}), whole(0.25, 1.0)


COLUMNS = ("method", "family", "reward", "kl", "P", "S", "C", "C_fwd", "C_JS")


def _print_table(data: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from kl_rl.report.html import plain_table

    console = Console(width=None if sys.stdout.isatty() else 110)
    key = data.get("table_title", "At mean reward {:.2f} (nats; means over seeds)")
    for target in data["targets"]:
        rows = [r | {"method": escape(r["method"])} for r in data["matched_reward"] if r["target"] == target]
        reached = sorted(
            (r for r in rows if r["seeds"]), key=lambda r: (r["family"] != "reference", r["C_fwd"] or 0)
        )
        if not reached:
            continue
        table = Table(title=key.format(target), title_justify="left", box=None, header_style="bold")
        for name in COLUMNS:
            table.add_column(name, justify="left" if name in ("method", "family") else "right")
        for cells in plain_table(reached, COLUMNS):
            table.add_row(*cells)
        console.print(table)
        missing = [r["method"] for r in rows if not r["seeds"]]
        if missing:
            console.print(f"no measured points around this reward: {', '.join(missing)}")
        console.print()
    warned = data.get("warnings") or []
    said = [f"{len(warned)} warnings of the estimators: see the report"] if warned else []
    for line in [data["answer"], *data["checks"], *said]:
        console.print(line, highlight=False, markup=False)


def run(args: argparse.Namespace) -> int:
    """The command.

    Returns:
      0; 130 or 143 if it was interrupted (what was finished is on disk and in the report).
    """
    from kl_rl.cli.cache import use_cache
    from kl_rl.cli.progress import live_progress
    from kl_rl.cli.running import said_how_to_resume

    _check(args)
    folder = Path(args.out) if args.out else Path("runs") / time.strftime("compare-%Y%m%d-%H%M%S")
    use_cache()
    started = time.monotonic()
    with live_progress() as progress, said_how_to_resume("compare", folder, skips=True) as code:
        data = (_run_world if _kind(args) == WORLD else _run_model)(args, folder, progress)
    if code:
        return code[0]
    if args.json:
        from kl_rl.storage.folder import clean

        kept = {k: v for k, v in data.items() if k not in ("rows", "curves")}
        print(json.dumps(clean(kept), allow_nan=False))
    else:
        _print_table(data)
        print(f"\n{folder / 'report.html'}  ({time.monotonic() - started:.0f} s)")
    return _ended(data, folder)


def _ended(data: dict[str, Any], folder: Path) -> int:
    """Say what is missing and how to go on; the exit status."""
    advice = f"go on with the same options and --out {folder} --resume"
    if missing := data.get("missing"):
        print(
            f"kl-rl compare: {len(missing)} lanes are not there yet: {', '.join(missing)}; {advice}",
            file=sys.stderr,
        )
    if data.get("stopped"):
        print(f"kl-rl compare: stopped ({data['stopped']}); {advice}", file=sys.stderr)
    return data.get("code", 0)
