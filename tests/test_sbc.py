"""Simulation-based calibration: ranks, their uniformity, and what it can and cannot see."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import chi2 as chi2_law

from kl_rl import exact
from kl_rl.measure import sbc

DRAWS = 7


@pytest.fixture(scope="module")
def strings():
    return exact.enumerate_strings(3, 4)


@pytest.fixture(scope="module")
def truth(strings):
    """A random law in which the second half of the text depends on the first."""
    rng = np.random.default_rng(0)
    return np.log(rng.dirichlet(np.full(len(strings.tokens), 0.5)))


def normalized(log_q):
    return log_q - np.log(np.exp(log_q - log_q.max()).sum()) - log_q.max()


def test_rank_counts_the_draws_below_and_shares_the_ties():
    rng = np.random.default_rng(1)
    draws = np.tile([0.0, 1.0, 1.0, 1.0, 2.0], (6000, 1))
    ranks = sbc.rank_statistics(np.full(6000, 1.0), draws, rng)
    counts = np.bincount(ranks, minlength=6)
    assert counts[0] == counts[5] == 0
    stderr = math.sqrt(6000 * 0.25 * 0.75)
    assert np.all(np.abs(counts[1:5] - 1500) < 4 * stderr)
    assert sbc.rank_statistics(np.array([-1.0, 9.0]), draws[:2], rng).tolist() == [0, 5]
    lowest = np.full((2, 3), -np.inf)
    assert set(sbc.rank_statistics(np.array([-np.inf, 0.0]), lowest, rng)) <= {0, 1, 2, 3}


def test_uniformity_of_a_table_worked_by_hand():
    """Counts 4, 1, 1 on three ranks: expected 2, chi2 = (4 + 1 + 1) / 2 = 3, p = exp(-3 / 2), distance 1/3."""
    result = sbc.uniformity(np.array([0, 0, 0, 0, 1, 2]), 2)
    assert_allclose([result.chi2, result.p_value], [3.0, math.exp(-1.5)], rtol=1e-12)
    assert_allclose(result.ecdf_distance, 4 / 6 - 1 / 3, rtol=1e-12)
    assert result.histogram.tolist() == [4, 1, 1]
    even = sbc.uniformity(np.arange(12), 11)
    assert (even.chi2, even.p_value) == (0.0, 1.0)
    assert_allclose(even.ecdf_distance, 0.0, atol=1e-15)


def test_p_value_is_that_of_the_chi_square_law():
    ranks = np.random.default_rng(2).integers(0, 10, 300)
    result = sbc.uniformity(ranks, 9)
    assert_allclose(result.p_value, chi2_law.sf(result.chi2, 9), rtol=1e-10)


def test_completions_follow_the_conditional_law(strings, truth):
    """Rank of an injective statistic among one completion = order of two strings: exact probability by summation."""
    rng = np.random.default_rng(3)
    model = np.log(rng.dirichlet(np.ones(len(truth))))
    statistic = rng.permutation(len(truth)).astype(float)
    tokens = np.asarray(strings.tokens)
    same = (tokens[:, None, :2] == tokens[None, :, :2]).all(-1)
    p, q = np.exp(truth), np.exp(model)
    conditional = same * q / (same @ q)[:, None]
    below = statistic[None, :] < statistic[:, None]
    equal = np.eye(len(p))
    expected = float(p @ (conditional * (below + 0.5 * equal)).sum(1))
    ranks = sbc.prefix_ranks(truth, model, strings, statistic, 2, 20_000, 1, np.random.default_rng(4))
    assert abs(ranks.mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / 20_000)


@pytest.mark.parametrize("prefix_length", [0, 2, 4])
def test_p_values_of_the_truth_are_uniform(strings, truth, prefix_length):
    """Over 200 seeds, as many p-values below each threshold as binomial counting allows; ties included."""
    statistic = np.asarray(strings.tokens).sum(1).astype(float)  # few distinct values
    p_values = np.array(
        [
            sbc.sbc_prefix(
                truth, truth, strings, statistic, prefix_length, 400, DRAWS, np.random.default_rng(seed)
            ).p_value
            for seed in range(200)
        ]
    )
    for threshold in (0.05, 0.25, 0.5, 0.75):
        stderr = math.sqrt(threshold * (1 - threshold) / 200)
        assert abs(np.mean(p_values < threshold) - threshold) < 4 * stderr


@pytest.mark.parametrize("power", [2.0, 0.5])
def test_sharpened_and_flattened_models_are_found_out(strings, truth, power):
    model = normalized(power * truth)
    results = [
        sbc.sbc_prefix(truth, model, strings, truth, 2, 1000, 15, np.random.default_rng(seed))
        for seed in range(5)
    ]
    assert max(r.p_value for r in results) < 1e-6
    low_half = np.mean([r.histogram[:8].sum() for r in results]) / 1000
    assert (low_half > 0.5) == (power > 1)  # a sharpened model draws strings that are too likely


def test_only_a_statistic_of_the_data_sees_a_model_that_ignores_them(strings, truth):
    """q = p*(first half) p*(second half): the second half alone is right, its likelihood given the first is not."""
    law = np.exp(truth).reshape(9, 9)
    model = np.log(np.outer(law.sum(1), law.sum(0)).ravel())
    last = np.asarray(strings.tokens) @ np.array([0, 0, 3, 1])
    run = lambda statistic, seed: sbc.sbc_prefix(
        truth, model, strings, statistic, 2, 1000, DRAWS, np.random.default_rng(seed)
    ).p_value
    assert max(run(truth, seed) for seed in range(5)) < 1e-6
    blind = [run(last.astype(float), seed) for seed in range(60)]
    assert abs(np.mean(np.array(blind) < 0.5) - 0.5) < 4 * math.sqrt(0.25 / 60)


def test_strings_that_end_early_keep_their_prefixes():
    ending = exact.enumerate_strings(3, 4, end=2)
    law = np.log(np.random.default_rng(5).dirichlet(np.ones(len(ending.tokens))))
    statistic = np.asarray(ending.mask).sum(1)
    p_values = [
        sbc.sbc_prefix(law, law, ending, statistic, 2, 400, DRAWS, np.random.default_rng(s)).p_value
        for s in range(60)
    ]
    assert abs(np.mean(np.array(p_values) < 0.5) - 0.5) < 4 * math.sqrt(0.25 / 60)


def test_order_of_the_strings_does_not_matter(strings, truth):
    """Each string's completions are looked up by its prefix, wherever they are listed."""
    shuffle = np.random.default_rng(7).permutation(len(truth))
    moved, law = strings._replace(tokens=strings.tokens[shuffle]), truth[shuffle]
    run = lambda model, seed: sbc.sbc_prefix(
        law, model, moved, law, 2, 400, DRAWS, np.random.default_rng(seed)
    )
    right = np.array([run(law, seed).p_value for seed in range(60)])
    assert abs(np.mean(right < 0.5) - 0.5) < 4 * math.sqrt(0.25 / 60)
    assert run(normalized(2 * law), 0).p_value < 1e-6


