"""Scores and calibration errors against plain loops, tables worked by hand, and exact identities."""

import itertools
import math

import numpy as np
import pytest
from numpy.testing import assert_allclose

from kl_rl.measure import forecasts

SEEDS = range(6)
BINNED = [(15, False), (15, True), (1, False), (4, True)]


def random_events(seed, size=60):
    """Forecasts with ties and both ends of the interval; outcomes are 0, 1 or in between; uneven weights."""
    rng = np.random.default_rng(seed)
    f = np.round(rng.beta(0.7, 0.9, size), 2)
    f[:4] = [0.0, 1.0, 0.5, 0.5]
    o = np.where(rng.random(size) < 0.5, (rng.random(size) < f).astype(float), rng.random(size))
    o[:2] = [0.0, 1.0]  # what a forecast of 0 or 1 excludes does not happen
    return f, np.where((f == 0) | (f == 1), f, o), rng.exponential(size=size)


def naive_bins(f, w, num_bins, equal_mass):
    """The bin of every event by the definition."""
    if not equal_mass:
        return [min(math.floor(x * num_bins), num_bins - 1) for x in f]
    total = sum(w)
    below = [sum(v for g, v in zip(f, w, strict=True) if g < x) / total for x in f]
    here = [sum(v for g, v in zip(f, w, strict=True) if g == x) / total for x in f]
    return [min(math.floor((b + h / 2) * num_bins), num_bins - 1) for b, h in zip(below, here, strict=True)]


def naive_groups(f, o, w, bins):
    """(weight, mean forecast, mean outcome) of every used bin."""
    for b in set(bins):
        rows = [(x, y, v) for x, y, v, c in zip(f, o, w, bins, strict=True) if c == b]
        mass = sum(v for *_, v in rows)
        yield mass / sum(w), sum(x * v for x, _, v in rows) / mass, sum(y * v for _, y, v in rows) / mass


