"""One mesh: rules, placement, donation, accumulation; sharded equals unsharded for every family of methods."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import multiprocess_worker
import numpy as np
import optax
import pytest

from kl_rl.core import rollouts
from kl_rl.core.posterior import Posterior, Tilt
from kl_rl.core.trajectories import Trajectories
from kl_rl.methods import METHODS, Given, Head, grpo, method_named, reinforce
from kl_rl.methods.parts import in_parts, value_and_grad
from kl_rl.models import (
    Attention,
    DecoderConfig,
    Execution,
    FeedForward,
    Norm,
    Rotary,
    constant_twist,
    decoder_policy,
    decoder_twist,
    init_weights,
    lora_policy,
    table_policy,
    table_twist,
)
from kl_rl.sharding import (
    check_mesh,
    jit_step,
    make_mesh,
    place,
    place_batch,
    shardings,
    weight_sharding,
)

VOCAB, LENGTH, HORIZON = 12, 3, 4
QUICKLY = Execution("float64", fuse=False)
SCANNED = dataclasses.replace(QUICKLY, scan_layers=True, remat=True)
# Some gradients are zero but for rounding (key biases); a small eps would make steps of that rounding. With this one
# an error of 1e-8 in a gradient (float32 parts of the forward pass) is one of 1e-7 in a parameter that moves by 1e-2.
OPTIMIZER = optax.adam(1e-2, eps=1e-3)
LLAMA = DecoderConfig(
    VOCAB,
    16,
    2,
    16,
    Attention(4, 2, 4),
    FeedForward(24, "silu", gated=True, bias=False),
    Norm(centred=False),
    Rotary(),
    tied=False,
    extra=4,
)
GPT2 = DecoderConfig.gpt2(VOCAB, width=16, layers=2, heads=4, context=16, extra=4)


def weights_of(config, seed=0):
    """Larger than at initialization, so that nothing is flat."""
    return jax.tree.map(lambda x: 4.0 * x, init_weights(jax.random.key(seed), config, jnp.float64))


def batch_of(num_prompts=8, num_samples=2):
    """Ragged completions of padded prompts, with rewards."""
    keys = jax.random.split(jax.random.key(7), 4)
    prompt = jax.random.randint(keys[0], (num_prompts, LENGTH), 0, VOCAB).at[::3, 0].set(-1)
    tokens = jax.random.randint(keys[1], (num_prompts, num_samples, HORIZON), 0, VOCAB)
    ends = jax.random.randint(keys[2], (num_prompts, num_samples, 1), 1, HORIZON + 1)
    mask = (jnp.arange(HORIZON).reshape(1, 1, -1) < ends).astype(jnp.float64)
    reward = jax.random.normal(keys[3], tokens.shape[:2])
    label = (reward > reward[:, ::-1]).astype(reward.dtype)
    return Trajectories(prompt, tokens, mask, jnp.ones_like(mask), -2.5 * mask, reward, label)


def posterior_of(name, base):
    return Posterior(base, method_named(name).evidence(0.7))


def algorithm_of(name, optimizer, value):
    """A card's algorithm, with a value head where one is needed."""

    def scaled(factor=1.0, *, epochs=1):
        return optimizer

    head = lambda kind: constant_twist() if kind is Head.LOG_Z else value
    given = Given(scaled, head, 10, jnp.asarray([-0.5, 0.5]), VOCAB)
    method = method_named(name)
    return method.made(2.0 if method.knob is None or method.knob.admits(2.0) else 0.5, given)


ONE_LAYER = {"llama": dataclasses.replace(LLAMA, layers=1), "gpt2": dataclasses.replace(GPT2, layers=1)}
QUICK = {  # the default tests: every family once, both models, four meshes
    "ppo": ("llama", (2, 2, 2)),
    "rwr": ("gpt2", (1, 4, 2)),
    "dt-tilted": ("llama", (1, 2, 2)),
    "subtb-replay": ("gpt2", (2, 2, 2)),
    "alpha-0.5": ("llama", (1, 4, 2)),
    "dpo": ("gpt2", (2, 2, 1)),
}
IN_PARTS = {"dpo": 2, "alpha-0.5": 2}  # of the default tests: the sharded step adds up gradients


