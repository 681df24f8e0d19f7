"""Does it fit? The full RLHF step of 1B and 7B models, compiled ahead of time for TPU slices that need not be there.

python benchmarks/plans.py            # prints the plans; --json adds lines to benchmarks/results/plans.jsonl
python benchmarks/plans.py --only 1b  # one of them
Needs libtpu (pip install 'kl-rl[tpu]'); each plan compiles for some minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from kl_rl.runs.plan import (
    Setting,
    as_json,
    as_text,
    find_topology,
    make_plan,
    parse_mesh,
    read_model,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One plan."""

    model: str
    topology: str
    mesh: str
    setting: Setting


CASES = {
    "1b": Case("1b", "v5e:4x4", "fsdp=4,tensor=4", Setting(batch=16)),
    "7b": Case("7b", "v5e:16x16", "fsdp=64,tensor=4", Setting(batch=256)),
}


def row(case: Case) -> tuple[str, dict]:
    """Text and JSON of a plan."""
    topology = find_topology(case.topology)
    sizes = parse_mesh(case.mesh, len(topology.devices))
    plan = make_plan(read_model(case.model), case.setting, topology, sizes)
    about = {name: version(name) for name in ("kl-rl", "jax", "jaxlib", "libtpu", "optax")}
    about |= {"python": platform.python_version(), "date": datetime.date.today().isoformat()}
    asked = {"model": case.model, "topology": case.topology, "setting": dataclasses.asdict(case.setting)}
    return as_text(plan), about | asked | as_json(plan)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=CASES, help="one plan")
    parser.add_argument("--json", action="store_true", help="append to benchmarks/results/plans.jsonl")
    args = parser.parse_args()
    for name in [args.only] if args.only else CASES:
        text, entry = row(CASES[name])
        print(f"{name} on {CASES[name].topology}: {text}\n", flush=True)
        if args.json:
            with open(Path(__file__).parent / "results" / "plans.jsonl", "a") as file:
                file.write(json.dumps(entry, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
