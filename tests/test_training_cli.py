"""The commands as processes: killed and resumed bit-equal, one writer per folder, bad input in one line."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from training_world import contents, knob_of, make_world

from kl_rl.cli.progress import live_progress

SIZE = (
    "--steps", 8, "--batch", 2, "--num-samples", 4, "--horizon", 8,
    "--held-out", 2, "--eval-every", 4, "--eval-samples", 4, "--lr", 0.01, "--quiet",
)  # fmt: skip
METHODS = ("best-of-n", "dt-tilted", "tb-replay")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = make_world(tmp_path_factory.mktemp("commands"))
    result = made.kl_rl(
        "pretrain", "--text", made.folder / "text.txt", "--out", made.base, "--steps", 40, "--width", 16,
        "--layers", 1, "--heads", 2, "--context", 40, "--batch", 16, "--lr", 0.02, "--json", "--quiet",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["steps"] == 40 and facts["held_out_loss"] < 3.0
    return made


def train_command(world, out, method="rlhf", *more):
    return (
        "train", method, "--base", world.base, "--prompts", world.prompts, "--reward", world.reward,
        *(part for name, value in knob_of(method).items() for part in (f"--{name}", value)),
        "--out", out, *SIZE, "--save-every", 1, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(world):
    """One uninterrupted run of each method, made when it is asked for."""
    made = {}

    def run(method):
        if method not in made:
            out = world.folder / f"whole-{method}"
            result = world.kl_rl(*train_command(world, out, method))
            assert result.returncode == 0, result.stderr
            made[method] = out
        return made[method]

    return run


def begun(world, out, method="rlhf", rows=1):
    """A process in the middle of its run: that many rows are written."""
    process = subprocess.Popen(
        world.command(*train_command(world, out, method, "--resume")),
        env=world.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    before = lines_in(out)
    deadline = time.monotonic() + 300
    while lines_in(out) < before + rows and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    return process


def lines_in(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed_while_saving(world, out, method):
    """SIGKILL while the folder holds an unfinished checkpoint."""
    process = begun(world, out, method)
    while process.poll() is None:
        if list((out / "checkpoints").glob("*.orbax-checkpoint-tmp*")):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    return process.returncode


def interrupted_and_resumed(world, out, method):
    process = begun(world, out, method, rows=random.randint(1, 4))  # bit-equal wherever it stops
    process.send_signal(signal.SIGTERM)
    message = process.communicate()[1]
    assert process.returncode == 143 and "SIGTERM: saved after step" in message and "--resume" in message
    assert killed_while_saving(world, out, method) == -signal.SIGKILL
    result = world.kl_rl(*train_command(world, out, method, "--resume"))
    assert result.returncode == 0, result.stderr


def test_sigterm_and_sigkill_while_saving_then_resume_bit_equal(world, finished, tmp_path):
    interrupted_and_resumed(world, tmp_path / "run", "rlhf")
    assert contents(tmp_path / "run") == contents(finished("rlhf"))
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_family_survives(method, world, finished, tmp_path):
    interrupted_and_resumed(world, tmp_path / "run", method)
    assert contents(tmp_path / "run") == contents(finished(method))


@pytest.mark.slow
def test_sigkill_at_any_moment(world, finished, tmp_path):
    """Killed at eight moments of its start and its run, each time resumed."""
    out = tmp_path / "run"
    for delay in (0.3, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0):
        process = subprocess.Popen(
            world.command(*train_command(world, out, "rlhf", "--resume")),
            env=world.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = world.kl_rl(*train_command(world, out, "rlhf", "--resume"))
    assert result.returncode == 0, result.stderr
    assert contents(out) == contents(finished("rlhf"))


def test_a_second_process_and_changed_settings_are_refused(world, finished, tmp_path, capsys):
    from kl_rl.cli import main
    from kl_rl.storage.folder import opened

    out = tmp_path / "run"
    command = [str(x) for x in train_command(world, out, "rlhf")]
    with opened(out, {"a": 1}, resume=False):
        assert main(command) == 2
        assert "another process is writing to this folder" in capsys.readouterr().err
    done = [str(x) for x in train_command(world, finished("rlhf"), "rlhf")]
    assert main(done) == 2
    assert "already holds a run; add --resume" in capsys.readouterr().err
    assert main([*done, "--resume", "--horizon", "9"]) == 2
    assert "started with horizon = 8, now asked for 9" in capsys.readouterr().err


REWARDS = """
def raises(prompt, completion):
    raise KeyError("nothing")

