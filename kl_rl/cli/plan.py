"""`kl-rl plan`: memory, communication and operations of a training step on devices that are not there."""

from __future__ import annotations

import argparse
import json
import os
import re

from kl_rl.cli.parsing import Subparsers, add_command

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Compile sampling and update of a fine-tune for a TPU slice without having one, and say what each device needs:
memory by kind, whether it fits, communication by kind, floating-point operations. The programs are a method of the
library with the sampler, in the setting of a large model: policy in float32 with AdamW, computed in bfloat16 with
scanned and rematerialized layers, frozen base in bfloat16, twist head, cache. (`kl-rl train --compute-dtype bfloat16
--scan-layers --remat` differs in that it keeps the base in float32.)"""

_EPILOG = """\
examples:
  kl-rl plan --model 1b --topology v5e:4x4 --mesh fsdp=4,tensor=4
  kl-rl plan --model 7b --topology v5e:16x16 --mesh fsdp=64,tensor=4 --batch 256 --json
  kl-rl plan --model my/checkpoint/config.json --topology v6e:4x4 --method reinforce --lora 16
  kl-rl plan --model tiny --topology cpu:8 --mesh data=2,fsdp=2,tensor=2 --batch 8 --prompt 16 --horizon 16
      simulated devices; works without libtpu

TPU topologies need libtpu: pip install 'kl-rl[tpu]'. Compiling takes some minutes.

exit status: 0 if it fits, 1 if it does not, 2 for bad input."""


def add_parser(subparsers: Subparsers) -> None:
    """Add ``plan`` to the commands."""
    parser = add_command(
        subparsers,
        run,
        "plan",
        "does a training step fit on these devices? compiled ahead of time, without them",
        _DESCRIPTION,
        _EPILOG,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="CONFIG", help="config.json, its folder, or a preset: tiny, 1b, 7b")
    add("--topology", required=True, metavar="CHIP:SHAPE", help="v5e:4x4, v5p:2x2x4, v6e:4x4, ..., or cpu:8")
    add("--mesh", metavar="AXIS=N,...", help="sizes of data, fsdp and tensor (default: all devices on fsdp)")
    add("--method", default="rlhf", help="rlhf (PPO with a twist head), reinforce, grpo, best-of-n, dpo")
    add("--batch", type=int, default=64, metavar="P", help="prompts per step, all devices (default: 64)")
    add("--prompt", type=int, default=512, metavar="L", help="tokens of a prompt (default: 512)")
    add("--horizon", type=int, default=512, metavar="T", help="new tokens (default: 512)")
    add("--samples", type=int, default=4, metavar="K", help="completions of each prompt (default: 4)")
    add(
        "--gradient-accumulation", type=int, default=1, metavar="N",
        help="add up the gradients of N parts of the batch",
    )  # fmt: skip
    add("--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank only")
    add(
        "--twist",
        choices=("head", "trunk"),
        default="head",
        help="twist: a head on the frozen base (default), or a trained model of its own",
    )
    add("--json", action="store_true", help="print one JSON object and nothing else")


def _prepare(topology: str) -> None:
    """What must be set before jax starts: no real accelerator, as many simulated devices as asked for."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    match = re.fullmatch(r"cpu:(\d+)", topology)
    flags = os.environ.get("XLA_FLAGS", "")
    if match and "host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={match.group(1)}".strip()


def run(args: argparse.Namespace) -> int:
    """Plan, print and return the exit status.

    Args:
        args: parsed arguments of the `plan` command.

    Returns:
        0 if it fits (or devices have no limit), 1 if it does not.

    Raises:
        ValueError: for bad input.
    """
    _prepare(args.topology)
    from kl_rl.runs.plan import (
        Setting,
        as_json,
        as_text,
        find_topology,
        make_plan,
        parse_mesh,
        read_model,
    )

    config = read_model(args.model)
    topology = find_topology(args.topology)
    setting = Setting(
        method=args.method,
        prompts=args.batch,
        prompt_length=args.prompt,
        horizon=args.horizon,
        samples=args.samples,
        lora=args.lora,
        twist_trunk=args.twist == "trunk",
        parts=args.gradient_accumulation,
    )
    plan = make_plan(config, setting, topology, parse_mesh(args.mesh, len(topology.devices)))
    if args.json:
        about = {"model": args.model, "topology": args.topology, "setting": setting.__dict__}
        print(json.dumps(about | as_json(plan), allow_nan=False))
    else:
        print(as_text(plan))
    return 1 if plan.fits is False else 0
