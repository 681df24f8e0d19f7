"""Queries on enumerated laws against brute force over strings, their theorems, and the extra fields of a comparison."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from kl_rl import exact, measure
from kl_rl.exact.hidden_markov import HiddenMarkov
from kl_rl.experiments.compare.extras import measure_extras
from kl_rl.experiments.compare.ground import Ground, exact_law
from kl_rl.measure import forecasts, queries
from kl_rl.methods.laws import best_of_n, normalized
from kl_rl.worlds import parse_world

within = jax.jit(measure.conditional_kl)


def random_law(seed, size, concentration=0.5, holes=0):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(size, concentration))
    p[rng.permutation(size)[:holes]] = 0
    with np.errstate(divide="ignore"):
        return np.log(p / p.sum())


@pytest.fixture(scope="module", params=[None, 2], ids=["fixed length", "end token"])
def listed(request):
    """Strings, their tree, and the texts as tuples without padding."""
    strings = exact.enumerate_strings(3, 4, end=request.param)
    lengths = np.asarray(strings.mask).sum(1).astype(int)
    texts = [tuple(row[:n]) for row, n in zip(np.asarray(strings.tokens).tolist(), lengths, strict=True)]
    return strings, queries.string_tree(strings, 3), texts


def starts(text, prefix):
    return text[: len(prefix)] == prefix


def brute_next(law, texts, prefix):
    """Next-token probabilities after a prefix, by summing strings."""
    asked = [(q, y) for q, y in zip(law, texts, strict=True) if starts(y, prefix) and len(y) > len(prefix)]
    return np.array([sum(q for q, y in asked if y[len(prefix)] == v) for v in range(3)])


def prefixes(texts):
    """Unfinished prefixes, shortest first, then in lexicographic order."""
    return sorted({y[:t] for y in texts for t in range(len(y))}, key=lambda prefix: (len(prefix), prefix))


def test_forecasts_are_conditional_probabilities_of_unfinished_prefixes(listed):
    _, tree, texts = listed
    law = random_law(0, len(texts), holes=5)
    found = queries.next_token_forecasts(law, tree)
    expected = [brute_next(np.exp(law), texts, prefix) for prefix in prefixes(texts)]
    assert found.log_mass.shape == (len(expected),)
    for log_conditional, log_mass, row in zip(*found, expected, strict=True):
        assert_allclose(np.exp(log_mass), row.sum(), rtol=1e-12, atol=1e-300)
        if row.sum() > 0:
            assert_allclose(np.exp(log_conditional), row / row.sum(), rtol=1e-12, atol=1e-300)
        else:
            assert np.isnan(log_conditional).all()


def test_marginals_sum_the_strings_below(listed):
    strings, tree, _ = listed
    law = random_law(1, len(tree.code))
    tokens = np.asarray(strings.tokens)
    for t, level in enumerate(queries.log_marginals(law, tree)):
        for place, prefix in enumerate(itertools.product(range(3), repeat=t)):
            below = (tokens[:, :t] == np.array(prefix, int)).all(1)
            assert_allclose(np.exp(level[place]), np.exp(law[below]).sum(), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("seed", range(4))
def test_next_token_error_times_length_is_the_divergence(listed, seed):
    """Chain rule: E[length] x mean KL per token = KL(p || q), holes of the truth included."""
    _, tree, texts = listed
    p, q = random_law(seed, len(texts), holes=20 * (seed % 2)), random_law(seed + 50, len(texts))
    length = float(np.exp(p) @ [len(y) for y in texts])
    divergence = float(exact.kl_divergence(jnp.asarray(p), jnp.asarray(q)))
    assert_allclose(length * queries.next_token_kl(p, q, tree), divergence, rtol=1e-11)
    assert divergence > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_infill_error_is_that_of_every_blank(listed, seed):
    """For every text and token of it: the law of that token given the rest, among texts of the same shape."""
    strings, tree, texts = listed
    p, q = random_law(seed, len(texts), holes=10 * (seed % 2)), random_law(seed + 50, len(texts))
    place = {tuple(row): i for i, row in enumerate(np.asarray(strings.tokens).tolist())}
    total = length = 0.0
    for row, i in place.items():
        for t in range(len(texts[i])):
            filled = [place.get((*row[:t], v, *row[t + 1 :])) for v in range(3)]
            answers = [j for j in filled if j is not None]
            p_mass, q_mass = np.exp(p[answers]).sum(), np.exp(q[answers]).sum()
            if np.exp(p[i]) > 0:
                total += np.exp(p[i]) * (p[i] - math.log(p_mass) - q[i] + math.log(q_mass))
        length += np.exp(p[i]) * len(texts[i])
    assert_allclose(queries.infill_kl(p, q, tree), total / length, rtol=1e-10)


def test_no_error_against_oneself_and_infinite_error_behind_a_hole(listed):
    _, tree, texts = listed
    p, q = random_law(2, len(texts), holes=8), random_law(3, len(texts), holes=8)
    for query in (queries.next_token_kl, queries.infill_kl):
        assert abs(query(p, p, tree)) < 1e-15
        assert query(p, q, tree) == math.inf
    uniform = np.full(len(texts), -math.log(len(texts)))
    alone = np.where(np.arange(len(texts)) == 5, 0.0, -np.inf)
    assert queries.infill_kl(alone, alone, tree) == 0
    assert_allclose(
        queries.next_token_kl(alone, uniform, tree), math.log(len(texts)) / len(texts[5]), rtol=1e-12
    )


def test_every_model_is_calibrated_on_its_own_text(listed):
    """The vacuous measurement: a random law has no calibration error on its own samples, only on the truth's."""
    _, tree, texts = listed
    q, p = (queries.next_token_forecasts(random_law(seed, len(texts)), tree) for seed in (4, 5))

    def errors(text):
        events = (np.exp(q.log_conditional).ravel(), np.exp(text.log_conditional).ravel())
        weight = np.repeat(np.exp(text.log_mass), 3)
        smooth = forecasts.smooth_calibration_error(*events, weight)
        return smooth, forecasts.expected_calibration_error(*events, weight)

    assert max(errors(q)) < 1e-12
    assert min(errors(p)) > 0.02