def test_strings_without_mass_are_never_drawn(truth):
    """Nor is a string of another group, wherever the zeros are."""
    group = np.repeat(np.arange(9), 9)
    law = truth.copy()
    law[::2] = -np.inf
    law[36:45] = -np.inf
    asked = np.tile(np.arange(9)[:, None], (1, 4000))
    drawn = sbc._draw_within(law, group, asked, np.random.default_rng(6))
    assert np.all(drawn[4] == -1)
    others = np.delete(drawn, 4, axis=0)
    assert np.isfinite(law[others]).all()
    assert np.array_equal(group[others], np.delete(asked, 4, axis=0))


def test_a_prefix_that_the_model_excludes_leaves_the_ranks_undefined(strings, truth):
    model = np.where(np.asarray(strings.tokens)[:, 0] == 0, -np.inf, truth)
    result = sbc.sbc_prefix(truth, normalized(model), strings, truth, 2, 200, 5, np.random.default_rng(0))
    assert math.isnan(result.p_value) and len(result.histogram) == 0


def test_bad_input_is_refused(strings, truth):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="prefix_length must be between 0 and 4, got 5"):
        sbc.prefix_ranks(truth, truth, strings, truth, 5, 10, 5, rng)
    with pytest.raises(ValueError, match="NaN"):
        sbc.prefix_ranks(truth, truth, strings, np.full(len(truth), np.nan), 2, 10, 5, rng)
    with pytest.raises(ValueError, match="draws"):
        sbc.rank_statistics(np.zeros(3), np.zeros((2, 4)), rng)
    for ranks in (np.array([], int), np.array([3]), np.array([-1])):
        with pytest.raises(ValueError, match=r"within 0 \.\. 2"):
            sbc.uniformity(ranks, 2)
