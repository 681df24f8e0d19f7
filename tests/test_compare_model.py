"""`kl-rl compare --base`: killed and resumed, within its time, and what it says of bad input."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from training_world import make_world, programs_kept

from kl_rl.cli import main
from kl_rl.experiments.compare.model.lanes import Clock

SIZE = (
    "--steps", 4, "--batch", 2, "--num-samples", 4, "--horizon", 6, "--held-out", 2, "--eval-samples", 8,
)  # fmt: skip
CARD = "from kl_rl.methods import method_named\nMINE = method_named('vargrad-replay')._replace(name='mine')\n"
METHODS = ("rloo", "rloo-free", "filter")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = make_world(tmp_path_factory.mktemp("compare"))
    result = made.kl_rl(
        "pretrain", "--text", made.folder / "text.txt", "--out", made.base, "--steps", 40, "--width", 16,
        "--layers", 1, "--heads", 2, "--context", 40, "--batch", 16, "--lr", 0.02, "--quiet",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (made.folder / "mine.py").write_text(CARD)
    with programs_kept(made.cache):
        yield made


def command(world, out, *more, methods=METHODS):
    given = ("--base", world.base, "--prompts", world.prompts, "--reward", world.reward, *SIZE)
    return [str(part) for part in ("compare", *given, "--methods", *methods, "--out", out, *more)]


def rows(folder):
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def timeless(row):
    return {k: v for k, v in row.items() if k not in ("seconds", "commit", "versions")}


@pytest.fixture(scope="module")
def whole(world):
    """An uninterrupted comparison; and what it printed."""
    out = world.folder / "whole"
    done = world.kl_rl(*command(world, out, "--json"))
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_one_report_with_intervals_for_every_lane(whole, world):
    out, summary = whole
    trained = [row for row in rows(out) if row["family"] != "reference"]
    assert {row["method"] for row in trained} == set(METHODS)
    for row in trained:
        assert row["C_lower"] <= row["C"] and row["samples"] == 16
        assert row["kl_base"] > -4.0 * row["kl_base_stderr"]
    assert len({row["knob_value"] for row in trained if row["method"] == "rloo"}) == 2  # one for each aim
    control = next(row for row in rows(out) if row["method"] == "control")
    assert control["known_C"] > 0.1 and control["C_lower"] <= control["known_C"]
    page = (out / "report.html").read_text()
    assert "95 % intervals" in page and "Sample completions" in page and "http" not in page
    assert summary["answer"] and not summary["missing"]
    lanes = {row["lane"] for row in trained}
    assert {path.name for path in (out / "lanes").iterdir()} == lanes
    assert not list(out.glob("lanes/*/checkpoints"))


def test_matched_numbers_are_those_of_the_rows(whole):
    """The posterior at its own target, priced prompt by prompt; and every lane with its limits and its law."""
    out, summary = whole
    own = {row["reward"]: row["kl"] for row in rows(out) if row["method"] == "p*"}
    found = [row for row in summary["matched_reward"] if row["method"] == "p*"]
    assert len(own) == len(found) == len(summary["targets"])
    for row in found:
        nearest = min(own, key=lambda reward: abs(reward - row["target"]))
        assert row["kl"] == pytest.approx(own[nearest], rel=2e-2)
    reached = [row for row in summary["matched_reward"] if row["seeds"] and row["family"] != "reference"]
    assert all(row["C_fwd_lower"] <= row["C_fwd"] for row in reached)
    lawful = [row for row in rows(out) if row["method"] == "rloo"]
    for row in lawful:
        assert row["kl_q_law"] == pytest.approx(row["kl_q_pstar"], abs=5.0 * row["kl_q_law_stderr"] + 1e-6)


FAILING = """
from pathlib import Path

def score(prompt, completion):
    if Path(__file__).with_name("broken").exists():
        return "nonsense"
    return float(completion.count("a"))
