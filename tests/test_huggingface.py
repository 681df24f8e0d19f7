"""Hugging Face folders: logits as transformers', the same bytes out as in."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import FOLDERS, HERE, assert_trees_equal, logits, spec_of, weight_files
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kl_rl.huggingface import CheckpointError, load_checkpoint, save_checkpoint, weights_in
from kl_rl.models.config import DecoderConfig
from kl_rl.models.parameters import weight_shapes
from kl_rl.tokenizer import ByteTokenizer, load_tokenizer


def base_size(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]


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


def test_the_dtype_of_a_file_is_that_of_its_parameters(copy, tmp_path):
    """Not that of a constant that lies before them."""
    folder = copy("llama_old")
    tensors = load_file(folder / "model.safetensors")
    wide = {k: v.astype(np.float64) for k, v in tensors.items() if "inv_freq" in k}
    assert wide
    save_file(tensors | wide, folder / "model.safetensors", {"format": "pt"})
    old = load_checkpoint(folder)
    assert "inv_freq" in old.layout.files[0].tensors[0].name
    save_checkpoint(tmp_path / "out", old.config, old.weights, like=old, dtype="bfloat16")
    assert load_checkpoint(tmp_path / "out").spec["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_float16_cannot_hold_are_refused(dtype, tmp_path):
    gpt2 = load_checkpoint(HERE / "gpt2", dtype=dtype)
    weights = gpt2.weights | {"embed": {**gpt2.weights["embed"]}}
    weights["embed"]["table"] = weights["embed"]["table"].at[3, 5].set(70_000.0)
    with pytest.raises(CheckpointError, match=r"embed/table: too large for float16; use bfloat16"):
        save_checkpoint(tmp_path / "out", gpt2.config, weights, dtype="float16")
    assert not list(tmp_path.iterdir())
    weights["embed"]["table"] = weights["embed"]["table"].at[3, 5].set(jnp.inf)  # is kept
    save_checkpoint(tmp_path / "out", gpt2.config, weights, dtype="float16")


def test_tensors_are_read_straight_into_their_sharding(monkeypatch):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def place(path, shape):
        axis = next((i for i, n in enumerate(shape) if n % 8 == 0 and path[0] != "final_norm"), None)
        if axis is None:
            return None if path[-1] == "bias" else jax.sharding.NamedSharding(mesh, spec())
        return jax.sharding.NamedSharding(mesh, spec(*[None] * axis, "fsdp"))

    read, read_call = [], weights_in._Stacked.__call__

    def spy(self, index):
        part = read_call(self, index)
        read.append(part.shape)
        return part

    monkeypatch.setattr(weights_in._Stacked, "__call__", spy)
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
