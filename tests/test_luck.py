"""Games of luck: the gambling table, conditioning against control over several decisions, played batches."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_rl.core import posterior, rollouts
from kl_rl.core.trajectories import check_trajectories
from kl_rl.exact import luck, luck_play

pytestmark = pytest.mark.usefixtures("compile_quickly")

PAYOFF = np.array([[1.0, 1.0], [5.0, -15.0], [1.0, -6.0]])  # sure; +5 or -15; +1 or -6; a fair coin each
GAMBLE = luck.gambling_table(jnp.asarray(PAYOFF))


def table_row(log_policy):
    return np.exp(np.asarray(log_policy[0][0])), float(luck.expected_return(GAMBLE, log_policy))


@pytest.mark.parametrize(
    ("low", "high", "policy", "value"),
    [
        (5, 5, [0, 1, 0], -5),
        (1, 1, [2 / 3, 0, 1 / 3], -1 / 6),
        (1, np.inf, [1 / 2, 1 / 4, 1 / 4], -1.375),
    ],
)
def test_gambling_table_conditioning_on_the_return(low, high, policy, value):
    actual = table_row(luck.condition_on_return(GAMBLE, 1, posterior.Between(low, high)))
    np.testing.assert_allclose(actual[0], policy, atol=1e-12)
    assert actual[1] == pytest.approx(value, rel=1e-12)
    hits = ((PAYOFF >= low) & (PAYOFF <= high)).sum(axis=1)
    np.testing.assert_allclose(actual[0], hits / hits.sum(), atol=1e-12)


@pytest.mark.parametrize("beta", [1.0, 20.0])
@pytest.mark.parametrize(("rule", "average"), [(luck.joint_tilt, "exp"), (luck.kl_control, "mean")])
def test_gambling_table_tilt_and_control_are_the_sums_by_hand(rule, average, beta):
    weight = np.exp(PAYOFF / beta).mean(axis=1) if average == "exp" else np.exp(PAYOFF.mean(axis=1) / beta)
    policy, value = table_row(rule(GAMBLE, 1, beta))
    np.testing.assert_allclose(policy, weight / weight.sum(), rtol=1e-12)
    assert value == pytest.approx(policy @ PAYOFF.mean(axis=1), rel=1e-12)


def test_gambling_table_published_digits():
    tilt, control = luck.joint_tilt(GAMBLE, 1, 1.0), luck.kl_control(GAMBLE, 1, 1.0)
    np.testing.assert_array_equal(np.round(table_row(tilt)[0], 4), [0.0347, 0.9479, 0.0174])
    np.testing.assert_array_equal(np.round(table_row(control)[0], 4), [0.9684, 0.0024, 0.0292])
    values = [table_row(plan)[1] for plan in (tilt, control)]
    values += [table_row(rule(GAMBLE, 1, 20.0))[1] for rule in (luck.joint_tilt, luck.kl_control)]
    np.testing.assert_array_equal(np.round(values, 3), [-4.748, 0.883, -1.975, -1.861])


def random_game(seed=0, states=2):
    """A game in which the outcome moves the state: [S, A, O] = [2, 2, 2]."""
    rng = np.random.default_rng(seed)
    shape = (states, 2, 2)
    chance = jnp.log(jnp.asarray(rng.dirichlet(np.ones(2) * 2, shape[:2])))
    prior = jnp.log(jnp.asarray(rng.dirichlet(np.ones(2) * 3)))
    following = jnp.asarray(rng.integers(states, size=shape), jnp.int32)
    payoff = jnp.asarray(rng.integers(-2, 3, size=shape), jnp.float64)
    return luck.Game(prior, chance, following, payoff, jnp.int32(0))


def histories(game, decisions):
    """(moves, prior log-probability of the actions, chance log-probability, return) by loops."""
    prior, chance, following, payoff, start = (np.asarray(x) for x in game)
    for moves in itertools.product(itertools.product(range(2), range(2)), repeat=decisions):
        state, log_prior, log_chance, total = int(start), 0.0, 0.0, 0.0
        for a, o in moves:
            log_prior, log_chance = log_prior + prior[a], log_chance + chance[state, a, o]
            total, state = total + payoff[state, a, o], following[state, a, o]
        yield moves, log_prior, log_chance, total


def policy_from_joint(rows, weights, decisions):
    """`p(a_t | h_t)` of a law over complete histories, as a dict; histories without mass are left out."""
    mass = {}
    for (moves, *_), weight in zip(rows, weights, strict=True):
        for t in range(decisions):
            for key in ((moves[:t], moves[t][0]), moves[:t]):
                mass[key] = mass.get(key, 0.0) + weight
    pairs = [key for key in mass if len(key) == 2 and isinstance(key[1], int)]
    return {key: mass[key] / mass[key[0]] for key in pairs if mass[key[0]] > 0}


def lookup(plan, history, action):
    index = 0
    for a, o in history:
        index = index * 4 + a * 2 + o
    return math.exp(np.asarray(plan[len(history)])[index, action])


@pytest.mark.parametrize("decisions", [3])
@pytest.mark.parametrize(
    "evidence", [posterior.Tilt(0.7), posterior.Threshold(1.0), posterior.Between(0.0, 1.0)]
)
def test_conditioning_is_the_policy_inside_the_joint_posterior(decisions, evidence):
    game = random_game()
    rows = list(histories(game, decisions))
    evidences = np.exp(np.asarray(evidence.log_evidence(jnp.asarray([row[3] for row in rows]))))
    weights = np.array([math.exp(row[1] + row[2]) for row in rows]) * evidences
    expected = policy_from_joint(rows, weights, decisions)
    plan = luck.condition_on_return(game, decisions, evidence)
    for (history, action), probability in expected.items():
        assert lookup(plan, history, action) == pytest.approx(probability, rel=1e-10, abs=1e-14)


def test_conditioning_falls_back_on_the_prior_once_the_event_is_out_of_reach():
    plan = luck.condition_on_return(GAMBLE, 2, posterior.Between(10, 10))
    lucky, unlucky = 1 * 2 + 0, 1 * 2 + 1
    np.testing.assert_allclose(np.exp(plan[0][0]), [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(np.exp(plan[1][lucky]), [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(np.exp(plan[1][unlucky]), np.full(3, 1 / 3), rtol=1e-12)


def objective_by_loops(game, plan, beta):
    total = 0.0
    for moves, log_prior, log_chance, reward in histories(game, len(plan)):
        probability = math.prod(lookup(plan, moves[:t], moves[t][0]) for t in range(len(plan)))
        if probability > 0:
            total += (
                probability * math.exp(log_chance) * (reward - beta * (math.log(probability) - log_prior))
            )
    return total


@pytest.mark.parametrize("decisions", [1, 2])
def test_control_maximizes_its_objective_and_conditioning_does_not(decisions):
    game, beta = random_game(1), 0.5
    control, tilt = luck.kl_control(game, decisions, beta), luck.joint_tilt(game, decisions, beta)
    best = float(luck.control_objective(game, control, beta))
    assert best == pytest.approx(objective_by_loops(game, control, beta), rel=1e-10)
    assert float(luck.control_objective(game, tilt, beta)) == pytest.approx(
        objective_by_loops(game, tilt, beta), rel=1e-10
    )
    assert float(luck.control_objective(game, tilt, beta)) < best - 0.01
    slope = jax.grad(lambda shift: luck.control_objective(game, normalized(control, shift), beta))
    for gradient in slope(tuple(jnp.zeros_like(table) for table in control)):
        np.testing.assert_allclose(gradient, 0.0, atol=1e-12)
    uphill = jax.grad(lambda shift: luck.control_objective(game, normalized(tilt, shift), beta))
    assert max(float(jnp.abs(g).max()) for g in uphill(tuple(jnp.zeros_like(table) for table in tilt))) > 0.01


def normalized(plan, shift):
    return tuple(jax.nn.log_softmax(table + move, axis=-1) for table, move in zip(plan, shift, strict=True))


def test_the_gap_between_conditioning_and_control_closes_as_the_noise_vanishes():
    game, beta = random_game(1), 0.5
    gaps = []
    for noise in (1.0, 0.5, 0.1, 0.01, 0.0):
        quiet = luck.with_noise(game, noise)
        plans = luck.joint_tilt(quiet, 2, beta), luck.kl_control(quiet, 2, beta)
        values = [float(luck.control_objective(quiet, plan, beta)) for plan in plans]
        gaps.append(values[1] - values[0])
        reachable = np.asarray(jnp.exp(luck_play_law(quiet, plans[1]))) > 0
        difference = [np.abs(np.exp(a) - np.exp(b)).max(axis=-1) for a, b in zip(*plans, strict=True)]
        if noise == 0.0:
            assert max(difference[0].max(), difference[1][reachable].max()) < 1e-12
        else:
            assert difference[0].max() > 0
    assert gaps[0] > 0.01 and gaps == sorted(gaps, reverse=True) and abs(gaps[-1]) < 1e-12


def luck_play_law(game, plan):
    """Log-probability of each history before the second decision."""
    return (plan[0][0][:, None] + game.log_chance[game.start]).reshape(-1)


def test_without_noise_a_tilted_return_prior_over_conditioned_plans_is_control():
    """sum_R p0(R) e^{R/beta} p(a | R) = p*(a): conditioning on every return at once, with the right prior."""
    game, beta = luck.with_noise(random_game(2), 0.0), 0.8
    rows = [row for row in histories(game, 1) if row[2] == 0.0]
    mixture, total = np.zeros(2), 0.0
    for reward in sorted({row[3] for row in rows}):
        weight = sum(math.exp(row[1]) for row in rows if row[3] == reward) * math.exp(reward / beta)
        plan = luck.condition_on_return(game, 1, posterior.Between(reward, reward))
        mixture, total = mixture + weight * np.exp(plan[0][0]), total + weight
    np.testing.assert_allclose(mixture / total, np.exp(luck.kl_control(game, 1, beta)[0][0]), rtol=1e-12)


def test_the_prior_plan_has_no_divergence_and_the_prior_mean():
    game = random_game(3)
    plan = luck.prior_plan(game, 2)
    mean = sum(math.exp(row[1] + row[2]) * row[3] for row in histories(game, 2))
    assert float(luck.expected_return(game, plan)) == pytest.approx(mean, rel=1e-12)
    assert float(luck.control_objective(game, plan, 10.0)) == pytest.approx(mean, rel=1e-12)


def batch(game, plan, num_samples, key=0):
    policy = luck_play.plan_policy(game, plan)
    play = jax.jit(luck_play.play, static_argnames=("num_samples", "decisions"))
    prompt = jnp.full((1, 1), 4)
    return policy, play(
        policy, jax.random.key(key), game, prompt, num_samples=num_samples, decisions=len(plan)
    )


def test_played_batches_follow_plan_and_chance():
    game = random_game(1)
    plan = luck.kl_control(game, 2, 1.0)
    policy, played = batch(game, plan, 6000)
    check_trajectories(played)
    tokens = np.asarray(played.tokens[0])
    assert set(np.unique(tokens[:, ::2])) <= {0, 1} and set(np.unique(tokens[:, 1::2])) <= {2, 3}
    np.testing.assert_array_equal(played.controlled[0, 0], [1, 0, 1, 0])
    np.testing.assert_allclose(played.log_behaviour, rollouts.score(policy, played), rtol=1e-12)
    np.testing.assert_array_equal(played.log_behaviour[..., 1::2], 0.0)
    for moves, _, log_chance, reward in histories(game, 2):
        string = [x for a, o in moves for x in (a, o + 2)]
        found = np.all(tokens == string, axis=1)
        probability = (
            math.exp(log_chance) * lookup(plan, (), moves[0][0]) * lookup(plan, moves[:1], moves[1][0])
        )
        assert abs(found.mean() - probability) < 4 * math.sqrt(probability * (1 - probability) / 6000)
        assert np.all(np.asarray(played.reward[0])[found] == reward)
    error = float(played.reward.std()) / math.sqrt(6000)
    assert abs(float(played.reward.mean()) - float(luck.expected_return(game, plan))) < 4 * error


def test_importance_weights_of_a_played_batch_ignore_chance():
    """Only the agent's own tokens are reweighted: E_prior[w r] is the mean return of the other plan."""
    game = random_game(4)
    plan = luck.kl_control(game, 2, 1.5)
    _, played = batch(game, luck.prior_plan(game, 2), 6000)
    log_weight = (rollouts.score(luck_play.plan_policy(game, plan), played) - played.log_behaviour).sum(
        axis=-1
    )
    values = np.asarray(jnp.exp(log_weight) * played.reward)
    assert abs(values.mean() - float(luck.expected_return(game, plan))) < 4 * values.std() / math.sqrt(6000)


def test_any_policy_can_be_restricted_to_legal_tokens():
    game = random_game(1)
    plan = luck.prior_plan(game, 1)
    uniform = luck_play.plan_policy(game, plan).with_params(tuple(jnp.zeros_like(t) for t in plan))
    restricted = luck_play.action_policy(uniform, 2)
    logits = restricted.logits(jnp.full((3, 1), 4), jnp.zeros((3, 2), jnp.int32))
    legal = np.array([[True, True, False, False], [False, False, True, True]])
    np.testing.assert_array_equal(np.isfinite(logits), np.broadcast_to(legal, logits.shape))
    assert luck_play.action_policy(uniform, 2).apply == restricted.apply
