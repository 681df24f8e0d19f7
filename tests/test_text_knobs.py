"""Knobs and reference laws of comparisons on text, against closed forms."""

import math

import numpy as np
import pytest

from kl_rl.experiments.compare.catalogue import CATALOGUE
from kl_rl.experiments.compare.text.knobs import sampled_knobs, targets, tilt_to_mean
from kl_rl.experiments.compare.text.reference import log_normalizer, tilted_expectation


def law(rng, size, lam=1.0):
    """Rewards 0, 1, 3 with known probabilities: samples [1, size], log Z, tilted mean, KL."""
    values, mass = np.array([0.0, 1.0, 3.0]), np.array([0.6, 0.3, 0.1])
    z = mass @ np.exp(lam * values)
    mean = (mass * np.exp(lam * values)) @ values / z
    return rng.choice(values, (1, size), p=mass), math.log(z), mean, lam * mean - math.log(z)


def test_bounds_on_log_z_hold_in_expectation_and_close():
    rng = np.random.default_rng(0)
    lower, upper = [], []
    for _ in range(200):
        reward, log_z, _, _ = law(rng, 256)
        found = log_normalizer(reward, 1.0, rng)
        lower.append(found.lower.value)
        upper.append(found.upper.value)
        assert found.particles == "rejection"
    for values, side in ((lower, -1), (upper, 1)):
        error = np.std(values) / math.sqrt(len(values))
        assert side * (np.mean(values) - log_z) > -4 * error
        assert abs(np.mean(values) - log_z) < 0.1
    assert np.mean(upper) - np.mean(lower) > 4 * np.std(np.subtract(upper, lower)) / math.sqrt(len(upper))


def test_too_few_accepted_particles_are_resampled():
    reward = np.concatenate([np.zeros((1, 511)), np.full((1, 1), 30.0)], axis=1)
    assert log_normalizer(reward, 1.0, np.random.default_rng(0)).particles == "resampling"


def test_weighted_expectations_and_their_errors():
    rng = np.random.default_rng(0)
    means, kls, errors = [], [], []
    for _ in range(200):
        reward, _, mean, kl = law(rng, 2000)
        means.append(tilted_expectation(reward, reward)[0].value)
        estimate = tilted_expectation(reward, reward)[1]
        kls.append(estimate.value)
        errors.append(estimate.stderr)
    for values, truth in ((means, mean), (kls, kl)):
        assert abs(np.mean(values) - truth) < 4 * np.std(values) / math.sqrt(len(values)) + 2e-3
    spread = np.std(kls)  # relative error of a standard deviation over 200 runs: 5 %
    assert abs(np.mean(errors) / spread - 1) < 0.2


def test_tilt_reaches_its_mean():
    reward, _, mean, _ = law(np.random.default_rng(0), 4000, lam=0.7)
    lam = tilt_to_mean(reward, mean)
    weight = np.exp(lam * reward)
    assert (weight * reward).sum() / weight.sum() == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("method", [m for m in CATALOGUE if m.knob != "steps"], ids=lambda m: m.name)
def test_every_method_gets_knobs_that_aim_higher_and_higher(method):
    reward = law(np.random.default_rng(0), 4000)[0]
    aims = targets(reward, (0.3, 1.0))
    assert reward.mean() < aims[0] < aims[1] < reward.max()
    knobs = sampled_knobs(method, reward, aims, num_samples=64)
    assert 1 <= len(knobs) <= 2
    assert all(math.isfinite(k) for k in knobs)
    upward = method.knob in ("n", "threshold")
    assert knobs == sorted(knobs, reverse=not upward)


def test_best_of_n_knob_matches_the_known_law():
    reward = law(np.random.default_rng(0), 200_000)[0]
    best_of_4 = 3 - (0.9**4) * 2 - (0.6**4) * 1
    method = next(m for m in CATALOGUE if m.name == "best-of-n")
    assert sampled_knobs(method, reward, (best_of_4,), num_samples=64) == [4.0]
