"""Checkpoints: whole or not at all, whatever the machine does in the meantime; damage is noticed."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_rl.sharding import make_mesh, place
from kl_rl.storage.checkpoint import Checkpoints, DamagedCheckpoint, SaveError, outline
from kl_rl.storage.checksum import checksums


def test_a_missing_checkpoint_is_said(tmp_path):
    store = Checkpoints(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        store.restore({"x": jnp.zeros(3)})
    store.close()


SAVER = """
import sys, jax.numpy as jnp
from kl_rl.storage.checkpoint import Checkpoints
store = Checkpoints(sys.argv[1])
for number in range(10**6):
    store.save(number, {"x": jnp.full(200_000, number)})
    print(number, flush=True)
"""


@pytest.mark.parametrize("extra", [0.0, 0.013, 0.031])
def test_kill_during_saving_loses_at_most_the_save_in_flight(extra, tmp_path):
    import time

    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SAVER), str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    for line in process.stdout:
        finished = int(line)
        if finished == 3:
            break
    time.sleep(extra)
    process.send_signal(signal.SIGKILL)
    finished = max([finished, *(int(line) for line in process.stdout if line.strip())])
    process.wait()
    process.stdout.close()
    store = Checkpoints(tmp_path / "run")
    assert store.latest >= finished
    restored = store.restore({"x": jnp.zeros(200_000, jnp.int32)})
    store.close()
    assert np.unique(restored["x"]).tolist() == [store.latest]


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    store, tree = Checkpoints(tmp_path / "run"), {"x": jnp.arange(1000)}
    store.save(1, tree, {"fact": 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10, 10))
    with pytest.raises(
        SaveError, match="checkpoint 2 could not be written: the disk is full; checkpoint 1 is intact"
    ):
        store.save(2, tree)
    store.close()


REFUSED = """
import resource, sys, jax.numpy as jnp
from kl_rl.storage.checkpoint import Checkpoints, SaveError
store = Checkpoints(sys.argv[1])
tree = {str(i): jnp.sin(jnp.arange(10_000.0) * (i + 1)) for i in range(20)}
store.save(1, tree, {"fact": 1})
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))
try:
    store.save(2, tree)
except SaveError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
assert store.latest == 1
store.save(3, tree, {"fact": 3})
found = store.recover(tree)
assert (found.number, found.about, found.damaged) == (3, {"fact": 3}, []), found
store.close()
"""


def test_a_write_that_the_kernel_refuses_is_one_line(tmp_path):
    """No file may grow beyond 4 kB, as on a disk that fills up while a checkpoint is being written."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = "checkpoint 2 could not be written: the disk is full; checkpoint 1 is intact\n"
    assert done.stdout == f"{tmp_path / 'run'}: {said}"


def test_no_damage_to_a_checkpoint_goes_unnoticed(tmp_path):
    """Each file of the newest checkpoint cut short: what is restored is the newest bit for bit, or the one before."""
    store = Checkpoints(tmp_path / "run")
    tree = {"x": jax.random.normal(jax.random.key(0), (300, 10)), "key": jax.random.key(7)}
    for number in (1, 2):
        store.save(number, tree | {"x": tree["x"] + number}, {"number": number})
    store.close()
    files = [p.relative_to(tmp_path / "run") for p in (tmp_path / "run" / "2").rglob("*") if p.is_file()]
    fell_back = 0
    for index, name in enumerate(files):
        copy = tmp_path / f"copy{index}"
        shutil.copytree(tmp_path / "run", copy)
        (copy / name).write_bytes((copy / name).read_bytes()[: (copy / name).stat().st_size // 2])
        store = Checkpoints(copy)
        found = store.recover(tree)
        store.close()
        np.testing.assert_array_equal(found.tree["x"], tree["x"] + found.number)
        assert found.about == {"number": found.number}
        fell_back += found.number == 1
    assert fell_back >= 3


def test_all_checkpoints_damaged_is_said(tmp_path):
    store, tree = Checkpoints(tmp_path / "run"), {"x": jnp.arange(100)}
    store.save(1, tree)
    store.close()
    (tmp_path / "run" / "1" / "facts" / "metadata").write_text("{")
    store = Checkpoints(tmp_path / "run")
    with pytest.raises(DamagedCheckpoint, match="no other checkpoint is whole"):
        store.recover(tree)
    store.close()


DAMAGED = """
import gc, sys, time, warnings
from pathlib import Path
import jax.numpy as jnp
from kl_rl.storage.checkpoint import Checkpoints
warnings.simplefilter("error")
tree = {str(i): jnp.sin(jnp.arange(10_000.0) * (i + 1)) for i in range(20)}
store = Checkpoints(sys.argv[1])
for number in (1, 2):
    store.save(number, tree)
store.close()
for pause in (0, 0.01, 0.03):
    store = Checkpoints(sys.argv[1])
    newest = Path(sys.argv[1]) / str(store.latest)
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    assert store.recover(tree).number == store.latest < int(newest.name)
    store.save(int(newest.name), tree)
    store.close()
    time.sleep(pause)
    gc.collect()
"""


def test_a_read_that_fails_is_reported_by_its_exception_alone(tmp_path):
    """Not a line on stderr from the reads that were in flight, while they end or when they are collected."""
    done = subprocess.run(
        [sys.executable, "-c", DAMAGED, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "uint32", "float64"])
def test_checksums_know_every_bit_and_no_layout(dtype):
    values = np.random.default_rng(0).integers(0, 2, (8, 4, 6)).astype(jnp.dtype(dtype))
    plain = checksums([jnp.asarray(values), jnp.asarray(values[0, 0, 0]), jnp.zeros((0, 3))])
    for shape, spec in (
        ((8,), ("data",)),
        ((2, 2), ("fsdp", None, "data")),
        ((2, 4), (None, ("data", "fsdp"))),
    ):
        mesh = make_mesh(*shape)
        try:
            placed = jax.device_put(values, jax.NamedSharding(mesh, jax.P(*spec)))
        except ValueError:  # 8 parts of 4
            placed = jax.device_put(values, jax.NamedSharding(mesh, jax.P(None, "fsdp")))
        assert checksums([placed]) == plain[:1]
    bits = values.view(np.uint8)
    for position in np.random.default_rng(1).integers(0, bits.size, 40):
        other = bits.copy().reshape(-1)
        other[position] ^= 1
        changed = other.reshape(bits.shape).view(values.dtype)
        assert checksums([jnp.asarray(changed)]) != plain[:1]
    assert checksums([jnp.asarray(values.transpose(0, 2, 1))]) != plain[:1]
    assert checksums([jnp.asarray(values[::-1])]) != plain[:1] and checksums([]) == []


def test_an_outline_is_restored_onto_its_places(tmp_path):
    mesh, store = make_mesh(2, 2), Checkpoints(tmp_path / "run")
    tree = place({"x": jnp.arange(16.0).reshape(4, 4), "key": jax.random.key(3), "n": jnp.int32(5)}, mesh)
    store.save(1, tree)
    found = store.restore(outline(tree))
    store.close()
    for name, leaf in tree.items():
        assert found[name].dtype == leaf.dtype and found[name].sharding == leaf.sharding
    np.testing.assert_array_equal(found["x"], tree["x"])
    np.testing.assert_array_equal(jax.random.key_data(found["key"]), jax.random.key_data(tree["key"]))
