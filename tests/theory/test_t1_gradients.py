"""Note 1, second half: expected gradients as sums over all tuples of strings; the law of the best of n."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from kl_rl import exact, objectives
from kl_rl.objectives import kl, weights
from kl_rl.objectives.credit import leave_one_out


def close(actual, expected, rtol=1e-9):
    """Equal up to rounding, relative to the largest entry."""
    assert_allclose(actual, expected, rtol=rtol, atol=rtol * float(np.max(np.abs(expected))))


def reverse_kl(tiny):
    return lambda log_q: exact.kl_divergence(log_q, tiny.log_posterior)


def forward_kl(tiny):
    return lambda log_q: exact.kl_divergence(tiny.log_posterior, log_q)


def on_policy_objectives(tiny):
    """The three objectives of T1.5, as functions of log q of the samples and their indices."""

    def delta(log_q, index):
        return log_q - (tiny.log_base + tiny.log_evidence)[index][None]

    log_z = exact.log_partition(tiny.log_base, tiny.log_evidence)
    return {
        "score_function": lambda q, i: objectives.score_function(q, leave_one_out(-delta(q, i))),
        "log_variance": lambda q, i: objectives.log_variance(delta(q, i)),
        "trajectory_balance": lambda q, i: objectives.trajectory_balance(delta(q, i), log_z),
    }


NAMES = ["score_function", "log_variance", "trajectory_balance"]


@pytest.mark.theorem("T1.5")
@pytest.mark.parametrize("name", NAMES)
def test_on_policy_gradient_is_the_reverse_kl_gradient(tiny, name):
    """Sum over ALL ordered pairs (y, y') of q(y) q(y') grad objective = grad KL(q || p*)."""
    actual = tiny.expected_gradient(on_policy_objectives(tiny)[name])
    close(actual, tiny.gradient(reverse_kl(tiny)))


@pytest.mark.theorem("T1.5")
@pytest.mark.parametrize("name", NAMES[:2])
def test_the_same_with_three_samples(smallest, name):
    actual = smallest.expected_gradient(on_policy_objectives(smallest)[name], num_samples=3)
    close(actual, smallest.gradient(reverse_kl(smallest)))


@pytest.mark.theorem("T1.5")
def test_score_function_and_log_variance_agree_tuple_by_tuple(tiny):
    losses = on_policy_objectives(tiny)
    for index in ([0, 5, 9], [3, 3, 7]):
        one = lambda name: lambda q: jnp.sum(losses[name](q[np.array(index)][None], np.array(index)))  # noqa: B023
        gradients = [tiny.gradient(one(name)) for name in NAMES[:2]]
        close(gradients[0], gradients[1])


@pytest.mark.theorem("T1.5")
def test_sample_by_sample_zero_at_the_posterior_except_for_imitation(table):
    """At q = p* every pair has gradient 0; for the forward KL only the expectation has."""
    star = table.at(table.reaching(table.log_posterior))
    assert_allclose(star.log_q, table.log_posterior, rtol=1e-10)
    losses = on_policy_objectives(table)
    losses["imitation"] = lambda q, i: objectives.weighted_likelihood(q, jnp.ones_like(q))

    @jax.jit
    @jax.jacobian
    def per_pair(log_q):
        pairs = np.array([[0, 1], [2, 7], [4, 14], [9, 9]])
        total = lambda loss, pair: jnp.sum(loss(log_q[pair][None], pair))
        return jnp.stack([jnp.stack([total(f, pair) for f in losses.values()]) for pair in pairs])

    gradients = np.tensordot(per_pair(star.log_q), star.jacobian(), 1)
    largest = np.max(np.abs(gradients), axis=(0, 2, 3))
    assert_allclose(largest[:3], np.zeros(3), atol=1e-12)
    assert largest[3] > 0.1
    expected = star.expected_gradient(losses["imitation"], num_samples=1)
    assert_allclose(expected, np.zeros_like(expected), atol=1e-12)


@pytest.mark.theorem("C1.3")
def test_off_policy_the_leave_one_out_gradient_is_that_of_the_log_variance(table):
    """Samples from p0: no longer grad KL(q||p*), but grad (1/2) Var_p0(delta), whose zero is still p*."""
    target = table.log_base + table.log_evidence

    def half_variance(log_q):
        delta = log_q - target
        return 0.5 * exact.expectation(
            table.log_base, (delta - exact.expectation(table.log_base, delta)) ** 2
        )

    variance, divergence = table.gradient(half_variance), table.gradient(reverse_kl(table))
    losses = on_policy_objectives(table)
    for name in NAMES[:2]:
        actual = table.expected_gradient(losses[name], log_sampler=table.log_base)
        close(actual, variance)
        assert np.max(np.abs(actual - divergence)) > 0.1 * np.max(np.abs(divergence))
    star = table.at(table.reaching(table.log_posterior))
    no_baseline = lambda q, i: objectives.score_function(q, -(q - target[i][None]))
    at_star = [
        np.max(np.abs(star.expected_gradient(f, log_sampler=table.log_base)))
        for f in (losses["score_function"], losses["log_variance"], no_baseline)
    ]
    assert max(at_star[:2]) < 1e-12 and at_star[2] > 1e-2


def against_base(tiny, estimator):
    """A KL estimator between the samples' log q and log p0."""
    return lambda log_q, index: estimator(log_q, tiny.log_base[index][None])


