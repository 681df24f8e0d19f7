"""`kl-rl plan`: memory, communication and operations of a training step on devices that are not there."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re

from kl_rl.cli.parsing import Subparsers, add_command

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Compile sampling and update of a fine-tune for a TPU slice without having one, and say what each device needs:
memory by kind, whether it fits, communication by kind, floating-point operations. The programs are those of
`kl-rl train` with the same options, lowered on shapes; unlike there, large models are the default
(--compute-dtype bfloat16 --scan-layers --remat)."""
_EPILOG = """\
examples:
  kl-rl plan --model 1b --topology v5e:4x4 --mesh fsdp=4,tensor=4
  kl-rl plan --model 7b --topology v5e:16x16 --mesh fsdp=64,tensor=4 --batch 256 --json
  kl-rl plan --model my/checkpoint/config.json --topology v6e:4x4 --method grpo --lora 16
  kl-rl plan --model tiny --topology cpu:8 --mesh data=2,fsdp=2,tensor=2 --batch 8 --prompt-length 16 --horizon 16
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
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="CONFIG", help="a preset, tiny, 1b or 7b, or a config.json")
    model.add_argument("--base", metavar="DIR", help="Hugging Face folder, hub name, or output of a run")
    add("--topology", required=True, metavar="CHIP:SHAPE", help="v5e:4x4, v5p:2x2x4, v6e:4x4, ..., or cpu:8")
    add("--mesh", metavar="AXIS=N,...", help="sizes of data, fsdp and tensor (default: all devices on fsdp)")
    add("--method", default="rlhf", metavar="NAME", help="as for `kl-rl train` (default: rlhf)")
    add("--batch", type=int, metavar="P", help="prompts per step, all devices (default: 64)")
    add("--prompt-length", type=int, metavar="L", help="tokens of a prompt (default: 512)")
    add("--horizon", type=int, metavar="T", help="new tokens (default: 512)")
    add("--num-samples", type=int, metavar="K", help="completions of each prompt (default: 4)")
    add("--gradient-accumulation", type=int, metavar="N", help="add up the gradients of N parts of the batch")
    add("--lora", type=int, metavar="RANK", help="train adapters of this rank only")
    add("--twist", choices=("head", "trunk"), help="values as a head on the base, or on a trunk of their own")
    add("--compute-dtype", choices=("float32", "bfloat16"), help="of matrix products (default: bfloat16)")
    add("--no-scan-layers", dest="scan_layers", action="store_false", help="every layer compiled by itself")
    add("--no-remat", dest="remat", action="store_false", help="keep activations")
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
    from kl_rl.huggingface.opened import architecture
    from kl_rl.runs.plan import Setting, as_json, as_text, find_topology, make_plan, parse_mesh, read_model

    config = read_model(args.model) if args.base is None else architecture(args.base)
    topology = find_topology(args.topology)
    names = [field.name for field in dataclasses.fields(Setting)]
    setting = Setting(**{name: value for name in names if (value := getattr(args, name)) is not None})
    plan = make_plan(config, setting, topology, parse_mesh(args.mesh, len(topology.devices)))
    if args.json:
        about = {"model": args.base or args.model, "topology": args.topology, "setting": setting.__dict__}
        print(json.dumps(about | as_json(plan), allow_nan=False))
    else:
        print(as_text(plan))
    return 1 if plan.fits is False else 0
