"""Several processes, one run: what they agree on, and `kl-rl train` in two processes equals it in one."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from training_world import FILES, contents, knob_of, make_world

from kl_rl.cli import main
from kl_rl.sharding.processes import Group, agreed, is_first, join, named, share, summed, whole
from kl_rl.storage.checkpoint import Checkpoints

MESH = ("--mesh", "data=2,fsdp=2")
SIZE = (
    "--steps", 4, "--batch", 4, "--num-samples", 4, "--horizon", 6, "--held-out", 2, "--eval-every", 2,
    "--eval-samples", 4, "--lr", 0.01, "--save-every", 1, "--no-png", "--quiet",
)  # fmt: skip

PRIMITIVES = """
import sys
import numpy as np, jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 2)
from kl_rl.sharding.processes import agreed, is_first, join, named, share, summed, whole
from kl_rl.sharding import make_mesh, put
group = named(sys.argv[1])
join(group)
assert jax.process_count() == 2 and is_first() == (group.number == 0)
assert [share(5), share(1)] == [[slice(0, 2), slice(0, 0)], [slice(2, 5), slice(0, 1)]][group.number]
mine = np.zeros(5, np.float32)
mine[share(5)] = np.arange(5, dtype=np.float32)[share(5)]
if group.number:
    mine[4] = np.nan
assert np.array_equal(summed(mine), [0, 1, 2, 3, np.nan], equal_nan=True) and summed(mine).dtype == np.float32
assert agreed(None) is None
assert agreed("\\u00e9 failed here" if group.number else None) == "\\u00e9 failed here"
assert agreed(f"process {group.number}") == "process 0"
rows = put(np.arange(8.0).reshape(4, 2), jax.NamedSharding(make_mesh(data=4), jax.P("data")))
assert not rows.is_fully_addressable
same = jax.jit(jnp.sum, out_shardings=jax.NamedSharding(make_mesh(data=4), jax.P()))(rows)
got = whole({"rows": rows, "same": same, "host": np.ones(2)})
assert np.array_equal(got["rows"], np.arange(8.0).reshape(4, 2)) and got["same"] == 28.0
assert all(isinstance(x, np.ndarray) for x in got.values())
"""


SAVED = """
import sys
import numpy as np, jax
jax.config.update("jax_num_cpu_devices", 2)
from kl_rl.cli import main
from kl_rl.storage.checkpoint import Checkpoints, outline
from kl_rl.sharding.processes import join, named, whole
from kl_rl.sharding import make_mesh, place
join(named(sys.argv[1]))
mesh, values = make_mesh(2, 2), np.arange(32.0, dtype=np.float32).reshape(4, 8)
tree = place({"x": values, "key": jax.random.key(3), "n": np.int32(5)}, mesh)
store = Checkpoints(sys.argv[2])
like = outline(tree)
found = store.recover(like)  # of one process
assert found.number == 1 and not found.damaged, found
assert np.array_equal(whole(found.tree["x"]), values + 1) and not found.tree["x"].is_fully_addressable
store.save(2, tree)
store.save(3, tree)
store.close()
"""


# In a process of its own: failed reads of orbax leave coroutines behind that complain when they are collected.
FLIPPED = """
import pathlib, sys
import jax, jax.numpy as jnp
from kl_rl.storage.checkpoint import Checkpoints, DamagedCheckpoint
folder, noticed = pathlib.Path(sys.argv[1]), 0
like = {"x": jnp.zeros((4, 8)), "key": jax.random.key(0), "n": jnp.int32(0)}
for path in (folder / "3" / "default").rglob("*"):
    if path.is_file() and path.stat().st_size > 64:
        before = path.read_bytes()
        path.write_bytes(bytes([*before[:-9], before[-9] ^ 1, *before[-8:]]))
        store = Checkpoints(folder)
        try:
            store.restore(like, 3)
        except DamagedCheckpoint:
            noticed += 1
        store.close()
        path.write_bytes(before)
