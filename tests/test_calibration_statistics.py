"""Calibration budget from log-probabilities: estimators, errors, coverage and warnings on random samples."""

import numpy as np
import pytest
from calibration_worlds import NAMES, World, concatenate, entries, gaussian_tilt, world

from kl_rl.core.estimate import Estimate, mean_estimate, poisson_upper_limit, student_quantile
from kl_rl.measure.calibration import sampled_budget
from kl_rl.measure.samples import Samples

# ---------------------------------------------------------------- estimates


def test_mean_estimate_is_the_textbook_one_and_weights_of_one_change_nothing():
    x = np.array([1.0, 2.0, 4.0, 9.0])
    plain = mean_estimate(x)
    assert plain.value == x.mean() and plain.count == pytest.approx(4.0)
    assert plain.stderr == pytest.approx(x.std(ddof=1) / 2)
    assert mean_estimate(x, np.full(4, 3.0)) == pytest.approx(plain)
    assert mean_estimate(x, np.array([1.0, 0, 0, 1])).value == 5.0
    assert np.isnan(mean_estimate(np.array([2.0])).stderr)


@pytest.mark.parametrize(
    ("x", "weights"), [([], None), ([1.0, 2.0], [1.0]), ([1.0, 2.0], [0.0, 0.0]), ([1.0, 2.0], [-1.0, 3.0])]
)
def test_mean_estimate_refuses(x, weights):
    with pytest.raises(ValueError, match="sample|shape|weights"):
        mean_estimate(np.array(x), None if weights is None else np.array(weights))


def test_quantiles_agree_with_scipy():
    special = pytest.importorskip("scipy.special")
    for degrees in (1.0, 2.0, 3.0, 5.5, 30.0, 1e6):
        assert student_quantile(0.975, degrees) == pytest.approx(special.stdtrit(degrees, 0.975), rel=2e-2)
    for count in (0, 1, 5, 100):
        exact = special.gammaincinv(count + 1, 0.975)
        assert poisson_upper_limit(count) == pytest.approx(exact, rel=1e-2)
    lower, upper = Estimate(1.0, 0.5, 1e9).interval()
    assert (lower, upper) == pytest.approx((1 - 0.97998, 1 + 0.97998), rel=1e-4)
    with pytest.raises(ValueError, match="level"):
        Estimate(1.0, 0.5, 10).interval(95)


# ---------------------------------------------------------------- statistics

FAMILIES = {
    "small C": (dict(noise=0.1), 1000, 1000),
    "few samples": (dict(), 300, 300),
    "large C": (dict(size=3000, noise=1.5), 2000, 2000),
    "many levels": (dict(size=3000, levels=40, tilt=0.05, noise=0.7), 1000, 1000),
    "strong tilt": (dict(size=3000, levels=11, tilt=1.5, noise=0.7, rare=True), 2000, 2000),
    "heavy tails": (dict(size=3000, levels=6, noise=1.0, heavy=True), 2000, 2000),
    "poor overlap": (dict(size=3000, levels=6, tilt=1.0, noise=2.5), 1000, 1000),
    "forgotten strings": (dict(size=1000, noise=0.3, drop=0.5), 1000, 1000),
    "sharpened": (dict(size=1000, noise=0.1, sharp=1.0), 1000, 1000),
    "no tilt": (dict(tilt=0.0, noise=0.3), 500, 500),
    "nearly the base": (dict(tilt=0.02, noise=0.03), 500, 500),
    "exact tilt": (dict(size=1000, tilt=1.0, noise=0.0), 1000, 1000),
    "unreached levels": (dict(size=3000, levels=11, tilt=2.5, noise=0.3, drop=0.5, rare=True), 1000, 1000),
    "many samples": (dict(size=3000, levels=8, noise=0.7), 20000, 20000),
    "few base samples": (dict(size=3000, levels=8, noise=0.7), 4000, 300),
    "few tuned samples": (dict(size=3000, levels=8, noise=0.7), 300, 4000),
}


@pytest.mark.parametrize("family", ["small C", "few samples", "large C", "many levels", "forgotten strings"])
def test_estimates_are_within_four_standard_errors(family):
    settings, n, m = FAMILIES[family]
    w = world(11, **settings)
    budget = sampled_budget(*w.draw(np.random.default_rng(11), n, m), bins="exact")
    for name, truth in w.truth().items():
        entry = getattr(budget, name)
        assert abs(entry.value - truth) < 4 * entry.stderr, name


