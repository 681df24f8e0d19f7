"""How fast is the language-model engine beside its peers? Ratios within one run, step by step in turns.

python benchmarks/engine.py                                   # our own side: seconds, memory, time to first step
python benchmarks/engine.py --torch-python VENV/bin/python --tunix-python VENV/bin/python --peers FOLDER [--json]
  --torch-python  an interpreter with torch, transformers and trl;  --tunix-python  one with google-tunix
  --peers         the folder with trl_rl.py, trl_dpo.py, tunix_rl.py, torch_step.py and peer_common.py
  --rounds N      steps of each that count (default 15);  --only rl dpo decode train
  --passive       peers' threads sleep instead of spinning while they wait (OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0):
                  spinning threads cost a peer several times its speed on a busy machine
  --json          append a line to benchmarks/results/engine.jsonl

Every program has a process of its own, takes a step when it is asked and is stopped in between, so that all of them
meet the same machine. The first steps (compilation) are not counted. A ratio is the peer's wall time over ours, round
by round; the table has its median and, in brackets, its least and greatest value. CPU is user and system time of all
threads. Peers run as they are, with two threads and otherwise their own settings.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from engine_process import Failed, Step, Stepper, race
from engine_table import OURS, race_rows, table

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the benchmark; float32 throughout."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 512
    vocab: int = 259  # RL and DPO: bytes and the three marks of the peers' tokenizer
    bytes: int = 256  # decoding and training
    prompt: int = 16
    new: int = 64
    batch: int = 32  # completions of an RL step, pairs of a DPO step, rows of a training step
    group: int = 8
    decode_batch: int = 64
    train_length: int = 128
    beta: float = 0.05
    dpo_beta: float = 0.1
    rl_rate: float = 1e-4
    train_rate: float = 3e-4
    rl_parts: int = 2  # our side: parts of the batch whose gradients are added up
    dpo_parts: int = 4
    train_parts: int = 8
    devices: int = 2  # our side: CPU devices that rows are split over, one a core
    retain: bool = True  # our side: kl_rl.cli.allocator, as the commands do
    threads: int = 2
    passive: bool = False  # peers: waiting threads sleep; otherwise their default, which is to spin
    warmup: int = 2
    seed: int = 0


class Peer(NamedTuple):
    """A script of ours or a peer's, and how many times its speed is asked of us."""

    name: str
    python: str
    script: str
    options: tuple[str, ...]
    target: float


class Race(NamedTuple):
    """A program of ours and who runs against it."""

    name: str
    title: str
    peers: tuple[Peer, ...]


RACES = (
    Race(
        "rl",
        "RL step (sample, score, update)",
        (
            Peer("TRL GRPO", "torch", "trl_rl.py", ("--algo", "grpo"), 2.5),
            Peer("TRL RLOO", "torch", "trl_rl.py", ("--algo", "rloo"), 2.5),
            Peer("tunix GRPO", "tunix", "tunix_rl.py", ("--algo", "grpo"), 4.0),
        ),
    ),
    Race("dpo", "DPO step", (Peer("TRL DPO", "torch", "trl_dpo.py", (), 1.2),)),
    Race("decode", "decoding", (Peer("HF generate", "torch", "torch_step.py", ("--mode", "generate"), 3.0),)),
    Race(
        "train", "training step", (Peer("torch eager", "torch", "torch_step.py", ("--mode", "eager"), 1.0),)
    ),
)