pytestmark = pytest.mark.usefixtures("compile_quickly")


def problem(name, config, execution, optimizer=OPTIMIZER):
    """A method in the middle of things: the policy is no longer its base."""
    base = decoder_policy(config, weights_of(config), execution)
    policy = base.with_params(weights_of(config, seed=1))
    twist = decoder_twist(config, base.params, execution, train_trunk=name == "ppo" and execution.scan_layers)
    algorithm = algorithm_of(name, optimizer, twist)
    return algorithm, algorithm.init(policy), posterior_of(name, base), batch_of()


def same(placed, plain, rtol=1e-6, atol=1e-6):
    """Equal up to rounding: float64, but softmax over a prompt and rotary angles are float32."""
    for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)


def check_program(compiled, state, mesh):
    """The state is overwritten in place, and no batch of activations crosses devices: only weights are gathered."""
    size = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == size
    text = compiled.as_text()
    assert (" all-gather(" in text) == (mesh.shape["fsdp"] * mesh.shape["tensor"] > 1)
    assert " all-to-all(" not in text


def sharded_equals_unsharded(name, config, shape, execution, parts=1):
    plain_algorithm, start, posterior, batch = problem(name, config, execution)
    algorithm = problem(name, config, execution, in_parts(OPTIMIZER, parts))[0]
    mesh, plain_step = make_mesh(*shape), jax.jit(plain_algorithm.step)
    state, *rest = place((start, posterior, batch), mesh)
    step = jit_step(algorithm.step, state, mesh)
    compiled = step.compile(state, *rest)
    kernel = state.policy.params["layers"]["query"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[1] == config.width // shape[1]
    assert kernel.sharding.shard_shape(kernel.shape)[2] == config.attention.heads // shape[2]
    assert state.optimizer["policy"][0].mu["layers"]["query"]["kernel"].sharding == kernel.sharding
    if name in ("ppo", "dpo", "subtb-replay"):
        check_program(compiled, _trained(state), mesh)
    plain = start
    for _ in range(2):
        before = state
        state, info = step(state, *rest)
        plain, plain_info = plain_step(plain, posterior, batch)
        same(info, plain_info)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(_trained(before)))
    same(state, plain)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings(state, mesh)


def _trained(state):
    """A state without the arrays that its policy and heads borrow."""
    own = lambda model: dataclasses.replace(model, shared=None)
    return state._replace(policy=own(state.policy), heads={n: own(h) for n, h in state.heads.items()})


@pytest.mark.parametrize("name", QUICK)
def test_sharded_step_equals_unsharded(name, capfd):
    config, shape = QUICK[name]
    sharded_equals_unsharded(name, ONE_LAYER[config], shape, QUICKLY, IN_PARTS.get(name, 1))
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), (8, 1, 1), (1, 8, 1)])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("name", [m.name for m in METHODS if "-logged" not in m.name])
def test_every_method_on_every_mesh(name, config, shape):
    sharded_equals_unsharded(name, config, shape, SCANNED)


@pytest.mark.parametrize(("config", "shape"), [(LLAMA, (2, 2, 2))], ids=["llama"])
def test_sampling_on_a_mesh_draws_the_same_tokens(config, shape):
    policy = decoder_policy(config, weights_of(config), dataclasses.replace(QUICKLY, scan_layers=True))
    draw = jax.jit(
        lambda policy, key, prompt: rollouts.sample(policy, key, prompt, num_samples=3, horizon=HORIZON)
    )
    key, prompt, mesh = jax.random.key(3), batch_of().prompt, make_mesh(*shape)
    plain = draw(policy, key, prompt)
    with jax.set_mesh(mesh):
        drawn = draw(place(policy, mesh), place(key, mesh), place_batch(batch_of(), mesh).prompt)
    np.testing.assert_array_equal(drawn[0], plain[0])
    same(drawn[1:], plain[1:])