def log_loss(f, o):
    return -(o * math.log(f) if o else 0.0) - ((1 - o) * math.log(1 - f) if o < 1 else 0.0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_bins, equal_mass", BINNED)
def test_binned_error_is_the_weighted_gap_of_the_bins(seed, num_bins, equal_mass):
    f, o, w = random_events(seed)
    groups = naive_groups(f, o, w, naive_bins(f, w, num_bins, equal_mass))
    expected = sum(mass * abs(mean_o - mean_f) for mass, mean_f, mean_o in groups)
    actual = forecasts.expected_calibration_error(f, o, w, num_bins=num_bins, equal_mass=equal_mass)
    assert_allclose(actual, expected, rtol=1e-12)


def test_equal_mass_bins_hold_equal_shares():
    """Eight distinct forecasts close to zero share one bin of width 1/4, but two each of four bins of equal mass."""
    f, o = np.arange(8) / 100, np.array([0, 1, 0, 1, 0, 1, 0, 1.0])
    o[:2] = 1.0  # the first two: mean outcome 1 against 0.005; the others: 1/2
    gaps = [1 - 0.005, 0.5 - 0.025, 0.5 - 0.045, 0.5 - 0.065]
    assert_allclose(
        forecasts.expected_calibration_error(f, o, num_bins=4, equal_mass=True), np.mean(gaps), rtol=1e-12
    )
    assert_allclose(forecasts.expected_calibration_error(f, o, num_bins=4), 5 / 8 - 0.035, rtol=1e-12)


def test_brier_decomposition_of_a_table_worked_by_hand():
    """Forecasts .2 (1 of 4 happen) and .7 (3 of 4): reliability .0025, resolution .0625, uncertainty .25."""
    f = np.array([0.2] * 4 + [0.7] * 4)
    o = np.array([1, 0, 0, 0, 1, 1, 1, 0.0])
    parts = forecasts.brier_decomposition(f, o, num_bins=10)
    assert_allclose(parts[:3], (0.0025, 0.0625, 0.25), rtol=1e-12)
    assert_allclose([parts.within, parts.score], [0.0, 0.19], atol=1e-15)
    assert_allclose(forecasts.brier_score(f, o), (0.64 + 3 * 0.04 + 3 * 0.09 + 0.49) / 8, rtol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_bins, equal_mass", BINNED)
def test_decompositions_are_identities_with_their_parts(seed, num_bins, equal_mass):
    f, o, w = random_events(seed)
    options = {"num_bins": num_bins, "equal_mass": equal_mass}
    brier, log = (
        forecasts.brier_decomposition(f, o, w, **options),
        forecasts.log_decomposition(f, o, w, **options),
    )
    share = w / w.sum()
    assert_allclose(brier.score, forecasts.brier_score(f, o, w), rtol=1e-12)
    assert_allclose(
        log.score, sum(v * log_loss(x, y) for x, y, v in zip(f, o, share, strict=True)), rtol=1e-12
    )
    groups = list(naive_groups(f, o, w, naive_bins(f, w, num_bins, equal_mass)))
    overall = float(share @ o)
    entropy = log_loss(overall, overall)
    assert_allclose(brier.reliability, sum(m * (x - y) ** 2 for m, x, y in groups), rtol=1e-11)
    assert_allclose(
        brier.resolution, sum(m * (y - overall) ** 2 for m, _, y in groups), rtol=1e-11, atol=1e-15
    )
    assert_allclose([brier.uncertainty, log.uncertainty], [overall * (1 - overall), entropy], rtol=1e-12)
    assert_allclose(
        log.reliability, sum(m * (log_loss(x, y) - log_loss(y, y)) for m, x, y in groups), rtol=1e-9
    )
    assert_allclose(
        log.resolution, entropy - sum(m * log_loss(y, y) for m, _, y in groups), rtol=1e-9, atol=1e-14
    )


def test_probabilities_as_outcomes_are_exact_expectations():
    """The score against the true probabilities is the mean score over all 2^M outcomes."""
    rng = np.random.default_rng(3)
    f, o, w = rng.random(5), rng.random(5), rng.random(5)
    brier = log = 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=5):
        y = np.array(outcome)
        chance = np.prod(np.where(y == 1, o, 1 - o))
        brier += chance * forecasts.brier_score(f, y, w)
        log += chance * forecasts.log_decomposition(f, y, w).score
    assert_allclose(forecasts.brier_score(f, o, w), brier, rtol=1e-12)
    assert_allclose(forecasts.log_decomposition(f, o, w).score, log, rtol=1e-12)


def test_weights_are_repetitions():
    f, o, _ = random_events(1)
    count = np.random.default_rng(0).integers(1, 5, len(f))
    many = (np.repeat(f, count), np.repeat(o, count))
    for measure in (
        forecasts.expected_calibration_error,
        forecasts.smooth_calibration_error,
        forecasts.brier_score,
        lambda *events: forecasts.brier_decomposition(*events).within,
        lambda *events: forecasts.log_decomposition(*events).reliability,
    ):
        assert_allclose(measure(f, o, count), measure(*many), rtol=1e-9)


def test_a_forecast_that_excludes_what_happens_scores_infinity_and_never_nan():
    with np.errstate(all="raise", divide="ignore"):
        alone = forecasts.log_decomposition(np.array([0.0]), np.array([0.5]))
        together = forecasts.log_decomposition(np.array([0.0, 0.01]), np.array([0.5, 0.0]))
        table = forecasts.log_score(np.array([[0.0, -np.inf]]), np.array([[0.5, 0.5]]))
    assert alone.reliability == math.inf and alone.within == 0 and alone.score == math.inf
    assert together.within == math.inf and math.isfinite(together.reliability)
    assert table == math.inf
    assert forecasts.log_score(np.array([[0.0, -np.inf]]), np.array([[1.0, 0.0]])) == 0


def naive_smoothed(f, o, w, sigma, cells):
    """Integral of |sum_i w_i (o_i - f_i) K(t, f_i)|: midpoint rule over cells, Gaussians with their mirror images."""
    t = (np.arange(cells) + 0.5) / cells
    total = np.zeros(cells)
    for x, y, v in zip(f, o, w / w.sum(), strict=True):
        for image in [2 * k + s * x for k in range(-4, 5) for s in (1, -1)]:
            density = np.exp(-0.5 * ((t - image) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
            total += v * (y - x) * density
    return np.abs(total).mean()


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5, 1.0])
def test_smoothing_is_convolution_with_the_reflected_gaussian(sigma):
    """Forecasts at cell centres, so that the grid loses nothing."""
    rng = np.random.default_rng(5)
    cells = 400
    f = (rng.integers(0, cells, 30) + 0.5) / cells
    f[:2] = [0.5 / cells, 1 - 0.5 / cells]
    o, w = rng.random(30), rng.exponential(size=30)
    actual = forecasts.smoothed_residual(f, o, sigma, w, num_cells=cells)
    assert_allclose(actual, naive_smoothed(f, o, w, sigma, cells), rtol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_smooth_error_is_the_fixed_point_of_a_decreasing_function(seed):
    f, o, w = random_events(seed)
    error = forecasts.smooth_calibration_error(f, o, w)
    curve = [forecasts.smoothed_residual(f, o, sigma, w) for sigma in np.geomspace(1e-3, 1.0, 25)]
    assert np.all(np.diff(curve) <= 1e-14)
    assert 0 < error < 1
    assert_allclose(forecasts.smoothed_residual(f, o, error, w), error, rtol=1e-9)
    assert abs(w @ (o - f)) / w.sum() - 1e-12 <= error <= curve[0] + 1e-3


@pytest.mark.parametrize("bias", [-0.3, -1e-3, 0.02, 0.4])
def test_a_constant_offset_costs_its_size(bias):
    o = np.linspace(0.45, 0.55, 101)
    assert_allclose(forecasts.smooth_calibration_error(o - bias, o), abs(bias), rtol=1e-9)
    assert_allclose(forecasts.expected_calibration_error(o - bias, o), abs(bias), rtol=1e-9)
    assert_allclose(forecasts.brier_decomposition(o - bias, o).reliability, bias**2, rtol=1e-9)


def test_smooth_error_does_not_jump_where_the_binned_one_does():
    """Forecasts of 1/2 -+ e, the lower one right: no binned error in one bin, 1/2 in two, however small e is."""
    o = np.array([1.0, 0.0])
    apart = np.array([0.5 - 1e-6, 0.5 + 1e-6])
    same = np.array([0.5, 0.5])
    assert forecasts.expected_calibration_error(apart, o, num_bins=2) > 0.49
    assert forecasts.expected_calibration_error(same, o, num_bins=2) == 0
    assert forecasts.smooth_calibration_error(same, o) == 0
    assert forecasts.smooth_calibration_error(apart, o) < 0.02


def test_calibrated_forecasts_have_no_error():
    """The true probabilities as outcomes of themselves, and a coarser forecast: the mean of what it lumps together."""
    rng = np.random.default_rng(2)
    truth, w = rng.random(40), rng.random(40)
    lumped = np.full(40, w @ truth / w.sum())
    for f in (truth, lumped):
        assert forecasts.smooth_calibration_error(f, truth, w) < 1e-12
        assert forecasts.expected_calibration_error(f, truth, w) < 1e-12
        assert forecasts.brier_decomposition(f, truth, w).reliability < 1e-24
        assert forecasts.log_decomposition(f, truth, w).reliability < 1e-12
    assert forecasts.brier_score(lumped, truth, w) > forecasts.brier_score(truth, truth, w)


@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.0, 3.0])
def test_temperature_is_recovered_exactly(temperature):
    """q proportional to p^T is put right by the temperature T; tokens that both exclude do not matter."""
    rng = np.random.default_rng(4)
    p = rng.dirichlet(np.ones(5), 30)
    p[:10, 0] = 0
    p /= p.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        log_p = np.log(p)
    log_q = forecasts.tempered(log_p, 1 / temperature)
    found = forecasts.fit_temperature(log_q, p, rng.random(30))
    assert_allclose(found, temperature, rtol=1e-9)
    assert_allclose(forecasts.tempered(log_q, found), log_p, rtol=1e-8)


