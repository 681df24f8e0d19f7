"""Plans: memory by kind against hand counts, operations against the compiler, errors, and the command."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from kl_rl.cli import main
from kl_rl.models import DecoderConfig, count_parameters, forward, init_weights
from kl_rl.models.config import Attention, Execution
from kl_rl.runs.plan import (
    PRESETS,
    Setting,
    as_json,
    as_text,
    find_topology,
    make_plan,
    parse_mesh,
    read_model,
    step_flops,
)
from kl_rl.runs.plan.compiled import count_collectives
from kl_rl.runs.plan.flops import forward_flops

TINY = dataclasses.replace(PRESETS["tiny"], layers=1)
SMALL = Setting("ppo", batch=4, prompt_length=4, horizon=4, num_samples=2, twist="head")
SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def plan():
    jax.config.update("jax_disable_most_optimizations", True)
    made = make_plan(TINY, SMALL, find_topology("cpu:8"), SIZES)
    jax.config.update("jax_disable_most_optimizations", False)
    return made


def test_memory_by_kind_is_what_the_shapes_say(plan):
    d, vocab, f, heads = 32, 256, 64, 4 * 8 + 2 * 2 * 8 + 4 * 8  # columns of query, key, value and out
    split_twice = 2 * vocab * d + d * heads + 3 * d * f
    parameters = 4 * (split_twice // 4 + 3 * d)  # float32; three norms are whole everywhere
    assert plan.parameters == split_twice + 3 * d
    assert plan.resident["parameters"] == parameters
    assert plan.resident["base"] == parameters
    assert plan.resident["twist"] == 4 * (d + 1)  # a head on the base
    moments, counts = 2 * (parameters + 4 * (d + 1)), 2 * 2 * 4  # of Adam and of its schedule
    assert plan.resident["optimizer"] == moments + counts
    assert plan.resident["batch"] == 4 * (4 + 2 * (4 * 4 + 1))  # one prompt of four per device
    tokens = 4 * (4 + 2 * 4)
    assert plan.cache == 2 * 2 * (2 * 8) * tokens // 8


def test_programs_fit_together(plan):
    resident = sum(plan.resident.values())
    assert plan.update.arguments - resident == 4 * 7 + 8 + 2 * 4 + 4  # and edges, key, knobs, step
    assert plan.peak >= resident and plan.fits is None
    assert plan.sampling.arguments < plan.update.arguments
    assert (
        plan.update.outputs < 1024
    )  # Info and a table of addresses; the state is written over its arguments
    assert plan.update.collectives["all-gather"] > 0 and plan.update.collectives["all-to-all"] == 0


def test_a_plan_is_told_as_json_and_as_text(plan):
    told = json.loads(json.dumps(as_json(plan), allow_nan=False))
    assert told["mesh"] == SIZES and told["fits"] is None
    assert told["model_flops"]["update"] == sum(told["model_flops"][k] for k in ("policy", "base", "twist"))
    limited = plan._replace(memory=plan.peak - 1)
    assert limited.fits is False and "DOES NOT FIT" in as_text(limited)
    assert plan._replace(memory=plan.peak).fits is True
    refused = plan._replace(update=plan.update._replace(refusal="Used 20G of 16G hbm"), memory=2**40)
    assert refused.fits is False and "Used 20G" in as_text(refused)


def test_forward_operations_agree_with_the_compiler():
    """One unrolled layer without loops, where the compiler counts right (unseen pairs and small change too)."""
    attention = Attention(4, 2, 16)
    config = dataclasses.replace(PRESETS["tiny"], width=64, layers=1, attention=attention)
    rows, length = 2, 64
    weights = jax.eval_shape(lambda: init_weights(jax.random.key(0), config))
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    program = jax.jit(lambda w, i: forward(config, Execution(), w, i)).lower(weights, ids).compile()
    counted = program.cost_analysis()["flops"]
    # a prompt of one token and length new ones: the same matrix products, one key more
    mine = forward_flops(config, Setting(batch=rows, prompt_length=1, horizon=length, num_samples=1))
    unseen = 4 * 4 * 16 * rows * (length * length - length * (length + 1) // 2)
    assert 1.0 <= counted / (mine + unseen) < 1.15


def test_operations_of_a_step():
    config, setting = (
        PRESETS["7b"],
        Setting("ppo", batch=1, prompt_length=1, horizon=2, num_samples=2, twist="head"),
    )
    matrices = count_parameters(config) - config.vocab * config.width - 65 * config.width
    flops = step_flops(config, setting)
    head = config.vocab * config.width
    exact = (
        2 * 3 * (matrices - head) + 2 * 4 * head + 4 * 4096 * 32 * 5
    )  # tokens: 3 in layers, 4 in the head; 5 pairs
    assert flops.base == exact and flops.policy == 3 * exact
    assert step_flops(config, dataclasses.replace(setting, lora=8)).policy == 2 * exact
    assert step_flops(config, dataclasses.replace(setting, method="dpo", twist=None)).twist == 0
    windowed = dataclasses.replace(config.attention, windows=(1,) * 32)
    local = step_flops(dataclasses.replace(config, attention=windowed), setting)
    assert flops.base - local.base == 4 * 4096 * 32 * 2


def test_presets_have_their_sizes():
    assert [round(count_parameters(PRESETS[name]) / 1e9, 2) for name in ("1b", "7b")] == [1.10, 7.25]


def test_collectives_are_counted_by_kind():
    text = """
