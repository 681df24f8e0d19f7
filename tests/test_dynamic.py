"""Dynamic programming against brute force over all strings; samplers by their own standard errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_rl import exact, worlds
from kl_rl.core import rollouts
from kl_rl.core.policy import sequence_log_prob
from kl_rl.exact.automaton import Automaton, automaton_reward
from kl_rl.exact.hidden_markov import HiddenMarkov

# One compilation for each row: (generator arguments, prompt). Seeds vary the numbers only.
SHAPES = {
    "hmm": ({"vocab": 3, "horizon": 4, "states": 2}, []),
    "markov-end-prompt": ({"vocab": 3, "horizon": 4, "kind": "markov", "end": 0}, [2, 0, 1]),
}
SEEDS = (0, 1, 2, 3)


def make(shape, seed, real=False):
    arguments, prompt = SHAPES[shape]
    world = worlds.generate_world(seed, prompts=[prompt], **arguments)
    if not real:
        return world
    weight = np.random.default_rng(seed).normal(size=world.automaton.weight.shape)
    return worlds.parse_world(world.spec | {"reward": world.spec["reward"] | {"weight": weight.tolist()}})


def problem(world):
    return world.process, world.automaton, jnp.asarray(world.prompts[0]), world.horizon


def brute_force(world):
    """Strings, mask, log p0 and reward of every completion, by loops in numpy."""
    initial, transition, emission = (np.exp(np.asarray(x)) for x in world.process)
    following, weight = np.asarray(world.automaton.next), np.asarray(world.automaton.weight)
    belief, state = initial, int(world.automaton.start)
    for token in [t for t in world.prompts[0] if t < world.vocab]:
        belief = belief * emission[:, token]
        belief, state = belief / belief.sum() @ transition, following[state, token]
    rows = {}
    for y in itertools.product(range(world.vocab), repeat=world.horizon):
        length = y.index(world.end) + 1 if world.end is not None and world.end in y else world.horizon
        if y[:length] in rows:
            continue
        b, q, prob, reward = belief, state, 1.0, 0.0
        for token in y[:length]:
            joint = b * emission[:, token]
            prob, b = prob * joint.sum(), joint / joint.sum() @ transition
            reward, q = reward + weight[q, token], following[q, token]
        rows[y[:length]] = (np.log(prob), reward)
    log_prob, reward = (np.array(column) for column in zip(*rows.values(), strict=True))
    return list(rows), log_prob, reward


def indicator(world, strings):
    """1 where string n has token v at place t; [N, T, V]."""
    table = np.zeros((len(strings), world.horizon, world.vocab))
    for n, y in enumerate(strings):
        table[n, np.arange(len(y)), list(y)] = 1.0
    return table


def padded(world, strings):
    filler = 0 if world.end is None else world.end
    tokens = jnp.asarray([list(y) + [filler] * (world.horizon - len(y)) for y in strings], jnp.int32)
    mask = jnp.asarray([[float(t < len(y)) for t in range(world.horizon)] for y in strings])
    return tokens, mask


def numbers(world, tokens, mask):
    """Row of each sampled string in the list of all strings."""
    strings, _, _ = brute_force(world)
    index = {y: n for n, y in enumerate(strings)}
    lengths = np.asarray(mask).sum(axis=-1).astype(int)
    return np.array([index[tuple(y[:n])] for y, n in zip(np.asarray(tokens).tolist(), lengths, strict=True)])


def assert_frequencies(index, prob):
    """Each string as often as its probability says, within 4 standard errors (or counts)."""
    count = np.bincount(index, minlength=len(prob))
    error = np.sqrt(len(index) * prob * (1 - prob))
    assert np.all(np.abs(count - len(index) * prob) < 4 * np.maximum(error, 1.0))


def posterior(log_prob, reward, beta):
    joint = log_prob + reward / beta
    log_z = joint.max() + np.log(np.exp(joint - joint.max()).sum())
    return log_z, joint - log_z


@pytest.mark.parametrize("real", [False, True], ids=["integer", "real"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_log_partition_moments_and_marginals_equal_brute_force(shape, seed, real):
    world = make(shape, seed, real)
    strings, log_prob, reward = brute_force(world)
    for beta in (0.2, 1.3):
        log_z, log_star = posterior(log_prob, reward, beta)
        star = np.exp(log_star)
        moments = exact.posterior_moments(*problem(world), beta, world.end)
        expected = log_z, star @ reward, star @ (reward - star @ reward) ** 2, star @ (log_star - log_prob)
        np.testing.assert_allclose(np.array(moments), expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(
            exact.lattice_log_partition(*problem(world), beta, world.end), log_z, rtol=1e-9, atol=1e-12
        )
        marginals = exact.token_marginals(*problem(world), beta, world.end)
        direct = np.einsum("n,ntv->tv", star, indicator(world, strings))
        np.testing.assert_allclose(marginals, direct, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reward_law_and_everything_given_a_reward_equal_brute_force(shape, seed):
    world = make(shape, seed)
    strings, log_prob, reward = brute_force(world)
    lattice = fixed_lattice(world)
    law = np.exp(exact.reward_distribution(*problem(world), lattice, world.end))
    direct = [np.exp(log_prob[reward == value]).sum() for value in lattice.values]
    np.testing.assert_allclose(law, direct, rtol=1e-9, atol=1e-15)
    for level in (int(np.argmax(law)), int(np.flatnonzero(law)[-1])):
        given = np.where(reward == lattice.values[level], np.exp(log_prob), 0.0) / law[level]
        marginals = exact.token_marginals_given_reward(*problem(world), lattice, level, world.end)
        expected = np.einsum("n,ntv->tv", given, indicator(world, strings))
        np.testing.assert_allclose(marginals, expected, rtol=1e-9, atol=1e-14)


def fixed_lattice(world):
    """All scores that weights in {-1, 0, 1, 2} can give, so that shapes do not depend on the seed."""
    weight = np.asarray(world.automaton.weight)
    values = np.arange(-world.horizon, 2 * world.horizon + 1.0)
    return exact.Lattice(values, weight.astype(np.int32), world.horizon)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_posterior_policy_is_the_posterior(shape, seed):
    world = make(shape, seed, real=True)
    strings, log_prob, reward = brute_force(world)
    tokens, mask = padded(world, strings)
    prompt = jnp.asarray(world.prompts)
    policy = exact.posterior_policy(world.process, world.automaton, world.horizon, 0.6, world.end)
    actual = jax.jit(sequence_log_prob)(policy, prompt, tokens, mask)
    np.testing.assert_allclose(actual, posterior(log_prob, reward, 0.6)[1], rtol=1e-9)


def test_the_reward_conditioned_policy_is_the_base_given_the_reward():
    world = make("markov-end-prompt", 1)
    strings, log_prob, reward = brute_force(world)
    tokens, mask = padded(world, strings)
    lattice = exact.score_lattice(world.automaton, world.horizon, world.end)
    law = np.array([np.exp(log_prob[reward == value]).sum() for value in lattice.values])
    level = int(np.argmax(law))
    policy = exact.reward_conditioned_policy(
        world.process, world.automaton, world.horizon, lattice, level, world.end
    )
    actual = np.exp(jax.jit(sequence_log_prob)(policy, jnp.asarray(world.prompts), tokens, mask))
    expected = np.where(reward == lattice.values[level], np.exp(log_prob) / law[level], 0.0)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15)


def test_decoder_and_forward_pass_of_the_posterior_agree():
    world = make("markov-end-prompt", 0)
    policy = exact.posterior_policy(world.process, world.automaton, world.horizon, 0.5, world.end)
    prompt = jnp.asarray(world.prompts)
    draw = jax.jit(rollouts.sample, static_argnames=("num_samples", "horizon", "end"))
    tokens, mask, log_probs = draw(
        policy, jax.random.key(0), prompt, num_samples=3000, horizon=world.horizon, end=world.end
    )
    scored = sequence_log_prob(policy, prompt[:, None], tokens, mask)
    np.testing.assert_allclose(log_probs.sum(axis=-1), scored, rtol=1e-9)
    _, log_prob, reward = brute_force(world)
    assert_frequencies(numbers(world, tokens[0], mask[0]), np.exp(posterior(log_prob, reward, 0.5)[1]))


def test_a_posterior_policy_refuses_strings_beyond_its_horizon():
    world = make("hmm", 0)
    policy = exact.posterior_policy(world.process, world.automaton, 2, 1.0)
    with pytest.raises(ValueError, match="computed for a horizon of 2: build the policy with a longer"):
        policy.logits(jnp.asarray(world.prompts), jnp.zeros((1, 3), jnp.int32))


def test_samples_of_the_posterior_have_its_law_and_carry_their_log_probability():
    world = make("markov-end-prompt", 2)
    _, log_prob, reward = brute_force(world)
    log_star = posterior(log_prob, reward, 0.8)[1]
    sample = exact.sample_posterior(jax.random.key(1), *problem(world), 0.8, 4000, world.end)
    index = numbers(world, *sample[:2])
    np.testing.assert_allclose(sample[2], log_star[index], rtol=1e-9)
    assert_frequencies(index, np.exp(log_star))


def test_samples_given_a_reward_have_the_base_law_inside_the_level():
    world = make("markov-end-prompt", 3)
    _, log_prob, reward = brute_force(world)
    lattice = exact.score_lattice(world.automaton, world.horizon, world.end)
    sizes = [np.sum(reward == value) for value in lattice.values]
    level = int(np.argmax(sizes))
    given = np.where(reward == lattice.values[level], np.exp(log_prob), 0.0)
    given /= given.sum()
    key = jax.random.key(2)
    sample = exact.sample_given_reward(key, *problem(world), lattice, level, 4000, world.end)
    index = numbers(world, *sample[:2])
    np.testing.assert_allclose(np.exp(sample[2]), given[index], rtol=1e-9)
    assert_frequencies(index, given)
    outside = [k for k, size in enumerate(sizes) if size == 0]
    for empty in outside[:1]:
        sample = exact.sample_given_reward(key, *problem(world), lattice, empty, 4000, world.end)
        assert jnp.all(jnp.isnan(sample[2]))


@pytest.mark.parametrize("shape", SHAPES)
def test_entropies_exact_for_markov_chains_bounded_and_estimated_otherwise(shape):
    world = make(shape, 0)
    _, log_prob, reward = brute_force(world)
    for beta, log_star in ((jnp.inf, log_prob), (0.9, posterior(log_prob, reward, 0.9)[1])):
        truth = -np.exp(log_star) @ log_star
        paths = float(exact.path_entropy(*problem(world), beta, world.end))
        if exact.is_unifilar(world.process):
            assert paths == pytest.approx(truth, rel=1e-9)
        else:
            assert paths > truth
        values = np.asarray(
            exact.sampled_entropies(jax.random.key(3), *problem(world), beta, 2000, world.end)
        )
        assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(len(values))


def test_unifilar_is_exactly_when_tokens_determine_the_path():
    def process(kind, **arrays):
        return worlds.parse_world(
            {"base": {"kind": kind, **arrays}, "reward": {"kind": "constant"}, "horizon": 1}
        ).process

    rows = [[0.5, 0.5], [0.5, 0.5]]
    tables = [[0.5, 0.5], rows, [rows, rows]]
    assert exact.is_unifilar(process("ngram", order=3, tables=tables))
    assert exact.is_unifilar(process("ngram", order=1, tables=tables[:1]))
    assert exact.is_unifilar(process("hmm", initial=[1, 0], transition=[[0, 1], [1, 0]], emission=rows))
    assert not exact.is_unifilar(
        process("hmm", initial=[0.5, 0.5], transition=[[0, 1], [1, 0]], emission=rows)
    )
    assert not exact.is_unifilar(process("hmm", initial=[1, 0], transition=rows, emission=rows))


def test_twists_are_the_expected_future_evidence_of_every_state():
    world = make("markov-end-prompt", 1, real=True)
    twists = exact.log_twists(world.process, world.automaton, world.horizon, 0.7, world.end)
    assert twists.shape == (world.horizon + 1, 3, 3)
    np.testing.assert_array_equal(twists[-1], np.zeros((3, 3)))
    for hidden, state in itertools.product(range(3), range(3)):
        initial = jnp.log(jnp.zeros(3).at[hidden].set(1.0))
        sub = world.process._replace(log_initial=initial), world.automaton._replace(start=jnp.int32(state))
        log_z = exact.lattice_log_partition(*sub, jnp.asarray([3]), 3, 0.7, world.end)
        assert float(twists[1, hidden, state]) == pytest.approx(float(log_z), rel=1e-12)


def test_a_new_temperature_does_not_retrace_and_a_sweep_is_one_vmap():
    world = make("hmm", 0)
    traces = []

    @jax.jit
    def solve(process, automaton, prompt, beta):
        traces.append(beta)
        return exact.lattice_log_partition(process, automaton, prompt, world.horizon, beta)

    arguments = problem(world)[:3]
    single = [float(solve(*arguments, beta)) for beta in (0.1, 0.5, 2.0)]
    other = make("hmm", 1)
    solve(other.process, other.automaton, arguments[2], 0.3)
    assert len(traces) == 1
    sweep = jax.vmap(solve, in_axes=(None, None, None, 0))(*arguments, jnp.asarray([0.1, 0.5, 2.0]))
    np.testing.assert_allclose(sweep, single, rtol=1e-12)
    assert len(traces) == 2


def test_batches_of_prompts_equal_single_prompts():
    world = worlds.generate_world(5, vocab=3, horizon=3, states=2, prompts=[[], [0, 2]])
    prompts = jnp.asarray(world.prompts)
    arguments = world.process, world.automaton
    lattice = exact.score_lattice(world.automaton, 3)
    both = exact.lattice_log_partition(*arguments, prompts, 3, 0.5)
    single = [exact.lattice_log_partition(*arguments, prompt, 3, 0.5) for prompt in prompts]
    np.testing.assert_allclose(both, single, rtol=1e-12)
    laws = exact.reward_distribution(*arguments, prompts, 3, lattice)
    np.testing.assert_allclose(jax.nn.logsumexp(laws + lattice.values[None] / 0.5, axis=1), both, rtol=1e-12)


def test_small_temperatures_find_the_best_string_even_behind_impossible_transitions():
    """Evidence differs by thousands of nats between states that cannot reach each other."""
    swap = np.array([[0.0, 1.0], [1.0, 0.0]])
    with np.errstate(divide="ignore"):
        tables = [
            jnp.asarray(np.log(x))
            for x in (np.array([1.0, 0.0]), np.eye(2), np.array([[0.5, 0.5], [0.9, 0.1]]))
        ]
    automaton = Automaton(jnp.int32(0), jnp.zeros((1, 2), jnp.int32), jnp.asarray([[-5.0, 3.0]]))
    log_z = exact.lattice_log_partition(HiddenMarkov(*tables), automaton, jnp.asarray([2]), 4, 1e-3)
    assert float(log_z) == pytest.approx(12000 + 4 * np.log(0.5), rel=1e-12)
    still = HiddenMarkov(tables[0], jnp.log(jnp.asarray(swap)), tables[2])
    log_z = exact.lattice_log_partition(still, automaton, jnp.asarray([2]), 4, 1e-3)
    assert float(log_z) == pytest.approx(12000 + 2 * np.log(0.05), rel=1e-12)


def test_gradients_survive_zero_probabilities():
    spec = {"kind": "markov", "initial": [1, 0], "transition": [[0.5, 0.5], [0, 1]]}
    reward = {"kind": "motif_count", "motif": [0, 1]}
    world = worlds.parse_world({"base": spec, "reward": reward, "horizon": 3})
    lattice = exact.score_lattice(world.automaton, 3)
    marginals = exact.token_marginals_given_reward(*problem(world), lattice, 1)
    np.testing.assert_allclose(marginals, [[1, 0], [1 / 3, 2 / 3], [0, 1]], atol=1e-12)
    unreachable = exact.token_marginals_given_reward(*problem(world), lattice, 2)
    np.testing.assert_array_equal(unreachable, np.zeros((3, 2)))


def automaton_of(weight):
    weight = jnp.asarray(weight, jnp.float64)
    return Automaton(jnp.int32(0), jnp.zeros(weight.shape, jnp.int32), weight)


@pytest.mark.parametrize(
    ("weight", "end", "values"),
    [
        ([0, 1], None, [0, 1, 2, 3]),
        ([0, 0.5, -0.5], None, [-1.5, -1, -0.5, 0, 0.5, 1, 1.5]),
        ([0.3, 0.1], None, [0.3, 0.5, 0.7, 0.9]),
        ([6, 10, 4], None, [12, 14, 16, 18, 20, 22, 24, 26, 28, 30]),
        ([7, 7], None, [21]),
        ([0, 0], None, [0]),
        ([np.pi, np.e], None, [3 * np.e, 2 * np.e + np.pi, np.e + 2 * np.pi, 3 * np.pi]),
        ([0, np.pi], 0, [0, np.pi, 2 * np.pi, 3 * np.pi]),
        ([1 / 3, 1 / 7], 0, [k / 21 for k in range(14)]),
    ],
)
def test_the_score_lattice_is_the_coarsest(weight, end, values):
    lattice = exact.score_lattice(automaton_of([weight]), 3, end)
    np.testing.assert_allclose(lattice.values, values, rtol=1e-12, atol=1e-12)


def test_the_score_lattice_ignores_states_that_cannot_be_reached():
    automaton = Automaton(
        jnp.int32(0), jnp.asarray([[0, 0], [1, 0]]), jnp.asarray([[0.0, 1.0], [np.pi, np.e]])
    )
    np.testing.assert_array_equal(exact.score_lattice(automaton, 2).values, [0, 1, 2])


@pytest.mark.parametrize(
    ("weight", "end"), [([1, np.pi, np.e], None), ([1, np.pi], 0), ([0, 1e-3, 10], None)]
)
def test_weights_without_a_coarse_unit_have_no_lattice(weight, end):
    with pytest.raises(exact.NoLattice, match=r"at most 100 points .* round the weights, enumerate"):
        exact.score_lattice(automaton_of([weight]), 3, end, limit=100)


def test_a_world_of_sixteen_states_thirty_two_tokens_and_sixty_four_steps():
    rng = np.random.default_rng(0)
    tables = rng.dirichlet(np.ones(16)), rng.dirichlet(np.ones(16), 16), rng.dirichlet(np.ones(32), 16)
    process = HiddenMarkov(*(jnp.log(jnp.asarray(x)) for x in tables))
    following = jnp.asarray(rng.integers(64, size=(64, 32)), jnp.int32)
    automaton = Automaton(
        jnp.int32(0), following, jnp.asarray(rng.integers(0, 2, size=(64, 32)), jnp.float64)
    )
    prompt = jnp.asarray([32])
    lattice = exact.score_lattice(automaton, 64)
    log_law = exact.reward_distribution(process, automaton, prompt, 64, lattice)
    log_z = exact.lattice_log_partition(process, automaton, prompt, 64, 4.0)
    assert float(log_z) == pytest.approx(float(jax.nn.logsumexp(log_law + lattice.values / 4.0)), rel=1e-9)
    tokens, _, log_star = exact.sample_posterior(jax.random.key(0), process, automaton, prompt, 64, 4.0, 500)
    assert tokens.shape == (500, 64) and bool(jnp.all(jnp.isfinite(log_star)))
    reward = np.asarray(automaton_reward(automaton, prompt[None], tokens, jnp.ones(tokens.shape)))
    star = jax.nn.softmax(log_law + lattice.values / 4.0)
    mean = float(star @ lattice.values)
    assert abs(reward.mean() - mean) < 4 * reward.std() / np.sqrt(500)
