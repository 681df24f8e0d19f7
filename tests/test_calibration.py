"""Calibration budget from log-probabilities: its algebra on exact truth, levels, bins, honesty."""

import numpy as np
import pytest
from calibration_worlds import NAMES, World, entries, gaussian_tilt, world

from kl_rl.measure.calibration import sampled_budget
from kl_rl.measure.calibration.balance import balance, calibration_terms
from kl_rl.measure.calibration.bounds import lower_bound, unreached_levels, upper_bound
from kl_rl.measure.calibration.jackknife import jackknife
from kl_rl.measure.calibration.levels import build_cells, distinct_levels, quantile_bins
from kl_rl.measure.calibration.price import price
from kl_rl.measure.samples import Samples

# ---------------------------------------------------------------- algebra, without chance


def exact_frequencies(seed=3) -> tuple[World, Samples, Samples]:
    """Samples whose frequencies *are* q and p0, so that every plug-in value is the truth."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(1, 9, 30), rng.integers(1, 9, 30)
    w = World(b / b.sum(), a / a.sum(), rng.integers(0, 4, 30).astype(float))
    picks = (np.repeat(np.arange(30), c) for c in (a, b))
    return w, *(Samples.from_log_ratio(w.reward[i], w.log_ratio[i]) for i in picks)


def test_plug_in_on_exact_frequencies_is_the_truth():
    w, tuned, base = exact_frequencies()
    cells = build_cells(tuned, base, "exact")
    weights = balance(cells)
    values, _ = calibration_terms(cells, weights)
    paid = price(cells, np.exp(weights.log_h), np.exp(weights.log_k))
    truth = w.truth()
    for name in ("C", "C_fwd", "C_JS"):
        assert values[name][0] == pytest.approx(truth[name], abs=1e-12), name
    assert paid.value == pytest.approx(truth["P"], abs=1e-12)
    assert values["KL_r"][0] - paid.value == pytest.approx(truth["S"], abs=1e-12)
    for forward, name in ((False, "C"), (True, "C_fwd")):
        assert lower_bound(cells, forward).value == pytest.approx(truth[name], abs=1e-12)
        assert upper_bound(cells, forward).value == pytest.approx(truth[name], abs=1e-12)
    assert sampled_budget(tuned, base, bins="exact").kl.value == pytest.approx(truth["kl"], abs=1e-12)


def test_leave_one_out_changes_equal_recomputation():
    """With the weight functions held fixed, each change is what literally removing the sample gives."""
    tuned, base = world(0, size=12, levels=3).draw(np.random.default_rng(0), 40, 30)
    cells = build_cells(tuned, base, "exact")
    weights = balance(cells)
    h, k = np.exp(weights.log_h), np.exp(weights.log_k)
    alpha = 40 / 70

    def statistics(keep: np.ndarray) -> np.ndarray:
        share = np.where(cells.is_base == 0, alpha, 1 - alpha)
        share = share / np.bincount(cells.is_base[keep])[cells.is_base] * keep
        a, b = share * h, share * k
        a, b = a / a.sum(), b / b.sum()
        qa, pb = np.bincount(cells.cell, a), np.bincount(cells.cell, b)
        log_a, log_b = (np.log(np.where(keep, x, 1.0)) for x in (a, b))
        ratio = np.log(qa / pb)
        c = a @ (log_a - log_b - ratio[cells.cell])
        return np.array([c, b @ (log_b - log_a + ratio[cells.cell]), qa @ ratio])

    everything = np.ones(70, bool)
    values, changes = calibration_terms(cells, weights)
    expected = statistics(everything)
    assert [values[n][0] for n in ("C", "C_fwd", "KL_r")] == pytest.approx(expected, abs=1e-13)
    for i in range(70):
        keep = everything.copy()
        keep[i] = False
        actual = [changes[n][i] for n in ("C", "C_fwd", "KL_r")]
        assert actual == pytest.approx(statistics(keep) - expected, abs=1e-12)


def test_price_changes_equal_solving_again():
    """One Newton step from the full solution: the error is of third order in 1/n."""
    tuned, base = world(1, levels=4).draw(np.random.default_rng(1), 400, 400)
    cells = build_cells(tuned, base, "exact")
    weights = balance(cells)
    h, k = np.exp(weights.log_h), np.exp(weights.log_k)
    paid = price(cells, h, k)
    for i in (0, 7, 399, 400, 777):
        share = np.where(
            np.arange(800) == i, 0.0, np.where(cells.is_base == cells.is_base[i], 400 / 399, 1.0)
        )
        again = price(cells, h * share, k * share)
        assert paid.value_change[i] == pytest.approx(again.value - paid.value, rel=1e-3, abs=1e-9)
        assert paid.tilt_change[i] == pytest.approx(again.tilt - paid.tilt, rel=2e-2, abs=1e-7)


def test_jackknife_of_a_mean_is_the_textbook_error():
    tuned, base = world(2).draw(np.random.default_rng(2), 50, 60)
    cells = build_cells(tuned, base, "exact")
    l = tuned.log_ratio
    result = jackknife(cells, l.mean(), np.concatenate([(l.mean() - l) / 49, np.zeros(60)]))
    assert result.stderr == pytest.approx(l.std(ddof=1) / np.sqrt(50))
    assert result.bias == pytest.approx(0.0, abs=1e-14)
    assert result.lower < result.value < result.upper


@pytest.mark.parametrize(
    "function", [lambda r: 0.8 * r - 1.0, lambda r: np.sin(3 * r), lambda r: (r > 2) * 5.0]
)
def test_c_is_zero_when_the_log_ratio_is_a_function_of_the_reward(function):
    rng = np.random.default_rng(0)
    reward = rng.integers(0, 6, 3000).astype(float)
    weight = np.exp(function(np.arange(6.0)))
    tilted = rng.choice(6, 3000, p=weight / weight.sum()).astype(float)
    log_ratio = [function(r) - np.log(weight.mean()) for r in (tilted, reward)]
    budget = sampled_budget(
        *(Samples.from_log_ratio(r, l) for r, l in zip((tilted, reward), log_ratio, strict=True))
    )
    for entry in (budget.C, budget.C_fwd, budget.C_JS):
        assert entry.value < 1e-12 and entry.lower == 0.0 and entry.upper < 1e-7


def test_budget_adds_up_and_permutation_and_reward_units_change_nothing():
    tuned, base = world(4, noise=0.8).draw(np.random.default_rng(4), 700, 600)
    budget = sampled_budget(tuned, base)
    order = np.random.default_rng(5).permutation(700)
    shuffled = Samples(*(x[order] for x in tuned[:3]))
    moved = [s._replace(reward=10.0 * s.reward - 7.0) for s in (shuffled, base)]
    other = sampled_budget(*moved)
    for name in NAMES:
        assert getattr(other, name)[:4] == pytest.approx(getattr(budget, name)[:4], rel=1e-6, abs=1e-9)
    assert other.beta_fit.value == pytest.approx(10 * budget.beta_fit.value, rel=1e-9)
    total = budget.P.value + budget.S.value + budget.C.value
    assert abs(total - budget.kl.value) < 4 * budget.kl.stderr
    assert budget.kl.value == pytest.approx(tuned.log_ratio.mean(), rel=1e-12)


# ---------------------------------------------------------------- levels


def test_levels_group_rounding_and_bins_have_equal_mass():
    reward = np.array([0.3, 0.1 + 0.2, 0.0, 1e-17, 5.0, 5.0 + 1e-6])
    assert distinct_levels(reward).tolist() == [1, 1, 0, 0, 2, 3]
    x = np.random.default_rng(0).normal(size=1000)
    assert np.ptp(np.bincount(quantile_bins(x, 10))) <= 2
    assert np.all(np.diff(quantile_bins(np.sort(x), 10)) >= 0)
    ties = np.array([0.0] * 90 + [1.0] * 10)
    assert set(quantile_bins(ties, 5)[:90]) == {0}
    cells = build_cells(Samples.from_log_ratio(x, x), None)
    assert cells.binning.kind == "quantile" and cells.binning.levels == 25


@pytest.mark.parametrize("bins", [0, -3, "many", True, 2.5])
def test_bad_bins_are_refused(bins):
    s = Samples.from_log_ratio(np.arange(4.0), np.zeros(4))
    with pytest.raises(ValueError, match="bins"):
        sampled_budget(s, bins=bins)


def test_inconsistent_arrays_are_refused():
    s = Samples.from_log_ratio(np.arange(4.0), np.zeros(4))
    with pytest.raises(ValueError, match="different lengths"):
        sampled_budget(s._replace(reward=np.arange(3.0)))
    with pytest.raises(ValueError, match="at least two"):
        sampled_budget(Samples(*(x[:1] for x in s[:3])))
    with pytest.raises(ValueError, match="finite"):
        sampled_budget(s._replace(logp_tuned=np.array([0, np.nan, 0, 0])))
    with pytest.raises(ValueError, match="one of the two"):
        sampled_budget(s._replace(prompt=np.arange(4)), s)
    with pytest.raises(ValueError, match="no prompt"):
        sampled_budget(s._replace(prompt=np.zeros(4, int)), s._replace(prompt=np.ones(4, int)))
    for beta in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="beta"):
            sampled_budget(s, beta=beta)


# ---------------------------------------------------------------- bins


@pytest.mark.parametrize("bins", [3, 8, 25])
def test_binned_exact_tilt_is_below_its_bound_and_corrected_to_zero(bins):
    budget = sampled_budget(*gaussian_tilt(np.random.default_rng(0), 4000, 1.0), bins=bins, beta=1.0)
    assert budget.bins == "quantile" and budget.num_levels == bins
    assert 0 < budget.C.value <= budget.binning_bound
    assert budget.C_corrected.value < 1e-9 and budget.C_corrected.upper < 1e-6
    assert budget.beta_fit.value == pytest.approx(1.0, rel=1e-6)


def test_correction_keeps_what_is_not_explained_by_the_tilt():
    """A second property of the strings, independent of the reward: C is its KL, whatever the bins."""
    rng = np.random.default_rng(1)
    n, log_odds = 6000, np.log(0.8 / 0.2)
    samples = []
    for s, share in zip(gaussian_tilt(rng, n, 1.0), (0.8, 0.5), strict=True):
        coin = rng.random(n) < share
        samples.append(Samples.from_log_ratio(s.reward, s.log_ratio + np.log(0.4) + log_odds * coin))
    truth = 0.8 * np.log(1.6) + 0.2 * np.log(0.4)
    budget = sampled_budget(*samples, bins=6, beta=1.0)
    assert abs(budget.C_corrected.value - truth) < 4 * budget.C_corrected.stderr
    assert budget.C.value - truth > 4 * budget.C.stderr  # the uncorrected one has the width of the bins in it


# ---------------------------------------------------------------- one set only, and honesty


def test_without_base_samples_only_what_is_known_has_limits():
    tuned, _ = world(7).draw(np.random.default_rng(7), 2000, 2)
    budget = sampled_budget(tuned)
    truth = world(7).truth()
    assert budget.kl.lower <= truth["kl"] <= budget.kl.upper
    assert budget.C.value == budget.C.lower_bound.value and budget.C.lower <= truth["C"]
    assert budget.C.upper is None and budget.C.upper_bound is None and budget.C_JS is None
    for entry in (budget.P, budget.S, budget.C_fwd, budget.beta_fit):
        assert entry.lower is None and entry.upper is None
    for name in ("P", "S", "C_fwd"):
        entry = getattr(budget, name)
        assert abs(entry.value - truth[name]) < 4 * entry.stderr
    assert budget.n_base == 0 and budget.ess_base is None


def test_collapse_onto_one_string_that_the_base_never_shows_is_not_called_harmless():
    """All tuned samples are one string of a level the base never reached: C may be large for all we know."""
    rng = np.random.default_rng(0)
    tuned = Samples.from_log_ratio(np.full(500, 10.0), np.full(500, 25.0))
    base = Samples.from_log_ratio(rng.integers(0, 5, 500).astype(float), np.full(500, -5.0))
    budget = sampled_budget(tuned, base)
    # base probability of the level: at most 3.7/500; of the string: e^-25
    assert budget.C.upper == pytest.approx(25.0 - np.log(500 / 3.7), abs=0.1)
    assert budget.P.lower < 5.0 < budget.P.upper
    cells = build_cells(tuned, base)
    assert unreached_levels(cells, balance(cells)).mass == pytest.approx(1.0)
    assert any("means little" in w for w in budget.warnings)


def test_extreme_log_ratios_make_no_nan():
    tuned, base = world(8).draw(np.random.default_rng(8), 300, 300)
    for scale in (1e3, 1e5):
        pair = [Samples.from_log_ratio(s.reward, s.log_ratio * scale) for s in (tuned, base)]
        for budget in (sampled_budget(*pair), sampled_budget(pair[0]), sampled_budget(pair[1])):
            for entry in entries(budget).values():
                assert entry is None or np.isfinite(entry.value)
    filtered = Samples.from_log_ratio(np.ones(500), np.full(500, np.log(2.0)))
    reward = np.arange(500.0) % 2
    kept = Samples.from_log_ratio(reward, np.where(reward == 1, np.log(2.0), -2000.0))
    budget = sampled_budget(filtered, kept)
    assert budget.C.upper < 1e-5 and budget.kl.value == pytest.approx(np.log(2))
    assert budget.P.lower <= np.log(2) <= budget.P.upper