def environment(config: Config, folder: str) -> dict[str, str]:
    """CPU only, and everything that is written goes into a folder that is removed."""
    paths = {"TMPDIR": folder, "XDG_CACHE_HOME": folder}
    waiting = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"} if config.passive else {}
    return {**os.environ, **paths, **waiting, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def peer_command(config: Config, peer: Peer, python: str, folder: str, steps: int) -> list[str]:
    """How a peer is started."""
    sizes = {
        "layers": config.layers, "d": config.width, "heads": config.heads, "ff": 4 * config.width,
        "prompt_len": config.prompt, "new_tokens": config.new, "batch": config.batch, "group": config.group,
        "threads": config.threads, "seed": config.seed, "steps": steps, "warmup": 0,
    }  # fmt: skip
    if peer.script == "torch_step.py":
        sizes |= {"T": config.train_length, "vocab": config.bytes, "gen_batch": config.decode_batch}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    return [python, str(HERE / "engine_peer.py"), folder, peer.script, *peer.options, *flags]


def our_command(config: Config, name: str) -> list[str]:
    """How our side is started."""
    return [
        sys.executable,
        str(HERE / "engine_worker.py"),
        name,
        json.dumps(dataclasses.asdict(config)),
    ]


def summary(steps: list[Step]) -> dict[str, float]:
    """Median and minimum of wall and CPU seconds."""
    out = {}
    for name in ("wall", "cpu"):
        values = [getattr(step, name) for step in steps]
        out |= {f"{name}_median": statistics.median(values), f"{name}_min": min(values)}
    return out


def ratios(theirs: list[Step], ours: list[Step], name: str) -> dict[str, float]:
    """Their time over ours, round by round."""
    values = [getattr(a, name) / getattr(b, name) for a, b in zip(theirs, ours, strict=True)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def run_race(
    config: Config, race_: Race, pythons: dict[str, str], folder: str, rounds: int
) -> dict[str, Any]:
    """All figures of a race.

    Args:
      config: sizes.
      race_: who runs.
      pythons: "torch" and "tunix", those that were given.
      folder: of the peers' scripts.
      rounds: steps that count.

    Returns:
      By name (ours and the peers'): seconds, peak memory, time to first step; ratios; what is missing and why.
    """
    steps, missing = 1 + config.warmup + rounds, {}
    racers: dict[str, Stepper] = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as ends:

        def start(command: list[str]) -> Stepper:
            stepper = Stepper(command, environment(config, scratch), warmup=config.warmup)
            ends.callback(stepper.kill)
            return stepper

        cold = start(our_command(config, race_.name))
        cold.close()
        racers[OURS] = start(our_command(config, race_.name))
        for peer in race_.peers:
            if peer.python not in pythons or not folder:
                missing[peer.name] = f"give --{peer.python}-python and --peers"
                continue
            try:
                racers[peer.name] = start(peer_command(config, peer, pythons[peer.python], folder, steps))
            except (Failed, OSError) as error:
                missing[peer.name] = f"it failed: {error}"
        taken, failed = race(racers, rounds)
        if OURS in failed:
            raise Failed(f"{race_.name}: our own process: {failed[OURS]}")
        missing |= {name: f"it failed: {why}" for name, why in failed.items()}
        racers = {name: racers[name] for name in taken}
        for racer in racers.values():
            racer.close()
    figures: dict[str, Any] = {"missing": missing, "cold": _start(cold), "ratios": {}}
    for name, racer in racers.items():
        figures[name] = summary(taken[name]) | _start(racer) | {"about": racer.about}
        if name != OURS:
            both = (taken[name], taken[OURS])
            figures["ratios"][name] = {kind: ratios(*both, kind) for kind in ("wall", "cpu")}
    return figures


def _start(racer: Stepper) -> dict[str, float]:
    return {
        "peak_bytes": racer.peak,
        "first_step": racer.first.wall,
        "until_first_step": racer.until_first,
    }


def provenance() -> dict[str, Any]:
    """What the figures were measured on; no names of machines, no paths."""
    git = lambda *args: subprocess.run(["git", *args], capture_output=True, text=True, check=False, cwd=HERE)
    changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short=12", "HEAD").stdout.strip() or None,
        "uncommitted_changes": bool(changed),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS"),
    }


def pin(threads: int) -> None:
    """As many CPUs as there are threads, for every process of the benchmark; where the system has such a call."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def main() -> None:
    config = Config()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("--torch-python", metavar="PATH")
    parser.add_argument("--tunix-python", metavar="PATH")
    parser.add_argument("--peers", metavar="FOLDER", default="")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=[r.name for r in RACES], default=[r.name for r in RACES])
    parser.add_argument("--passive", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the processes that were started
    config = dataclasses.replace(config, passive=args.passive)
    pythons = {kind: getattr(args, f"{kind}_python") for kind in ("torch", "tunix")}
    pythons = {kind: path for kind, path in pythons.items() if path}
    folder = str(Path(args.peers).resolve()) if args.peers else ""
    pin(config.threads)
    load = os.getloadavg()[0]
    if load > 1:
        print(
            f"WARNING: the load average is {load:.1f}; figures measured now are not to be trusted", flush=True
        )
    about, results, rows = provenance() | {"load_at_start": load}, {}, []
    for race_ in RACES:
        if race_.name in args.only:
            results[race_.name] = run_race(config, race_, pythons, folder, args.rounds)
            rows = race_rows(config, race_, results[race_.name])
            print(table(rows), flush=True)
    about |= {"load_at_end": os.getloadavg()[0], "rounds": args.rounds, "config": dataclasses.asdict(config)}
    print(json.dumps(about))
    if args.json:
        with open(HERE / "results" / "engine.jsonl", "a") as file:
            file.write(json.dumps(about | {"results": results}, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