def test_fitted_temperature_has_the_least_log_score():
    rng = np.random.default_rng(6)
    log_q, p = np.log(rng.dirichlet(np.full(4, 0.5), 50)), rng.dirichlet(np.ones(4), 50)
    w = rng.random(50)
    loss = lambda t: forecasts.log_score(forecasts.tempered(log_q, t), p, w)
    best = forecasts.fit_temperature(log_q, p, w)
    assert 1.1 < best < 50  # random forecasts are overconfident
    assert all(loss(best) < loss(best * factor) for factor in (0.5, 0.99, 1.01, 2.0))
    assert_allclose(loss(best * 1.0001), loss(best / 1.0001), rtol=1e-7)


def test_temperature_stays_within_its_limits_and_knows_when_none_helps():
    sure = np.log(np.array([[0.9, 0.1]]))
    assert_allclose(forecasts.fit_temperature(sure, np.array([[1.0, 0.0]])), 1e-2)
    assert_allclose(forecasts.fit_temperature(sure, np.array([[0.1, 0.9]]), limits=(0.1, 5.0)), 5.0)
    with np.errstate(divide="ignore"):
        impossible = np.log(np.array([[1.0, 0.0]]))
    assert math.isnan(forecasts.fit_temperature(impossible, np.array([[0.5, 0.5]])))


def test_log_score_is_the_cross_entropy():
    rng = np.random.default_rng(8)
    q, p, w = rng.dirichlet(np.ones(3), 7), rng.dirichlet(np.ones(3), 7), rng.random(7)
    expected = -sum(w[i] * p[i, v] * math.log(q[i, v]) for i in range(7) for v in range(3)) / w.sum()
    assert_allclose(forecasts.log_score(np.log(q), p, w), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([0.5, 1.5], [0, 1]), "confidence must lie in"),
        (([0.5, np.nan], [0, 1]), "confidence must lie in"),
        (([0.5, 0.5], [0, -1]), "outcome must lie in"),
        (([0.5, 0.5], [1]), "both have shape"),
        (([[0.5]], [[1]]), r"shape \(M,\)"),
        (([], []), "no events"),
        (([0.5], [1], [0.0]), "positive sum"),
        (([0.5], [1], [-1.0]), "nonnegative"),
        (([0.5], [1], [1.0, 1.0]), "weight must have shape"),
    ],
)
def test_bad_events_are_refused(arguments, message):
    arrays = [np.array(a) for a in arguments]
    for measure in (
        forecasts.expected_calibration_error,
        forecasts.smooth_calibration_error,
        forecasts.brier_score,
    ):
        with pytest.raises(ValueError, match=message):
            measure(*arrays)


def test_bad_bins_and_tables_are_refused():
    with pytest.raises(ValueError, match="num_bins must be at least 1"):
        forecasts.expected_calibration_error(np.array([0.5]), np.array([1.0]), num_bins=0)
    with pytest.raises(ValueError, match=r"shape \(M, V\)"):
        forecasts.log_score(np.zeros((2, 3)), np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="outcome_probs must lie in"):
        forecasts.fit_temperature(np.zeros((1, 2)), np.array([[2.0, -1.0]]))