def repeated(settings: dict, n: int, m: int, runs: int, worlds: int = 1, bins="exact"):
    """(truth, value, stderr, lower, upper) of every quantity, [runs, names, 5]; and the budgets."""
    rows, budgets = [], []
    for run in range(runs):
        w = world(run % worlds, **settings)
        truth = w.truth()
        budget = sampled_budget(*w.draw(np.random.default_rng(1000 + run), n, m), bins=bins)
        rows.append([[truth[name], *getattr(budget, name)[:4]] for name in NAMES])
        budgets.append(budget)
    return np.array(rows), budgets


@pytest.mark.parametrize("family", ["small C", "few samples", "sharpened"])
def test_standard_errors_are_the_spread_over_runs(family):
    """The spread of 300 runs has a relative error of 1/sqrt(600), more for heavy tails (by the kurtosis)."""
    settings, n, m = FAMILIES[family]
    rows, _ = repeated(settings, n, m, 300)
    for j, name in enumerate(NAMES):
        error = rows[:, j, 1] - rows[:, j, 0]
        kurtosis = np.mean((error - error.mean()) ** 4) / np.var(error) ** 2
        relative = np.sqrt((kurtosis - 1) / 300) / 2
        if name == "S":  # clipped at 0: the spread can only be smaller
            assert error.std() / rows[:, j, 2].mean() < 1 + 4 * relative
        else:
            assert abs(error.std() / rows[:, j, 2].mean() - 1) < 4 * relative, name


def test_stochastic_bounds_lie_on_their_sides_and_the_estimate_between_is_nearly_unbiased():
    """Few samples a level make the bias of the bounds large: their order in expectation, 400 runs."""
    rows, budgets = repeated(dict(size=400, levels=8, tilt=0.05, noise=1.0), 200, 200, 400)
    for name in ("C", "C_fwd"):
        truth, value, _, lower, upper = rows[:, NAMES.index(name)].T
        below, above = (
            mean_estimate(np.array([getattr(getattr(b, name), side).value for b in budgets]) - truth)
            for side in ("lower_bound", "upper_bound")
        )
        assert below.value < -4 * below.stderr
        assert above.value > 4 * above.stderr
        centre = mean_estimate(value - truth)
        assert abs(centre.value) < 4 * centre.stderr + 0.1 * min(-below.value, above.value)
        assert np.all(lower <= value) and np.all(value <= upper)


def test_stderr_of_the_bounds_is_their_spread():
    _, budgets = repeated(dict(noise=0.4), 1500, 1500, 200)
    for name in ("C", "C_fwd"):
        for side in ("lower_bound", "upper_bound"):
            found = [getattr(getattr(b, name), side) for b in budgets]
            ratio = np.std([e.value for e in found]) / np.mean([e.stderr for e in found])
            assert abs(ratio - 1) < 4 * 1.5 / np.sqrt(2 * 200), (name, side)


def check_coverage(family: str, runs: int, worlds: int, label: str) -> None:
    settings, n, m = FAMILIES[family]
    rows, _ = repeated(settings, n, m, runs, worlds)
    held = (rows[..., 3] <= rows[..., 0]) & (rows[..., 0] <= rows[..., 4])
    share = dict(zip(NAMES, held.mean(0), strict=True))
    print(f"{label} {family}: " + "  ".join(f"{k} {v:.1%}" for k, v in share.items()))
    assert min(share.values()) >= 0.95, share


@pytest.mark.parametrize("family", ["few samples", "many levels", "no tilt", "unreached levels"])
def test_intervals_hold_the_truth_quick(family):
    check_coverage(family, 80, 8, "80 runs,")


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
def test_intervals_hold_the_truth(family):
    check_coverage(family, 400, 40, "400 runs,")


# ---------------------------------------------------------------- prompts


def prompt_worlds(count: int, **settings) -> list[World]:
    return [world(100 + i, size=200, tilt=0.7 + 0.2 * (i % 3), **settings) for i in range(count)]


def prompt_truth(worlds: list[World]) -> dict[str, float]:
    truth = {name: float(np.mean([w.truth()[name] for w in worlds])) for name in ("kl", "C", "C_fwd", "C_JS")}
    mean, low, high = np.mean([w.q @ w.reward for w in worlds]), -50.0, 50.0
    for _ in range(100):  # one tilt for all prompts
        tilt = (low + high) / 2
        weights = [w.p * np.exp(tilt * w.reward) for w in worlds]
        above = np.mean([v @ w.reward / v.sum() for v, w in zip(weights, worlds, strict=True)]) > mean
        low, high = (low, tilt) if above else (tilt, high)
    truth["P"] = tilt * mean - float(np.mean([np.log(v.sum()) for v in weights]))
    return truth | {"S": truth["kl"] - truth["C"] - truth["P"]}


