"""Hugging Face folders that are missing, damaged, cut short or on the hub; saving is whole or not at all."""

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import HERE, assert_trees_equal, weight_files
from safetensors.numpy import load_file, save_file

from kl_rl.huggingface import CheckpointError, load_checkpoint, save_checkpoint
from kl_rl.storage import disk


def test_missing_files_are_named(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(NotADirectoryError, match="a checkpoint is a folder"):
        load_checkpoint(HERE / "gpt2" / "config.json")
    with pytest.raises(FileNotFoundError, match=r"config\.json: missing"):
        load_checkpoint(tmp_path)
    folder = copy("gpt2")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors and no"):
        load_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(
        CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\).*save_pretrained"
    ):
        load_checkpoint(folder)
    (folder / "config.json").write_text("{'a': 1}")
    with pytest.raises(CheckpointError, match=r"gpt2/config\.json: not JSON"):
        load_checkpoint(folder)
    (tmp_path / "gone.previous").mkdir()
    with pytest.raises(FileNotFoundError, match=r"gone\.previous is there: a save was cut short"):
        load_checkpoint(tmp_path / "gone")


def test_shards_must_be_there(copy):
    folder = copy("llama")
    index = folder / "model.safetensors.index.json"
    shard = "model-00002-of-00003.safetensors"
    kept = (folder / shard).read_bytes()
    (folder / shard).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard}: missing, but .*index\.json says that it holds"):
        load_checkpoint(folder)
    (folder / shard).write_bytes(kept)
    spec = json.loads(index.read_text())
    spec["weight_map"]["lm_head.weight"] = shard
    index.write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match=rf"{shard}: tensor lm_head.weight is missing, but"):
        load_checkpoint(folder)
    spec["weight_map"]["lm_head.weight"] = "../llama/" + shard
    index.write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match="is no file name in this folder"):
        load_checkpoint(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="not a shard index"):
        load_checkpoint(folder)


def test_damaged_weights_are_named(copy):
    path = copy("qwen3") / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for size, problem in (
        (len(whole) - 1, f"expected {len(whole)}"),
        (100, "header would need"),
        (3, "truncated"),
    ):
        path.write_bytes(whole[:size])
        with pytest.raises(
            CheckpointError, match=rf"model\.safetensors: truncated.* {size} bytes.*{problem}|{problem}"
        ):
            load_checkpoint(path.parent)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        load_checkpoint(path.parent)
    for old, new, problem in (
        (b'{"__', b'x"__', "not a safetensors file"),
        (b'"F32"', b'"F99"', "dtype 'F99' is not supported"),
        (b"[320,16]", b"[321,16]", r"tensor .*: 20480 bytes do not make F32 \(321, 16\)"),
        (b"[320,16]", b"[3e9999]", r"tensor .*: damaged entry in the header"),
        (b"[320,16]", b"[true,1]", r"tensor .*: damaged entry in the header"),
        (b'"F32"', b"[320]", r"dtype '\[320\]' is not supported"),
        (b'_offsets":[0,', b'_offsets":["",', r"damaged entry in the header|not a safetensors file"),
    ):
        path.write_bytes(whole[:8] + whole[8 : 8 + length].replace(old, new, 1) + whole[8 + length :])
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{problem}"):
            load_checkpoint(path.parent)


def test_tensors_must_fit_the_configuration(copy):
    path = copy("qwen3") / "model.safetensors"
    tensors, name = load_file(path), "model.layers.1.mlp.up_proj.weight"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != name}, rf"tensor {name}: missing; .* shape \[24, 16\]"),
        (tensors | {name: tensors[name].T.copy()}, rf"tensor {name}: has shape \[16, 24\]; .* \[24, 16\]"),
        (tensors | {name: tensors[name].astype(np.int8)}, rf"tensor {name}: holds int8, expected floating"),
        (
            tensors | {"model.layers.2.mlp.up_proj.weight": tensors[name]},
            r"tensor model\.layers\.2.*: qwen3 has no such parameter",
        ),
    ):
        save_file(changed, path)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: " + message):
            load_checkpoint(path.parent)


def test_weights_must_fit_when_they_are_saved(tmp_path):
    checkpoint = load_checkpoint(HERE / "gpt2")
    config, weights = checkpoint.config, checkpoint.weights
    for changed, message in (
        (
            weights | {"embed": {"table": jnp.zeros((3, 16))}},
            r"embed/table has shape \[3, 16\], expected \[96, 16\]",
        ),
        ({k: v for k, v in weights.items() if k != "final_norm"}, "weights have no final_norm"),
        (weights | {"adapter": {"a": jnp.zeros(3)}}, "adapter/a is no parameter"),
    ):
        for like in (None, checkpoint):
            with pytest.raises(CheckpointError, match=message):
                save_checkpoint(tmp_path / "out", config, changed, like=like)
    assert not list(tmp_path.iterdir())


