"""The comparison from outside: files, checks, interruption, resumption, bad input."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from kl_rl.experiments.compare.main import frontier_of, price_along
from kl_rl.experiments.compare.matched import matched, summary
from kl_rl.methods import METHODS, laws

WORLD = {
    "name": "small",
    "base": {
        "kind": "markov",
        "initial": [0.5, 0.3, 0.2],
        "transition": [[0.6, 0.2, 0.2], [0.3, 0.4, 0.3], [0.2, 0.5, 0.3]],
    },
    "reward": {"kind": "motif_count", "motif": [2], "weight": 1.0},
    "horizon": 3,
}
FIELDS = """method family knob knob_value seed reward kl P S C C_fwd C_JS kl_q_pstar kl_pstar_q entropy log_z versions
commit device"""
FAST = ["--seeds", "2", "--steps", "8"]
ENV = {**{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def programs_on_disk(tmp_path_factory):
    """Processes of these tests compile a program once, whichever worker starts them."""
    ENV["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.getbasetemp().parent / "programs")
    ENV["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def kl_rl(*args, **options):
    command = [sys.executable, "-m", "kl_rl", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, check=False, **options)


def rows_of(folder, name="results.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def world_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "W.json"
    path.write_text(json.dumps(WORLD))
    return path


@pytest.fixture(scope="module")
def finished(world_file):
    out = world_file.parent / "run"
    done = kl_rl(
        "compare", "--world", world_file, "--methods", "filter", "dpo", "--out", out, "--json", *FAST
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_a_run_leaves_rows_figures_and_a_self_contained_report(finished):
    out, summary = finished
    rows = rows_of(out)
    assert {r["method"] for r in rows} == {
        "exact-posterior",
        "control",
        "exact-best-of-n",
        "exact-filter",
        "filter",
        "dpo",
    }
    for row in rows:
        assert set(FIELDS.split()) <= set(row)
        assert row["kl"] == pytest.approx(row["P"] + row["S"] + row["C"], abs=1e-12)
    assert all("wall_s" in r and "compile_s" in r for r in rows if r["family"] != "reference")
    for r in rows:
        if r["method"] == "exact-posterior":
            assert abs(r["C"]) < 1e-14 and r["C_lower"] == 0 and r["kl_q_pstar"] < 1e-14
        if r["method"] == "control":
            assert r["C"] == pytest.approx(r["known_C"], abs=1e-14) and r["known_C"] > 0.01
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64") == 4 and "http" not in page
    for name in ("budget", "frontier", "training", "forward"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    strict = {"parse_constant": lambda name: pytest.fail(f"{name} is not JSON")}
    json.loads((out / "summary.json").read_text(), **strict)
    assert summary["answer"] and json.loads((out / "summary.json").read_text())["answer"] == summary["answer"]


def test_resume_makes_exactly_the_rows_that_are_missing(finished, world_file):
    """Without the last method's rows, and with a line cut short by a crash, the same rows come again."""
    out, _ = finished
    before = rows_of(out)
    kept = [r for r in before if r["method"] != before[-1]["method"]]
    torn = json.dumps(before[-1])[:40]
    (out / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept) + torn)
    args = ["compare", "--world", world_file, "--methods", "filter", "dpo", "--out", out, *FAST]
    refused = kl_rl(*args)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    assert kl_rl(*args, "--resume").returncode == 0
    timeless = lambda rows: [{k: v for k, v in r.items() if k not in ("wall_s", "compile_s")} for r in rows]
    assert timeless(rows_of(out)) == timeless(before)
    changed = kl_rl(*args[:-1], "9", "--resume")
    assert changed.returncode == 2 and "steps" in changed.stderr


