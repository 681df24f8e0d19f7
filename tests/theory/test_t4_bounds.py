"""Note 4, first half: stochastic bounds on the calibration loss, their bias, and binned rewards."""

import math
from itertools import combinations_with_replacement

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from kl_rl import exact, measure
from kl_rl.measure.calibration.bounds import lower_bound, upper_bound
from kl_rl.measure.calibration.levels import build_cells, quantile_bins
from kl_rl.measure.samples import Samples

within = jax.jit(measure.conditional_kl)
REWARD = np.array([0.0, 0.0, 1.0, 1.0, 1.0])  # two levels, of two and three strings
LEVELS = exact.Levels(jnp.array([0.0, 1.0]), jnp.array([0, 0, 1, 1, 1]))


@pytest.fixture(params=range(3))
def laws(request):
    """(q, p0) on five strings."""
    return np.random.default_rng(request.param).dirichlet(np.full(5, 2.0), 2)


def multisets(law, size):
    """All samples of a size, order forgotten, with their probabilities: an exact expectation in few terms."""
    for index in combinations_with_replacement(range(len(law)), size):
        count = np.bincount(index, minlength=len(law))
        ways = math.factorial(size) / math.prod(map(math.factorial, count))
        yield np.array(index), ways * math.prod(law**count)


def samples(index, q, p, reward=REWARD):
    return Samples.from_log_ratio(reward[index], np.log(q / p)[index])


def truth(q, p):
    return float(within(jnp.log(q), jnp.log(p), LEVELS)), float(within(jnp.log(p), jnp.log(q), LEVELS))


@pytest.mark.theorem("T4.1")
def test_expected_lower_bounds_are_below_the_truth(laws):
    """Exact expectation over ALL samples; for C from q, for C_fwd from p0; closer with more samples."""
    q, p = laws
    loss, forward = truth(q, p)
    pair = samples(np.array([0, 1]), q, p)
    gaps = []
    for size in (2, 3, 5):
        backward = sum(
            w * lower_bound(build_cells(samples(i, q, p), None, "exact")).value for i, w in multisets(q, size)
        )
        ahead = sum(
            w * lower_bound(build_cells(pair, samples(i, q, p), "exact"), forward=True).value
            for i, w in multisets(p, size)
        )
        gaps.append([loss - backward, forward - ahead])
    assert np.min(gaps) > 0
    assert np.all(np.diff(gaps, axis=0) < 0)


@pytest.mark.theorem("T4.2")
def test_expected_upper_bounds_are_above_the_truth_where_all_levels_are_reached(laws):
    """Exact expectation over ALL pairs of samples, given that the inner one reaches both levels."""
    q, p = laws
    loss, forward = truth(q, p)
    reached = lambda index: len(set(REWARD[index])) == 2

    def expected(size):
        total = np.zeros(2)
        inner = [[(i, w) for i, w in multisets(law, size) if reached(i)] for law in (p, q)]
        outer = [list(multisets(law, 2)) for law in (q, p)]
        for index, weight in inner[0]:
            for other, probability in outer[0]:
                cells = build_cells(samples(other, q, p), samples(index, q, p), "exact")
                total[0] += weight * probability * upper_bound(cells).value
        for index, weight in inner[1]:
            for other, probability in outer[1]:
                cells = build_cells(samples(index, q, p), samples(other, q, p), "exact")
                total[1] += weight * probability * upper_bound(cells, forward=True).value
        return total / [sum(w for _, w in side) for side in inner]

    gaps = np.array([expected(size) - [loss, forward] for size in (2, 4)])
    assert np.min(gaps) > 0


TILTED, BASE = np.array([0.95, 0.05]), np.array([0.9, 0.1])  # one string a level: C = 0


def expectation_over_both(bound, size):
    """E of bound(outer index, inner index) over all samples of q = TILTED and p0 = BASE."""
    outer, inner = list(multisets(TILTED, size)), list(multisets(BASE, size))
    return sum(a * b * bound(i, j) for i, a in outer for j, b in inner)


@pytest.mark.theorem("C4.1")
def test_merging_an_unreached_level_with_its_neighbour_loses_the_upper_bound():
    """q = (.95, .05), p0 = (.9, .1) at two levels, two samples each: the expectation is below C = 0."""
    log_ratio = np.log(TILTED / BASE)

    def bound(outer, inner):
        nearest = [g if g in inner else 1 - g for g in range(2)]
        return np.mean([log_ratio[g] - log_ratio[nearest[g]] for g in outer])

    by_hand = (log_ratio[0] - log_ratio[1]) * (0.1**2 * 0.95 - 0.9**2 * 0.05)
    assert_allclose(expectation_over_both(bound, 2), by_hand, rtol=1e-10)
    assert by_hand < -0.02


@pytest.mark.theorem("T4.2")
def test_upper_bound_with_unreached_levels_is_still_above_the_truth():
    reward = np.array([0.0, 1.0])

    def bound(outer, inner):
        tuned, base = (samples(np.array(i), TILTED, BASE, reward) for i in (outer, inner))
        return upper_bound(build_cells(tuned, base, "exact")).value

    for size in (2, 4):
        assert expectation_over_both(bound, size) >= -1e-12