def test_adapters_share_one_placed_base_that_is_never_donated():
    mesh = make_mesh(1, 2, 2)
    base = decoder_policy(ONE_LAYER["llama"], weights_of(ONE_LAYER["llama"]), QUICKLY)
    policy = lora_policy(base, jax.random.key(1), rank=2)
    algorithm = reinforce(optimizer=optax.sgd(0.1))
    state, posterior, batch = place((algorithm.init(policy), Posterior(base, Tilt(1.0)), batch_of()), mesh)
    lent, own = jax.tree.leaves(state.policy.shared), jax.tree.leaves(posterior.base.params)
    assert all(a is b for a, b in zip(lent, own, strict=True))
    step = jit_step(algorithm.step, state, mesh)
    after, _ = step(state, posterior, batch)
    after, _ = step(after, posterior, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.policy.params))
    assert not any(leaf.is_deleted() for leaf in own)
    assert all(a is b for a, b in zip(jax.tree.leaves(after.policy.shared), own, strict=True))
    factor = after.policy.params["layers"]["query"]["b"]
    assert factor.sharding.shard_shape(factor.shape)[2] == factor.shape[2] // 2


def test_a_placed_copy_shares_nothing_with_its_source():
    source = {
        "embed": {"table": jnp.ones((8, 8))},
        "count": jnp.zeros(()),
        "key": jax.random.key(0),
        "beta": 0.5,
    }
    mesh = make_mesh(2, 2, 2)
    placed = place({"one": source, "two": source}, mesh)
    assert placed["one"]["beta"] == 0.5
    arrays = {name: entry for name, entry in placed.items()}
    jax.jit(lambda tree: jax.tree.map(lambda x: x, tree), donate_argnums=0)(arrays)
    np.testing.assert_array_equal(source["embed"]["table"], np.ones((8, 8)))
    assert float(source["count"]) == 0.0 and jax.random.key_data(source["key"]).shape == (2,)


def accumulation(name, num_parts):
    """One step on a table with the batch whole, and in parts."""
    base = table_policy(jax.random.key(0), VOCAB, 2, extra=4, scale=0.7)
    posterior, optimizer, batch = posterior_of(name, base), optax.sgd(0.1), batch_of()
    value = table_twist(VOCAB, 2, extra=4)
    steps = (algorithm_of(name, o, value) for o in (optimizer, in_parts(optimizer, num_parts)))
    run = lambda algorithm: jax.jit(algorithm.step)(algorithm.init(base), posterior, batch)
    return [run(algorithm) for algorithm in steps]


IN_PARTS_OFTEN = ("ppo", "tb-replay", "dt-tilted", "alpha-0.5", "dpo")
IN_PARTS_SELDOM = sorted({m.name for m in METHODS if m.needs.parts} - set(IN_PARTS_OFTEN))


@pytest.mark.parametrize(
    "name", [*IN_PARTS_OFTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in IN_PARTS_SELDOM)]
)
def test_accumulated_parts_equal_the_whole_batch(name):
    """State, extra state and all of Info; two steps of PPO on each batch."""
    whole, parts = accumulation(name, 4)
    assert jax.tree.structure(parts) == jax.tree.structure(whole)
    same(parts, whole, 1e-9, 1e-11)


def test_accumulation_refuses_parts_that_do_not_divide():
    with pytest.raises(ValueError, match="8 prompts cannot be split into 3 parts"):
        accumulation("rloo", 3)
    with pytest.raises(ValueError, match="at least one part; got 0"):
        in_parts(optax.sgd(0.1), 0)


