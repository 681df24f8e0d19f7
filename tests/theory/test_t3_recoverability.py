"""Note 3: calibration loss as a projection, what undoing the reward recovers, and what it bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from kl_rl import exact, measure
from kl_rl.measure import queries

budget_of = jax.jit(measure.exact_budget)
within = jax.jit(measure.conditional_kl)
symmetric = jax.jit(measure.conditional_js)
divergence = jax.jit(exact.kl_divergence)
undo = jax.jit(measure.undo_reward)


def kl(q, p):
    """KL of two probability vectors, by the definition."""
    q, p = q[q > 0], p[q > 0]
    return float(q @ np.log(q / p))


def functions_of_reward(levels, count=20):
    """Random log-functions of the reward, on strings; [count, N]."""
    rng = np.random.default_rng(7)
    return rng.normal(scale=2.0, size=(count, len(levels.value)))[:, np.asarray(levels.index)]


def reweighted(log_p, log_weight):
    law = np.exp(np.asarray(log_p) + log_weight)
    return law / law.sum()


@pytest.mark.theorem("T3.1")
def test_calibration_loss_is_the_distance_to_the_nearest_tilt(random_pair):
    """KL(q || p0 f / Z_f) = C + KL(q(r) || p0 f (r)) for every f; least at f = q(r) / p0(r)."""
    log_q, log_p, reward, levels = random_pair
    q, index = np.exp(log_q), np.asarray(levels.index)
    loss = float(within(log_q, log_p, levels))
    for log_f in functions_of_reward(levels):
        tilted = reweighted(log_p, log_f)
        total = loss + kl(np.bincount(index, q), np.bincount(index, tilted))
        assert_allclose(kl(q, tilted), total, rtol=1e-10)
    best = exact.level_log_prob(log_q, levels) - exact.level_log_prob(log_p, levels)
    assert_allclose(kl(q, reweighted(log_p, np.asarray(best)[index])), loss, rtol=1e-9)


@pytest.mark.theorem("T3.1")
@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_calibration_loss_is_the_beta_free_part_of_the_distance_to_the_posterior(random_pair, beta):
    log_q, log_p, reward, levels = random_pair
    result = budget_of(log_q, log_p, reward, levels, beta)
    star = reweighted(log_p, np.asarray(reward) / beta)
    between = kl(np.bincount(levels.index, np.exp(log_q)), np.bincount(levels.index, star))
    assert_allclose(result.kl_q_pstar, result.C + between, rtol=1e-9)


@pytest.mark.theorem("T3.2")
def test_finer_statistics_leave_less_and_nested_ones_attribute_the_kl(random_pair):
    log_q, log_p, _, levels = random_pair
    q, p, coarse = np.exp(log_q), np.exp(log_p), np.asarray(levels.index)
    fine = 3 * coarse + np.arange(12) % 3  # every level in up to three parts
    names, fine = np.unique(fine, return_inverse=True)
    parent = names // 3
    parts = exact.Levels(jnp.arange(float(len(names))), jnp.asarray(fine.ravel()))
    q_fine, p_fine = np.bincount(fine, q), np.bincount(fine, p)
    q_coarse, p_coarse = np.bincount(coarse, q), np.bincount(coarse, p)
    second = sum(
        q_coarse[g] * kl(q_fine[parent == g] / q_coarse[g], p_fine[parent == g] / p_coarse[g])
        for g in range(4)
    )
    left = float(within(log_q, log_p, parts))
    assert_allclose(kl(q_coarse, p_coarse) + second + left, kl(q, p), rtol=1e-10)
    assert_allclose(within(log_q, log_p, levels), second + left, rtol=1e-10)
    assert second > 1e-3 and left >= 0


@pytest.mark.theorem("T3.3")
def test_forward_loss_is_what_no_reweighting_by_the_reward_recovers(random_pair):
    """KL(p0 || w q / Z_w) = C_fwd + KL(p0(r) || w q (r)); a convex solve finds the same minimum."""
    log_q, log_p, reward, levels = random_pair
    p, index = np.exp(log_p), np.asarray(levels.index)
    result = budget_of(log_q, log_p, reward, levels, 1.0)
    for log_w in functions_of_reward(levels):
        tilted = reweighted(log_q, log_w)
        total = result.C_fwd + kl(np.bincount(index, p), np.bincount(index, tilted))
        assert_allclose(kl(p, tilted), total, rtol=1e-10)
    undone = undo(log_q, log_p, levels)
    assert_allclose(divergence(log_p, undone), result.C_fwd, rtol=1e-9)
    log_w = np.zeros(4)
    for _ in range(100):  # damped Newton on the convex log Z_w - E_{p0} log w, its gauge removed by pinv
        law = np.bincount(index, reweighted(log_q, log_w[index]))
        slope = law - np.bincount(index, p)
        step = np.linalg.pinv(np.diag(law) - np.outer(law, law)) @ slope
        log_w -= step / (1 + np.sqrt(step @ slope))
    assert_allclose(kl(p, reweighted(log_q, log_w[index])), result.C_fwd, rtol=1e-9)
    assert_allclose(reweighted(log_q, log_w[index]), np.exp(undone), rtol=1e-8)


@pytest.mark.theorem("T3.3")
def test_forward_loss_is_zero_exactly_when_undoing_the_reward_recovers_the_base(random_pair):
    log_q, log_p, reward, levels = random_pair
    star = jnp.log(reweighted(log_p, 1.7 * np.asarray(reward)))
    assert abs(float(within(log_p, star, levels))) < 1e-14
    assert_allclose(undo(star, log_p, levels), log_p, rtol=1e-10)
    assert np.max(np.abs(np.exp(undo(log_q, log_p, levels)) - np.exp(log_p))) > 1e-2


def query_losses(q, p, index, answer):
    """E_{r~q} TV and E_{r~q} KL between q(h|r) and p0(h|r) for answers drawn from answer[y]; [N, H]."""
    total_variation = relative = 0.0
    for g in np.unique(index):
        inside = index == g
        a, b = q[inside] @ answer[inside] / q[inside].sum(), p[inside] @ answer[inside] / p[inside].sum()
        total_variation += q[inside].sum() * 0.5 * np.abs(a - b).sum()
        relative += q[inside].sum() * kl(a, b)
    return total_variation, relative


@pytest.mark.theorem("T3.4")
@pytest.mark.parametrize("noisy", [False, True])
def test_calibration_loss_bounds_every_query(random_pair, noisy):
    log_q, log_p, _, levels = random_pair
    q, p, index = np.exp(log_q), np.exp(log_p), np.asarray(levels.index)
    loss = float(within(log_q, log_p, levels))
    rng = np.random.default_rng(3)
    for _ in range(100):
        size = int(rng.integers(2, 6))
        answer = rng.dirichlet(np.full(size, 0.3), 12) if noisy else np.eye(size)[rng.integers(0, size, 12)]
        total_variation, relative = query_losses(q, p, index, answer)
        assert total_variation <= np.sqrt(loss / 2)
        assert relative <= loss
    assert_allclose(query_losses(q, p, index, np.eye(12))[1], loss, rtol=1e-10)  # attained: "which string?"


@pytest.mark.theorem("T3.4")
def test_the_library_query_through_a_common_kernel_obeys_the_bound(random_pair):
    log_q, log_p, _, levels = random_pair
    index, kernel = np.asarray(levels.index), np.random.default_rng(4).dirichlet(np.full(3, 0.3), 12)
    measured = queries.latent_state_tv(np.asarray(log_p), np.asarray(log_q), index, kernel)
    assert_allclose(measured, query_losses(np.exp(log_q), np.exp(log_p), index, kernel)[0], rtol=1e-10)
    assert 0.01 < measured <= queries.latent_state_bound(float(within(log_q, log_p, levels)))


@pytest.mark.theorem("T3.4")
def test_the_total_variation_bound_is_sharp_for_small_changes():
    """One level, a fair coin moved by e: TV = e, sqrt(C / 2) = e + O(e^3)."""
    for shift in (0.1, 0.01):
        q, p = np.array([0.5 + shift, 0.5 - shift]), np.array([0.5, 0.5])
        total_variation, loss = query_losses(q, p, np.zeros(2, int), np.eye(2))
        assert 1 <= np.sqrt(loss / 2) / total_variation < 1 + shift**2


@pytest.mark.theorem("T3.5")
def test_symmetric_loss_is_symmetric_bounded_and_zero_only_with_c(random_pair):
    log_q, log_p, reward, levels = random_pair
    forth, back = float(symmetric(log_q, log_p, levels)), float(symmetric(log_p, log_q, levels))
    assert_allclose(forth, back, rtol=1e-11)
    q, p, index = np.exp(log_q), np.exp(log_p), np.asarray(levels.index)
    by_level = 0.0
    for g in range(4):
        a, b = q[index == g], p[index == g]
        weight, a, b = (a.sum() + b.sum()) / 2, a / a.sum(), b / b.sum()
        by_level += weight * (kl(a, (a + b) / 2) + kl(b, (a + b) / 2)) / 2
    assert_allclose(forth, by_level, rtol=1e-10)
    loss, forward = within(log_q, log_p, levels), within(log_p, log_q, levels)
    assert 0 < forth < min(np.log(2), np.log(2) / 4 * (loss + forward))
    star = jnp.log(reweighted(log_p, -1.2 * np.asarray(reward)))
    assert abs(float(symmetric(star, log_p, levels))) < 1e-14


@pytest.mark.theorem("T3.5")
def test_bound_of_the_symmetric_loss_by_the_other_two_is_sharp():
    """q lives where p0 does not and drops a rare part e of it: C_JS / (C + C_fwd) tends to (log 2) / 4."""
    levels = exact.Levels(jnp.arange(2.0), jnp.array([0, 0, 1]))
    ratios = []
    for rare in (1e-1, 1e-2, 1e-4):
        log_q = jnp.log(jnp.array([rare**3, 1 - rare**3 - 1e-9, 1e-9]))
        log_p = jnp.log(jnp.array([1e-9 * rare, 1e-9 * (1 - rare), 1 - 1e-9]))
        both = within(log_q, log_p, levels) + within(log_p, log_q, levels)
        ratios.append(float(symmetric(log_q, log_p, levels) / both) / (np.log(2) / 4))
    assert np.all(np.diff(ratios) > 0) and 0.999 < ratios[-1] < 1


@pytest.mark.theorem("T3.5")
def test_symmetric_loss_reaches_log_two_for_disjoint_conditionals():
    """Also at a level that only one of the two laws visits: there the other has no conditional at all."""
    levels = exact.Levels(jnp.arange(2.0), jnp.array([0, 0, 1, 1]))
    p = jnp.log(jnp.array([0.25, 0.0, 0.75, 0.0]))
    q = jnp.log(jnp.array([0.0, 0.6, 0.0, 0.4]))
    assert_allclose(symmetric(q, p, levels), np.log(2), rtol=1e-12)


@pytest.mark.theorem("T3.5")
def test_symmetric_loss_counts_a_level_visited_by_one_law_only_as_log_two():
    levels = exact.Levels(jnp.arange(2.0), jnp.array([0, 0, 1, 1]))
    p, q = jnp.log(jnp.full(4, 0.25)), jnp.log(jnp.array([0.5, 0.5, 0.0, 0.0]))
    assert_allclose(symmetric(q, p, levels), 0.25 * np.log(2), rtol=1e-12)


@pytest.mark.theorem("C3.1")
def test_collapse_onto_one_intact_level_hides_the_damage_from_c():
    """C weights levels by q: as q leaves the damaged level C tends to 0 and C_fwd keeps its value."""
    levels = exact.Levels(jnp.arange(2.0), jnp.array([0, 0, 1, 1]))
    log_p = jnp.log(jnp.full(4, 0.25))
    damaged = 0.5 * np.log(0.5 / 0.99) + 0.5 * np.log(0.5 / 0.01)
    for left in (0.1, 0.001):
        log_q = jnp.log(jnp.array([0.99 * left, 0.01 * left, (1 - left) / 2, (1 - left) / 2]))
        assert within(log_q, log_p, levels) < left * np.log(2)
        assert_allclose(within(log_p, log_q, levels), 0.5 * damaged, rtol=1e-10)


@pytest.mark.theorem("C3.2")
def test_a_filter_has_no_calibration_loss_and_infinite_forward_loss(random_pair):
    _, log_p, reward, levels = random_pair
    log_q = exact.log_posterior(log_p, jnp.where(reward >= 0.5, 0.0, -jnp.inf))
    assert_allclose(undo(log_q, log_p, levels), log_q, rtol=1e-12)  # what was kept comes back as in p0
    inside = log_q - exact.level_log_prob(log_q, levels)[levels.index]
    assert_allclose(
        inside[reward >= 0.5], (log_p - exact.level_log_prob(log_p, levels)[levels.index])[reward >= 0.5]
    )
    result = budget_of(log_q, log_p, reward, levels, 1.0)
    assert abs(float(result.C)) < 1e-14
    assert result.C_fwd == jnp.inf