@pytest.mark.theorem("T1.6")
def test_what_each_kl_estimator_does_as_a_loss(tiny):
    to_base = tiny.gradient(lambda log_q: exact.kl_divergence(log_q, tiny.log_base))
    from_base = tiny.gradient(lambda log_q: exact.kl_divergence(tiny.log_base, log_q))
    loss = lambda k: tiny.expected_gradient(against_base(tiny, k), num_samples=1)
    assert_allclose(loss(kl.k1), jnp.zeros_like(to_base), atol=1e-13)
    close(loss(kl.k2), to_base)
    close(loss(kl.k3), from_base, rtol=1e-8)
    assert np.max(np.abs(to_base - from_base)) > 0.1 * np.max(np.abs(to_base))


@pytest.mark.theorem("T1.6")
def test_what_each_kl_estimator_does_in_the_reward(tiny):
    to_base = tiny.gradient(lambda log_q: exact.kl_divergence(log_q, tiny.log_base))
    from_base = tiny.gradient(lambda log_q: exact.kl_divergence(tiny.log_base, log_q))

    def in_reward(estimator):
        k = against_base(tiny, estimator)
        penalty = lambda log_q, index: objectives.score_function(log_q, leave_one_out(-k(log_q, index)))
        return tiny.expected_gradient(penalty)

    close(in_reward(kl.k1), to_base)
    close(in_reward(kl.k3), to_base - from_base, rtol=1e-8)


@pytest.mark.theorem("T1.6")
def test_values_k1_and_k3_are_unbiased_and_k2_is_not(tiny):
    truth = exact.kl_divergence(tiny.log_q, tiny.log_base)
    expected = lambda k: exact.expectation(tiny.log_q, k(tiny.log_q, tiny.log_base))
    value = lambda k: jax.jit(expected, static_argnums=0)(k)
    assert_allclose(value(kl.k1), truth, rtol=1e-11)
    assert_allclose(value(kl.k3), truth, rtol=1e-9)
    assert abs(value(kl.k2) - truth) > 1e-2 * truth


@pytest.mark.theorem("C1.4")
@pytest.mark.parametrize(("beta", "distance"), [(1.0, 0.043), (0.1, 0.53)])
def test_k3_in_the_loss_has_the_fixed_point_beta_p0_over_lambda_minus_r(beta, distance):
    """One decision, three fair bits, r = number of ones: the stationary policy is not p*."""
    log_base = jnp.full(8, -jnp.log(8.0))
    reward = jnp.asarray([float(bin(i).count("1")) for i in range(8)])
    low, high = 3.0 + beta / 8, 3.0 + beta * 8
    for _ in range(200):  # sum of beta p0 / (lambda - r) = 1
        middle = 0.5 * (low + high)
        mass = float(jnp.sum(beta * jnp.exp(log_base) / (middle - reward)))
        low, high = (middle, high) if mass > 1 else (low, middle)
    fixed = beta * jnp.exp(log_base) / (low - reward)

    @jax.jit
    def expected_gradient(logits):
        def total(logits):
            log_q = jax.nn.log_softmax(logits)

            def sampled(index):
                gain = objectives.score_function(log_q[index], reward[index])
                return jnp.sum(gain + beta * kl.k3(log_q[index], log_base[index]))

            return exact.expectation_over_tuples(sampled, log_q, 1)

        return jax.grad(total)(logits)

    star = exact.log_posterior(log_base, reward / beta)
    assert_allclose(expected_gradient(jnp.log(fixed)), np.zeros(8), atol=1e-10)
    assert np.max(np.abs(expected_gradient(star))) > 1e-2 * beta
    assert_allclose(exact.kl_divergence(jnp.log(fixed), star), distance, rtol=0.02)