@pytest.mark.theorem("C4.2")
def test_the_lower_bound_says_nothing_about_strings_that_q_gave_up():
    """q keeps 1e-6 of half of p0: C is log 2 to five digits, the bound from a few samples almost 0."""
    q, p = np.array([1 - 1e-6, 1e-6, 0.5, 0.3, 0.2]), np.array([0.5, 0.5, 0.5, 0.3, 0.2])
    q, p = q / 2, p / 2  # the second level is intact and holds the other half
    loss = truth(q, p)[0]
    assert_allclose(loss, 0.5 * np.log(2), rtol=1e-4)
    cells = lambda i: build_cells(samples(i, q, p), None, "exact")
    expected = sum(w * lower_bound(cells(i)).value for i, w in multisets(q, 4))
    assert 0 <= expected < 4 * 5e-7 * np.log(1e6)


def expected_log_mean(weight, law, size):
    """E log of the mean of `size` independent weights: exact, over all counts of at most three values."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size + 1)))])
    weight, law = np.pad(weight, (0, 3 - len(weight)), constant_values=1.0), np.pad(law, (0, 3 - len(law)))
    a, b = (x.ravel() for x in np.meshgrid(np.arange(size + 1), np.arange(size + 1)))
    counts = np.stack([a, b, size - a - b], axis=1)
    counts = counts[(counts[:, 2] >= 0) & np.all((counts == 0) | (law > 0), axis=1)]
    power = counts @ np.log(np.where(law > 0, law, 1.0))
    probability = np.exp(log_factorial[size] - log_factorial[counts].sum(axis=1) + power)
    return probability @ np.log(counts @ weight / size)


@pytest.mark.theorem("T4.3")
def test_bias_of_one_level_is_variance_over_twice_the_count():
    """m (log E w - E log mean w) -> Var w / (2 (E w)^2), with an error of order 1/m: slope -1 in log m."""
    law, weight = np.array([0.2, 0.5, 0.3]), np.exp(-np.array([1.0, -0.3, 0.4]))
    mean = law @ weight
    limit = law @ (weight - mean) ** 2 / (2 * mean**2)
    sizes = np.array([20, 40, 80, 160])
    bias = np.array([np.log(mean) - expected_log_mean(weight, law, m) for m in sizes])
    assert np.all(bias > 0)
    error = np.abs(sizes * bias / limit - 1)
    assert_allclose(error[:-1] / error[1:], np.full(3, 2.0), rtol=0.1)
    slope = np.diff(np.log(bias)) / np.diff(np.log(sizes))
    assert np.all(np.abs(slope + 1) < 2 * error[:-1])


@pytest.mark.theorem("T4.3")
def test_bias_of_the_whole_lower_bound_is_a_sum_over_levels_over_twice_n(laws):
    """n (C - E lower) -> (1/2) sum_r Var_q(e^{-l} | r) / E_q(e^{-l} | r)^2: no level weights are left."""
    q, p = laws
    weight, parts = p / q, [slice(0, 2), slice(2, 5)]
    inside = [(weight[s], q[s] / q[s].sum()) for s in parts]
    limit = sum(law @ (w - law @ w) ** 2 / (2 * (law @ w) ** 2) for w, law in inside)
    mass = np.array([q[s].sum() for s in parts])

    def bias(size):
        total = 0.0
        for chance, (w, law) in zip(mass, inside, strict=True):
            for k in range(1, size + 1):
                binomial = math.comb(size, k) * chance**k * (1 - chance) ** (size - k)
                total += binomial * k / size * (np.log(law @ w) - expected_log_mean(w, law, k))
        return total

    cells = lambda i: build_cells(samples(i, q, p), None, "exact")
    by_library = sum(w * lower_bound(cells(i)).value for i, w in multisets(q, 4))
    assert_allclose(truth(q, p)[0] - by_library, bias(4), rtol=1e-8)
    ratio = np.array([size * bias(size) / limit for size in (30, 60, 120)])
    extrapolated = 2 * ratio[1:] - ratio[:-1] - 1  # the term of order 1/n removed: of order 1/n^2
    assert np.max(np.abs(extrapolated)) < 0.01
    assert_allclose(extrapolated[0] / extrapolated[1], 4.0, rtol=0.25)


@pytest.mark.theorem("T4.4")
@pytest.mark.parametrize("count", [2, 5, 20])
def test_binned_loss_of_an_exact_tilt_is_below_the_squared_width(count):
    rng = np.random.default_rng(count)
    p, reward = rng.dirichlet(np.ones(81)), rng.normal(size=81)
    index = quantile_bins(reward, count)
    width = max(np.ptp(reward[index == b]) for b in range(index.max() + 1))
    levels = exact.Levels(jnp.arange(float(index.max() + 1)), jnp.asarray(index))
    for beta in (0.2, 1.0, 5.0):
        star = exact.log_posterior(jnp.log(p), jnp.asarray(reward / beta))
        loss = within(star, jnp.log(p), levels)
        assert 0 < loss <= (width / beta) ** 2 / 8


@pytest.mark.theorem("T4.4")
def test_the_binning_bound_is_sharp_for_two_points_and_small_width():
    levels = exact.Levels(jnp.zeros(1), jnp.zeros(2, jnp.int32))
    log_p, reward = jnp.log(jnp.array([0.5, 0.5])), jnp.array([0.0, 1.0])
    ratios = []
    for scale in (0.2, 0.1):
        loss = within(exact.log_posterior(log_p, scale * reward), log_p, levels)
        ratios.append(1 - loss / (scale**2 / 8))
    assert_allclose(ratios[0] / ratios[1], 4.0, rtol=0.01)  # the bound minus the loss is of fourth order
    assert 0 < ratios[1] < 0.1**2