HEARS_CTRL_C = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
runpy.run_module("kl_rl", run_name="__main__")
"""


def test_ctrl_c_keeps_what_is_finished_and_resume_goes_on(world_file, tmp_path):
    out = tmp_path / "run"
    asked = ["filter", "dpo"]  # when the references are there, both are in the middle
    args = ["--world", str(world_file), "--methods", *asked, "--out", str(out), *FAST]
    process = subprocess.Popen(
        [sys.executable, "-c", HEARS_CTRL_C, "compare", *args],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out / "results.jsonl").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in stderr and "Traceback" not in stderr
    assert (out / "report.html").exists()
    assert {r["method"] for r in rows_of(out)} < {m.name for m in METHODS} | {
        "exact-posterior", "control", "exact-best-of-n", "exact-filter"
    }  # fmt: skip
    again = kl_rl("compare", *args, "--resume")
    assert again.returncode == 0, again.stderr
    counted = [(r["method"], r["knob_value"], r["seed"]) for r in rows_of(out)]
    assert len(counted) == len(set(counted)) and set(asked) <= {c[0] for c in counted}


BAD = {
    ("--methods", "rlhff"): "unknown method 'rlhff'",
    ("--seeds", "0"): "--seeds must be positive",
    ("--reward", "x.json"): "--reward goes with --base or --text, not with an enumerable world",
    ("--resume",): "--resume needs --out",
    ("--world", "no-such.json"): "no-such.json: no such file",
    ("--text", "no-such.txt"): "no-such.txt",
    ("--full", "--text"): "--full goes with an enumerable world",
}


@pytest.mark.parametrize("options", BAD, ids=lambda o: " ".join(o))
def test_bad_input_is_one_message_and_exit_2(options, tmp_path):
    done = kl_rl("compare", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert BAD[options] in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_a_world_too_large_to_enumerate_names_size_limit_and_way_out(tmp_path):
    path = tmp_path / "W.json"
    path.write_text(json.dumps({**WORLD, "horizon": 40}))
    done = kl_rl("compare", "--world", path, cwd=tmp_path)
    assert done.returncode == 2 and "262144" in done.stderr and "shorten the horizon" in done.stderr


def test_interpolation_is_exact_where_divergences_are_quadratic():
    """KL = 0.3 x^2 in the reward gained: between the knobs and the base, the square root is linear."""
    rate = {"kl": 0.3, "P": 0.2, "S": 0.0, "C": 0.1, "C_fwd": 0.5, "C_JS": 0.01, "kl_pstar_q": 1.0}
    rows = [
        {"method": "m", "family": "f", "seed": seed, "reward": 1.0 + x, "entropy_gap": 2.0 * x}
        | {name: c * x**2 for name, c in rate.items()}
        for seed in (0, 1)
        for x in (1.0, 2.0)
    ]
    (entry, missed) = matched(rows, "reward", [1.7, 9.0], base_reward=1.0)
    assert entry["seeds"] == 2 and entry["C_fwd_stderr"] == 0
    np.testing.assert_allclose(
        [entry["C_fwd"], entry["entropy_gap"], entry["kl"]], [0.5 * 0.49, 1.4, 0.3 * 0.49]
    )
    assert missed == {"method": "m", "family": "f", "target": 9.0, "seeds": 0, "passed": False}
    (own,) = matched(
        [r | {"reward": r["reward"] ** 3} for r in rows], "reward", [8.0 + 1e-6], base_reward=1.0
    )
    assert own["C"] == pytest.approx(
        0.1, rel=1e-5
    )  # at a point that was measured, however far the next one is
    at_kl = matched(rows, "kl", [0.3 * 1.5**2], base_reward=1.0)[0]
    np.testing.assert_allclose([at_kl["reward"], at_kl["C"]], [2.5, 0.1 * 1.5**2])


def _lost(method, low, high, **more):
    value = 1.5 * low
    row = {"method": method, "family": method, "target": 1.0, "seeds": 1, "passed": True, "kl": 2.0, "P": 0.5}
    return row | {"C": value, "C_fwd": value, "C_fwd_lower": low, "C_fwd_upper": high} | more


def test_the_answer_ranks_only_what_intervals_tell_apart():
    a, b, c = _lost("a", 0.1, 0.3), _lost("b", 0.2, 0.5), _lost("c", 0.4, np.nan)
    assert "cannot be told apart" in summary([a, b], [1.0])
    said = summary([a, b, c], [1.0])
    assert "a (a) loses less" in said and "than c 0.4" not in said and "than c" in said
    assert "not told apart from it: b" in said
    exact = [{k: v for k, v in r.items() if not k.endswith(("lower", "upper"))} for r in (a, b)]
    assert "a (a) loses least" in summary(exact, [1.0]) and "b (b) most" in summary(exact, [1.0])
    assert "most" not in summary(exact[:1], [1.0])
    unreached = {"method": "a", "family": "a", "target": 1.0, "seeds": 0, "passed": True}
    assert "went further at once" in summary([unreached], [1.0])
    assert "train longer" in summary([unreached | {"passed": False}], [1.0])
    assert "all methods have lost" in summary([_lost("a", 0.1, np.inf) | {"C_fwd": np.inf}], [1.0])


def test_the_frontier_is_the_price():
    """A fair coin: P(mu) = log 2 - H(mu)."""
    price = price_along(frontier_of(np.log([[0.5, 0.5]]), np.array([[0.0, 1.0]])))
    for mu in (0.5, 0.6, 0.9):
        entropy = -mu * np.log(mu) - (1 - mu) * np.log(1 - mu)
        assert price(mu) == pytest.approx(np.log(2) - entropy, abs=1e-4)


def test_the_frontier_of_several_prompts_has_a_law_for_each():
    """No policy chooses its prompts: coins that pay 0 or 1, and 10 or 11, are priced as one coin is."""
    fair = np.log(np.full((2, 2), 0.5))
    one = price_along(frontier_of(fair[:1], np.array([[0.0, 1.0]])))
    both = price_along(frontier_of(fair, np.array([[0.0, 1.0], [10.0, 11.0]])))
    assert both(5.8) == pytest.approx(one(0.8), abs=1e-4)


def test_best_of_n_law_is_that_of_the_best_of_n_draws(tiny):
    """By summing over all triples of strings, ties broken at random."""
    log_base, reward = np.asarray(tiny.log_base), np.asarray(tiny.reward)
    p = np.exp(log_base)
    law = np.zeros_like(p)
    index = np.indices((27, 27, 27)).reshape(3, -1)
    best = reward[index] == reward[index].max(0)
    for k in range(3):
        np.add.at(law, index[k], p[index].prod(0) * best[k] / best.sum(0))
    np.testing.assert_allclose(np.exp(laws.best_of_n(log_base, reward, 3.0)), law, rtol=1e-10)