def random_process(seed, states=3, vocab=3, zeros=False):
    rng = np.random.default_rng(seed)
    emission = rng.dirichlet(np.ones(vocab), states)
    if zeros:
        emission = np.eye(vocab)
    tables = (rng.dirichlet(np.ones(states)), rng.dirichlet(np.ones(states), states), emission)
    with np.errstate(divide="ignore"):
        return HiddenMarkov(*(jnp.asarray(np.log(table)) for table in tables)), tables


@pytest.mark.parametrize("prompt", [[3], [3, 1, 0]])
def test_last_state_kernel_sums_over_hidden_paths(listed, prompt):
    strings, _, texts = listed
    process, (initial, transition, emission) = random_process(6)
    kernel = queries.last_state_kernel(process, np.array(prompt), strings)
    for i in range(0, len(texts), 7):
        seen = [token for token in prompt if token < 3] + list(texts[i])
        mass = np.zeros(3)
        for path in itertools.product(range(3), repeat=len(seen)):
            steps = np.prod([transition[a, b] for a, b in itertools.pairwise(path)])
            mass[path[-1]] += initial[path[0]] * steps * np.prod(emission[list(path), seen])
        assert_allclose(kernel[i], mass / mass.sum(), rtol=1e-10)


def test_last_state_of_a_chain_is_its_last_token(listed):
    strings, _, texts = listed
    process, _ = random_process(7, zeros=True)
    kernel = queries.last_state_kernel(process, np.array([3]), strings)
    assert_allclose(kernel, np.eye(3)[[y[-1] for y in texts]], atol=1e-15)


def test_kernel_stays_a_law_where_the_process_excludes_a_string(listed):
    strings, _, _ = listed
    process = HiddenMarkov(jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.eye(2)), jnp.log(jnp.eye(2, 3)))
    kernel = queries.last_state_kernel(process, np.array([3]), strings)
    assert_allclose(kernel, np.tile([1.0, 0.0], (len(kernel), 1)))


@pytest.mark.parametrize("seed", range(30))
def test_latent_query_is_below_the_bound_of_the_calibration_loss(listed, seed):
    strings, _, texts = listed
    level = np.array([sum(y) % 4 for y in texts])
    levels = exact.Levels(jnp.arange(4.0), jnp.asarray(level, jnp.int32))
    p, q = random_law(seed, len(texts), 2.0), random_law(seed + 100, len(texts), [0.1, 2.0, 50.0][seed % 3])
    kernel = queries.last_state_kernel(random_process(seed)[0], np.array([3]), strings)
    found = queries.latent_state_tv(p, q, level, kernel)
    expected = 0.0
    for r in range(4):
        rows = level == r
        p_r, q_r = np.exp(p[rows]), np.exp(q[rows])
        gap = q_r @ kernel[rows] / q_r.sum() - p_r @ kernel[rows] / p_r.sum()
        expected += q_r.sum() * np.abs(gap).sum() / 2
    assert_allclose(found, expected, rtol=1e-11)
    bound = queries.latent_state_bound(float(within(jnp.asarray(q), jnp.asarray(p), levels)))
    assert 0 < found <= bound


