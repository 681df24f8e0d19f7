"""Note 2: the price of the reward, the shape of its marginal, and the calibration loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from kl_rl import exact, measure

budget_of = jax.jit(measure.exact_budget)
price = jax.jit(measure.price)
within = jax.jit(measure.conditional_kl)


def kl(q, p):
    """KL of two probability vectors, by the definition."""
    q, p = q[q > 0], p[q > 0]
    return float(q @ np.log(q / p))


def marginal(law, index, size=None):
    return np.bincount(np.asarray(index), np.asarray(law), minlength=size or 0)


def tilt(p, reward, mean):
    """The tilt of p with a given mean reward, by Newton's method; and its lambda."""
    scale = 0.0
    for _ in range(100):
        law = p * np.exp(scale * (reward - reward.max()))
        law = law / law.sum()
        average = law @ reward
        scale += (mean - average) / (law @ (reward - average) ** 2)
    return law, scale


@pytest.mark.theorem("T2.1")
def test_price_is_the_least_kl_that_buys_a_mean_reward(random_pair):
    log_q, log_p, reward, levels = random_pair
    q, p, r = np.exp(log_q), np.exp(log_p), np.asarray(reward)
    mean = q @ r
    cheapest, scale = tilt(p, r, mean)
    paid, lam = price(exact.level_log_prob(log_p, levels), levels.value, mean)
    assert_allclose(lam, scale, rtol=1e-9)
    assert_allclose(paid, kl(cheapest, p), rtol=1e-9)
    assert_allclose(kl(q, p) - paid, kl(q, cheapest), rtol=1e-9)  # so every other law pays more
    for other in (scale - 1.0, scale - 0.1, scale + 0.1, scale + 1.0):
        assert other * mean - np.log(p @ np.exp(other * r)) < paid


@pytest.mark.theorem("T2.1")
def test_price_at_the_ends_of_the_range_and_at_the_base_mean(random_pair):
    _, log_p, reward, levels = random_pair
    mass = np.exp(exact.level_log_prob(log_p, levels))
    for level in (0, -1):
        paid, _ = price(jnp.log(mass), levels.value, levels.value[level])
        assert_allclose(paid, -np.log(mass[level]), rtol=1e-9)
    paid, lam = price(jnp.log(mass), levels.value, jnp.asarray(mass @ np.asarray(levels.value)))
    assert_allclose([paid, lam], [0.0, 0.0], atol=1e-9)


@pytest.mark.theorem("T2.2")
@pytest.mark.parametrize("groups", [1, 2, 5, 12])
def test_split_for_any_statistic(random_pair, groups):
    log_q, log_p, _, _ = random_pair
    q, p = np.exp(log_q), np.exp(log_p)
    label = np.random.default_rng(groups).permutation(np.arange(12) % groups)
    levels = exact.Levels(jnp.arange(float(groups)), jnp.asarray(label))
    split = kl(marginal(q, label), marginal(p, label)) + within(log_q, log_p, levels)
    assert_allclose(split, kl(q, p), rtol=1e-11)
    by_level = sum(
        q[label == g].sum() * kl(q[label == g] / q[label == g].sum(), p[label == g] / p[label == g].sum())
        for g in range(groups)
    )
    assert_allclose(within(log_q, log_p, levels), by_level, rtol=1e-10, atol=1e-14)


def noisy_split(q, p, kernel):
    """KL(q(t)||p(t)) and E_{t~q} KL(q(y|t)||p(y|t)) when t is drawn from kernel[y]."""
    q_t, p_t = q @ kernel, p @ kernel
    return kl(q_t, p_t), sum(
        w * kl(q * k / a, p * k / b) for w, k, a, b in zip(q_t, kernel.T, q_t, p_t, strict=True)
    )


@pytest.mark.theorem("T2.2")
def test_split_for_a_statistic_observed_through_common_noise(random_pair):
    q, p = np.exp(random_pair[0]), np.exp(random_pair[1])
    kernel = np.random.default_rng(9).dirichlet(np.ones(4), 12)
    assert_allclose(sum(noisy_split(q, p, kernel)), kl(q, p), rtol=1e-11)


def zero_set(p, r):
    """Policies that are p0 times a function of the reward."""
    at_most = np.array([p[r <= x].sum() for x in r])
    below = np.array([p[r < x].sum() for x in r])
    mass = at_most - below
    prior = dict(
        zip(np.unique(r), np.random.default_rng(1).dirichlet(np.ones(len(np.unique(r)))), strict=True)
    )
    kept = np.clip((at_most - 0.6) / mass, 0.0, 1.0)  # top 40 % of p0, the boundary level in part
    return {
        "tilt": p * np.exp(1.7 * r),
        "any function, not monotone": p * np.cos(r) ** 2,
        "filter": p * (r >= 0.5),
        "quantilizer": p * kept,
        "best of 5, ties at random": p * (at_most**5 - below**5) / mass,
        "conditioning on a return drawn from any prior": p / mass * np.array([prior[x] for x in r]),
        "mixture over temperatures": 0.3 * p * np.exp(r) + 0.7 * p * np.exp(-2 * r),
    }


