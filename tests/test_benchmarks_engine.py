"""The speed benchmarks run: our programs on toy sizes, taking turns with peers, the table, the accelerator's script."""

import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("compile_quickly")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {"layers": 1, "width": 8, "heads": 2, "context": 16, "prompt": 3, "new": 4, "batch": 64, "group": 8}
TINY |= {"decode_batch": 2, "train_length": 6, "dpo_parts": 1, "train_parts": 2}
COMMON = """
import argparse, json, time
def args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int)
    parser.add_argument("--die", type=int)
    return parser.parse_args()
class StepTimer:
    def __init__(self): self.t0 = time.perf_counter(); self.t = []
def emit(peer, a, stats, **about): raise AssertionError("must be replaced")
"""
SCRIPT = """
from peer_common import *
a = args(); timer = StepTimer(); print("chatter")
for i in range(a.steps):
    sum(range(200_000)); timer.mark()
    if i + 1 == a.die: raise SystemExit("out of luck")
emit("toy", a, {}, params=7, versions={"toy": "1"})
"""


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def numbers(tree):
    """The floating-point leaves, copied before they are donated."""
    return [np.array(x) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


@pytest.mark.parametrize("name", ["rl", "dpo", "decode", "train"])
def test_every_program_takes_steps_and_learns(name):
    from engine import Config
    from engine_worker import PROGRAMS

    call = PROGRAMS[name](Config(**TINY))
    first = call()
    if name == "decode":
        assert first.tokens.shape == (2, 1, 4)
    if name == "dpo":
        assert float(first[0].loss) == pytest.approx(math.log(2), abs=1e-6)  # the policy is p0
    if name == "rl":
        np.testing.assert_allclose(first[0].log_ratio, 0.0, atol=1e-5)
        assert 0 <= float(first[0].reward[0]) <= 1
    first, second = numbers(first), numbers(call())
    assert all(np.isfinite(x).all() for x in second)
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def toy_peer(tmp_path):
    (tmp_path / "peer_common.py").write_text(COMMON)
    (tmp_path / "toy.py").write_text(SCRIPT)
    (tmp_path / "broken.py").write_text("raise SystemExit('no such library')")
    return lambda script, *options: [
        sys.executable, str(BENCHMARKS / "engine_peer.py"), str(tmp_path), script, *options
    ]  # fmt: skip


def test_peers_take_turns_and_start_again_at_their_end(toy_peer):
    from engine_process import Failed, Stepper, race

    env = {"PATH": ""}
    long, short = (Stepper(toy_peer("toy.py", "--steps", n), env, warmup=1) for n in ("6", "3"))
    steps, failed = race({"long": long, "short": short}, rounds=3)
    assert not failed
    long.close()
    short.close()
    assert long.process.returncode == 0 == short.process.returncode
    for taken in steps.values():
        assert len(taken) == 3
        assert all(0 < step.wall < 60 and step.cpu > 0 and step.peak > 2**20 for step in taken)
    assert long.about == short.about | {"settings": {"steps": 6, "die": None}}
    assert long.about["params"] == 7
    with pytest.raises(Failed, match="no such library"):
        Stepper(toy_peer("broken.py"), env, warmup=1)
    dying = Stepper(toy_peer("toy.py", "--steps", "2", "--die", "1"), env, warmup=0)
    steps, failed = race({"dying": dying}, rounds=2)
    assert not steps and "out of luck" in failed["dying"]


def test_ratios_are_judged_round_by_round():
    from engine import RACES, Config, ratios
    from engine_process import Step
    from engine_table import race_rows, table

    ours, theirs = ([Step(w, w, 1) for w in walls] for walls in ([1.0, 2.0, 4.0], [3.0, 4.0, 4.0]))
    assert ratios(theirs, ours, "wall") == {"median": 2.0, "min": 1.0, "max": 3.0}
    times = dict.fromkeys(("wall_median", "wall_min", "cpu_median", "cpu_min"), 1.0)
    start = {"peak_bytes": 2**30, "first_step": 5.0, "until_first_step": 9.0}
    speed = {kind: {"median": 2.6, "min": 2.0, "max": 3.0} for kind in ("wall", "cpu")}
    figures = {"kl_rl": times | start, "TRL GRPO": times | start, "cold": start | {"peak_bytes": 2**31}}
    figures |= {"ratios": {"TRL GRPO": speed}, "missing": {"TRL RLOO": "give it"}}
    rows = race_rows(Config(), RACES[0], figures)
    judged = {row.what.strip(): row.met for row in rows if row.met is not None}
    assert judged == {"speed over TRL GRPO": True, "peak memory": False, "first step": True}
    assert "missing: give it" in table(rows) and "NOT met" in table(rows)


@pytest.mark.slow
def test_accelerator_script_runs_on_toy_sizes(monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--only", "train", "decode"])
    gpu.main()
    out = capsys.readouterr().out
    assert "training, batch 2, layers recomputed" in out and "ms a token of 4 rows" in out
    assert "peaks are not in the table" in out
    weights, cache = gpu.decode_bytes(gpu.TINY)
    # bytes, keys and values of two layers and two heads, rows, mean length
    assert cache == 2 * (2 * 2 * 2 * 8) * 4 * (4 + 8 / 2)
    assert weights == 2 * (34_976 - 256 * 32)  # parameters but the embedding, of which a token reads one row


@pytest.mark.parametrize(
    ("kind", "bandwidth"),
    [("NVIDIA H100 80GB HBM3", 3.35e12), ("NVIDIA L4", 0.3e12), ("TPU v5 lite", 0.819e12), ("TPU v5p", None),
     ("NVIDIA L40S", None), ("NVIDIA H200", 4.8e12), ("cpu", None)],
)  # fmt: skip
def test_peaks_are_found_by_device_kind(kind, bandwidth):
    import gpu

    chip = gpu.find_chip(kind)
    assert (chip and chip.bandwidth) == bandwidth


def test_freed_memory_is_kept_where_the_allocator_is_glibc(capfd):
    import platform
    import subprocess

    code = (
        "import resource, sys; from kl_rl.cli.allocator import retain_freed_memory\n"
        "if sys.argv[1] == 'on': print(retain_freed_memory())\n"
        "import numpy as np\n"
        "touch = lambda: np.full(10_000_000, 1.0)\n"
        "touch(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(5): touch()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    run = lambda how: subprocess.run(
        [sys.executable, "-c", code, how], capture_output=True, text=True, check=True
    )
    said, kept = run("on").stdout.split()
    glibc = sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"
    assert said == str(glibc)
    if glibc:
        assert (
            int(kept) < 100 < int(run("off").stdout)
        )  # 80 MB are 20 000 pages of 4 KiB, or 40 huge ones, five times
