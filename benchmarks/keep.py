"""Keep a run of ``kl-rl compare`` as a reference: its matched tables, with versions, commit and device.

python benchmarks/keep.py runs/compare-20261121-110954      # appends to benchmarks/results/compare.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Append one line."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run = Path(sys.argv[1])
    summary = json.loads((run / "summary.json").read_text())
    with open(run / "results.jsonl") as file:
        first = json.loads(file.readline())
    about = {name: first[name] for name in ("versions", "commit", "device")}
    kept = {name: summary[name] for name in ("title", "answer", "checks", "matched_reward", "matched_kl")}
    settings = json.loads((run / "run.json").read_text())
    with open(Path(__file__).parent / "results" / "compare.jsonl", "a") as file:
        file.write(json.dumps(about | {"settings": settings} | kept) + "\n")


if __name__ == "__main__":
    main()
