"""The decoder's parts: memory of log-probabilities, adapters on a shared base, twist heads, execution options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoders import CONFIGS, policy_of, random_weights
from flax import nnx

from kl_rl import Posterior, Tilt, Trajectories, advance, fresh, ppo, reinforce, score, start
from kl_rl.core.twist import prefix_twists
from kl_rl.models import (
    Attention,
    DecoderConfig,
    DecoderModule,
    Execution,
    FeedForward,
    count_parameters,
    decoder_policy,
    decoder_twist,
    init_weights,
    lora_policy,
    merge_lora,
    packed_log_probs,
)

pytestmark = pytest.mark.usefixtures("compile_quickly")

PROMPT = jnp.array([[-1, 3, 5], [1, 2, 4]], jnp.int32)


def batch_of(num_samples=2, horizon=5, vocab=31):
    tokens = jax.random.randint(jax.random.key(4), (2, num_samples, horizon), 0, vocab)
    ones = jnp.ones(tokens.shape)
    return Trajectories(
        PROMPT, tokens, ones, ones, jnp.zeros(tokens.shape), jnp.arange(2.0 * num_samples).reshape(2, -1)
    )


@pytest.mark.optimized
def test_no_array_of_all_logits_exists():
    """Training and scoring with a vocabulary of 50 000: temporaries stay far below one [B, T, V] array of logits."""
    config = DecoderConfig.gpt2(50_000, width=16, layers=1, heads=2, context=64)
    execution = Execution(chunk_rows=64, chunk_vocab=4096)
    shapes = jax.eval_shape(lambda: init_weights(jax.random.key(0), config))
    ids = jax.ShapeDtypeStruct((8, 65), jnp.int32)
    all_logits = 8 * 64 * config.vocab * 4

    def loss(weights, ids):
        return -packed_log_probs(config, execution, weights, ids).mean()

    for function in (loss, jax.grad(loss)):
        memory = jax.jit(function).lower(shapes, ids).compile().memory_analysis()
        assert memory.temp_size_in_bytes < all_logits / 4
    whole = dataclasses.replace(execution, chunk_rows=8 * 64, chunk_vocab=config.vocab)
    plain = lambda weights, ids: -packed_log_probs(config, whole, weights, ids).mean()
    assert (
        jax.jit(jax.grad(plain)).lower(shapes, ids).compile().memory_analysis().temp_size_in_bytes
        > all_logits
    )


CHUNKS = [("gemma2", (5, 31)), ("gemma2", (6, 10)), ("llama3", (1, 7)), ("llama3", (100, 8))]


@pytest.mark.parametrize(("name", "chunks"), CHUNKS)
def test_chunks_change_rounding_only(name, chunks):
    """Values and gradients, for chunks that divide nothing evenly; tied and untied heads, soft-capped or not."""
    config, weights = CONFIGS[name], random_weights(CONFIGS[name], dtype=jnp.float64)
    ids = jax.random.randint(jax.random.key(0), (3, 8), 0, 31)

    def loss(weights, execution):
        return packed_log_probs(config, execution, weights, ids)[1:].sum()

    execution = Execution("float64", chunk_rows=chunks[0], chunk_vocab=chunks[1])
    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (a, da), (b, db) = run(weights, execution), run(weights, Execution("float64"))
    np.testing.assert_allclose(a, b, rtol=1e-12)
    for x, y in zip(jax.tree.leaves(da), jax.tree.leaves(db), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11)


def test_an_adapter_starts_at_the_base_and_merges_exactly():
    base = policy_of("qwen2", dtype=jnp.float64)
    policy = lora_policy(base, jax.random.key(0), rank=3, alpha=6.0)
    run = jax.jit(score)
    np.testing.assert_array_equal(run(policy, batch_of()), run(base, batch_of()))
    moved = policy.with_params(jax.tree.map(lambda x: x + 0.05, policy.params))
    assert np.abs(run(moved, batch_of()) - run(base, batch_of())).max() > 0.01
    merged = base.with_params(merge_lora(moved))
    np.testing.assert_allclose(run(merged, batch_of()), run(moved, batch_of()), atol=1e-6)


def test_training_an_adapter_leaves_the_base_and_keeps_one_copy():
    """The gradient, the optimizer and the state hold adapter arrays only; the base's arrays are the very same."""
    base = policy_of("llama3")
    policy = lora_policy(base, jax.random.key(0), rank=2, targets=("query", "down"))
    assert all(
        a is b for a, b in zip(jax.tree.leaves(policy.shared), jax.tree.leaves(base.params), strict=True)
    )
    algorithm = reinforce(optimizer=optax.adam(0.01))
    posterior = Posterior(base, Tilt(1.0))
    source = fresh(PROMPT, lambda p, t, m: (t % 3).sum(-1).astype(jnp.float32), num_samples=4, horizon=4)
    run = start(algorithm, policy, posterior, source, jax.random.key(1))
    trained = sum(x.size for x in jax.tree.leaves(policy.params))
    assert sum(x.size for x in jax.tree.leaves(run.state.optimizer)) <= 2 * trained + 2
    step = jax.jit(lambda run, posterior: advance(algorithm, run, posterior, source, num_steps=2))
    after, _ = step(run, posterior)
    for old, new in zip(
        jax.tree.leaves(base.params), jax.tree.leaves(after.state.policy.shared), strict=True
    ):
        np.testing.assert_array_equal(old, new)
    moved = [np.abs(x).max() for x in jax.tree.leaves(after.state.policy.params)]
    assert min(moved) > 0


