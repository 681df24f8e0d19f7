"""``kl-rl train``: fine-tune a language model by any method, in a run that survives."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from kl_rl.cli.parsing import Subparsers, add_command

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Fine-tune a language model for a reward, held to a base model: RLHF, imitation, decision-transformer conditioning,
off-policy RL, preferences. Checkpoints hold everything; a run that was stopped or killed anywhere and is resumed ends
with the same weights and the same files, bit for bit. Measures on held-out prompts what training does to the model
(calibration loss C, with P and S).
"""
EXAMPLES = """\
methods: `kl-rl methods` lists them, with knob and options of each; a family (rlhf, imitation, ...) stands for its
  first; module:NAME or file.py:NAME is a card of your own
rewards: module:function or file.py:function, called as function(prompt, completion) -> number (prompt.messages is the
  conversation, if the prompt was given as messages); a word list or patterns (.json); lines of token, tab, valence
  (.tsv, .txt; weights are rounded to halves); a Hugging Face folder: a reward model (sequence classification with one
  label), or a causal language model, whose log-likelihood is the reward (nats); both use their own chat template for
  conversations
prompts: .jsonl or .parquet with a field "prompt" (or "messages", "prompt_tokens"); .txt: a prompt on each line, or
  pieces of --prompt-length tokens
data: .jsonl or .parquet; for methods of preference comparisons (prompt, chosen, rejected), else completions with
  rewards (prompt, completion or completions, reward or rewards; log_behaviour where the method needs it; as many for
  each prompt where it compares them). Some of their prompts are held out; --reward is what their rewards are, and
  scores the samples measured

examples:
  kl-rl train rlhf --base runs/base --prompts lines.txt --reward words.json --beta 0.5 --out runs/rlhf
  kl-rl train dpo --base runs/base --data pairs.jsonl --reward reward_model/ --beta 0.1 --out runs/dpo
  kl-rl train best-of-n --n 4 --base runs/base --prompts p.jsonl --reward rewards.py:politeness --out runs/bon
  kl-rl train ppo --set clip=0.1 epochs=4 --base runs/base --prompts p.jsonl --reward words.json --out runs/ppo
  kl-rl train rlhf --base models/qwen --lora 16 --prompts p.jsonl --reward m:f --beta 0.1 --out runs/q --resume
  srun kl-rl train rlhf --distributed --mesh fsdp=16 --base models/qwen ... --out /shared/run   # a process on each host

Writes metrics.jsonl, evaluations.jsonl, samples.jsonl, timing.jsonl, curves.png, checkpoints/, model/ (Hugging Face).
metrics.jsonl has a row for each step, about the batch, whoever drew it: loss, reward, log_ratio (mean log q - log p0,
  nats), ess (effective sample size, share), grad_norm, entropy (of the sampler, nats a token), length (tokens), skipped
evaluations.jsonl is about the policy, on held-out prompts: kl, P, S, C, C_fwd, C_JS, _lower and _upper (nats, 95 %),
  mean rewards, entropy, effective sample sizes, warnings; kl is a mean over its samples, P + S + C pools both policies
SIGTERM and Ctrl-C: the step is finished and saved, exit status 143 or 130; --resume goes on.
"""
OPTIONS: tuple[tuple[str, Any, str, str], ...] = (
    (
        "beta",
        float,
        "B",
        "knob of most methods: reward units per nat (default 1); `kl-rl methods` tells whose",
    ),
    ("n", float, "N", "knob of others: draws of which the best is kept (default 4)"),
    ("threshold", float, "R", "knob of others: least reward of a sample that is imitated"),
    (
        "fraction",
        float,
        "F",
        "knob of others: upper share of the base's samples that is imitated (default 0.1)",
    ),
    ("prompt-length", int, "L", "cut a .txt file into prompts of L tokens"),
    ("num-prompts", int, "N", "use at most N prompts, spread over the file"),
    ("steps", int, "N", "training steps (default 200)"),
    ("batch", int, "B", "prompts per step (default 8)"),
    (
        "gradient-accumulation",
        int,
        "N",
        "add up the gradients of N parts of the batch: less memory (default 1)",
    ),
    ("num-samples", int, "K", "completions of each prompt (default 8)"),
    ("horizon", int, "T", "longest completion, tokens (default 48)"),
    ("held-out", int, "N", "prompts kept to measure on (default 8)"),
    ("eval-every", int, "N", "steps between measurements (default: a quarter of --steps)"),
    ("eval-samples", int, "N", "completions of each held-out prompt in a measurement (default 32)"),
    ("lr", float, "R", "peak learning rate (default 1e-4; with --lora more, such as 1e-3)"),
    ("lora", int, "RANK", "train an adapter of this rank, not all weights"),
    ("temperature", float, "T", "of the sampler (default 1; not for methods that do not correct for it)"),
    ("seed", int, "N", "default 0"),
    ("save-every", int, "N", "steps between checkpoints (default: a tenth of --steps)"),
)


