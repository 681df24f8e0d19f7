"""The protocol table: every method, through the same checks. A new method is one more row of `METHODS`."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kl_rl
from kl_rl import exact, methods
from kl_rl.core.policy import Policy
from kl_rl.core.posterior import Posterior, Threshold, Tilt
from kl_rl.core.rollouts import rollout
from kl_rl.experiments.compare.reference import best_of_n_law
from kl_rl.methods import fit, sources
from kl_rl.methods.algorithm import Algorithm, Info, State
from kl_rl.models import constant_twist, table_twist

pytestmark = pytest.mark.usefixtures("compile_quickly")

BETA = 0.8
SGD = optax.sgd(1.0)


def edges(tiny):
    value = tiny.levels.value
    return 0.5 * (value[1:] + value[:-1])


def optimal_twist(tiny, beta):
    """log E_p0[e^{r/beta} | prefix] for every prefix, as a table."""
    head = table_twist(tiny.vocab, tiny.horizon, extra=tiny.extra)
    tokens = tiny.strings.tokens
    rows = head.apply.context.rows(jnp.broadcast_to(tiny.prompt[0], (len(tokens), 1)), tokens)[
        :, :-1
    ].reshape(-1)
    size = head.params.shape[0]
    repeat = lambda x: jnp.repeat(x, tiny.horizon)
    top = jax.ops.segment_sum(repeat(jnp.exp(tiny.log_base + tiny.reward / beta)), rows, size)
    bottom = jax.ops.segment_sum(repeat(jnp.exp(tiny.log_base)), rows, size)
    return head.with_params(jnp.where(bottom > 0, jnp.log(jnp.where(bottom > 0, top / bottom, 1.0)), 0.0))


def tilted(tiny):
    return tiny.tilt(BETA)


def filtered_law(tiny):
    return exact.log_posterior(tiny.log_base, Threshold(2.0).log_evidence(tiny.reward))


def grpo_law(tiny):
    """The tilt at beta * std_q(r), self-consistently."""
    beta = BETA
    for _ in range(200):
        law = tiny.tilt(beta)
        mean = exact.expectation(law, tiny.reward)
        beta = BETA * jnp.sqrt(exact.expectation(law, (tiny.reward - mean) ** 2))
    return law


def ipo_law(tiny):
    win = jax.nn.sigmoid(tiny.reward[:, None] - tiny.reward[None, :]) @ jnp.exp(tiny.log_base)
    return exact.log_posterior(tiny.log_base, win / BETA)


def best_of_four(tiny):
    return jnp.asarray(best_of_n_law(np.asarray(tiny.log_base), np.asarray(tiny.reward), 4.0))


def heads(tiny, twist):
    return {
        "twist": table_twist(tiny.vocab, tiny.horizon, extra=tiny.extra)
        if twist == "table"
        else constant_twist()
    }


def one_round(tiny, optimizer):
    """Expert iteration that never renews its frozen policy: best-of-n of p0."""
    return methods.expert_iteration(4.0, optimizer=optimizer, refresh=10**6)


def balanced(family, twist, **options):
    return lambda tiny, optimizer: family(optimizer=optimizer, **options, **heads(tiny, twist))


def return_conditioned(tiny, optimizer):
    return methods.decision_transformer(optimizer=optimizer, edges=edges(tiny), first_token=tiny.vocab + 1)


# name: (constructor from (tiny, optimizer), evidence, law of the stated fixed point, twist kind)
METHODS = {
    "reinforce": (lambda t, o: methods.reinforce(optimizer=o), Tilt(BETA), tilted, None),
    "ppo": (lambda t, o: methods.ppo(optimizer=o, **heads(t, "table")), Tilt(BETA), tilted, "table"),
    "grpo": (lambda t, o: methods.grpo(optimizer=o), Tilt(BETA), grpo_law, None),
    "filtered": (lambda t, o: methods.filtered(optimizer=o), Threshold(2.0), filtered_law, None),
    "reward_weighted": (lambda t, o: methods.reward_weighted(optimizer=o), Tilt(BETA), tilted, None),
    "best_of_n": (lambda t, o: methods.best_of_n(4.0, optimizer=o), Tilt(BETA), best_of_four, None),
    "expert_iteration": (one_round, Tilt(BETA), best_of_four, None),
    "vargrad": (lambda t, o: methods.vargrad(optimizer=o), Tilt(BETA), tilted, None),
    "trajectory_balance": (balanced(methods.trajectory_balance, "constant"), Tilt(BETA), tilted, "constant"),
    "subtrajectory_balance": (
        balanced(methods.subtrajectory_balance, "table", decay=0.9),
        Tilt(BETA),
        tilted,
        "table",
    ),
    "path_consistency": (balanced(methods.path_consistency, "table", window=2), Tilt(BETA), tilted, "table"),
    "alpha_divergence": (lambda t, o: methods.alpha_divergence(0.5, optimizer=o), Tilt(BETA), tilted, None),
    "dpo": (lambda t, o: methods.dpo(optimizer=o), Tilt(BETA), tilted, None),
    "ipo": (lambda t, o: methods.ipo(optimizer=o), Tilt(BETA), ipo_law, None),
    "decision_transformer": (return_conditioned, Tilt(BETA), tilted, None),
}


def source_for(name, tiny, num_samples):
    made = sources.fresh(tiny.prompt, tiny.reward_fn, num_samples=num_samples, horizon=tiny.horizon)
    return sources.comparisons(made) if name in ("dpo", "ipo") else made


def at_fixed_point(name, tiny, optimizer):
    """The state of a method that has learned what it says it learns."""
    make, evidence, law, twist = METHODS[name]
    algorithm = make(tiny, optimizer)
    state = algorithm.init(tiny.base)
    policy = tiny.tabulate(law(tiny))
    if name == "decision_transformer":
        policy = tiny.base
        for level in range(len(tiny.levels.value)):
            inside = jnp.where(tiny.levels.index == level, tiny.log_base, -jnp.inf)
            given = exact.log_posterior(inside, jnp.zeros_like(inside))
            prompt = jnp.array([tiny.vocab + 1 + level])
            policy = kl_rl.models.table_from_law(given, prompt, tiny.strings.tokens, policy)
    state = state._replace(policy=policy)
    if twist == "table":
        state = state._replace(twist=optimal_twist(tiny, BETA))
    if twist == "constant":
        log_z = exact.log_partition(tiny.log_base, tiny.reward / BETA)
        state = state._replace(twist=constant_twist().with_params(log_z))
    return algorithm, state, evidence


@pytest.mark.parametrize("name", METHODS)
def test_every_public_method_is_in_the_table(name):
    makes = lambda f: inspect.isfunction(f) and inspect.signature(f).return_annotation == "Algorithm"
    functions = {n for n in methods.__all__ if makes(getattr(methods, n))} - {"gradient_algorithm"}
    assert functions == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_protocol(name, tiny):
    algorithm, state, evidence = at_fixed_point(name, tiny, SGD)
    assert isinstance(algorithm, Algorithm) and isinstance(state, State)
    posterior = Posterior(tiny.base, evidence)
    batch = rollout(
        tiny.base, jax.random.key(0), tiny.prompt, tiny.reward_fn, num_samples=8, horizon=tiny.horizon
    )
    new, info = algorithm.step(state, posterior, batch)
    assert isinstance(new, State) and isinstance(info, Info)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert not any(np.isnan(x) for x in info)
    for made in (algorithm.behaviour(new, posterior), algorithm.deploy(new, posterior)):
        assert isinstance(made, Policy)
    jitted, _ = jax.jit(algorithm.step)(state, posterior, batch)
    for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(new), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_one_trace_for_any_beta_weights_and_seed(name, tiny):
    algorithm, state, evidence = at_fixed_point(name, tiny, SGD)
    source = source_for(name, tiny, 4)
    traces = []

    @jax.jit
    def train(base, knob, key):
        traces.append(1)
        posterior = Posterior(base, type(evidence)(knob))
        run = fit.start(algorithm, base, posterior, source, key)
        return fit.advance(algorithm, run, posterior, source, num_steps=2)[0].state.policy.params

    heavier = tiny.base.with_params(tiny.base.params * 1.1)
    first = train(tiny.base, jnp.asarray(0.7), jax.random.key(0))
    second = train(heavier, jnp.asarray(1.3), jax.random.key(1))
    assert len(traces) == 1
    sweep = jax.vmap(train, in_axes=(None, 0, 0))
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    lanes = sweep(tiny.base, jnp.asarray([0.7, 1.3]), keys)
    np.testing.assert_allclose(lanes[0], first, rtol=1e-8, atol=1e-10)
    assert not np.allclose(lanes[1], first) and np.isfinite(second).all()


@pytest.mark.parametrize("name", METHODS)
def test_stated_fixed_point_is_stationary(name, tiny):
    """At the stated fixed point the mean update over many keys is zero within its own standard error."""
    algorithm, state, evidence = at_fixed_point(name, tiny, SGD)
    posterior, source = Posterior(tiny.base, evidence), source_for(name, tiny, 1024)

    def update(key):
        behaviour = algorithm.behaviour(state, posterior)
        batch, _ = source.draw((), key, behaviour)
        new, _ = algorithm.step(state, posterior, batch)
        leaves = zip(*(jax.tree.leaves((s.policy.params, s.twist)) for s in (new, state)), strict=True)
        change = jnp.concatenate([(a - b).reshape(-1) for a, b in leaves])
        return jnp.where(jnp.isfinite(change), change, 0.0)

    updates = np.asarray(jax.jit(jax.vmap(update))(jax.random.split(jax.random.key(5), 96)))
    mean, stderr = updates.mean(0), updates.std(0, ddof=1) / np.sqrt(len(updates))
    moved = np.abs(updates).max(0) > 1e-12
    assert np.all(np.abs(mean[moved]) < 4.5 * stderr[moved] + 1e-12)
    # The test can fail: away from the fixed point the same statistic is large.
    away = state._replace(policy=state.policy.with_params(jnp.zeros_like(state.policy.params)))

    def update_away(key):
        batch, _ = source.draw((), key, algorithm.behaviour(away, posterior))
        return algorithm.step(away, posterior, batch)[0].policy.params.reshape(-1)

    wrong = np.asarray(jax.jit(jax.vmap(update_away))(jax.random.split(jax.random.key(6), 24)))
    z = np.abs(wrong.mean(0)) / np.maximum(wrong.std(0, ddof=1) / np.sqrt(len(wrong)), 1e-12)
    assert z.max() > 8


@pytest.mark.parametrize("name", METHODS)
def test_stated_fixed_point_is_reached(name, tiny):
    """Trained from p0, the deployed policy ends within a fiftieth of the initial divergence from the stated law."""
    steps = 400
    optimizer = optax.adam(optax.linear_schedule(0.1, 0.002, steps))
    make, evidence, law, _ = METHODS[name]
    algorithm = make(tiny, optimizer)
    posterior, source = Posterior(tiny.base, evidence), source_for(name, tiny, 512)

    @jax.jit
    def train(key):
        run = fit.start(algorithm, tiny.base, posterior, source, key)
        run, _ = fit.advance(algorithm, run, posterior, source, num_steps=steps)
        return tiny.law(algorithm.deploy(run.state, posterior))

    target, learned = law(tiny), train(jax.random.key(0))
    start = exact.kl_divergence(target, tiny.log_base)
    assert exact.kl_divergence(target, learned) < start / 50


def test_decision_transformer_deploys_the_posterior_exactly(tiny):
    """With exact conditionals and exact return frequencies the mixture over return tokens is p* to rounding."""
    algorithm, state, evidence = at_fixed_point("decision_transformer", tiny, SGD)
    log_level = exact.level_log_prob(tiny.log_base, tiny.levels)
    counts = methods.ReturnCounts(jnp.exp(log_level), log_level + tiny.levels.value / BETA)
    learned = tiny.law(algorithm.deploy(state._replace(extra=counts), Posterior(tiny.base, evidence)))
    np.testing.assert_allclose(learned, tiny.tilt(BETA), rtol=1e-10)


def test_return_priors(tiny):
    counts = methods.ReturnCounts(jnp.array([4.0, 3.0, 2.0, 1.0, 0.0]), jnp.zeros(5))
    np.testing.assert_array_equal(jnp.exp(methods.greatest_return(counts, Tilt(1.0))), [0, 0, 0, 1, 0])
    np.testing.assert_allclose(jnp.exp(methods.top_quantile(0.2)(counts, Tilt(1.0))), [0, 0, 0.5, 0.5, 0])


@pytest.mark.parametrize(
    "name", ["reinforce", "vargrad", "ppo", "dpo", "alpha_divergence", "path_consistency"]
)
def test_hard_evidence_is_refused_where_reverse_kl_is_infinite(name, tiny):
    algorithm = METHODS[name][0](tiny, SGD)
    batch = rollout(tiny.base, jax.random.key(0), tiny.prompt, tiny.reward_fn, num_samples=8, horizon=3)
    with pytest.raises(ValueError, match="hard evidence"):
        algorithm.step(algorithm.init(tiny.base), Posterior(tiny.base, Threshold(1.0)), batch)


@pytest.mark.parametrize("name", ["reinforce", "grpo", "vargrad", "alpha_divergence", "best_of_n"])
def test_one_sample_is_refused_where_two_are_needed(name, tiny):
    algorithm = METHODS[name][0](tiny, SGD)
    batch = rollout(tiny.base, jax.random.key(0), tiny.prompt, tiny.reward_fn, num_samples=1, horizon=3)
    with pytest.raises(ValueError, match="needs K >= "):
        algorithm.step(algorithm.init(tiny.base), Posterior(tiny.base, Tilt(1.0)), batch)


def test_a_filter_that_passes_nothing_changes_nothing(tiny):
    algorithm = methods.filtered(optimizer=SGD)
    batch = rollout(tiny.base, jax.random.key(0), tiny.prompt, tiny.reward_fn, num_samples=8, horizon=3)
    state = algorithm.init(tiny.base)
    new, info = algorithm.step(state, Posterior(tiny.base, Threshold(99.0)), batch)
    assert info.ess == 0 and info.loss == 0
    np.testing.assert_array_equal(new.policy.params, state.policy.params)


def test_uncontrolled_tokens_carry_no_gradient(tiny):
    algorithm = methods.reinforce(optimizer=SGD)
    batch = rollout(tiny.base, jax.random.key(0), tiny.prompt, tiny.reward_fn, num_samples=8, horizon=3)
    batch = batch._replace(controlled=batch.controlled.at[..., 1:].set(0))
    state = algorithm.init(tiny.base)
    new, _ = algorithm.step(state, Posterior(tiny.base, Tilt(1.0)), batch)
    changed = np.flatnonzero(np.any(np.asarray(new.policy.params != state.policy.params), axis=1))
    first_row = state.policy.apply.context.start(tiny.prompt[0])
    assert changed.tolist() == [int(first_row)]


def test_best_of_more_than_there_are_samples_is_refused(tiny):
    batch = rollout(tiny.base, jax.random.key(0), tiny.prompt, tiny.reward_fn, num_samples=4, horizon=3)
    for method in (methods.best_of_n, methods.expert_iteration):
        algorithm = method(8, optimizer=SGD)
        with pytest.raises(ValueError, match="K >= 8"):
            algorithm.step(algorithm.init(tiny.base), Posterior(tiny.base, Tilt(1.0)), batch)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(beta, tiny):
    algorithm = methods.reinforce(optimizer=SGD)
    batch = rollout(tiny.base, jax.random.key(0), tiny.prompt, tiny.reward_fn, num_samples=4, horizon=3)
    with pytest.raises(ValueError, match="beta must be positive"):
        algorithm.step(algorithm.init(tiny.base), Posterior(tiny.base, Tilt(beta)), batch)


def test_what_pads_the_tokens_does_not_matter(tiny):
    """-100 behind the mask, as other libraries pad, gives the same update as any id."""
    algorithm = methods.ppo(optimizer=SGD, **heads(tiny, "table"))
    batch = rollout(
        tiny.base, jax.random.key(0), tiny.prompt, tiny.reward_fn, num_samples=8, horizon=3, end=2
    )
    padded = batch._replace(tokens=jnp.where(batch.mask > 0, batch.tokens, -100))
    assert (padded.tokens == -100).any()
    state = algorithm.init(tiny.base)
    steps = [algorithm.step(state, Posterior(tiny.base, Tilt(1.0)), b)[0] for b in (batch, padded)]
    np.testing.assert_array_equal(steps[0].policy.params, steps[1].policy.params)
    np.testing.assert_array_equal(steps[0].twist.params, steps[1].twist.params)


def test_advantages_count_what_the_environment_changes():
    """decay 1 is Monte Carlo: with an uncontrolled token in the middle the value's change there still counts."""
    value = jnp.array([0.0, 1.0, 3.0, 5.0])
    found = kl_rl.objectives.generalized_advantage(jnp.zeros(3), value, jnp.ones(3), decay=1.0)
    np.testing.assert_allclose(found, [5.0, 4.0, 2.0])
    early = kl_rl.objectives.generalized_advantage(jnp.zeros(3), value, jnp.array([1.0, 1.0, 0.0]), decay=1.0)
    np.testing.assert_allclose(early, [3.0, 2.0, 0.0])


