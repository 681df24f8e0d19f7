"""Hugging Face folders: logits as transformers', the same bytes out as in, one clear message for bad input."""

import dataclasses
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kl_rl.huggingface import (
    CheckpointError,
    config_from_dict,
    config_to_dict,
    disk,
    load_checkpoint,
    read_weights,
    save_checkpoint,
)
from kl_rl.models.config import Attention, DecoderConfig, Execution, FeedForward, Norm, Rotary
from kl_rl.models.decoder import forward
from kl_rl.models.weights import weight_shapes
from kl_rl.tokenizer import ByteTokenizer, load_tokenizer

HERE = Path(__file__).parent / "checkpoints"
FOLDERS = sorted(path.parent.name for path in HERE.glob("*/config.json"))


jitted = jax.jit(forward, static_argnums=(0, 1))


def logits(config, weights, ids):
    return np.asarray(jitted(config, Execution(), weights, jnp.asarray(ids)))


def spec_of(name):
    return json.loads((HERE / name / "config.json").read_text())


def weight_files(folder):
    return {
        p.name: p.read_bytes()
        for p in Path(folder).iterdir()
        if ".safetensors" in p.name or p.name == "config.json"
    }


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def copy(tmp_path):
    """A copy of a checkpoint that may be damaged."""

    def make(name):
        return Path(shutil.copytree(HERE / name, tmp_path / name))

    return make


def test_every_family_has_a_checkpoint():
    families = {spec_of(name)["model_type"] for name in FOLDERS}
    assert families == {"gpt2", "llama", "qwen2", "qwen3", "gemma2", "gemma3_text"}


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_are_those_of_transformers(name):
    """Measured with jax 0.10.2: at most 3.9e-6, where logits are up to 4.6."""
    expected = np.load(HERE / name / "expected.npz")
    checkpoint = load_checkpoint(HERE / name)
    real = expected["ids"] >= 0
    assert not real.all() and np.abs(expected["logits"]).max() > 1.0
    found = logits(checkpoint.config, checkpoint.weights, expected["ids"])
    assert np.abs(found - expected["logits"])[real].max() < 1e-4