%all-reduce-scatter.1 (x: f32[8]) -> f32[4] {
  %a = f32[8] all-reduce(%x)
}
ENTRY %main {
  %b = f32[8] all-gather-start(%p), metadata={op_name="all-gather("}
  %c = f32[8] all-gather-done(%b)
  %d = f32[8] all-reduce(%c)
}"""
    counts = count_collectives(text)
    assert (counts["all-gather"], counts["all-reduce"], counts["reduce-scatter"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere"}, "--model nowhere: neither a preset"),
        ({"topology": "v7x:2x2"}, "--topology v7x:2x2: unknown; known: v4:AxB"),
        ({"topology": "cpu:64"}, "this process has 8 simulated devices"),
        ({"mesh": "fsdp=4"}, "data=1 x fsdp=4 x tensor=1 makes 4 devices; the topology has 8"),
        ({"mesh": "experts=8"}, "'experts=8' must be AXIS=SIZE"),
        ({"mesh": "tensor=8"}, "mesh tensor=8 does not divide the 4 heads of layers.query.kernel"),
        ({"mesh": "fsdp=8", "batch": "6"}, "--batch 6 cannot be split over data x fsdp = 8 devices"),
        (
            {"mesh": "fsdp=8", "batch": "8", "gradient-accumulation": "2"},
            "--batch 8 in 2 parts cannot be split over data x fsdp = 8 devices: use a multiple of 16",
        ),
        ({"gradient-accumulation": "3"}, "--gradient-accumulation must divide --batch = 8; got 3"),
        ({"method": "magic"}, "unknown method 'magic' (known: rloo,"),
        ({"method": "dpo", "num-samples": "1"}, "--num-samples must be at least 2; got 1"),
        ({"method": "dpo", "twist": "trunk"}, "--twist trunk: dpo has no values"),
        ({"horizon": "9000"}, "the model's context is 8192"),
        ({"prompt-length": "0"}, "--prompt-length must be at least 1"),
        ({"lora": "-1"}, "--lora must be at least 0"),
    ],
)
def test_bad_input_is_one_clear_line(options, message, capsys):
    asked = {"model": "tiny", "topology": "cpu:8", "batch": "8"} | options
    command = ["plan", *(part for name, value in asked.items() for part in (f"--{name}", value))]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_without_libtpu_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    with pytest.raises(ValueError, match=r"pip install 'kl-rl\[tpu\]'"):
        find_topology("v5e:4x4")


def test_a_model_is_read_from_its_config(tmp_path):
    spec = {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 64,
        "vocab_size": 100,
    }
    (tmp_path / "config.json").write_text(json.dumps(spec))
    assert read_model(str(tmp_path)) == DecoderConfig.gpt2(100, width=32, layers=2, heads=4, context=64)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        read_model(str(tmp_path))


def test_meshes_are_read():
    assert parse_mesh("fsdp=4,tensor=2", 8) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert parse_mesh(None, 8) == {"data": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [["--lora", "4"], ["--method", "ppo"], ["--method", "best-of-n", "--gradient-accumulation", "2"]],
    ids=["lora", "trunk", "best-of-n in parts"],
)
def test_the_command_plans_variants(extra, capsys):
    sizes = ["--batch", "8", "--prompt-length", "4", "--horizon", "4", "--num-samples", "4"]
    mesh = ["--topology", "cpu:8", "--mesh", "data=2,fsdp=2,tensor=2"]
    assert main(["plan", "--model", "tiny", *mesh, *sizes, *extra, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    adapters, trunk = "--lora" in extra, "ppo" in extra
    assert told["setting"]["gradient_accumulation"] == (2 if "--gradient-accumulation" in extra else 1)
    assert (told["resident_bytes"]["parameters"] < told["resident_bytes"]["base"]) == adapters
    assert (told["resident_bytes"]["twist"] > told["resident_bytes"]["base"]) == trunk


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    ("model", "topology", "mesh", "prompts"),
    [("1b", "v5e:4x4", "fsdp=4,tensor=4", 16), ("7b", "v5e:16x16", "fsdp=64,tensor=4", 256)],
)
def test_large_models_fit_on_their_slices(model, topology, mesh, prompts):
    devices = find_topology(topology)
    sizes = parse_mesh(mesh, len(devices.devices))
    made = make_plan(read_model(model), Setting("ppo", batch=prompts, twist="head"), devices, sizes)
    assert made.fits and made.peak < 0.9 * made.memory