def test_saving_over_a_folder_replaces_it_and_keeps_strangers(copy):
    folder = copy("llama")
    (folder / "README.md").write_text("mine")
    checkpoint = load_checkpoint(folder)
    weights = jax.tree.map(lambda w: w + 1.0, checkpoint.weights)
    save_checkpoint(folder, checkpoint.config, weights)
    assert (folder / "README.md").read_text() == "mine"
    assert [p.name for p in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert_trees_equal(load_checkpoint(folder).weights, weights)


def test_a_link_to_a_folder_stays_a_link(copy, tmp_path):
    (tmp_path / "link").symlink_to(copy("gpt2"))
    checkpoint = load_checkpoint(tmp_path / "link")
    for shift in (1.0, 2.0):
        weights = jax.tree.map(lambda w, shift=shift: w + shift, checkpoint.weights)
        save_checkpoint(tmp_path / "link", checkpoint.config, weights)
        assert_trees_equal(load_checkpoint(tmp_path / "gpt2").weights, weights)
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt2", "link"]


def test_a_crash_between_two_renames_is_mended(copy, tmp_path):
    folder = copy("gpt2")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("mine")
    checkpoint = load_checkpoint(folder)
    folder.rename(disk.previous(folder))  # the crash: neither the old nor the new folder is in place
    save_checkpoint(folder, checkpoint.config, checkpoint.weights)
    assert (folder / "notes" / "a.txt").read_text() == "mine"
    shutil.copytree(
        folder, disk.previous(folder)
    )  # a later crash: the new one is in place, some files are not
    (folder / "notes").rename(tmp_path / "lost")
    (tmp_path / "gpt2.saving").mkdir()
    save_checkpoint(folder, checkpoint.config, checkpoint.weights)
    assert (folder / "notes" / "a.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt2", "lost"]


def test_what_a_crash_left_behind_brings_no_stale_index_back(copy, monkeypatch):
    """Of several shards, one file; the crash comes before the old folder is cleared, and the next save fails."""
    folder = copy("llama")
    checkpoint = load_checkpoint(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    shutil.copytree(folder, disk.previous(folder))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    shutil.copy(HERE / "gpt2" / "model.safetensors", folder / "model.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match="not enough space"):
        save_checkpoint(folder, checkpoint.config, checkpoint.weights)
    assert [p.name for p in folder.glob("*.safetensors*")] == ["model.safetensors"]


TWO_PROCESSES = """
import sys
import jax
rank, port, source, target = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
from kl_rl.huggingface import load_checkpoint, save_checkpoint
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
def place(path, shape):
    axes = ["fsdp" if n % 8 == 0 and path[-1] != "bias" else None for n in shape]
    first = axes.index("fsdp") if "fsdp" in axes else len(axes)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes[: first + 1]))
checkpoint = load_checkpoint(source, place=place)
assert not checkpoint.weights["embed"]["table"].is_fully_addressable
save_checkpoint(target, checkpoint.config, checkpoint.weights, like=checkpoint)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_two_processes_write_one_folder(name, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", TWO_PROCESSES]
    runs = [
        subprocess.Popen([*command, str(rank), port, str(HERE / name), str(tmp_path / "out")], env=env)
        for rank in range(2)
    ]
    try:
        assert [run.wait(120) for run in runs] == [0, 0]
    finally:
        for run in runs:
            run.kill()
    assert weight_files(tmp_path / "out") == weight_files(HERE / name)


@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_leaves_the_old_folder_whole(exists, copy, tmp_path, monkeypatch):
    """The kernel refuses to write more than 20 kB into a file: as on a full disk, in the middle of a tensor."""
    folder = copy("gpt2") if exists else tmp_path / "gpt2"
    checkpoint = load_checkpoint(HERE / "gpt2")
    before = {p.name: p.read_bytes() for p in folder.iterdir()} if exists else None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match="could not save .*gpt2: .*; the folder " + ("is as" if exists else "was not")
        ):
            save_checkpoint(folder, checkpoint.config, checkpoint.weights, like=checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == (["gpt2"] if exists else [])
    if exists:
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"not enough space: \d+ bytes are needed, 1000 are free") as caught:
        save_checkpoint(folder, checkpoint.config, checkpoint.weights, like=checkpoint)
    assert caught.value.errno == 28


def test_hub_names(monkeypatch, tmp_path):
    asked = []
    hub = types.ModuleType("huggingface_hub")

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        if name != "org/tiny":
            raise RuntimeError("404")
        return str(HERE / "gpt2")

    hub.snapshot_download = snapshot_download
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert load_checkpoint("org/tiny").config.vocab == 96
    assert asked == [("org/tiny", ("*.json", "*.safetensors", "*.jinja"))]
    with pytest.raises(FileNotFoundError, match=r"org/other: no such folder, and .* did not give it: .*404"):
        load_checkpoint("org/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=re.escape("pip install 'kl-rl[hf]'")):
        load_checkpoint("org/tiny")
    with pytest.raises(FileNotFoundError, match="no such folder$"):
        load_checkpoint("./org/tiny")