def add_parser(subparsers: Subparsers) -> None:
    """Add ``train`` to the commands."""
    parser = add_command(
        subparsers, run, "train", "fine-tune a language model by any method", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("method", metavar="METHOD", help="see below")
    parser.add_argument(
        "--base", metavar="DIR", required=True, help="Hugging Face folder, or output of a run"
    )
    parser.add_argument("--prompts", metavar="FILE", help="to draw completions of; see below")
    parser.add_argument("--data", metavar="FILE", help="to learn from instead of drawing; see below")
    parser.add_argument("--reward", metavar="R", required=True, help="see below")
    parser.add_argument("--out", metavar="DIR", required=True, help="output folder")
    parser.add_argument(
        "--set", metavar="NAME=VALUE", nargs="+", action="extend", default=[], dest="options",
        help="options of the method, such as clip=0.1 epochs=4; an unknown one lists them",
    )  # fmt: skip
    for name, kind, metavar, text in OPTIONS:
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    parser.add_argument(
        "--twist", choices=("head", "trunk"), help="values (critics, state flows): a head on the base, or a network of "
        "their own (default; beside an adapter: a head)",
    )  # fmt: skip
    parser.add_argument(
        "--mesh", metavar="AXES", default="",
        help="devices, such as data=2,fsdp=4,tensor=1; on a CPU data=N gives each of N cores its own rows",
    )  # fmt: skip
    parser.add_argument(
        "--distributed", metavar="HOST:PORT,COUNT,NUMBER", nargs="?", const="",
        help="join the other processes of this run, which see the same --out: on TPU pods, Slurm, Open MPI and "
        "Kubernetes without a value; else the address of process 0, how many processes, and which one this is",
    )  # fmt: skip
    parser.add_argument(
        "--compute-dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products"
    )
    parser.add_argument(
        "--scan-layers", action="store_true", help="one compiled layer in a loop, for deep models"
    )
    parser.add_argument(
        "--remat", action="store_true", help="recompute activations in the backward pass: less memory"
    )
    parser.add_argument(
        "--on-bad-reward", choices=("stop", "skip"), default="stop",
        help="if the reward fails or is no finite number: stop, or replace the sample by a good one of its group",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    parser.add_argument("--no-png", action="store_true", help="no figure")
    parser.add_argument("--tensorboard", action="store_true", help="event files in DIR/tensorboard")
    parser.add_argument("--wandb", metavar="PROJECT", help="report to wandb")
    parser.add_argument("--trackio", metavar="PROJECT", help="report to trackio")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the last measurement as one JSON object")


def _mesh_axes(text: str) -> tuple[tuple[str, int], ...]:
    axes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in ("data", "fsdp", "tensor") or not size.isdigit() or not int(size) or name in axes:
            raise ValueError(f"--mesh: {part!r} is not data=N, fsdp=N or tensor=N; give each at most once")
        axes[name] = int(size)
    return tuple(axes.items())


def _settings(args: argparse.Namespace) -> Any:
    import dataclasses

    from kl_rl.runs.settings import Learning, Saving, Settings, Sizes, Task

    steps = args.steps or Sizes.steps
    given = {
        **vars(args),
        "learning_rate": args.lr,
        "mesh": _mesh_axes(args.mesh),
        "options": tuple(args.options),
    }
    given["eval_every"] = max(1, steps // 4) if args.eval_every is None else args.eval_every
    given["save_every"] = max(1, steps // 10) if args.save_every is None else args.save_every

    def group(kind: Any) -> Any:
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**{n: given[n] for n in names if given.get(n) is not None or n == "prompts"})

    return Settings(group(Task), group(Sizes), group(Learning), group(Saving))


def _run_name(folder: Path) -> str:
    """Another one for every run, and the same when it is resumed."""
    begun = (folder / "run.json").stat().st_mtime_ns
    return f"{folder.name}-{zlib.crc32(f'{folder.absolute()} {begun}'.encode()):08x}"


def _sinks(args: argparse.Namespace, folder: Path, settings: Any) -> Any:
    from kl_rl.storage.trackers import tensorboard_sink, tracking_sink

    def make(step: int) -> list[Any]:
        found = [tensorboard_sink(folder / "tensorboard", step)] if args.tensorboard else []
        for name in ("wandb", "trackio"):
            if project := getattr(args, name):
                found.append(tracking_sink(name, project, _run_name(folder), settings.compared()))
        return found

    return make


def run(args: argparse.Namespace) -> int:
    """The command.

    Returns:
      0; 1 if a checkpoint could not be written; 2 for bad input and bad rewards; 143 or 130 after a signal.
    """
    from kl_rl.cli.allocator import retain_freed_memory
    from kl_rl.cli.cache import use_cache
    from kl_rl.cli.progress import live_progress
    from kl_rl.cli.running import said_how_to_resume
    from kl_rl.huggingface.opened import model_folder
    from kl_rl.runs.choice import choose
    from kl_rl.runs.job import make_job
    from kl_rl.runs.train import Files, train
    from kl_rl.sharding.processes import is_first
    from kl_rl.storage.fingerprint import fingerprint
    from kl_rl.storage.held import held
    from kl_rl.storage.preemption import Preemption

    settings, folder = _settings(args), Path(args.out)
    choose(settings.task, settings.sizes, settings.learning)
    retain_freed_memory()
    _use_devices(args, settings)
    use_cache()
    task = settings.task
    given = [name for name in ("prompts", "data", "reward") if getattr(task, name) is not None]
    inputs = {name: fingerprint(getattr(task, name)) for name in given}  # not of functions
    inputs["base"] = fingerprint(model_folder(task.base))
    same = {name: os.path.normpath(getattr(task, name)) for name in ("base", *given)}
    asked = {"command": "train", **settings.compared(), **same, "inputs": inputs}
    started = time.monotonic()
    with (
        held(folder, asked, resume=args.resume),
        said_how_to_resume("train", folder, skips=args.on_bad_reward == "skip") as code,
        live_progress() as live,
    ):
        quiet = lambda fraction, message: None
        progress = quiet if args.quiet or not is_first() else _sparse(live, settings.sizes.steps)
        with (
            contextlib.redirect_stdout(sys.stderr),
            Preemption() as preemption,
        ):  # what a reward prints is no result
            progress(0.0, "opening the base model")
            files = Files(folder, settings.saving.save_every, _sinks(args, folder, settings))
            result = train(make_job(settings), files, preemption, progress=progress)
        if is_first() and not args.no_png:
            from kl_rl.report.curves import draw_curves

            draw_curves(folder)
    if code:
        return code[0]
    if is_first():
        _print(args, folder, result, time.monotonic() - started)
    return 0


def _use_devices(args: argparse.Namespace, settings: Any) -> None:
    """Join the other processes, and let a CPU be as many devices as its part of the mesh has."""
    from kl_rl.sharding import split_cpu
    from kl_rl.sharding.processes import join, named

    axes, spread = dict(settings.learning.mesh), args.distributed is not None
    if spread and not axes:
        raise ValueError("--distributed needs --mesh, which counts the devices of all processes")
    group = named(args.distributed) if args.distributed else None
    if group and math.prod(axes.values()) % group.total:
        raise ValueError(f"--mesh {args.mesh}: {group.total} processes cannot have equal parts of it")
    if axes and (group or not spread):
        split_cpu(math.prod(axes.values()) // (group.total if group else 1))
    if spread:
        join(group)


def _sparse(live: Any, steps: int) -> Any:
    """On a terminal every step moves the bar; elsewhere about twenty lines are written."""
    every = 1 if sys.stderr.isatty() else max(1, steps // 20)

    def progress(fraction: float, message: str) -> None:
        if not message.startswith("step ") or round(fraction * steps) % every == 0:
            live(fraction, message)

    return progress


def _print(args: argparse.Namespace, folder: Path, result: dict[str, Any], seconds: float) -> None:
    if args.json:
        from kl_rl.storage.folder import clean

        print(json.dumps(clean(result), allow_nan=False))
        return
    print(f"{folder / 'model'}: {args.method}, {result['steps']} steps  ({seconds:.0f} s)")
    where = "held-out prompts" if result["held_out"] else "prompts that were trained on (none is held out)"
    print(f"on {where}: mean reward {result['base_reward']:.3f} -> {result['reward']:.3f}; in nats:")
    for name, text in (
        ("kl", "KL(q || p0)"),
        ("P", "price P"),
        ("S", "shape S"),
        ("C", "calibration loss C"),
    ):
        low, high = result[f"{name}_lower"], result[f"{name}_upper"]
        print(f"  {text:<20} {result[name]:8.4f}   [{low:.4f}, {high:.4f}]")
    total = sum(result[name] for name in ("P", "S", "C"))
    print(f"  P + S + C = {total:.4f}: KL from the samples of both policies together")
    for warning in result["warnings"]:
        print(f"warning: {warning}")
