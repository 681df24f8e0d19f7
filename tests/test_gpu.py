"""Numerics on an accelerator: JAX_PLATFORMS= python -m pytest -m gpu tests/test_gpu.py (or benchmarks/gpu.py)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoders import CONFIGS, policy_of, random_weights

import kl_rl
from kl_rl import Trajectories, score
from kl_rl.core.sampler import generate
from kl_rl.models import DecoderConfig, Execution, decoder_policy
from kl_rl.models.attention import row_attention
from kl_rl.models.positions import layout_of

pytestmark = pytest.mark.gpu
PROMPT = jnp.asarray([[-1, -1, 3, 5, 6], [1, 2, 3, 4, 5], [7, -1, -1, -1, -1], [8, 9, -1, -1, -1]])
BOUND = {"float32": 1e-5, "bfloat16": 0.1}  # as in tests/test_contract.py


@pytest.fixture(autouse=True)
def accelerator():
    """The first device, if it is one; float32 products in float32 and not in a shorter format."""
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda", "rocm", "tpu"):
        pytest.skip("needs an accelerator")
    with jax.default_matmul_precision("highest"):
        yield device


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma3"])
def test_decoding_equals_teacher_forcing(name, dtype):
    policy = policy_of(name, dtype=jnp.dtype(dtype))
    draw = jax.jit(functools.partial(generate, num_samples=3, horizon=7))
    drawn = draw(policy, jax.random.key(1), PROMPT)
    reward = jnp.zeros(drawn.tokens.shape[:2])
    batch = Trajectories(PROMPT, drawn.tokens, drawn.mask, jnp.ones_like(drawn.mask), drawn.log_model, reward)
    np.testing.assert_allclose(drawn.log_model, jax.jit(score)(policy, batch), atol=BOUND[dtype], rtol=0)


def _attention_case(kv_heads):
    """Queries, keys, values and a cotangent of unit normal entries, [B, S, H, D], rounded to bfloat16."""
    shape = DecoderConfig.gpt2(31, width=256, layers=1, heads=4, context=128)
    rng, part = np.random.default_rng(0), (2, 128, 4, 64)
    draw = lambda heads: jnp.asarray(rng.standard_normal((*part[:2], heads, part[3])), jnp.bfloat16)
    return shape, (draw(4), draw(kv_heads), draw(kv_heads)), draw(4)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_flash_attention_equals_plain_attention(accelerator, kv_heads, padded):
    if accelerator.platform == "tpu":
        pytest.skip("cuDNN is for NVIDIA GPUs")
    shape, parts, cotangent = _attention_case(kv_heads)
    ids = jnp.where(jnp.arange(128) < jnp.array([[0], [40]]), -1, 1) if padded else None
    layout = None if ids is None else layout_of(ids)
    live = jnp.ones((2, 128, 1, 1)) if ids is None else (ids >= 0)[..., None, None].astype(jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def both(how, query, key, value):
        def out(*parts):
            return row_attention(shape, Execution(attention=how), *parts, layout, None) * live.astype(
                query.dtype
            )

        y, back = jax.vjp(out, query, key, value)
        return y, *back(cotangent.astype(y.dtype))

    flash = both("cudnn", *parts)
    exact = both("xla", *(part.astype(jnp.float32) for part in parts))
    # Rounding of inputs is shared. Outputs are averages of values (|v| < 5): the weights and the result are rounded to
    # 2^-9 each. Gradients go through one more product of rounded factors, and sum over up to 128 queries.
    for got, want, bound in zip(flash, exact, (2**-7, 2**-5, 2**-5, 2**-5), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            got.astype(jnp.float32), want, atol=bound * float(jnp.abs(want).max()), rtol=0
        )


@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma3"])
def test_a_training_step_equals_that_of_the_cpu(accelerator, name):
    """DPO with plain gradient descent, whose update is the gradient: nothing is divided by a small number."""
    tokens = np.random.default_rng(1).integers(0, 31, (4, 2, 6)).astype(np.int32)
    ones, reward = np.ones(tokens.shape, np.float32), np.tile(np.float32([1, 0]), (4, 1))
    batch = Trajectories(np.asarray(PROMPT), tokens, ones, ones, -ones, reward)
    algorithm = kl_rl.dpo(optimizer=optax.sgd(0.1))
    rows, after = CONFIGS[name], {}
    for device in (accelerator, jax.devices("cpu")[0]):
        base = decoder_policy(rows, random_weights(rows), Execution())
        own = base.with_params(jax.tree.map(lambda x: 1.01 * x, base.params))
        state, posterior, data = jax.device_put(
            (algorithm.init(own), kl_rl.Posterior(base, kl_rl.Tilt(0.5)), batch), device
        )
        state, info = jax.jit(algorithm.step)(state, posterior, data)
        after[device.platform] = jax.device_get((state.policy.params, info.loss))
    (params, loss), (wanted, wanted_loss) = after.values()
    assert loss == pytest.approx(wanted_loss, abs=1e-5)
    moved = jax.tree.leaves(
        jax.tree.map(lambda a, b: np.abs(a - 1.01 * b).max(), wanted, random_weights(rows))
    )
    assert max(moved) > 1e-3  # the step did something, so that agreeing means something
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=0), params, wanted)
