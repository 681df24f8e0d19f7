"""Note 1, first half: the posterior, its envelope, twists and path consistency."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from kl_rl import exact, objectives
from kl_rl.core.posterior import Threshold, Tilt
from kl_rl.objectives.credit import terminal_twist

divergence = jax.jit(exact.kl_divergence)
expectation = jax.jit(exact.expectation)
log_partition = jax.jit(exact.log_partition)
log_posterior = jax.jit(exact.log_posterior)
balance = jax.jit(objectives.subtrajectory_balance)


@pytest.mark.theorem("T1.1")
def test_variational_formula_and_its_gap(tiny):
    """E_q r - beta KL(q||p0) = beta log Z - beta KL(q||p*), whatever q."""
    evidence = Tilt(tiny.beta).log_evidence(tiny.reward)
    log_z = log_partition(tiny.log_base, evidence)
    for seed in range(5):
        log_q = jnp.log(np.random.default_rng(seed).dirichlet(np.ones(len(tiny.reward))))
        kept = expectation(log_q, tiny.reward) - tiny.beta * divergence(log_q, tiny.log_base)
        gap = tiny.beta * divergence(log_q, log_posterior(tiny.log_base, evidence))
        assert_allclose(kept, tiny.beta * log_z - gap, rtol=1e-11)
        assert gap > 0


@pytest.mark.theorem("T1.1")
@pytest.mark.parametrize("evidence", [Tilt(0.7), Threshold(1.0)])
def test_the_posterior_attains_log_z(tiny, evidence):
    log_l = evidence.log_evidence(tiny.reward)
    log_p = log_posterior(tiny.log_base, log_l)
    attained = expectation(log_p, log_l) - divergence(log_p, tiny.log_base)
    assert_allclose(attained, log_partition(tiny.log_base, log_l), rtol=1e-11)
    assert_allclose(
        jnp.exp(log_p), jnp.exp(tiny.log_base + log_l) / jnp.sum(jnp.exp(tiny.log_base + log_l)), rtol=1e-11
    )


@pytest.mark.theorem("C1.1")
def test_hard_evidence_makes_reverse_kl_infinite_and_forward_kl_finite(tiny):
    log_l = Threshold(1.0).log_evidence(tiny.reward)
    log_p = log_posterior(tiny.log_base, log_l)
    assert divergence(tiny.log_q, log_p) == jnp.inf
    assert jnp.isfinite(divergence(log_p, tiny.log_q))


def cumulant(log_base, reward, scale):
    return exact.log_partition(log_base, scale * reward)


cumulants = jax.jit(  # Lambda and its two derivatives
    lambda log_base, reward, scale: (
        cumulant(log_base, reward, scale),
        jax.grad(cumulant, 2)(log_base, reward, scale),
        jax.grad(jax.grad(cumulant, 2), 2)(log_base, reward, scale),
    )
)


@pytest.mark.theorem("T1.2")
@pytest.mark.parametrize("scale", [-1.3, 0.0, 0.4, 2.5])
def test_derivatives_of_the_cumulant_are_moments_of_the_tilt(tiny, scale):
    log_p = log_posterior(tiny.log_base, scale * tiny.reward)
    mean = expectation(log_p, tiny.reward)
    variance = expectation(log_p, (tiny.reward - mean) ** 2)
    _, slope, curvature = cumulants(tiny.log_base, tiny.reward, scale)
    assert_allclose(slope, mean, rtol=1e-11, atol=1e-13)
    assert_allclose(curvature, variance, rtol=1e-10)
    step = 1e-4  # central differences: error of order step^2
    high, low = (cumulants(tiny.log_base, tiny.reward, scale + sign * step)[0] for sign in (1, -1))
    assert_allclose((high - low) / (2 * step), mean, atol=20 * step**2)


@pytest.mark.theorem("T1.2")
def test_kl_of_the_tilt_three_ways(tiny):
    """KL(p*||p0) = lambda Lambda' - Lambda = integral of t Lambda''(t) = - d(beta log Z)/d beta."""
    scale, problem = 1.0 / tiny.beta, (tiny.log_base, tiny.reward)
    kl = divergence(tiny.log_posterior, tiny.log_base)
    value, slope, _ = cumulants(*problem, scale)
    assert_allclose(scale * slope - value, kl, rtol=1e-10)
    nodes, weight = np.polynomial.legendre.leggauss(24)
    times = scale / 2 * (nodes + 1)
    curvature = np.array([cumulants(*problem, time)[2] for time in times])
    assert_allclose(np.sum(weight * scale / 2 * times * curvature), kl, rtol=1e-10)
    slope_in_beta = jax.jit(jax.grad(lambda beta: beta * cumulant(*problem, 1 / beta)))(tiny.beta)
    assert_allclose(slope_in_beta, -kl, rtol=1e-10)