@pytest.mark.theorem("T2.3")
def test_everything_that_updates_on_the_reward_alone_has_no_calibration_loss(random_pair):
    _, log_p, reward, levels = random_pair
    with np.errstate(divide="ignore"):
        for name, law in zero_set(np.exp(log_p), np.asarray(reward)).items():
            result = budget_of(jnp.log(law / law.sum()), log_p, reward, levels, 1.0)
            assert abs(float(result.C)) < 1e-14, name
            assert result.kl > 1e-3, name


@pytest.mark.theorem("T2.3")
def test_nothing_else_has(random_pair):
    """C is the KL to a member of the zero set, so it vanishes only if q is that member."""
    log_q, log_p, reward, levels = random_pair
    shift = exact.level_log_prob(log_q, levels) - exact.level_log_prob(log_p, levels)
    member = log_p + shift[levels.index]
    assert_allclose(jnp.sum(jnp.exp(member)), 1.0, rtol=1e-12)
    assert_allclose(within(log_q, log_p, levels), kl(np.exp(log_q), np.exp(member)), rtol=1e-10)
    spoilt = np.exp(member) * (1 + 0.01 * np.where(np.arange(12) % 2, 1.0, -1.0))
    assert within(jnp.log(spoilt / spoilt.sum()), log_p, levels) > 1e-7


@pytest.mark.theorem("C2.1")
@pytest.mark.parametrize("n", [2, 5])
def test_best_of_n_with_ties_broken_by_index_pays_calibration(random_pair, n):
    _, log_p, reward, levels = random_pair
    order = np.lexsort((np.arange(12), np.asarray(reward)))
    top = np.cumsum(np.exp(log_p)[order])
    law = np.empty(12)
    law[order] = top**n - np.concatenate([[0.0], top[:-1]]) ** n
    assert_allclose(law.sum(), 1.0, rtol=1e-12)
    assert within(jnp.log(law), log_p, levels) > 1e-3
    constant = exact.Levels(
        jnp.zeros(1), jnp.zeros(12, jnp.int32)
    )  # even a constant reward costs KL, all of it C
    top = np.cumsum(np.exp(log_p))
    law = top**n - np.concatenate([[0.0], top[:-1]]) ** n
    assert_allclose(within(jnp.log(law), log_p, constant), kl(law, np.exp(log_p)), rtol=1e-9)
    assert kl(law, np.exp(log_p)) > 1e-3


@pytest.mark.theorem("C2.2")
def test_an_injective_reward_makes_the_measure_vacuous(random_pair):
    log_q, log_p, _, _ = random_pair
    reward = jnp.asarray(np.random.default_rng(0).permutation(12.0 + np.arange(12)))
    result = budget_of(log_q, log_p, reward, exact.reward_levels(reward), 1.0)
    assert_allclose([result.C, result.C_fwd, result.C_JS], np.zeros(3), atol=1e-14)
    assert result.kl > 0.1 and result.S > 0.01


@pytest.mark.theorem("C2.3")
def test_with_a_stochastic_reward_the_posterior_is_not_a_function_of_the_realized_reward(random_pair):
    """Level sets of E[e^{r/beta} | y] have C = 0; conditioning on the reward that was drawn has not."""
    p, beta, value = np.exp(random_pair[1]), 0.7, np.array([0.0, 1.0, 2.0])
    group = np.arange(12) % 4
    kernel = np.random.default_rng(3).dirichlet(np.ones(3), 4)[group]
    star = p * (kernel @ np.exp(value / beta))
    star = star / star.sum()
    levels = exact.Levels(jnp.arange(4.0), jnp.asarray(group))
    assert abs(within(jnp.log(star), jnp.log(p), levels)) < 1e-14
    marginal_kl, loss = noisy_split(star, p, kernel)
    assert_allclose(marginal_kl + loss, kl(star, p), rtol=1e-10)
    assert loss > 1e-2


@pytest.mark.theorem("T2.4")
def test_three_way_budget(random_pair):
    log_q, log_p, reward, levels = random_pair
    q, p, r = np.exp(log_q), np.exp(log_p), np.asarray(reward)
    result = budget_of(log_q, log_p, reward, levels, 0.7)
    assert_allclose(result.P + result.S + result.C, result.kl, rtol=1e-10)
    assert min(result.P, result.S, result.C) > 0
    matched, scale = tilt(p, r, q @ r)
    assert_allclose(1 / result.beta_fit, scale, rtol=1e-9)
    assert_allclose(result.S, kl(marginal(q, levels.index), marginal(matched, levels.index)), rtol=1e-9)
    assert_allclose(result.C, sum(noisy_split(q, p, np.eye(4)[levels.index])[1:]), rtol=1e-10)