"""


def test_a_reward_that_fails_can_be_mended(world, tmp_path, capsys):
    """Before anything is measured, and in a later lane: one line with the reason, and --resume goes on."""
    (tmp_path / "reward.py").write_text(FAILING)
    broken = tmp_path / "broken"
    reward = ["--reward", str(tmp_path / "reward.py:score")]
    asked = lambda *more: main(command(world, tmp_path / "run", *reward, *more, methods=("rloo", "filter")))
    broken.touch()
    assert asked() == 2
    said = capsys.readouterr().err
    assert "failed on every completion" in said and "'nonsense'" in said and "--resume" in said
    broken.unlink()
    assert asked("--resume") == 0
    finished = rows(tmp_path / "run")
    (tmp_path / "run" / "results.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in finished if row["method"] != "filter")
    )
    for lane in (tmp_path / "run" / "lanes").glob("filter-*"):
        shutil.rmtree(lane)
    for kept in (tmp_path / "run" / "base").glob("*/*.npz"):
        kept.write_bytes(b"damaged")
    assert asked("--resume") == 0
    by_lane = lambda found: sorted(map(timeless, found), key=lambda row: row["lane"])
    assert by_lane(rows(tmp_path / "run")) == by_lane(finished)


def test_killed_and_resumed_it_is_the_same_and_repeats_nothing(whole, world):
    out = world.folder / "killed"
    process = subprocess.Popen(
        world.command(*command(world, out)),
        env=world.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(row["family"] != "reference" for row in rows(out)):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = (out / "results.jsonl").read_bytes()
    finished = {row["lane"] for row in rows(out) if row["family"] != "reference"}
    touched = {lane: (out / "lanes" / lane / "metrics.jsonl").stat().st_mtime_ns for lane in finished}
    assert (
        finished < {row["lane"] for row in rows(whole[0])} - {"base-0"} and not (out / "report.html").exists()
    )
    again = world.kl_rl(*command(world, out, "--resume"))
    assert again.returncode == 0, again.stderr
    assert (out / "results.jsonl").read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    for lane, when in touched.items():
        assert (out / "lanes" / lane / "metrics.jsonl").stat().st_mtime_ns == when
    assert list(map(timeless, rows(out))) == list(map(timeless, rows(whole[0])))


def test_a_finished_comparison_is_only_told_again(whole, world, capsys):
    out, _ = whole
    before = (out / "results.jsonl").read_bytes()
    assert main(command(world, out, "--resume")) == 0
    assert (out / "results.jsonl").read_bytes() == before and "report.html" in capsys.readouterr().out
    assert main(command(world, out)) == 2 and "--resume" in capsys.readouterr().err
    assert main(command(world, out, "--resume", "--seeds", "2")) == 2 and "seeds" in capsys.readouterr().err


def test_what_does_not_fit_into_the_time_is_said(world, tmp_path, capsys, monkeypatch):
    """With hardly any time nothing is measured, with a little the reference laws are, and --resume does the rest."""
    mine = f"{world.folder / 'mine.py'}:MINE"  # a card of one's own
    asked = lambda *more: main(command(world, tmp_path / "run", *more, methods=("filter", mine)))
    assert asked("--minutes", "1e-6") == 2
    assert "--minutes 1e-06: the time is over" in capsys.readouterr().err and not rows(tmp_path / "run")
    monkeypatch.setattr(Clock, "fits", lambda *_: False)
    assert asked("--minutes", "5", "--resume") == 0
    said = capsys.readouterr().err
    assert "lanes are not there yet: filter-" in said and "mine-" in said and "--resume" in said
    assert {row["family"] for row in rows(tmp_path / "run")} == {"reference"}
    monkeypatch.undo()
    assert asked("--resume") == 0
    assert {row["method"] for row in rows(tmp_path / "run")} >= {"filter", "mine"}


def test_a_lane_is_stopped_when_the_time_is_over(world, tmp_path, capsys, monkeypatch):
    """In the middle of its steps, with a checkpoint; what is finished is reported."""
    begun = lambda: any((tmp_path / "run").glob("lanes/*/metrics.jsonl"))
    monkeypatch.setattr(Clock, "elapsed", property(lambda clock: 1e6 * begun()))
    assert main(command(world, tmp_path / "run", "--minutes", "5", methods=("rloo",))) == 0
    said = capsys.readouterr().err
    assert "the time is over" in said and "rloo-" in said
    assert list((tmp_path / "run").glob("lanes/rloo-*/checkpoints"))


OTHERS = """
TWICE, PATH, CONTROL = (MINE._replace(name=name) for name in ("rloo", "../../up", "control"))
"""
BAD = {
    "no such base": ({"--base": "nowhere"}, "nowhere: no such folder"),
    "no prompts": ({"--prompts": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read"),
    "no reward": ({"--reward": "nothing"}, "a reward is module:function"),
    "missing prompts": ({"--prompts": None}, "--base needs --prompts"),
    "unknown method": ({"--methods": "rlfh"}, "unknown method 'rlfh'; did you mean rlhf?"),
    "twice": ({"--methods": "rloo mine.py:TWICE"}, "two methods are called rloo"),
    "a path": ({"--methods": "mine.py:PATH"}, "a name has letters, digits"),
    "reserved": ({"--methods": "mine.py:CONTROL"}, "reports call something else so"),
    "no time": ({"--minutes": "0"}, "--minutes must be positive"),
    "odd": (
        {"--methods": "dpo", "--num-samples": "3"},
        "dpo compares pairs: --num-samples must be even; got 3",
    ),
    "two bases": ({"--text": "book.txt"}, "not allowed with argument"),
    "the world's": ({"--full": ""}, "--full goes with an enumerable world, not with --base"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name, world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CARD + OTHERS)
    changes, message = BAD[name]
    asked = command(world, tmp_path / "run")
    for option, value in changes.items():
        if option == "--methods":
            place = asked.index(option)
            asked[place + 1 : place + 1 + len(METHODS)] = value.split()
        elif value is None:
            del asked[asked.index(option) : asked.index(option) + 2]
        else:
            asked += [option, value] if value else [option]
    try:
        code = main(asked)
    except SystemExit as error:  # of the parser
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and message in said and "Traceback" not in said
    assert not list((tmp_path / "run").glob("results.jsonl"))