def test_unknown_projections_are_named():
    with pytest.raises(ValueError, match="'keys'; known: query, key"):
        lora_policy(policy_of("gpt2"), jax.random.key(0), targets=("keys",))
    with pytest.raises(ValueError, match="rank must be at least 1; got 0"):
        lora_policy(policy_of("gpt2"), jax.random.key(0), rank=0)


@pytest.mark.parametrize("train_trunk", [False, True])
def test_a_twist_head_sees_prefixes_only(train_trunk):
    config = CONFIGS["gemma3"]
    twist = decoder_twist(config, random_weights(config), train_trunk=train_trunk)
    values = jax.jit(prefix_twists)
    np.testing.assert_array_equal(values(twist, batch_of()), 0.0)
    rng = np.random.default_rng(0)
    noise = lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype)
    twist = twist.with_params(jax.tree.map(noise, twist.params))
    batch = batch_of()
    before = values(twist, batch)
    assert before.shape == (2, 2, 6)
    after = values(twist, batch._replace(tokens=batch.tokens.at[..., 3].add(1) % 31))
    np.testing.assert_allclose(after[..., :4], before[..., :4], atol=1e-6)
    assert (np.abs(after[..., 4:] - before[..., 4:]) > 1e-6).all()
    prompts = jnp.broadcast_to(PROMPT[:, None], (2, 2, 3))
    alone = jax.jit(twist.apply)(twist.weights, prompts, batch.tokens)
    np.testing.assert_allclose(alone, before, atol=1e-5)


def test_a_twist_on_the_frozen_base_trains_its_head_only():
    base = policy_of("gpt2")
    twist = decoder_twist(CONFIGS["gpt2"], base.params)
    algorithm = ppo(optimizer=optax.adam(0.01), twist=twist)
    state = algorithm.init(base)
    assert len(jax.tree.leaves(state.optimizer["value"])) == 2 * 2 + 1
    state, info = jax.jit(algorithm.step)(state, Posterior(base, Tilt(1.0)), batch_of())
    assert np.isfinite(info.loss) and np.abs(state.heads["value"].params["kernel"]).max() > 0


@pytest.mark.optimized
def test_rematerialization_keeps_less():
    config = DecoderConfig.gpt2(64, width=64, layers=6, heads=2, context=128)
    shapes = jax.eval_shape(lambda: init_weights(jax.random.key(0), config))
    ids = jax.ShapeDtypeStruct((16, 128), jnp.int32)

    def memory(execution):
        loss = lambda weights, ids: packed_log_probs(config, execution, weights, ids).mean()
        return jax.jit(jax.grad(loss)).lower(shapes, ids).compile().memory_analysis().temp_size_in_bytes

    assert memory(Execution(scan_layers=True, remat=True)) < memory(Execution(scan_layers=True)) / 2


def test_master_weights_stay_wide_under_bf16():
    policy = policy_of("llama3", compute_dtype="bfloat16")
    grads = jax.jit(jax.grad(lambda params: score(policy.with_params(params), batch_of()).sum()))(
        policy.params
    )
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    exact = jax.jit(score)(policy_of("llama3"), batch_of())
    np.testing.assert_allclose(jax.jit(score)(policy, batch_of()), exact, atol=0.25)


def test_the_nnx_module_is_the_same_model():
    config = CONFIGS["qwen3"]
    module = DecoderModule(config, rngs=nnx.Rngs(0))
    policy = module.policy()
    assert sum(x.size for x in jax.tree.leaves(policy.params)) == count_parameters(config)
    tokens = batch_of().tokens
    ours = jax.jit(lambda policy, *ids: policy.logits(*ids))(policy, PROMPT[1], tokens[1])
    np.testing.assert_allclose(
        nnx.jit(lambda m, *ids: m(*ids))(module, PROMPT[1], tokens[1]), ours, atol=1e-6
    )
    state = nnx.state(module, nnx.Param)
    assert sum(x.size for x in jax.tree.leaves(state)) == count_parameters(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecoderConfig.gpt2(8, width=10, heads=4), "multiple of the number of heads, 4"),
        (lambda: DecoderConfig(8, 8, 2, 8, Attention(4, 3, 2), FeedForward(8)), "divide heads = 4; got 3"),
        (lambda: DecoderConfig(8, 8, 2, 8, Attention(4, 2, 2, windows=(1,)), FeedForward(8)), "layers; got 1"),
        (lambda: DecoderConfig(0, 8, 2, 8, Attention(4, 2, 2), FeedForward(8)), "vocab must be at least 1"),
    ],
)  # fmt: skip
def test_impossible_shapes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_deterministic_policies_are_equal_by_value():
    a, b = policy_of("gpt2"), decoder_policy(CONFIGS["gpt2"], random_weights(CONFIGS["gpt2"], 9))
    assert jax.tree.structure(a) == jax.tree.structure(b)