print(noticed)
"""


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def together(commands, **options):
    """Processes started side by side; none outlives the test."""
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        for command in commands
    ]
    return processes


def ended(processes):
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def test_one_process_needs_no_agreement():
    assert is_first() and share(5) == slice(0, 5) and agreed(None) is None and agreed("x") == "x"
    values = np.arange(3.0)
    assert summed(values) is values
    assert np.array_equal(whole({"a": values})["a"], values)


def test_a_group_is_named():
    assert named("host0:1234,4,3") == Group("host0:1234", 4, 3)
    for text in ("host0,4,3", "host0:1234", "host0:1234,4", "host0:1234,4,x"):
        with pytest.raises(ValueError, match="is not HOST:PORT,COUNT,NUMBER"):
            named(text)
    with pytest.raises(ValueError, match="2 processes are numbered 0 to 1"):
        named("host0:1234,2,2")
    with pytest.raises(ValueError, match="cannot join the other processes"):
        join(None)  # computations have begun


def test_two_processes_agree():
    address = free_address()
    codes, said = ended(together([[sys.executable, "-c", PRIMITIVES, f"{address},2,{i}"] for i in range(2)]))
    assert codes == [0, 0], said


def test_a_checkpoint_goes_from_one_process_to_two_and_back(tmp_path):
    """And a bit that changes in what two processes have written is noticed."""
    folder, values = tmp_path / "run", np.arange(32.0, dtype=np.float32).reshape(4, 8)
    mine = {"x": jnp.asarray(values), "key": jax.random.key(3), "n": jnp.int32(5)}
    store = Checkpoints(folder)
    store.save(1, mine | {"x": mine["x"] + 1})
    store.close()
    address = free_address()
    command = lambda i: [sys.executable, "-c", SAVED, f"{address},2,{i}", str(folder)]
    codes, said = ended(together([command(i) for i in range(2)]))
    assert codes == [0, 0], said
    store = Checkpoints(folder)
    np.testing.assert_array_equal(store.recover(mine).tree["x"], values)
    store.close()
    done = subprocess.run(
        [sys.executable, "-c", FLIPPED, str(folder)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) >= 2  # the data files, of both processes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = make_world(tmp_path_factory.mktemp("processes"))
    result = made.kl_rl(
        "pretrain", "--text", made.folder / "text.txt", "--out", made.base, "--steps", 20, "--width", 16,
        "--layers", 1, "--heads", 2, "--context", 40, "--batch", 16, "--lr", 0.02, "--quiet",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return made


def arguments(world, method, out, *more):
    data = ("--base", world.base, "--prompts", world.prompts, "--reward", world.reward)
    knob = (part for name, value in knob_of(method).items() for part in (f"--{name}", value))
    return ("train", method, *data, *knob, *SIZE, *MESH, "--out", out, *more)


def two(world, method, out, *more):
    address = free_address()
    commands = [
        world.command(*arguments(world, method, out, "--distributed", f"{address},2,{i}", *more))
        for i in range(2)
    ]
    return together(commands, env=world.environment)


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def in_tilts(row):
    """The fitted temperature as its inverse, which goes through 0 where nothing was learned."""
    beta = row.get("beta_fit")
    if beta is None:
        return row
    stderr = row["beta_fit_stderr"]
    return row | {"beta_fit": 1.0 / beta, "beta_fit_stderr": stderr and stderr / beta**2}


def assert_equal_runs(one, other):
    """To rounding: sums over devices have another order."""
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        pairs = list(zip(rows(one, name), rows(other, name), strict=True))
        assert pairs
        for a, b in (map(in_tilts, pair) for pair in pairs):
            assert a.keys() == b.keys()
            for key in a:
                number = isinstance(b[key], int | float)  # or words, or no limit from so few samples
                expected = pytest.approx(b[key], rel=1e-3, abs=1e-4) if number else b[key]
                assert a[key] == expected, (name, key)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (one, other)]
    for name, value in weights[0].items():
        np.testing.assert_allclose(value, weights[1][name], atol=3e-4, err_msg=name)


@pytest.mark.slow
def test_a_run_in_two_processes_equals_it_in_one(world, tmp_path):
    result = world.kl_rl(*arguments(world, "rlhf", tmp_path / "one"))
    assert result.returncode == 0, result.stderr
    codes, said = ended(two(world, "rlhf", tmp_path / "two", "--json"))
    assert codes == [0, 0], said
    told = [out.splitlines()[-1] for out, _ in said]  # gloo writes to standard output too
    assert json.loads(told[0])["steps"] == 4 and "steps" not in told[1]
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dt-tilted", "tb-replay", "dpo"])
def test_other_families_in_two_processes(method, world, tmp_path):
    more = ("--lora", 2) if method == "dpo" else ()
    assert world.kl_rl(*arguments(world, method, tmp_path / "one", *more)).returncode == 0
    codes, said = ended(two(world, method, tmp_path / "two", *more))
    assert codes == [0, 0], said
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_resume_is_bit_equal(world, tmp_path):
    assert ended(two(world, "rlhf", tmp_path / "whole"))[0] == [0, 0]
    processes, metrics = two(world, "rlhf", tmp_path / "cut"), tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = ended(processes)
    assert codes == [143, 143] and "SIGTERM: saved after step" in said[0][1]
    shutil.copytree(tmp_path / "cut", tmp_path / "alone")
    result = world.kl_rl(*arguments(world, "rlhf", tmp_path / "alone", "--resume"))
    assert result.returncode == 0, result.stderr
    assert_equal_runs(tmp_path / "alone", tmp_path / "whole")
    codes, said = ended(two(world, "rlhf", tmp_path / "cut", "--resume"))
    assert codes == [0, 0], said
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole") and len(FILES) == 4


@pytest.mark.slow
def test_a_problem_of_one_process_is_a_problem_of_both(world, tmp_path):
    """The reward fails on the rows of the second process alone; the folder is in use for the first alone."""
    (tmp_path / "bad.py").write_text(
        "import jax\ndef score(prompt, completion):\n    return float('nan') if jax.process_index() else 1.0\n"
    )
    out = tmp_path / "run"
    codes, said = ended(two(world, "rlhf", out, "--reward", f"{tmp_path / 'bad.py'}:score"))
    assert codes == [2, 2] and "not a finite number, for prompt" in said[0][1], said
    codes, said = ended(two(world, "rlhf", out))
    assert codes == [2, 2] and all("already holds a run" in err for _, err in said), said
    address = free_address()
    commands = [
        world.command(*arguments(world, "rlhf", out, "--distributed", f"{address},2,{i}", "--seed", i))
        for i in range(2)
    ]
    codes, said = ended(together(commands, env=world.environment))
    assert codes == [2, 2] and all("were not asked the same" in err for _, err in said), said


def test_a_mesh_that_processes_cannot_share_is_refused(capsys):
    files = ("--base", "b", "--prompts", "p", "--reward", "m:f", "--out", "o", "--batch", "4")
    for mesh in ("data=2", "data=3"):
        assert main(["train", "rlhf", *files, "--mesh", mesh, "--distributed", "host0:1234,4,0"]) == 2
        assert f"--mesh {mesh}: 4 processes cannot have equal parts" in capsys.readouterr().err
    assert main(["train", "rlhf", *files, "--distributed", "host0:1234,4,0"]) == 2
    assert "--distributed needs --mesh" in capsys.readouterr().err
