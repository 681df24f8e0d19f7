"""Note 4, second half: the balance heuristic, and self-normalized weights."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from kl_rl import exact, objectives
from kl_rl.core.posterior import Threshold, Tilt
from kl_rl.measure.calibration.balance import balance, calibration_terms
from kl_rl.measure.calibration.levels import build_cells
from kl_rl.measure.samples import Samples
from kl_rl.objectives import weights

REWARD = np.array([0.0, 0.0, 1.0, 1.0])


@pytest.mark.theorem("T4.5")
@pytest.mark.parametrize("seed", range(2))
def test_balance_weights_are_unbiased_for_both_laws_and_bounded(seed):
    """Exact expectation over ALL samples of two from q and three from p0: q(r) and p0(r), level by level."""
    q, p = np.random.default_rng(seed).dirichlet(np.ones(4), 2)
    log_ratio, tuned_share = np.log(q / p), 2 / 5
    expected = np.zeros((2, 2))
    for index in product(range(4), repeat=5):
        i, j = np.array(index[:2]), np.array(index[2:])
        cells = build_cells(
            Samples.from_log_ratio(REWARD[i], log_ratio[i]),
            Samples.from_log_ratio(REWARD[j], log_ratio[j]),
            "exact",
        )
        given = balance(cells)
        chance = np.prod(q[i]) * np.prod(p[j])
        level = (cells.per_cell(cells.reward) / cells.per_cell()).astype(int)
        expected[0, level] += chance * np.exp(given.log_q)
        expected[1, level] += chance * np.exp(given.log_p)
        assert np.max(given.log_h) < -np.log(tuned_share)
        assert np.max(given.log_k) < -np.log1p(-tuned_share)
    assert_allclose(expected, [np.bincount(REWARD.astype(int), law) for law in (q, p)], rtol=1e-10)


@pytest.mark.theorem("T4.5")
def test_balance_losses_are_nonnegative_and_zero_for_a_function_of_the_reward():
    """Whatever the samples: the two weighted pools are laws on the same points."""
    rng = np.random.default_rng(0)
    for log_ratio, zero in (
        (np.array([0.7, 0.7, -2.0, -2.0]), True),
        (np.array([0.7, -0.1, -2.0, 1.0]), False),
    ):
        for _ in range(20):
            sets = [rng.integers(0, 4, size) for size in (8, 5)]
            tuned, base = (Samples.from_log_ratio(REWARD[i], log_ratio[i]) for i in sets)
            cells = build_cells(tuned, base, "exact")
            values, _ = calibration_terms(cells, balance(cells))
            losses = np.concatenate([values[name] for name in ("C", "C_fwd", "C_JS")])
            assert np.all(losses >= 0)
            assert np.max(losses) < 1e-14 if zero else np.min(losses) > 1e-4


def imitation(log_evidence):
    """Sum over k of -w_k log q_k with self-normalized weights (expected_gradient takes the mean over k)."""

    def objective(log_q, index):
        weight = weights.self_normalized(log_evidence[index][None])
        return index.shape[0] * objectives.weighted_likelihood(log_q, weight)

    return objective


@pytest.mark.theorem("T4.6")
def test_soft_evidence_makes_self_normalized_imitation_miss_the_posterior(table):
    """At q = p* the expected gradient over ALL pairs is not 0, and shrinks with K."""
    star = table.at(table.reaching(table.log_posterior))
    log_l = Tilt(table.beta).log_evidence(table.reward)
    sizes = [
        np.max(np.abs(star.expected_gradient(imitation(log_l), num_samples=k, log_sampler=table.log_base)))
        for k in (1, 2)
    ]
    assert 1e-2 < sizes[1] < sizes[0]
    full = lambda log_q: exact.kl_divergence(table.log_posterior, log_q)
    assert_allclose(star.gradient(full), np.zeros_like(star.gradient(full)), atol=1e-12)


@pytest.mark.theorem("T4.6")
@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_its_fixed_point_is_a_flattened_tilt(smallest, num_samples):
    """E sum_k w_k 1[y_k = y] = K p0(y) E[l(y) / (l(y) + l_2 + .. + l_K)]: p0 times a function of r."""
    p, evidence = np.exp(smallest.log_base), np.exp(np.asarray(smallest.log_evidence))
    tuples = np.array(list(product(range(8), repeat=num_samples)))
    weight = jax.jit(weights.self_normalized)(smallest.log_evidence[tuples])
    chance = np.prod(p[tuples], axis=1)
    law = sum(np.bincount(tuples[:, k], chance * weight[:, k], 8) for k in range(num_samples))
    rest = np.array(list(product(range(8), repeat=num_samples - 1)), int)
    others = np.prod(p[rest], axis=1), np.sum(evidence[rest], axis=1)
    formula = [num_samples * p[y] * (others[0] @ (evidence[y] / (evidence[y] + others[1]))) for y in range(8)]
    assert_allclose(law, formula, rtol=1e-10)
    gain, order = law / p, np.argsort(evidence)
    rise, full = gain[order][1:] / gain[order][:-1], evidence[order][1:] / evidence[order][:-1]
    strict = full > 1 + 1e-9
    assert np.all(rise[strict] < full[strict])  # flatter than p*
    assert_allclose(rise[~strict], np.ones(np.sum(~strict)), rtol=1e-10)  # C = 0


@pytest.mark.theorem("T4.6")
@pytest.mark.parametrize("num_samples", [1, 2])
def test_a_hard_filter_scales_the_gradient_by_the_chance_that_something_passes(tiny, num_samples):
    """Expected gradient = (1 - (1 - Z)^K) grad KL(p* || q) for any q; no sample passing gives 0, not NaN."""
    log_l = Threshold(2.0).log_evidence(tiny.reward)
    log_p = exact.log_posterior(tiny.log_base, log_l)
    passing = np.exp(exact.log_partition(tiny.log_base, log_l))
    assert 0.05 < passing < 0.6
    actual = tiny.expected_gradient(imitation(log_l), num_samples=num_samples, log_sampler=tiny.log_base)
    expected = (1 - (1 - passing) ** num_samples) * tiny.gradient(
        lambda log_q: exact.kl_divergence(log_p, log_q)
    )
    assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)
    assert jnp.all(weights.self_normalized(jnp.full((1, 2), -jnp.inf)) == 0)