@pytest.mark.parametrize(("prompts", "samples", "levels"), [(40, 8, 2), (20, 32, 4)])
def test_prompts_are_conditioned_on_and_averaged(prompts, samples, levels):
    worlds = prompt_worlds(prompts, levels=levels, noise=0.5)
    truth = prompt_truth(worlds)
    errors, held = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        pairs = [w.draw(rng, samples, samples) for w in worlds]
        tuned, base = (concatenate([pair[side] for pair in pairs]) for side in (0, 1))
        budget = sampled_budget(tuned, base)
        errors.append([getattr(budget, name).value - truth[name] for name in NAMES])
        held.append([getattr(budget, n).lower <= truth[n] <= getattr(budget, n).upper for n in NAMES])
        assert budget.num_prompts == prompts
    assert np.mean(held, axis=0).min() >= 0.95
    for name, column in zip(NAMES, np.array(errors).T, strict=True):
        found = mean_estimate(column)
        allowed = {"kl": 0.0, "P": 0.0}.get(name, 0.05 * truth[name])  # what the jackknife leaves of the bias
        assert abs(found.value) < 4 * found.stderr + allowed, name


def test_one_prompt_equals_no_prompt_and_identifiers_may_be_strings():
    tuned, base = world(6).draw(np.random.default_rng(6), 400, 300)
    plain = sampled_budget(tuned, base)
    named = [s._replace(prompt=np.array(["a"] * len(s.reward), object)) for s in (tuned, base)]
    assert entries(sampled_budget(*named)) == entries(plain)


def test_spread_of_the_tilt_over_prompts_is_seen():
    def spread(tilts):
        rng = np.random.default_rng(0)
        pairs = [world(i, tilt=t, noise=0.0).draw(rng, 2000, 2000) for i, t in enumerate(tilts)]
        return sampled_budget(*(concatenate([p[j] for p in pairs]) for j in (0, 1)))

    same, different = spread([1.0] * 6), spread([0.5, 1.5] * 3)
    assert same.lambda_spread < 1e-6  # exact tilts: the balance weights know the tilt exactly
    assert different.lambda_spread == pytest.approx(0.5, rel=1e-6)
    assert different.C.upper < 1e-6 < different.S.value  # no calibration loss, yet no common beta


# ---------------------------------------------------------------- warnings


def say(budget) -> str:
    return " | ".join(budget.warnings)


def test_a_healthy_measurement_has_no_warnings():
    assert sampled_budget(*world(9).draw(np.random.default_rng(9), 3000, 3000)).warnings == []


def test_every_warning_fires():
    tuned, base = world(9).draw(np.random.default_rng(9), 600, 600)
    rng = np.random.default_rng(0)
    same = [Samples.from_log_ratio(s.reward, 0 * s.reward) for s in (tuned, base)]
    assert "look identical" in say(sampled_budget(*same))
    assert "swapped" in say(sampled_budget(base, tuned))
    assert "one level" in say(sampled_budget(*(s._replace(reward=0 * s.reward) for s in (tuned, base))))
    assert "Without base samples" in say(sampled_budget(tuned))
    single = [s._replace(prompt=np.arange(600)) for s in (tuned, base)]
    assert "single sample" in say(sampled_budget(*single)) and "alone in their reward level" in say(
        sampled_budget(*single)
    )
    half = [s._replace(prompt=np.arange(600) % 3 + i) for i, s in enumerate((tuned, base))]
    assert "left out" in say(sampled_budget(*half))
    low = Samples(*(x[base.reward < 3] for x in base[:3]))
    assert "without base samples" in say(sampled_budget(tuned, low))
    far = Samples(*(x[tuned.reward == 4] for x in tuned[:3]))
    assert "outside the range" in say(sampled_budget(far, low))
    hot = [s._replace(logp_tuned=s.logp_tuned + 0.4) for s in (tuned, base)]
    assert "mean of p0/q" in say(sampled_budget(*hot)) and "mean of q/p0" in say(sampled_budget(*hot))
    poor = world(9, size=3000, noise=3.0).draw(rng, 600, 600)
    assert "effective sample size" in say(sampled_budget(*poor))
    assert "reward bins alone" in say(sampled_budget(*gaussian_tilt(rng, 500, 1.0), bins=3))
    tiny = world(9).draw(rng, 20, 20)
    assert "means little" in say(sampled_budget(*tiny))


def test_truncated_sampling_is_noticed():
    """Samples drawn at temperature 1/2 but scored at temperature 1: the mean of p0/q is far from 1."""
    w = world(10, size=100, noise=1.0)
    cold = World(w.p, w.q**2 / np.sum(w.q**2), w.reward)
    picks = np.random.default_rng(0).choice(100, 3000, p=cold.q)
    tuned = Samples.from_log_ratio(w.reward[picks], w.log_ratio[picks])
    _, base = w.draw(np.random.default_rng(1), 2, 3000)
    assert "temperature" in say(sampled_budget(tuned, base))