@pytest.mark.theorem("T2.4")
def test_shape_vanishes_exactly_when_the_reward_marginal_is_a_tilt(random_pair):
    log_q, log_p, reward, levels = random_pair
    index, p = np.asarray(levels.index), np.exp(log_p)
    tilted = np.asarray(marginal(p * np.exp(0.8 * np.asarray(reward)), index))
    inside = np.exp(log_q - exact.level_log_prob(log_q, levels)[levels.index])
    law = inside * (tilted / tilted.sum())[index]  # drifted inside the levels, tilted between them
    result = budget_of(jnp.log(law), log_p, reward, levels, 0.7)
    assert abs(float(result.S)) < 1e-10 and result.C > 1e-3
    assert_allclose(result.beta_fit, 1 / 0.8, rtol=1e-9)
    star = p * np.exp(0.8 * np.asarray(reward))
    result = budget_of(jnp.log(star / star.sum()), log_p, reward, levels, 0.7)
    assert_allclose([result.S, result.C], np.zeros(2), atol=1e-10)
    assert_allclose(result.P, result.kl, rtol=1e-10)


@pytest.mark.theorem("T2.5")
@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_distance_to_the_posterior_at_matched_reward(random_pair, beta):
    """KL(q||p*_beta) = KL(q||p0) - mu/beta + log Z = S + C + a function of mu, which is 0 at beta_fit."""
    log_q, log_p, reward, levels = random_pair
    result = budget_of(log_q, log_p, reward, levels, beta)
    assert_allclose(result.kl_q_pstar, result.kl - result.reward / beta + result.log_z, rtol=1e-10)
    own = budget_of(log_q, log_p, reward, levels, result.beta_fit)
    assert_allclose(own.kl_q_pstar, result.S + result.C, rtol=1e-8)


@pytest.mark.theorem("T2.5")
def test_the_optimum_in_a_small_class_has_the_least_s_plus_c_at_its_reward(smallest):
    """Bigram policies over 8 strings, brute force: none with the same mean reward has a smaller S + C."""
    tokens, p0 = np.asarray(smallest.strings.tokens), np.exp(smallest.log_base)
    reward = (
        2.0 * (tokens[:, 0] == tokens[:, 2]) + tokens[:, 1]
    )  # no bigram can match tokens two places apart

    def laws(first, after_0, after_1):  # probabilities of token 1; [...] -> [..., 8]
        chance = np.stack([after_0, after_1, first])
        rows = np.concatenate([np.full((8, 1), 2), tokens[:, :-1]], axis=1)
        one = np.moveaxis(chance[rows], (0, 1), (-2, -1))
        return np.prod(np.where(tokens == 1, one, 1 - one), axis=-1)

    def divergence(q):
        return np.sum(q * (np.log(q / p0) - reward / 2.0), axis=-1)

    low, high = np.full(3, 1e-3), np.full(3, 1 - 1e-3)
    for _ in range(40):  # zoom in on the KL-RL optimum of the class
        grid = np.meshgrid(*np.linspace(low, high, 15).T, indexing="ij")
        best = np.unravel_index(np.argmin(divergence(laws(*grid))), grid[0].shape)
        optimum, width = np.array([g[best] for g in grid]), (high - low) / 4
        low, high = np.maximum(optimum - width, 1e-6), np.minimum(optimum + width, 1 - 1e-6)
    champion = laws(*optimum)
    mean = champion @ reward
    after = np.random.default_rng(0).uniform(0.02, 0.98, (2, 2000))
    zero, one = laws(np.zeros(2000), *after) @ reward, laws(np.ones(2000), *after) @ reward
    first = (mean - zero) / (one - zero)  # the mean reward is linear in the first probability
    inside = (first > 0.01) & (first < 0.99)
    members = laws(first[inside], *after[:, inside])
    assert inside.sum() > 100
    assert_allclose(members @ reward, np.full(len(members), mean), rtol=1e-9)
    every = jax.jit(jax.vmap(measure.exact_budget, in_axes=(0, None, None, None, None)))
    laws_in_nats = jnp.log(np.concatenate([champion[None], members]))
    both = every(laws_in_nats, smallest.log_base, jnp.asarray(reward), exact.reward_levels(reward), 1.0)
    cost = np.asarray(both.S + both.C)
    assert cost[0] > 1e-3  # the class does not hold p*
    assert np.min(cost[1:]) > cost[0] - 1e-9