def test_the_base_sees_the_prompt_without_return_tokens(tiny):
    """Relabelling is for the student: Info.log_ratio is that of the original prompt."""
    algorithm = return_conditioned(tiny, SGD)
    batch = rollout(tiny.base, jax.random.key(0), tiny.prompt, tiny.reward_fn, num_samples=8, horizon=3)
    student = tiny.base.with_params(jnp.zeros_like(tiny.base.params))
    _, info = algorithm.step(algorithm.init(student), Posterior(tiny.base, Tilt(1.0)), batch)
    expected = -3 * np.log(3) - batch.log_behaviour.sum(-1).mean()
    np.testing.assert_allclose(info.log_ratio, expected, rtol=1e-9)


def test_a_conditional_policy_deployed_before_any_data_is_a_policy(tiny):
    algorithm = return_conditioned(tiny, SGD)
    deployed = algorithm.deploy(algorithm.init(tiny.base), Posterior(tiny.base, Tilt(1.0)))
    np.testing.assert_allclose(jnp.exp(tiny.law(deployed)).sum(), 1.0)


def test_sources_refuse_sizes_they_cannot_serve(tiny):
    posterior = Posterior(tiny.base, Tilt(1.0))
    source = sources.replay(source_for("reinforce", tiny, 4), capacity=2)
    memory = source.init(jax.random.key(0), posterior)
    with pytest.raises(ValueError, match="capacity"):
        source.draw(memory, jax.random.key(0), tiny.base)
    odd = sources.comparisons(source_for("reinforce", tiny, 3))
    with pytest.raises(ValueError, match="even number"):
        odd.draw((), jax.random.key(0), tiny.base)


def test_replay_keeps_the_fields_of_a_sample_together(tiny):
    """Every sample that comes out of the buffer has the reward and the log-probabilities of its own tokens."""
    posterior = Posterior(tiny.base, Tilt(1.0))
    source = sources.replay(source_for("reinforce", tiny, 4), capacity=9, share=0.7)
    memory = source.init(jax.random.key(0), posterior)
    for i in range(6):
        batch, memory = source.draw(memory, jax.random.key(i), tiny.base)
        np.testing.assert_allclose(batch.reward, tiny.reward_fn(None, batch.tokens, batch.mask))
        np.testing.assert_allclose(batch.log_behaviour, kl_rl.score(tiny.base, batch), rtol=1e-9)