@pytest.mark.parametrize("name", FOLDERS)
def test_files_are_byte_identical_after_a_round_trip(name, tmp_path):
    checkpoint = load_checkpoint(HERE / name)
    save_checkpoint(tmp_path / "out", checkpoint.config, checkpoint.weights, like=checkpoint)
    assert weight_files(tmp_path / "out") == weight_files(HERE / name)
    tokenizer = HERE / name / "tokenizer.json"
    assert (tmp_path / "out" / "tokenizer.json").exists() == tokenizer.exists()
    assert not list(tmp_path.glob("*.saving")) and not list(tmp_path.glob("*.previous"))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_our_own_layout_reads_back(name, tmp_path):
    checkpoint = load_checkpoint(HERE / name)
    save_checkpoint(tmp_path / "out", checkpoint.config, checkpoint.weights, max_shard_bytes=12_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
    again = load_checkpoint(tmp_path / "out")
    assert again.config == checkpoint.config
    assert_trees_equal(again.weights, checkpoint.weights)


def test_trained_weights_keep_layout_types_and_buffers(tmp_path):
    checkpoint = load_checkpoint(HERE / "llama_old")
    trained = jax.tree.map(lambda w: w + 0.125, checkpoint.weights)
    save_checkpoint(tmp_path / "out", checkpoint.config, trained, like=checkpoint)
    before, after = (load_file(f / "model.safetensors") for f in (HERE / "llama_old", tmp_path / "out"))
    assert list(before) == list(after)
    for name in before:
        shift = 0.0 if "inv_freq" in name else 0.125
        np.testing.assert_array_equal(after[name], before[name] + np.float32(shift))
    assert_trees_equal(load_checkpoint(tmp_path / "out").weights, trained)


def test_bfloat16_is_kept_and_can_be_asked_for(tmp_path):
    stored = load_checkpoint(HERE / "qwen2", dtype=None)
    assert {w.dtype for w in jax.tree.leaves(stored.weights)} == {jnp.dtype("bfloat16")}
    gpt2 = load_checkpoint(HERE / "gpt2")
    save_checkpoint(tmp_path / "out", gpt2.config, gpt2.weights, like=gpt2, dtype="bfloat16")
    again = load_checkpoint(tmp_path / "out")
    assert again.spec["torch_dtype"] == "bfloat16" and "dtype" not in again.spec
    rounded = jax.tree.map(lambda w: w.astype("bfloat16").astype("float32"), gpt2.weights)
    assert_trees_equal(again.weights, rounded)


def test_tensors_are_read_straight_into_their_sharding(monkeypatch):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def place(path, shape):
        axis = next((i for i, n in enumerate(shape) if n % 8 == 0 and path[0] != "final_norm"), None)
        if axis is None:
            return None if path[-1] == "bias" else jax.sharding.NamedSharding(mesh, spec())
        return jax.sharding.NamedSharding(mesh, spec(*[None] * axis, "fsdp"))

    read, read_call = [], read_weights._Stacked.__call__

    def spy(self, index):
        part = read_call(self, index)
        read.append(part.shape)
        return part

    monkeypatch.setattr(read_weights._Stacked, "__call__", spy)
    for name in ("gpt2", "llama", "gemma3"):
        whole = load_checkpoint(HERE / name)
        read.clear()
        sharded = load_checkpoint(HERE / name, place=place)
        assert_trees_equal(sharded.weights, whole.weights)
        kernel = sharded.weights["layers"]["out"]["kernel"]
        assert kernel.sharding == place(("layers", "out", "kernel"), kernel.shape)
        if name != "gpt2":  # the embedding is read in eighths
            assert (96, 16) not in read and (12, 16) in read


def old_gpt2(folder):
    """As the first published files are: no prefix, with causal masks."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    masks = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 32, 32), np.float32)) for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": np.array(-1e4, np.float32) for i in range(2)}
    save_file(tensors | masks, folder / "model.safetensors")


def test_old_names_and_buffers_survive(copy, tmp_path):
    folder = copy("gpt2")
    old_gpt2(folder)
    checkpoint = load_checkpoint(folder)
    assert_trees_equal(checkpoint.weights, load_checkpoint(HERE / "gpt2").weights)
    save_checkpoint(tmp_path / "out", checkpoint.config, checkpoint.weights, like=checkpoint)
    assert weight_files(tmp_path / "out") == weight_files(folder)


def test_the_file_says_whether_the_head_is_tied(copy, tmp_path):
    folder = copy("gpt2")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    twice = load_checkpoint(folder)
    assert twice.config.tied
    trained = jax.tree.map(lambda w: w * 2.0, twice.weights)
    save_checkpoint(tmp_path / "out", twice.config, trained, like=twice)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(saved["lm_head.weight"], saved["transformer.wte.weight"])
    tensors["lm_head.weight"] += 1.0
    save_file(tensors, folder / "model.safetensors")
    apart = load_checkpoint(folder)
    assert not apart.config.tied
    np.testing.assert_array_equal(apart.weights["head"]["kernel"].T, tensors["lm_head.weight"])
    save_checkpoint(tmp_path / "apart", apart.config, apart.weights, like=apart)
    assert weight_files(tmp_path / "apart") == weight_files(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_byte_model_with_input_only_ids_goes_out_and_in(tied, tmp_path):
    config = dataclasses.replace(
        DecoderConfig.gpt2(257, width=16, layers=2, heads=2, context=32, extra=3), tied=tied
    )
    rng = np.random.default_rng(0)
    shapes = weight_shapes(config)
    weights = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), "float32"), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    save_checkpoint(tmp_path / "out", config, weights, tokenizer_from=ByteTokenizer())
    again = load_checkpoint(tmp_path / "out")
    assert again.config == config and again.spec["vocab_size"] == 260 and again.spec["eos_token_id"] == 256
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [257, 258, 259]
    assert load_tokenizer(tmp_path / "out") == ByteTokenizer()
    ids = np.random.default_rng(0).integers(0, 260, (2, 7))
    np.testing.assert_array_equal(logits(config, weights, ids), logits(again.config, again.weights, ids))


def test_rows_for_new_input_only_ids_can_be_added(tmp_path):
    base = load_checkpoint(HERE / "llama")
    config = dataclasses.replace(base.config, extra=4)
    table = base.weights["embed"]["table"]
    weights = base.weights | {"embed": {"table": jnp.concatenate([table, table[:4] + 1.0])}}
    save_checkpoint(tmp_path / "out", config, weights, like=base)
    again = load_checkpoint(tmp_path / "out")
    assert again.config == config and again.spec["eos_token_id"] == base.spec["eos_token_id"]
    assert_trees_equal(again.weights, weights)
    names = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert names == sorted(p.name for p in (HERE / "llama").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == base_size(HERE / "llama") + 2 * 4 * 16 * 4


def base_size(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]


SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def read(model_type, **fields):
    return config_from_dict({"model_type": model_type, **SIZES, **fields})


def test_fields_of_older_and_newer_files():
    assert read("llama", rope_theta=5e5).rotary == Rotary(5e5)
    assert read("llama", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}).rotary == Rotary(5e5)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 32}
    llama3 = Rotary(5e5, llama3=(8.0, 1.0, 4.0, 32))
    assert read("llama", rope_theta=5e5, rope_scaling=scaling).rotary == llama3
    assert read("llama", rope_parameters=scaling | {"rope_theta": 5e5}).rotary == llama3
    assert read("llama").attention.head_dim == 4 and read("llama", head_dim=8).attention.head_dim == 8
    assert read("llama", num_key_value_heads=None).attention.kv_heads == 4
    assert read("qwen2").attention.bias and not read("qwen2").attention.out_bias
    assert read("qwen2", sliding_window=8).attention.windows == ()
    assert read(
        "qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=3
    ).attention.windows == ((None,) * 3 + (8,))
    assert read("qwen3").attention.head_dim == 128
    gemma2 = read("gemma2", sliding_window=8)
    assert gemma2.attention.windows == (8, None, 8, None) and gemma2.tied
    assert (gemma2.attention.softcap, gemma2.softcap, gemma2.embed_scale) == (50.0, 30.0, 4.0)
    assert gemma2.attention.scale is None and read("gemma2", head_dim=8).attention.scale == 256**-0.5


def test_gemma3_positions_of_older_and_newer_files():
    old = {
        "rope_theta": 2e6,
        "rope_local_base_freq": 3e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    old |= {"sliding_window": 8, "sliding_window_pattern": 2}
    config = read("gemma3_text", **old)
    assert config.rotary == Rotary(2e6, factor=8.0) and config.attention.local_rotary == Rotary(3e4)
    assert config.attention.windows == (8, None, 8, None) and config.softcap is None
    nested = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6}}
    nested["sliding_attention"] = {"rope_type": "default", "rope_theta": 3e4}
    types = ["sliding_attention", "full_attention"] * 2
    assert config == read("gemma3_text", rope_parameters=nested, sliding_window=8, layer_types=types)
    plain = read("gemma3_text", sliding_window=8)
    assert plain.attention.windows == (8,) * 4 and plain.attention.local_rotary == Rotary(1e4)
    assert plain.rotary == Rotary(1e6)


def test_an_architecture_that_no_family_has_is_refused():
    config = DecoderConfig(
        10,
        8,
        2,
        16,
        Attention(2, 2, 4, windows=(4, None)),
        FeedForward(16, "silu", True, False),
        Norm(centred=False),
    )
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM: rotary"):
        config_to_dict(config)
    config = dataclasses.replace(config, rotary=Rotary())
    with pytest.raises(
        CheckpointError, match=r"LlamaForCausalLM: attention.windows;.*Qwen2.*: attention.bias"
    ):
        config_to_dict(config)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "llama",
            {"architectures": ["MixtralForCausalLM"]},
            "architectures: unknown.*'Mixtral.*known: GPT2LMHead",
        ),
        ("llama", {"architectures": None, "model_type": "mamba"}, "model_type: unknown architecture 'mamba'"),
        (
            "llama",
            {"architectures": ["X"], "auto_map": {"AutoModel": "x.X"}},
            r"its own code \(auto_map\) is never run",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type: 'yarn' is not supported",
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor: missing"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        (
            "llama",
            {"quantization_config": {"bits": 4}},
            "quantization_config: quantized weights are not supported",
        ),
        ("llama", {"num_local_experts": 8}, "num_local_experts: mixtures of experts are not supported"),
        ("llama", {"hidden_act": "relu"}, "hidden_act: 'relu' is not supported; known: gelu_new"),
        ("llama", {"hidden_size": None}, "hidden_size: missing"),
        (
            "llama",
            {"num_hidden_layers": "2"},
            "num_hidden_layers: must be a whole number of at least 1; got '2'",
        ),
        ("llama", {"num_key_value_heads": 3}, "kv_heads must divide heads = 4; got 3"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings: must be true or false"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx: attention scaled",
        ),
        (
            "gemma2",
            {"layer_types": ["full_attention"]},
            "layer_types: must be a list with one entry for each of 3",
        ),
        (
            "gemma2",
            {"layer_types": ["chunked_attention"] * 3},
            "layer_types: 'chunked_attention' is not supported",
        ),
        ("gemma3", {"sliding_window": None}, "sliding_window: missing"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0 is not supported"),
        ("gemma3", {"use_bidirectional_attention": True}, "only causal attention"),
    ],
)
def test_what_is_not_supported_is_named(name, change, message):
    with pytest.raises(CheckpointError, match=r"^here\.json: .*" + message):
        config_from_dict(spec_of(name) | change, "here.json")


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