def levels_of(tiny):
    """cdf F and its left limit at the reward of every string; [N], [N]."""
    p, reward = np.exp(tiny.log_base), np.asarray(tiny.reward)
    return (reward[None] <= reward[:, None]) @ p, (reward[None] < reward[:, None]) @ p


@pytest.mark.theorem("T1.7")
@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_weights_are_unbiased_for_the_tie_aware_law(smallest, n):
    """Sum over ALL triples: the weights give p0 (F^n - F-^n) / (F - F-), also for n < K."""
    below_or_equal, below = levels_of(smallest)
    p0 = np.exp(smallest.log_base)
    law = p0 * (below_or_equal**n - below**n) / (below_or_equal - below)

    def estimator(index):
        weight = weights.best_of_n(smallest.reward[index], n)
        return weight @ jax.nn.one_hot(index, len(p0), dtype=weight.dtype)

    triples = np.indices((8, 8, 8)).reshape(3, -1).T
    shares = jax.jit(jax.vmap(estimator))(jnp.asarray(triples))
    probability = np.prod(p0[triples], axis=1)
    close(probability @ shares, law)
    assert_allclose(np.sum(law), 1.0, rtol=1e-12)
    assert_allclose(np.sum(shares, axis=1), np.ones(512), rtol=1e-12)


def best_of_n_kl(level_mass, n):
    """KL of the best of n from p0, with ties broken at random: a sum over levels."""
    top = np.cumsum(level_mass)
    gain = top**n - (top - level_mass) ** n
    return np.sum(gain * np.log(gain / level_mass))


@pytest.mark.theorem("T1.7")
def test_best_of_n_kl_is_below_the_atomless_value_and_tends_to_it():
    assert_allclose(best_of_n_kl(np.array([0.5, 0.5]), 2), 0.1308, atol=5e-5)
    assert_allclose(np.log(2) - 0.5, 0.1931, atol=5e-5)
    rng = np.random.default_rng(0)
    for n in (2, 4, 16):
        bound = np.log(n) - (n - 1) / n
        for size in (1, 2, 5, 20):
            assert best_of_n_kl(rng.dirichlet(np.ones(size)), n) < bound
        refined = np.array([bound - best_of_n_kl(np.full(2**k, 2.0**-k), n) for k in range(1, 13)])
        assert np.all(np.diff(refined) < 0)
        assert refined[-1] < n / 2**12


def alpha_divergence_value(tiny, alpha):
    """D_alpha(p* || q), or its limits."""
    if alpha == 0:
        return reverse_kl(tiny)
    if alpha == 1:
        return forward_kl(tiny)
    power = lambda log_q: jnp.sum(jnp.exp(alpha * tiny.log_posterior + (1 - alpha) * log_q))
    return lambda log_q: (power(log_q) - 1) / (alpha * (alpha - 1))


@pytest.mark.theorem("T1.8")
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_alpha_divergence_gradient(tiny, alpha):
    def objective(log_q, index):
        log_weight = tiny.log_posterior[index][None] - log_q
        return objectives.alpha_divergence(log_q, log_weight, alpha=alpha)

    close(tiny.expected_gradient(objective), tiny.gradient(alpha_divergence_value(tiny, alpha)))


@pytest.mark.theorem("T1.8")
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_an_error_in_log_z_only_rescales_the_alpha_gradient(tiny, alpha):
    """log Z wrong by e multiplies the expected gradient by exp(-alpha e)."""

    def objective(log_q, index):
        log_weight = tiny.log_posterior[index][None] - log_q - 0.3
        return objectives.alpha_divergence(log_q, log_weight, alpha=alpha)

    scale = np.exp(-0.3 * alpha)
    close(tiny.expected_gradient(objective), scale * tiny.gradient(alpha_divergence_value(tiny, alpha)))


@pytest.mark.theorem("T1.8")
def test_alpha_divergence_tends_to_the_two_kls(tiny):
    """The error at distance h from either end is of order h."""
    for end, inward in ((0, 1), (1, -1)):
        near = [alpha_divergence_value(tiny, end + inward * h)(tiny.log_q) for h in (0, 1e-3, 1e-4)]
        error = np.abs(np.array(near[1:]) - near[0])
        assert_allclose(error[0] / error[1], 10.0, rtol=0.02)