@pytest.mark.theorem("T1.2")
def test_moments_by_dynamic_programming(tiny):
    moments = exact.posterior_moments(
        tiny.process, tiny.automaton, tiny.prompt, tiny.horizon, tiny.beta, tiny.end
    )
    mean = expectation(tiny.log_posterior, tiny.reward)
    assert_allclose(moments.log_z, log_partition(tiny.log_base, tiny.log_evidence), rtol=1e-10)
    assert_allclose(moments.reward_mean, mean, rtol=1e-10)
    variance = expectation(tiny.log_posterior, (tiny.reward - mean) ** 2)
    assert_allclose(moments.reward_variance, variance, rtol=1e-9)
    assert_allclose(moments.kl, divergence(tiny.log_posterior, tiny.log_base), rtol=1e-9)


def optimal_twist(tiny, prefixes):
    """log psi_t at every prefix by its definition E_{p0}[l | prefix], [N, T + 1]; p0 and p0 l of prefixes."""
    base, base_child = prefixes(tiny, tiny.log_base)
    weighted, weighted_child = prefixes(tiny, tiny.log_base + tiny.log_evidence)
    before_end = np.pad(np.log(weighted / base), ((0, 0), (0, 1)))
    twist = terminal_twist(jnp.asarray(before_end), tiny.log_evidence, tiny.strings.mask)
    return np.asarray(twist), (base, base_child), weighted_child


@pytest.mark.theorem("T1.3")
def test_soft_bellman_recursion_and_posterior_tokens(tiny, prefixes):
    twist, (base, base_child), weighted_child = optimal_twist(tiny, prefixes)
    live = np.asarray(tiny.strings.mask) > 0
    p0 = base_child / base[..., None]  # p0(v | prefix)
    child_twist = np.where(base_child > 0, weighted_child / np.where(base_child > 0, base_child, 1.0), 0.0)
    recursion = np.log(np.sum(p0 * child_twist, axis=-1))
    assert_allclose(recursion[live], twist[:, :-1][live], rtol=1e-11, atol=1e-13)
    star, star_child = prefixes(tiny, tiny.log_posterior)
    by_twist = p0 * child_twist / np.exp(twist[:, :-1])[..., None]
    assert_allclose(by_twist[live], (star_child / star[..., None])[live], rtol=1e-11, atol=1e-15)
    assert_allclose(twist[:, 0], log_partition(tiny.log_base, tiny.log_evidence), rtol=1e-11)


@pytest.mark.theorem("T1.3")
def test_twists_by_dynamic_programming(tiny, prefixes):
    """The library's backward messages start at log Z, and its twisted policy is p*."""
    twist, _, _ = optimal_twist(tiny, prefixes)
    problem = (tiny.process, tiny.automaton)
    messages = exact.log_twists(*problem, tiny.horizon, tiny.beta, tiny.end)
    first = np.exp(tiny.process.log_initial) @ np.exp(messages[0, :, 0])
    assert_allclose(np.log(first), twist[0, 0], rtol=1e-10)
    log_z = exact.lattice_log_partition(*problem, tiny.prompt, tiny.horizon, tiny.beta, tiny.end)
    assert_allclose(log_z, twist[0, 0], rtol=1e-10)
    policy = exact.posterior_policy(*problem, tiny.horizon, tiny.beta, tiny.end)
    log_q = jax.jit(exact.log_law)(policy, tiny.prompt, tiny.strings)
    assert_allclose(log_q, tiny.log_posterior, rtol=1e-9, atol=1e-12)


def token_log_ratio(tiny, log_q, prefixes):
    """log q - log p0 of the token at each position of each string; [N, T]."""

    def tokens(log_p):
        prefix, child = prefixes(tiny, log_p)
        chosen = np.take_along_axis(child, np.asarray(tiny.strings.tokens)[..., None], axis=-1)[..., 0]
        return np.log(chosen / prefix)

    return jnp.asarray(np.where(tiny.strings.mask > 0, tokens(log_q) - tokens(tiny.log_base), 0.0))


