"""Weights and advantages in float32: constant groups, many samples."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_rl.core.sampler import _inverse
from kl_rl.core.transform import Transform, transformed
from kl_rl.objectives.credit import group_normalized, leave_one_out
from kl_rl.objectives.weights import best_of_n


@pytest.mark.parametrize("size", [2, 3, 8, 10, 33])
@pytest.mark.parametrize("advantage", [group_normalized, leave_one_out])
def test_a_constant_group_has_no_advantage(advantage, size):
    """Exactly none: the mean of equal floats is often not equal to them, and the spread is divided by."""
    values = jnp.float32([[13.7], [100.3], [1.1], [-0.3]])
    group = jnp.broadcast_to(values, (4, size))
    assert jnp.any(jnp.mean(group, axis=-1) != group[:, 0]) or size == 2
    np.testing.assert_array_equal(jax.jit(advantage)(group), np.zeros((4, size)))


@pytest.mark.parametrize(("size", "n"), [(4, 4), (64, 4), (256, 4), (1024, 2), (4096, 4)])
def test_best_of_n_weights_of_many_samples(size, n):
    """Against exact binomial coefficients."""
    reward = np.random.default_rng(0).permutation(size)
    weight = np.asarray(best_of_n(jnp.asarray(reward, jnp.float32), n), np.float64)
    exact = [(math.comb(int(r) + 1, n) - math.comb(int(r), n)) / math.comb(size, n) for r in reward]
    assert weight.min() >= 0 and np.abs(weight - exact).sum() < 1e-4


def test_best_of_n_with_a_fractional_n():
    """Gamma functions in place of factorials, ties shared."""
    share = lambda count, n: math.gamma(count + 1) / math.gamma(count - n + 1) if count >= n else 0.0
    found = best_of_n(jnp.asarray([1.0, 1.0, 0.0, 2.0]), jnp.asarray(2.5))
    total = share(4, 2.5)
    third, tied = share(3, 2.5) / total, 1 - share(3, 2.5) / total
    np.testing.assert_allclose(found, [third / 2, third / 2, 0.0, tied], rtol=1e-6)


def test_all_of_the_mass_is_all_tokens():
    """Sums of a long row reach 1 before its end in float32; top_p = 1 leaves the law alone."""
    law = jax.nn.log_softmax(3.0 * jax.random.normal(jax.random.key(0), (150_000,), jnp.float32))
    kept = transformed(Transform(top_p=jnp.float32(1.0)), law, 0, horizon=1)
    assert np.isfinite(kept).all()
    np.testing.assert_allclose(kept, law, atol=1e-4)


def test_a_uniform_number_of_zero_is_no_rare_token():
    law = jnp.log(jnp.asarray([[1e-30, 0.5, 0.5]], jnp.float32))
    assert _inverse(law, jnp.zeros(1, jnp.float32)).tolist() == [1]
    assert _inverse(law, jnp.full(1, 1 - 2.0**-23, jnp.float32)).tolist() == [2]