def test_latent_query_ignores_functions_of_the_reward_and_counts_excluded_levels(listed):
    strings, _, texts = listed
    level = np.array([len(set(y)) for y in texts])
    kernel = queries.last_state_kernel(random_process(8)[0], np.array([3]), strings)
    p = random_law(9, len(texts), 2.0)
    tilted = normalized(p + np.array([0.0, 1.0, -2.0, 0.5])[level])
    assert queries.latent_state_tv(p, tilted, level, kernel) < 1e-14
    with np.errstate(divide="ignore"):
        kept = normalized(np.where(level == 1, -np.inf, p))
    assert_allclose(queries.latent_state_tv(kept, p, level, kernel), np.exp(p[level == 1]).sum(), rtol=1e-12)
    assert queries.latent_state_bound(0.08) == 0.2 and queries.latent_state_bound(-1e-18) == 0.0


def test_prompt_information_of_known_channels():
    """0 for one law, log P for disjoint ones, and a binary channel with error e: log 2 - H(e)."""
    one = random_law(10, 6)
    assert abs(queries.prompt_information(np.stack([one, one, one]))) < 1e-15
    with np.errstate(divide="ignore"):
        assert_allclose(queries.prompt_information(np.log(np.eye(4))), math.log(4), rtol=1e-14)
    channel = np.array([[0.9, 0.1], [0.1, 0.9]])
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert_allclose(queries.prompt_information(np.log(channel)), math.log(2) - entropy, rtol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_attractor_lift_is_the_largest_ratio_over_ngrams(listed, n):
    strings, _, texts = listed
    p, q = random_law(11, len(texts)), random_law(12, len(texts), holes=30)
    occurs = lambda law, g: sum(
        w
        for w, y in zip(np.exp(law), texts, strict=True)
        if any(y[i : i + n] == g for i in range(len(y) - n + 1))
    )
    grams = sorted({y[i : i + n] for y in texts for i in range(len(y) - n + 1)})
    found = queries.ngrams(strings, n)
    assert [tuple(g) for g in found.tokens.tolist()] == grams
    ratios = [math.log(occurs(q, g) / occurs(p, g)) for g in grams if occurs(q, g) > 0]
    assert_allclose(queries.attractor_lift(q, p, found), max(ratios), rtol=1e-11)
    assert abs(queries.attractor_lift(p, p, found)) < 1e-14


def test_lift_is_infinite_for_what_the_posterior_never_says(listed):
    strings, _, texts = listed
    with np.errstate(divide="ignore"):
        never = normalized(np.where([1 in y for y in texts], -np.inf, 0.0))
    everything = np.full(len(texts), -math.log(len(texts)))
    assert queries.attractor_lift(everything, never, queries.ngrams(strings, 1)) == math.inf
    with pytest.raises(ValueError, match="between 1 and the horizon 4, got 5"):
        queries.ngrams(strings, 5)


def make_ground(prompts, end=None):
    """A world whose base is the process itself: nothing to train."""
    rng = np.random.default_rng(0)
    tables = {"transition": [[0.8, 0.2], [0.3, 0.7]], "emission": rng.dirichlet(np.ones(3), 2).tolist()}
    base = {"kind": "hmm", "initial": [0.5, 0.5]} | tables
    spec = {"base": base, "horizon": 5, "prompts": prompts}
    reward = {"kind": "motif_count", "motif": [1, 0]}
    world = parse_world(spec | {"reward": reward} | ({} if end is None else {"end": end}))
    strings = exact.enumerate_strings(3, 5, end=end)
    rows = jnp.asarray(world.prompts)
    log_base = normalized(exact_law(world.base, rows, strings))
    rewards = np.stack([np.asarray(world.reward(row, strings.tokens, strings.mask), float) for row in rows])
    flat = exact.reward_levels(rewards.reshape(-1))
    levels = exact.Levels(np.asarray(flat.value), np.asarray(flat.index).reshape(rewards.shape))
    return Ground(world, world.base, strings, log_base, rewards, levels, np.zeros(0), (0.0, 0.0))


@pytest.fixture(
    scope="module", params=[([[]], None), ([[0], [1]], 2)], ids=["one prompt", "two prompts, end"]
)
def ground(request):
    return make_ground(*request.param)


def calibration_loss(ground, law):
    """Mean over prompts of E_{r~q} KL(q(y|r) || p0(y|r)), by the definition."""
    total = 0.0
    for p, q, index in zip(np.exp(ground.log_base), np.exp(law), ground.levels.index, strict=True):
        for r in np.unique(index[q > 0]):
            rows = (index == r) & (q > 0)
            mass, base = q[rows].sum(), p[index == r].sum()
            total += q[rows] @ (np.log(q[rows] / mass) - np.log(p[rows] / base))
    return total / len(law)


def extras_of(ground, law, beta=0.7):
    """The extra fields, compared with the posterior of a temperature."""
    measured = {"beta_fit": beta, "beta": 0.7, "C": calibration_loss(ground, law)}
    return measure_extras(ground)(law, measured), measured


def test_exact_posterior_is_perfect_on_its_own_terms(ground):
    row, _ = extras_of(ground, normalized(ground.log_base + ground.reward / 0.7))
    assert all(isinstance(value, float) and math.isfinite(value) for value in row.values())
    zero = ["query_next_undone", "query_infill_undone", "query_next_pstar", "query_infill_pstar", "latent_tv"]
    zero += ["ece_pstar", "ece_mass_pstar", "smece_pstar", "brier_reliability_pstar", "log_reliability_pstar"]
    assert max(abs(row[name]) for name in [*zero, "attractor_lift"]) < 1e-9
    assert min(row["sbc_reward_p"], row["sbc_logp0_p"]) > 1e-3
    assert row["smece_p0"] > 1e-2 and row["query_next_p0"] > 1e-3
    assert row["smece_p0_tempered"] <= row["smece_p0"] * 1.2
    assert ("information_gap" in row) == (len(ground.log_base) > 1)
    assert abs(row.get("information_gap", 0.0)) < 1e-9


def test_base_is_perfect_on_its_own_text(ground):
    row, _ = extras_of(ground, ground.log_base, math.inf)
    names = ["ece", "ece_mass", "smece", "brier_reliability", "log_reliability", "query_next", "query_infill"]
    assert max(abs(row[f"{name}_p0"]) for name in names) < 1e-12
    assert_allclose(row["temperature_p0"], 1.0, rtol=1e-6)


def test_a_spoiled_policy_is_seen_by_every_instrument(ground):
    noise = np.random.default_rng(1).normal(size=ground.log_base.shape)
    row, measured = extras_of(ground, normalized(ground.log_base + ground.reward / 0.7 + noise))
    for name in (
        "ece_pstar",
        "smece_pstar",
        "query_next_undone",
        "query_infill_undone",
        "query_infill_pstar",
    ):
        assert row[name] > 1e-3
    assert 0 < row["latent_tv"] <= row["latent_bound"]
    assert_allclose(row["latent_bound"], math.sqrt(measured["C"] / 2), rtol=1e-12)
    assert row["attractor_lift"] > 1e-3


def test_ranks_see_a_sharpened_posterior(ground):
    sharp = normalized(2 * (ground.log_base + ground.reward / 0.7))
    row, _ = extras_of(ground, sharp)
    assert row["sbc_logp0_p"] < 1e-6 and row["temperature_p0"] > 1.2


def test_log_score_on_base_text_is_entropy_plus_the_next_token_query(ground):
    """nll on p0 text, times the expected length, is the cross-entropy of the laws; prompts are pooled."""
    law = normalized(ground.log_base + 0.5 * np.random.default_rng(2).normal(size=ground.log_base.shape))
    row, _ = extras_of(ground, law)
    p = np.exp(ground.log_base)
    length = (p @ np.asarray(ground.strings.mask).sum(1)).sum()
    assert_allclose(row["nll_p0"], -(p * law).sum() / length, rtol=1e-11)


def test_filters_leave_fields_undefined_without_failing(ground):
    with np.errstate(divide="ignore"):
        law = normalized(np.where(ground.reward >= 1, ground.log_base, -np.inf))
    row, _ = extras_of(ground, law)
    assert row["nll_p0"] == math.inf and row["query_infill_p0"] == math.inf
    assert math.isnan(row["ece_p0"]) and math.isnan(row["temperature_p0"])
    assert row["latent_tv"] < 1e-12 and math.isfinite(row["attractor_lift"])
    best = np.stack([best_of_n(b, r, 4.0) for b, r in zip(ground.log_base, ground.reward, strict=True)])
    assert abs(extras_of(ground, best)[0]["query_infill_undone"]) < 1e-12


def test_a_diverged_law_gives_the_same_fields_undefined(ground):
    row, measured = extras_of(ground, ground.log_base)
    lost = measure_extras(ground)(np.full_like(ground.log_base, np.nan), measured)
    assert set(row) - set(lost) <= {"information_gap"} and all(math.isnan(value) for value in lost.values())