def test_accumulation_adds_up_in_float32():
    """256 parts with gradients 1 and 255 times 2**-8: lost one by one in bfloat16, where 1 + 2**-8 is 1."""
    rows = jnp.full(256, 2.0**-8, jnp.bfloat16).at[0].set(1.0)
    objective = lambda params, x: (jnp.mean(params * x), x)
    (_, kept), found = value_and_grad(objective, jnp.bfloat16(1.0), rows, 256)
    exact = (1 + 255 / 256) / 256
    assert found.dtype == jnp.bfloat16 and abs(float(found) - exact) <= 2**-8 * exact
    np.testing.assert_array_equal(kept, rows)


def test_accumulation_needs_less_memory():
    """What the update of a decoder needs beyond its arguments, in four parts and whole."""
    execution = dataclasses.replace(QUICKLY, compute_dtype="float32")
    base = decoder_policy(LLAMA, weights_of(LLAMA), execution)
    batch, posterior = batch_of(num_prompts=256, num_samples=4), Posterior(base, Tilt(0.7))

    def temporary(optimizer):
        algorithm = grpo(optimizer=optimizer)
        lowered = jax.jit(algorithm.step).lower(algorithm.init(base), posterior, batch)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(in_parts(OPTIMIZER, 4)) < 0.4 * temporary(OPTIMIZER)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (
            GPT2,
            (1, 1, 3),
            r"mesh tensor=3 does not divide the 4 heads of layers.query.kernel .*: use 1, 2 or 4",
        ),
        (LLAMA, (1, 1, 4), r"tensor=4 does not divide the 2 kv_heads of layers.key.kernel .*: use 1 or 2"),
        (
            LLAMA,
            (1, 3, 1),
            r"fsdp=3 does not divide the 16 embed of embed.table \[16, 16\]: use 1, 2, 4, 8 or 16",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(config, shape, message):
    with pytest.raises(ValueError, match=message):
        check_mesh(config, make_mesh(*shape))


def test_a_vocabulary_that_does_not_divide_stays_whole():
    config, mesh = DecoderConfig.gpt2(13, width=16, layers=1, heads=4, context=8), make_mesh(1, 2, 4)
    check_mesh(config, mesh)
    shapes = jax.eval_shape(lambda: init_weights(jax.random.key(0), config))
    where = shardings(shapes, mesh)["embed"]["table"]
    assert where.shard_shape((13, 16)) == (13, 8)
    assert weight_sharding(mesh)(("embed", "table"), (13, 16)) == where


def test_bad_meshes_and_batches_are_said():
    with pytest.raises(ValueError, match="needs 1000 devices; there are 8"):
        make_mesh(10, 10, 10)
    with pytest.raises(ValueError, match="must be at least 1"):
        make_mesh(tensor=0)
    with pytest.raises(ValueError, match="6 prompts cannot be split over data x fsdp = 4"):
        place_batch(batch_of(6), make_mesh(2, 2, 2))


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Two processes with four devices each, over loopback, against eight devices in this process."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    out = tmp_path / "out.npz"
    command = [sys.executable, str(Path(multiprocess_worker.__file__)), address, "2"]
    workers = [
        subprocess.Popen([*command, str(i), str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for i in range(2)
    ]
    single = multiprocess_worker.run_steps(multiprocess_worker.SHAPE)
    try:
        said = [worker.communicate(timeout=300)[0].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], said
    with np.load(out) as many:
        assert set(many.files) == set(single)
        for name in many.files:
            np.testing.assert_allclose(many[name], single[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_cpu_is_split_before_the_first_computation_only():
    code = (
        "import jax\nfrom kl_rl.sharding import make_mesh, split_cpu\n"
        "split_cpu(3)\nassert make_mesh(data=3).size == 3\nsplit_cpu(2)\n"
        "try:\n    split_cpu(4)\nexcept ValueError as error:\n    print(error)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "the CPU must be split into 4 devices before the first computation\n"