def nan(prompt, completion):
    return float("nan")

def exits(prompt, completion):
    raise SystemExit(3)

def text(prompt, completion):
    return "good"

def constant(prompt, completion):
    return 1.0
"""

DATA = {"--prompts": None, "--data": "logged.jsonl"}
BAD = {
    "unknown method": ({"method": "rlfh"}, "unknown method 'rlfh'; did you mean rlhf? (known: rloo"),
    "missing base": ({"--base": "nowhere"}, "nowhere: no such folder"),
    "base without tokenizer": ({"--base": "no_tokenizer"}, "tokenizer.json: missing"),
    "tokenizer of another model": ({"--base": "wrong_tokenizer"}, "the tokenizer has ids up to"),
    "truncated weights": ({"--base": "truncated"}, "model.safetensors"),
    "missing prompts": ({"--prompts": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read"),
    "malformed prompts": ({"--prompts": "bad.jsonl"}, "bad.jsonl: line 2: column"),
    "prompt of a wrong type": ({"--prompts": "number.jsonl"}, 'number.jsonl: line 2: field "prompt"'),
    "prompt of foreign ids": (
        {"--prompts": "ids.jsonl"},
        "ids.jsonl: line 2: the prompt has token id 999, but the vocabulary has",
    ),
    "prompt too long": ({"--prompts": "long.jsonl"}, "long.jsonl: line 2: the prompt has 61 tokens"),
    "text without a prompt": (
        {"--prompts": "short.txt", "--prompt-length": "20"},
        "short.txt: has 9 tokens, less than one prompt of --prompt-length 20",
    ),
    "unknown kind of prompts": ({"--prompts": "words.json"}, "not a known kind of data"),
    "module that is not there": ({"--reward": "no_module:f"}, "cannot import no_module"),
    "function that is not there": ({"--reward": "rewards.py:f"}, "rewards.py has no 'f'"),
    "no reward": ({"--reward": "nothing"}, "a reward is module:function"),
    "constant reward": (
        {"method": "dt-tilted", "--reward": "rewards.py:constant"},
        "completions score 1: there is no return to condition on",
    ),
    "function without a name": ({"--reward": "rewards.py"}, "name the function too: rewards.py:function"),
    "empty reward": ({"--reward": ""}, "--reward is empty; a reward is module:function"),
    "learning rate": ({"--lr": "0"}, "--lr must be positive and finite; got 0.0"),
    "seed": ({"--seed": "99999999999999999999"}, "--seed must be at least 0 and less than 2**32"),
    "malformed words": ({"--reward": "bad.json"}, "bad.json: line 1"),
    "no room": ({"--horizon": "40"}, "--horizon 40 leaves no room for a prompt in a context of 40"),
    "mesh": ({"--mesh": "data=2,depth=2"}, "'depth=2' is not data=N"),
    "mesh and batch": ({"--mesh": "data=3"}, "--batch 2 cannot be split over data x fsdp = 3"),
    "mesh and model": ({"--mesh": "tensor=4"}, "--mesh: "),
    "parts": ({"--gradient-accumulation": "3"}, "--gradient-accumulation must divide --batch = 2; got 3"),
    "parts and mesh": (
        {"--gradient-accumulation": "2", "--mesh": "data=2"},
        "--batch 2 in 2 parts cannot be split over data x fsdp = 2 devices: use a multiple of 4",
    ),
    "pooled parts": (
        {"method": "rwr", "--gradient-accumulation": "2"},
        "rwr normalizes its weights over the whole batch: it cannot have --gradient-accumulation",
    ),
    "prompts and data": ({"--data": "pairs.jsonl"}, "give --prompts, to draw completions, or --data"),
    "neither": ({"--prompts": None}, "give --prompts, to draw completions, or --data"),
    "data of others": (
        DATA | {"method": "rloo"},
        "rloo learns from samples of its own policy and cannot use --data",
    ),
    "prompt length of data": (
        DATA | {"method": "dpo", "--prompt-length": "3"},
        "about --prompts, not about --data",
    ),
    "missing data": ({"--prompts": None, "--data": "no.jsonl", "method": "dpo"}, "no.jsonl: cannot be read"),
    "not pairs": (DATA | {"method": "dpo"}, 'logged.jsonl: line 1: unknown field "completion"'),
    "unrecorded": (DATA | {"method": "rwr"}, 'logged.jsonl: line 1: missing field "log_behaviour"'),
    "single completion": (
        {"--prompts": None, "--data": "single.jsonl", "method": "vargrad-replay"},
        "vargrad-replay compares completions of one prompt: single.jsonl has one of each",
    ),
    "too few draws": (
        DATA | {"method": "best-of-n", "--n": "3"},
        "--n must be at most the 2 completions that logged.jsonl has of a prompt; got 3",
    ),
    "long completion": (
        DATA | {"method": "filter", "--threshold": "0", "--horizon": "2"},
        "logged.jsonl: line 1: a completion has 4 tokens; the limit is 2",
    ),
    "beta": ({"--beta": "0"}, "--beta must be positive"),
    "n": ({"method": "best-of-n", "--n": "5"}, "--n must be at most --num-samples = 4"),
    "temperature": (
        {"method": "grpo", "--temperature": "0.7"},
        "grpo takes its samples as they are drawn: another --temperature than 1 would move what it learns",
    ),
    "knob of another": ({"--n": "3"}, "--n is not for rloo, which is set by --beta"),
    "no option": ({"--set": "klip=1"}, "'klip=1' is no option; options of rloo: kl_weight=1.0"),
    "option of another type": (
        {"method": "ppo", "--set": "epochs=1.5"},
        "epochs is a whole number; got '1.5'; options of ppo: clip=0.2, decay=0.95, value_weight=0.5, epochs=2",
    ),
    "values": ({"--twist": "head"}, "--twist head: rloo has no values, which it would be for"),
    "threshold": ({"method": "filter"}, "needs --threshold"),
    "steps": ({"--steps": "-1"}, "--steps must be at least 1"),
    "reward raises": ({"--reward": "rewards.py:raises"}, "raised KeyError: 'nothing' for prompt '"),
    "reward exits": ({"--reward": "rewards.py:exits"}, "RuntimeError: it called sys.exit(3) for prompt '"),
    "reward is nan": ({"--reward": "rewards.py:nan"}, "returned nan, not a finite number, for prompt '"),
    "reward is text": ({"--reward": "rewards.py:text"}, "returned 'good' (str), not a number"),
}


@pytest.fixture(scope="module")
def bad_input(world):
    """A folder of things that cannot be used."""
    folder = world.folder / "bad"
    folder.mkdir()
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (folder / "number.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    (folder / "long.jsonl").write_text(
        json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "x" * 60}) + "\n"
    )
    (folder / "ids.jsonl").write_text('{"prompt_tokens": [72, 73]}\n{"prompt_tokens": [72, 999]}\n')
    rows = [
        {"prompt": f"{p} ", "completion": c, "reward": r} for p in "abcd" for c, r in (("sun", 1), ("sky", 0))
    ]
    (folder / "logged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "single.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::2]))
    (folder / "short.txt").write_text("too short")
    (folder / "bad.json").write_text("{")
    shutil.copy(world.reward, folder / "words.json")
    for name in ("no_tokenizer", "wrong_tokenizer", "truncated"):
        shutil.copytree(world.base / "model", folder / name)
    (folder / "no_tokenizer" / "tokenizer.json").unlink()
    (folder / "no_tokenizer" / "tokenizer_config.json").unlink()
    widen(folder / "wrong_tokenizer")
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def widen(model):
    """Give a model's tokenizer more ids than the model has rows."""
    (model / "tokenizer_config.json").unlink()
    spec = json.loads((model / "tokenizer.json").read_text())
    spec["model"]["vocab"]["extra"] = 500
    (model / "tokenizer.json").write_text(json.dumps(spec))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name, world, bad_input, tmp_path, capsys, monkeypatch):
    """Exit status 2, one line that names what is wrong, no traceback."""
    from kl_rl.cli import main

    monkeypatch.chdir(bad_input)
    changes, message = BAD[name]
    command = [str(x) for x in train_command(world, tmp_path / "run", changes.get("method", "rlhf"))]
    for option, value in changes.items():
        if value is None:
            del command[command.index(option) : command.index(option) + 2]
        elif option != "method":
            command += [option, value]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("kl-rl train: ") and said.count("\n") == 1
    begun_anyway = (tmp_path / "run" / "checkpoints").exists()  # a reward fails on the first samples only
    assert begun_anyway == name.startswith("reward ") == (tmp_path / "run" / "run.json").exists()
    if not begun_anyway and (tmp_path / "run").exists():
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_short_text_and_overfull_context_are_said(world, tmp_path, capsys):
    from kl_rl.cli import main

    (tmp_path / "short.txt").write_text("too short")
    assert main(["pretrain", "--text", str(tmp_path / "short.txt"), "--out", str(tmp_path / "x")]) == 2
    assert "has 9 bytes" in capsys.readouterr().err
    assert main(["sample", "--model", str(world.base), "--prompt", "x" * 38, "--max-tokens", "3"]) == 2
    assert "there is room for 1 more, not 3" in capsys.readouterr().err
    assert main(["sample", "--model", str(world.base), "--prompt", "x", "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_sample_prints_what_was_asked_for(world, capsys):
    from kl_rl.cli import main

    ask = [
        "sample",
        "--model",
        str(world.base),
        "--prompt",
        "the ",
        "--num",
        "3",
        "--max-tokens",
        "6",
        "--json",
    ]
    assert main(ask) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(row["sample"] for row in rows) == [0, 1, 2]
    assert all(row["tokens"] <= 6 and row["log_prob"] < 0 for row in rows)
    assert main([*ask, "--temperature", "0"]) == 0
    greedy = {json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()}
    assert len(greedy) == 1


@pytest.mark.parametrize(("asked", "status", "message"), [
    (("--top-k", "-1"), 2, "top_k must be at least 1; got -1"),
    (("--top-p", "0"), 2, "top_p must lie in (0, 1]; got 0.0"),
    (("--temperature", "-1"), 2, "temperature must be at least 0 and finite; got -1.0"),
    (("--temperature", "inf"), 2, "temperature must be at least 0 and finite; got inf"),
    (("--seed", "4294967296"), 2, "--seed must be at least 0 and less than 2**32"),
    (("--num", "0"), 2, "--num must be at least 1; got 0"),
    (("--top-k", "0"), 0, ""),
])  # fmt: skip
def test_samples_are_asked_for_within_range(asked, status, message, world, capsys):
    from kl_rl.cli import main

    command = ["sample", "--model", str(world.base), "--prompt", "a", "--max-tokens", "2", *asked]
    assert main(command) == status
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == bool(status)


def test_a_run_that_has_not_ended_has_no_model(tmp_path, capsys):
    from kl_rl.cli import main

    (tmp_path / "run.json").write_text("{}")
    assert main(["sample", "--model", str(tmp_path), "--prompt", "a"]) == 2
    assert (
        "this run has not ended, its model is not written yet: go on with it, --resume"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("as_json", [True, False])
def test_what_a_reward_prints_is_no_result(as_json, world, tmp_path, capsys, monkeypatch):
    """Standard output holds the measurement alone, with its warnings."""
    import kl_rl.runs.train  # noqa: F401
    from kl_rl.cli import main

    names = ("kl", "P", "S", "C")
    row = {f"{name}{end}": 0.25 for name in names for end in ("", "_lower", "_upper")}
    row |= {"steps": 8, "reward": 1.0, "base_reward": 0.5, "held_out": False, "warnings": ["it means little"]}

    def train(*args, **options):
        print("noise of the reward")
        return row

    monkeypatch.setattr(sys.modules["kl_rl.runs.train"], "train", train)
    command = [str(x) for x in train_command(world, tmp_path / "run", "rlhf", "--no-png")]
    assert main([*command, "--json"] if as_json else command) == 0
    printed = capsys.readouterr()
    assert "noise of the reward" in printed.err and "noise" not in printed.out
    if as_json:
        assert json.loads(printed.out) == row
    else:
        assert "on prompts that were trained on (none is held out): mean reward 0.500 -> 1.000" in printed.out
        assert "P + S + C = 0.7500" in printed.out and "warning: it means little" in printed.out


def test_time_left_does_not_count_what_came_before(monkeypatch, capsys):
    """Sixty seconds of compiling, or a resumed run: the rate is that of steps seen."""
    clock = iter([0.0, 60.0, 61.0, 62.0])
    monkeypatch.setattr("kl_rl.cli.progress.time.monotonic", lambda: next(clock))
    with live_progress() as progress:
        for step in (5, 6, 7):
            progress(step / 10, f"step {step}: done")
    first, second, third = capsys.readouterr().err.splitlines()
    assert "left" not in first and "about 4 s left" in second and "about 3 s left" in third


def test_help_needs_no_jax(world):
    code = "import sys; from kl_rl.cli import build_parser; build_parser(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([*world.command()[:1], "-c", code], check=False).returncode == 0
