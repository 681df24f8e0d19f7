"""Note 2, T2.6: which gradient flows are inference when stopped early."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from kl_rl import exact, measure
from kl_rl.exact import flows

losses = jax.jit(jax.vmap(measure.conditional_kl, in_axes=(0, None, None)))
vanilla = jax.jit(flows.vanilla_gradient_flow, static_argnames="num_steps")


@pytest.fixture
def world():
    """(log p0, reward, levels): 9 outcomes, 3 levels, p0 bounded away from 0."""
    rng = np.random.default_rng(5)
    log_base = jnp.asarray(np.log(rng.dirichlet(np.full(9, 6.0))))
    reward = jnp.asarray(np.repeat([0.0, 1.0, 2.0], 3))
    return log_base, reward, exact.reward_levels(reward)


@pytest.mark.theorem("T2.6")
def test_natural_flow_is_the_tilt_at_lambda_equal_to_time(world):
    log_base, reward, levels = world
    p, r = np.exp(log_base), np.asarray(reward)
    fisher = np.diag(p) - np.outer(p, p)
    step = np.linalg.pinv(fisher) @ (p * (r - p @ r))  # natural gradient of E_q r in the logits
    assert_allclose(step - p @ step, r - p @ r, rtol=1e-9)
    slope = lambda x: r - np.exp(x) @ r
    log_q, h, path = np.asarray(log_base), 0.01, []
    for index in range(200):  # Runge-Kutta for d log q / dt = r - E_q r; error of order h^4
        a = slope(log_q)
        b = slope(log_q + h / 2 * a)
        c = slope(log_q + h / 2 * b)
        log_q = log_q + h / 6 * (a + 2 * b + 2 * c + slope(log_q + h * c))
        if index in (49, 199):
            path.append(log_q)
    closed = flows.natural_gradient_flow(log_base, reward, jnp.array([0.5, 2.0]))
    assert_allclose(path, closed, atol=100 * h**4)
    for time, law in zip((0.5, 2.0), closed, strict=True):
        assert_allclose(law, exact.log_posterior(log_base, time * reward), rtol=1e-12)
    assert_allclose(losses(closed, log_base, levels), np.zeros(2), atol=1e-14)


@pytest.mark.theorem("T2.6")
@pytest.mark.parametrize("inverse_kl_weight", [np.inf, 0.8])
def test_velocity_of_the_vanilla_flow(world, inverse_kl_weight):
    """d log q / dt = q (A - E_q A) - sum q^2 (A - E_q A)."""
    log_base, reward, _ = world
    h = 1e-3
    path = vanilla(log_base, reward, step_size=h, num_steps=400, inverse_kl_weight=inverse_kl_weight)
    log_q = path[-2]
    q = np.exp(log_q)
    advantage = reward - (log_q - log_base) / inverse_kl_weight
    pull = q * (advantage - q @ advantage)
    assert_allclose((path[-1] - path[-3]) / (2 * h), pull - q @ pull, atol=h**2)
    assert np.max(np.abs(pull)) > 0.05


@pytest.mark.theorem("T2.6")
def test_vanilla_flow_leaves_the_zero_set_at_once_unless_p0_is_uniform_inside_levels(world):
    """C(t) = t^2/2 sum_r p0(r) (r - E r)^2 Var_{p0}(p0(y) | r) + O(t^3)."""
    log_base, reward, levels = world
    p, r = np.exp(log_base), np.asarray(reward)
    mass = np.bincount(levels.index, p)[levels.index]
    spread = p - (np.bincount(levels.index, p * p) / np.bincount(levels.index, p))[levels.index]
    rate = 0.5 * np.sum(p * (r - p @ r) ** 2 * spread**2)
    path = vanilla(log_base, reward, step_size=0.01, num_steps=2)
    error = losses(path[1:], log_base, levels) / (rate * np.array([0.01, 0.02]) ** 2) - 1
    assert abs(error[1]) < 0.05
    assert_allclose(error[1] / error[0], 2.0, rtol=0.1)
    even = jnp.log(mass / 3)
    far = vanilla(even, reward, step_size=0.5, num_steps=100)
    assert_allclose(losses(far, even, levels), np.zeros(101), atol=1e-13)
    assert np.exp(far[-1]) @ r > 1.7


@pytest.mark.theorem("T2.6")
def test_the_kl_penalized_vanilla_flow_returns_to_the_posterior(world):
    """C rises on the way and ends at 0, with q = p*; without the penalty it stays."""
    log_base, reward, levels = world
    path = vanilla(log_base, reward, step_size=1.0, num_steps=4000, inverse_kl_weight=1 / 0.7)
    loss = losses(path, log_base, levels)
    assert np.max(loss) > 1e-3
    assert abs(loss[-1]) < 1e-9
    assert_allclose(path[-1], exact.log_posterior(log_base, reward / 0.7), atol=1e-6)
    free = vanilla(log_base, reward, step_size=1.0, num_steps=4000)
    assert np.min(np.diff(losses(free, log_base, levels)[::400])) > 0