@pytest.mark.theorem("T1.4")
def test_all_residual_losses_vanish_string_by_string_at_the_posterior(tiny, prefixes):
    twist, _, _ = optimal_twist(tiny, prefixes)
    ratio = token_log_ratio(tiny, tiny.log_posterior, prefixes)
    mask, log_l = tiny.strings.mask, tiny.log_evidence

    @jax.jit
    def losses(ratio, twist):
        rows = [objectives.subtrajectory_balance(ratio, twist, mask, decay=d) for d in (0.1, 3.0)]
        rows += [objectives.path_consistency(ratio, twist, mask, window=w) for w in (1, 2, 3)]
        rows.append(objectives.trajectory_balance(jnp.sum(ratio, -1) - log_l, twist[:, 0]))
        return jnp.stack(rows)

    assert_allclose(losses(ratio, jnp.asarray(twist)), np.zeros((6, len(tiny.reward))), atol=1e-25)
    assert jnp.min(jnp.max(losses(0.9 * ratio, jnp.asarray(twist)), axis=1)) > 1e-4


@pytest.mark.theorem("T1.4")
@pytest.mark.parametrize("seed", range(2))
def test_single_step_residuals_have_no_other_zero(smallest, prefixes, seed):
    """Gauss-Newton from random (q, twist) on all one-step residuals ends at p* and the optimal twist only."""
    twist, _, _ = optimal_twist(smallest, prefixes)
    strings, log_base = smallest.strings, smallest.log_base
    base, base_child = prefixes(smallest, log_base)
    log_p0 = np.log(np.take_along_axis(base_child, np.asarray(strings.tokens)[..., None], -1)[..., 0] / base)
    codes = [
        np.unique(np.asarray(strings.tokens[:, :t]), axis=0, return_inverse=True)[1].ravel() for t in range(3)
    ]
    row = np.stack([codes[t] + 2**t - 1 for t in range(3)], axis=1)  # 7 prefixes; [8, 3]

    def residuals(x):
        logits, log_twist = x[:14].reshape(7, 2), x[14:]
        log_q = jnp.take_along_axis(jax.nn.log_softmax(logits)[row], strings.tokens[..., None], -1)[..., 0]
        inner = jnp.concatenate([log_twist[row], jnp.zeros((8, 1))], axis=1)
        value = terminal_twist(inner, smallest.log_evidence, strings.mask)
        return (value[:, :-1] + log_q - log_p0 - value[:, 1:]).ravel()

    linearize = jax.jit(lambda x: (residuals(x), jax.jacobian(residuals)(x)))
    x = np.random.default_rng(seed).normal(size=21)
    assert np.max(np.abs(linearize(x)[0])) > 0.1
    for _ in range(25):
        value, slope = map(np.asarray, linearize(x))
        x = x - np.linalg.lstsq(slope, value, rcond=1e-9)[0]
    assert_allclose(linearize(x)[0], np.zeros(24), atol=1e-12)
    assert_allclose(x[14:][row], twist[:, :3], rtol=1e-9, atol=1e-10)
    log_q = np.log(np.exp(x[:14].reshape(7, 2)) / np.sum(np.exp(x[:14].reshape(7, 2)), axis=1, keepdims=True))
    chosen = np.take_along_axis(log_q[row], np.asarray(strings.tokens)[..., None], -1)[..., 0]
    assert_allclose(np.sum(chosen, axis=1), smallest.log_posterior, rtol=1e-9)


@pytest.mark.theorem("C1.2")
def test_without_the_boundary_value_every_policy_is_consistent(tiny, prefixes):
    """With the twist 'sum of log q - log p0 so far' all residuals vanish for any q, unless it must end at l."""
    ratio = token_log_ratio(tiny, tiny.log_q, prefixes)
    free = jnp.concatenate([jnp.zeros_like(ratio[:, :1]), jnp.cumsum(ratio, axis=-1)], axis=-1)
    loss = balance(ratio, free, tiny.strings.mask, decay=1.0)
    assert_allclose(loss, jnp.zeros(len(loss)), atol=1e-25)
    bound = terminal_twist(free, tiny.log_evidence, tiny.strings.mask)
    assert jnp.max(balance(ratio, bound, tiny.strings.mask, decay=1.0)) > 1e-3
