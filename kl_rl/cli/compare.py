"""``kl-rl compare``: fine-tune one base model by every family of methods, and say what each did to it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kl_rl.cli.parsing import Subparsers, add_command

if TYPE_CHECKING:
    from kl_rl.experiments.compare.runner import Sizes

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Fine-tune one base model by RLHF, filtered imitation, decision-transformer conditioning, off-policy RL and
preferences, and measure exactly (or, with --text, by two-sided estimates) what each did to calibrated
conditional inference. Writes results.jsonl, curves.jsonl, summary.json, report.html and the figures as PNG.
"""
EXAMPLES = """\
examples:
  kl-rl compare                                     default world (4 096 strings), all methods, 4 seeds
  kl-rl compare --methods rlhf imitation --seeds 8  two families, more seeds
  kl-rl compare --world W.json --out runs/w         your own world (`kl-rl exact --schema`: the format)
  kl-rl compare --full --out runs/full              65 536 strings, 8 seeds, longer training
  kl-rl compare --text FILE --reward LEXICON        a transformer trained on a text, a word-list reward
  kl-rl compare --out runs/w --world W.json --resume    go on after an interruption

Without --out a new folder runs/compare-<time> is made.
Ctrl-C keeps what is finished and still writes the report.
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
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--world", metavar="W.json", help="an enumerable world (default: a built-in one with 4 096 strings)"
    )
    where.add_argument(
        "--text",
        metavar="FILE",
        nargs="?",
        const="",
        help="a text file; without FILE: English text that ships with Python",
    )
    parser.add_argument(
        "--reward",
        metavar="FILE",
        help="with --text: a lexicon (.json, or .tsv with word and valence) or patterns (.json)",
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="methods or families (default: all)")
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="fine-tuning seeds per knob (default 4; 8 with --full; 1 with --text)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="gradient steps of fine-tuning")
    parser.add_argument("--full", action="store_true", help="65 536 strings, 8 seeds, longer training")
    parser.add_argument("--minutes", type=float, metavar="M", help="with --text: minutes of pretraining")
    parser.add_argument("--out", metavar="DIR", help="output folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def _positive(args: argparse.Namespace) -> None:
    for name in ("seeds", "steps", "minutes"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be positive; got {value}")
    if args.reward and args.text is None:
        raise ValueError("--reward goes with --text; a world file holds its own reward")
    if args.minutes and args.text is None:
        raise ValueError("--minutes goes with --text")
    if args.resume and not args.out:
        raise ValueError("--resume needs --out, the folder of the run to go on with")
    if args.full and args.text is not None:
        raise ValueError("--full goes with an enumerable world, not with --text")


def _sizes(args: argparse.Namespace) -> Sizes:
    from kl_rl.experiments.compare.runner import Sizes

    plan = (
        Sizes(seeds=8, steps=800, checkpoints=10, base_steps=2500, learning_rate=2e-3)
        if args.full
        else Sizes()
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
        stopped = False
        try:
            tabular.run_tabular(world, methods, plan, opened, progress, measure_extras)
        except KeyboardInterrupt:
            stopped = True
        if not opened.rows("results.jsonl"):
            raise KeyboardInterrupt
        progress(1.0, "report")
        data = main.finish(opened, json.loads((folder / "world.json").read_text()))
    return data | {"stopped": stopped}


def _run_text(args: argparse.Namespace, folder: Path, progress) -> dict[str, Any]:
    from kl_rl import storage
    from kl_rl.experiments.compare import main, text

    plan = text.TextPlan()
    plan = plan._replace(minutes=args.minutes or plan.minutes, steps=args.steps or plan.steps)
    methods = args.methods or list(text.DEFAULT_METHODS)
    settings = {"text": args.text, "reward": args.reward, "methods": methods, "seeds": args.seeds or 1}
    settings = json.loads(json.dumps(settings | plan._asdict()))
    with storage.opened(folder, settings, resume=args.resume) as opened:
        about, stopped = storage.provenance(), False
        done = frozenset((r["method"], r["knob_value"], r["seed"]) for r in opened.rows("results.jsonl"))

        def keep_facts(facts: dict[str, Any]) -> None:
            subtitle = (
                f"{facts['alphabet_size']} characters, completions of {plan.horizon}, {plan.steps} steps of "
                f"{plan.num_samples} samples; no exact truth: estimates with 95 % intervals."
            )
            storage.write_atomically(
                folder / "world.json", json.dumps(facts | {"subtitle": subtitle}, indent=1) + "\n"
            )

        try:
            text.run_text(
                text=args.text or None,
                reward=args.reward,
                methods=methods,
                seeds=range(settings["seeds"]),
                out=folder,
                done=done,
                plan=plan,
                progress=progress,
                on_rows=lambda rows: opened.append("results.jsonl", [row | about for row in rows]),
                on_facts=keep_facts,
            )
        except KeyboardInterrupt:
            stopped = True
        if not (folder / "world.json").exists():
            raise KeyboardInterrupt
        data = main.finish(opened, json.loads((folder / "world.json").read_text()), text.collect_text)
    return data | {"stopped": stopped}


COLUMNS = ("method", "family", "reward", "kl", "P", "S", "C", "C_fwd", "C_JS")


def _print_table(data: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from kl_rl.report.html import plain_table

    console = Console(width=None if sys.stdout.isatty() else 110)
    key = data.get("table_title", "At mean reward {:.2f} (nats; means over seeds)")
    for target in data["targets"]:
        rows = [r for r in data["matched_reward"] if r["target"] == target]
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
    for line in [data["answer"], *data["checks"]]:
        console.print(line, highlight=False)


def run(args: argparse.Namespace) -> int:
    """The command.

    Returns:
      0, or 1 if the run was interrupted (what was finished is on disk and in the report).
    """
    from kl_rl.cli.cache import use_cache
    from kl_rl.cli.progress import live_progress

    _positive(args)
    folder = Path(args.out) if args.out else Path("runs") / time.strftime("compare-%Y%m%d-%H%M%S")
    use_cache()
    started = time.monotonic()
    with live_progress() as progress:
        data = (_run_world if args.text is None else _run_text)(args, folder, progress)
    if args.json:
        from kl_rl.storage.folder import clean

        kept = {k: v for k, v in data.items() if k not in ("rows", "curves")}
        print(json.dumps(clean(kept), allow_nan=False))
    else:
        _print_table(data)
        print(f"\n{folder / 'report.html'}  ({time.monotonic() - started:.0f} s)")
    if data.get("stopped"):
        print(f"kl-rl compare: interrupted; go on with: --out {folder} --resume", file=sys.stderr)
        return 1
    return 0
