"""Methods beyond the protocol: return priors, memories, heads and targets, mixed batches, knobs, options."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from protocol import (
    HORIZON,
    batch_of,
    compiled,
    conditionals,
    counts_of,
    given,
    ground_with,
    law,
    law_of,
    made,
    posterior_of,
    reward_fn,
    tabulated,
)

import kl_rl
from kl_rl import exact, methods, objectives
from kl_rl.core.posterior import NoEvidence, Posterior, Threshold, Tilt
from kl_rl.methods import METHODS, Head, Mix, Needs, aim, fit, fresh, gradient_algorithm, laws, rated, replay
from kl_rl.models import table_twist

pytestmark = pytest.mark.usefixtures("compile_quickly")

SGD = optax.sgd(1.0)
NAMED = {method.name: method for method in METHODS}


def stepped(name, batch, ground, posterior=None):
    state = made(NAMED[name], ground).init(ground.base)
    return state, *compiled(NAMED[name])(state, posterior or posterior_of(NAMED[name], ground.base), batch)


def test_decision_transformer_deploys_the_posterior_exactly():
    """With exact conditionals and exact return frequencies the mixture over return tokens is its law to rounding."""
    for prompts in (1, 3):
        ground, method = ground_with(prompts), NAMED["dt-tilted"]
        algorithm = made(method, ground)
        state = algorithm.init(ground.base)._replace(policy=conditionals(ground, ground.log_base))
        state = state._replace(extra=counts_of(ground, 0.8))
        learned = law_of(algorithm.deploy(state, posterior_of(method, ground.base)), ground)
        np.testing.assert_allclose(learned, law(method, ground), rtol=1e-9)
        is_posterior = np.allclose(learned, laws.tilt(ground.log_base, ground.reward, 0.8))
        assert is_posterior == (prompts == 1)  # with several, return frequencies are pooled


def test_return_priors():
    counts = methods.ReturnCounts(jnp.array([4.0, 3.0, 2.0, 1.0, 0.0]), jnp.zeros(5))
    np.testing.assert_array_equal(jnp.exp(methods.greatest_return(counts, Tilt(1.0))), [0, 0, 0, 1, 0])
    np.testing.assert_allclose(jnp.exp(methods.top_quantile(0.2)(counts, Tilt(1.0))), [0, 0, 0.5, 0.5, 0])


def test_return_edges_stand_between_rewards_that_occur():
    np.testing.assert_array_equal(methods.return_edges(np.array([3.0, 1.0, 1.0]), tokens=4), [2.0])
    reward = np.random.default_rng(0).normal(size=5000)
    edges = methods.return_edges(reward, tokens=8)
    assert len(edges) == 7 and np.mean(reward > edges[-1]) == pytest.approx(0.01, rel=0.1)
    by_weight = methods.return_edges(np.sort(reward), np.full(5000, 0.5), tokens=8)
    np.testing.assert_allclose(edges, by_weight)


def test_a_filter_that_passes_nothing_changes_nothing():
    ground = ground_with(1)
    batch = batch_of(NAMED["filter"], ground, ground.base, jax.random.key(0), 8)
    state, new, info = stepped("filter", batch, ground, Posterior(ground.base, Threshold(99.0)))
    assert info.ess == 0 and info.loss == 0
    np.testing.assert_array_equal(new.policy.params, state.policy.params)


def test_uncontrolled_tokens_carry_no_gradient():
    ground = ground_with(1)
    batch = batch_of(NAMED["rloo"], ground, ground.base, jax.random.key(0), 8)
    state, new, _ = stepped("rloo", batch._replace(controlled=batch.controlled.at[..., 1:].set(0)), ground)
    changed = np.flatnonzero(np.any(np.asarray(new.policy.params != state.policy.params), axis=1))
    assert changed.tolist() == [int(state.policy.apply.context.start(ground.prompt[0]))]


def test_best_of_more_than_there_are_samples_is_refused():
    ground = ground_with(1)
    batch = batch_of(NAMED["filter"], ground, ground.base, jax.random.key(0), 4)
    for method in (methods.best_of_n, methods.expert_iteration):
        algorithm = method(8, optimizer=SGD)
        with pytest.raises(ValueError, match="K >= 8"):
            algorithm.step(algorithm.init(ground.base), Posterior(ground.base, NoEvidence()), batch)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(beta):
    ground = ground_with(1)
    batch = batch_of(NAMED["rloo"], ground, ground.base, jax.random.key(0), 4)
    algorithm = made(NAMED["rloo"], ground)
    with pytest.raises(ValueError, match="beta must be positive"):
        algorithm.step(algorithm.init(ground.base), Posterior(ground.base, Tilt(beta)), batch)


def test_a_reward_that_is_no_number_is_refused_where_rewards_are_read():
    ground = ground_with(1)
    batch = batch_of(NAMED["dpo"], ground, ground.base, jax.random.key(0), 4)
    bad, state = (
        batch._replace(reward=batch.reward.at[0, 2].set(jnp.nan)),
        made(NAMED["rloo"], ground).init(ground.base),
    )
    with pytest.raises(ValueError, match=r"Trajectories.reward\[0, 2\] is nan"):
        made(NAMED["rloo"], ground).step(state, posterior_of(NAMED["rloo"], ground.base), bad)
    _, new, _ = stepped("dpo", bad, ground)  # comparisons do not read it
    assert np.isfinite(new.policy.params).all()


def test_comparisons_without_labels_are_refused():
    ground = ground_with(1)
    batch = batch_of(NAMED["rloo"], ground, ground.base, jax.random.key(0), 4)
    with pytest.raises(ValueError, match="label is missing"):
        stepped("dpo", batch, ground)


def test_what_pads_the_tokens_does_not_matter():
    """-100 behind the mask, as other libraries pad, gives the same update as any id."""
    ground, method = ground_with(1), NAMED["ppo"]
    batch = kl_rl.core.rollout(
        ground.base, jax.random.key(0), ground.prompt, reward_fn, num_samples=8, horizon=HORIZON, end=2
    )
    padded = batch._replace(tokens=jnp.where(batch.mask > 0, batch.tokens, -100))
    assert (padded.tokens == -100).any()
    algorithm = made(method, ground)
    state, posterior = algorithm.init(ground.base), posterior_of(method, ground.base)
    one, other = (compiled(method)(state, posterior, b)[0] for b in (batch, padded))
    np.testing.assert_array_equal(one.policy.params, other.policy.params)
    np.testing.assert_array_equal(one.heads[Head.VALUE].params, other.heads[Head.VALUE].params)


def test_advantages_count_what_the_environment_changes():
    """decay 1 is Monte Carlo: with an uncontrolled token in the middle the value's change there still counts."""
    value = jnp.array([0.0, 1.0, 3.0, 5.0])
    found = objectives.generalized_advantage(jnp.zeros(3), value, jnp.ones(3), decay=1.0)
    np.testing.assert_allclose(found, [5.0, 4.0, 2.0])
    early = objectives.generalized_advantage(jnp.zeros(3), value, jnp.array([1.0, 1.0, 0.0]), decay=1.0)
    np.testing.assert_allclose(early, [3.0, 2.0, 0.0])


def test_the_base_sees_the_prompt_without_return_tokens():
    """Relabelling is for the student: Info.log_ratio is that of the original prompt."""
    ground, method = ground_with(1), NAMED["dt-tilted"]
    batch = batch_of(method, ground, ground.base, jax.random.key(0), 8)
    algorithm = made(method, ground)
    uniform = ground.base.with_params(jnp.zeros_like(ground.base.params))
    _, info = compiled(method)(algorithm.init(uniform), posterior_of(method, ground.base), batch)
    expected = -3 * np.log(3) - batch.log_behaviour.sum(-1).mean()
    np.testing.assert_allclose(info.log_ratio, expected, rtol=1e-9)


def test_a_conditional_policy_deployed_before_any_data_is_a_policy():
    ground, method = ground_with(1), NAMED["dt-tilted"]
    algorithm = made(method, ground)
    deployed = algorithm.deploy(algorithm.init(ground.base), posterior_of(method, ground.base))
    np.testing.assert_allclose(np.exp(law_of(deployed, ground)).sum(), 1.0)


def source_on(ground, memory, num_samples=4):
    return fresh(ground.prompt, reward_fn, num_samples=num_samples, horizon=HORIZON, memory=memory)


def test_raters_leave_the_gold_reward_alone():
    ground = ground_with(1)
    draw = jax.jit(lambda key: source_on(ground, rated(), 64).draw((), key, ground.base))
    batch, _ = draw(jax.random.key(0))
    np.testing.assert_allclose(batch.reward, reward_fn(None, batch.tokens, batch.mask))
    assert set(np.unique(batch.label)) == {0.0, 1.0}
    np.testing.assert_array_equal(batch.label[:, 0::2] + batch.label[:, 1::2], 1.0)
    with pytest.raises(ValueError, match="even number"):
        source_on(ground, rated(), 3).draw((), jax.random.key(0), ground.base)


def test_replay_keeps_the_fields_of_a_group_together():
    """Every group that comes out of the ring has the prompt, reward and log-probabilities of its own tokens."""
    ground = ground_with(3)
    source, posterior = source_on(ground, replay(share=0.7, batches=3)), Posterior(ground.base, Tilt(1.0))
    kept = source.init(jax.random.key(0), posterior)
    assert kept.data.reward.shape == (9, 4)
    draw, score = jax.jit(source.draw), jax.jit(kl_rl.score)
    for i in range(6):
        batch, kept = draw(kept, jax.random.key(i), ground.base)
        np.testing.assert_allclose(batch.reward, reward_fn(None, batch.tokens, batch.mask))
        np.testing.assert_allclose(batch.log_behaviour, score(ground.base, batch), rtol=1e-9)
    small = kept._replace(data=kept.data.map_prompts(lambda x: x[:2]))
    with pytest.raises(ValueError, match="a ring of 2 groups cannot hold a batch of 3"):
        source.draw(small, jax.random.key(0), ground.base)


def test_heads_must_be_those_that_are_needed():
    with pytest.raises(ValueError, match=r"needs the heads \['value'\]; got \[\]"):
        gradient_algorithm(lambda *_: None, optimizer=SGD, needs=Needs(heads=(Head.VALUE,)))


def soft_q(optimizer, q, decay):
    """Soft Q-learning relative to p0 with a slow target: Q(s, a) is the log-twist after a, q = p0 e^Q normalized."""

    def loss(scored, evidence, extra):
        own, slow = scored.heads[Head.Q], scored.targets[Head.Q]
        taken = jnp.take_along_axis(own, scored.tokens[..., None], axis=-1)[..., 0]
        value = jax.nn.logsumexp(slow, axis=-1) - jnp.log(
            slow.shape[-1]
        )  # log E_p0 e^Q, the base being uniform
        later = jnp.concatenate([value[..., 1:], jnp.zeros_like(value[..., :1])], axis=-1)
        error = taken - jax.lax.stop_gradient(later + scored.token_reward / evidence.beta)
        fit_q = jnp.sum(error**2, axis=-1)
        return fit_q, jnp.ones_like(fit_q)

    needs = Needs(samples=1, heads=(Head.Q,), foreign=True, unrecorded=True)
    return gradient_algorithm(
        loss, optimizer=optimizer, needs=needs, heads={Head.Q: q}, targets={Head.Q: decay}
    )


def test_several_heads_with_slow_targets_learn_the_soft_values():
    """The Q head of every prefix becomes the log-twist after each token; its slow copy follows."""
    ground = ground_with(1)
    uniform = ground.base.with_params(jnp.zeros_like(ground.base.params))
    steps, q = 500, table_twist(3, HORIZON + 1, extra=6, actions=True)
    algorithm = soft_q(optax.adam(optax.linear_schedule(0.1, 0.005, steps)), q, 0.2)
    posterior = Posterior(uniform, Tilt(0.8))

    def sample(key, policy):
        batch = kl_rl.core.rollout(policy, key, ground.prompt, reward_fn, num_samples=64, horizon=HORIZON)
        paid = (batch.tokens == 2).astype(jnp.float64)
        same = (batch.tokens[..., 0] == batch.tokens[..., -1]).astype(jnp.float64)  # known at the end
        return batch._replace(token_reward=paid.at[..., -1].add(same))

    source = methods.Source(sample)
    run = fit.start(algorithm, uniform, posterior, source, jax.random.key(0))
    run, _ = jax.jit(lambda r: fit.advance(algorithm, r, posterior, source, num_steps=steps))(run)
    head, target = run.state.heads[Head.Q], run.state.targets[Head.Q]
    strings = ground.strings.tokens
    values = head.apply(head.params, jnp.broadcast_to(ground.prompt[0], (27, 2)), strings)
    log_law = jnp.full(27, -3 * np.log(3.0))
    weight = np.asarray(log_law + ground.reward[0] / 0.8)
    for first in range(3):
        inside = np.asarray(strings[:, 0] == first)
        expected = np.log(np.exp(weight[inside]).sum()) - np.log(np.exp(np.asarray(log_law)[inside]).sum())
        assert float(values[0, 0, first]) == pytest.approx(expected, abs=0.1)
    assert float(jnp.abs(head.params - target.params).max()) < 0.2
    assert not np.array_equal(head.params, target.params)


def test_token_statistics_are_those_of_the_whole_laws():
    """Entropy and KL of every position by chunks, against the full table; the sum over t is the KL."""
    ground = ground_with(3)
    student = tabulated(laws.tilt(ground.log_base, ground.reward, 0.5), ground)
    batch = batch_of(NAMED["rloo"], ground, student, jax.random.key(0), 2048)
    found = jax.jit(methods.token_statistics)(student, ground.base, batch)
    np.testing.assert_allclose(found.log_q, kl_rl.score(student, batch), atol=1e-12)
    assert (np.asarray(found.kl) >= 0).all() and (np.asarray(found.entropy) >= 0).all()
    log_q, log_p = law_of(student, ground), ground.log_base
    true = (np.exp(log_q) * (log_q - log_p)).sum(-1)
    estimates = np.asarray(found.kl.sum(-1))
    error = estimates.std(1) / np.sqrt(estimates.shape[1])
    assert (np.abs(estimates.mean(1) - true) < 4.5 * error).all()
    plain = np.asarray((found.log_q - found.log_base).sum(-1))
    assert (estimates.var(1) < plain.var(1)).all()


def test_a_second_batch_is_mixed_in():
    """PPO-ptx: a likelihood term on p0's text, here on RLOO; its gradient is added with its weight."""
    ground, method = ground_with(1), NAMED["rloo"]
    likelihood = lambda scored, evidence, extra: (-scored.sequence_log_q, jnp.ones_like(scored.reward))
    own = lambda scored, evidence, extra: (0.0 * scored.sequence_log_q, jnp.ones_like(scored.reward))
    make = lambda loss, mix: gradient_algorithm(loss, optimizer=SGD, needs=Needs(parts=True), mix=mix)
    batch, text = (batch_of(method, ground, ground.base, jax.random.key(i), 8) for i in (0, 1))
    posterior = posterior_of(method, ground.base)
    move = lambda algorithm, *batches: (
        algorithm.step(algorithm.init(ground.base), posterior, *batches)[0].policy.params - ground.base.params
    )
    mixed = move(make(own, Mix(likelihood, 0.25)), batch, text)
    np.testing.assert_allclose(mixed, 0.25 * move(make(likelihood, None), text), atol=1e-12)
    with pytest.raises(ValueError, match="mixes in a second batch"):
        move(make(own, Mix(likelihood)), batch)
    with pytest.raises(ValueError, match="takes one batch"):
        move(make(own, None), batch, text)


REACHABLE = [m.name for m in METHODS if m.law is not None and m.knob is not None]


@pytest.mark.parametrize("name", REACHABLE)
def test_a_knob_is_aimed_at_a_mean_reward(name):
    """By the exact law of p0, and by the empirical law of samples, which gives nearly the same."""
    ground, method = ground_with(3), NAMED[name]
    mean = laws.mean_reward(ground.log_base, ground.reward) + 0.6
    value = aim(method.law, ground.log_base, ground.reward, mean, method.knob)
    reached = lambda value: laws.mean_reward(
        method.law(ground.log_base, ground.reward, float(value)), ground.reward
    )
    if method.knob.candidates is None:
        assert reached(value) == pytest.approx(mean, abs=1e-4)
    else:  # the closest there is
        others = method.knob.candidates(ground.log_base, ground.reward, 64)
        closest = min(abs(reached(v) - mean) for v in others)
        assert abs(reached(value) - mean) == pytest.approx(closest, abs=1e-9)
    rng = np.random.default_rng(0)
    index = np.stack([rng.choice(27, 4000, p=np.exp(row)) for row in ground.log_base])
    sampled = np.take_along_axis(ground.reward, index, axis=1)
    by_samples = aim(method.law, np.full(sampled.shape, -np.log(4000)), sampled, mean, method.knob)
    assert abs(reached(by_samples) - reached(value)) < 0.1
    assert method.knob.admits(value) and float(f"{value:.6g}") == value or name == "filter"


def test_rewards_over_their_spread_have_a_fixed_point_above_a_critical_value_only():
    """Binary rewards, p0(1) = 0.5: beta_crit = 1.51; what cannot be reached is aimed at from above."""
    log_base, reward = np.log([0.5, 0.5]), np.array([0.0, 1.0])
    with pytest.raises(laws.NoFixedPoint, match="below beta = 1.51"):
        laws.standardized_tilt(log_base, reward, 1.5)
    q = np.exp(laws.standardized_tilt(log_base, reward, 1.52))
    lam = np.log(q[1] / q[0])
    assert lam * np.sqrt(q[0] * q[1]) == pytest.approx(1 / 1.52)
    grpo = NAMED["grpo"]
    value = aim(grpo.law, log_base[None], reward[None], 0.999, grpo.knob)
    assert value == pytest.approx(1.51, abs=0.01)
    assert np.isfinite(laws.standardized_tilt(log_base, reward, value)).all()


def test_a_law_of_one_prompt_needs_no_axis():
    ground = ground_with(3)
    for method in METHODS:
        if method.law is not None:
            one = method.law(ground.log_base[0], ground.reward[0], 2.0)
            alone = method.law(ground.log_base[:1], ground.reward[:1], 2.0)
            np.testing.assert_allclose(one, alone[0], rtol=1e-12)
            np.testing.assert_allclose(np.exp(one).sum(), 1.0)


def test_every_law_of_the_reward_alone_has_no_calibration_loss():
    """What `kl-rl methods` prints is computed from the law."""
    ground = ground_with(1)
    reward = jnp.asarray(ground.reward[0])
    for method in (m for m in METHODS if m.law is not None):
        log_q = jnp.asarray(law(method, ground)[0])
        found = kl_rl.measure.exact_budget(
            log_q, jnp.asarray(ground.log_base[0]), reward, exact.reward_levels(reward), 1.0
        )
        assert abs(found.C) < 1e-12 and found.kl > 0.01, method.name


def test_options_are_the_keywords_of_the_function():
    ppo = NAMED["ppo"]
    assert methods.options_of(ppo) == {"clip": 0.2, "decay": 0.95, "value_weight": 0.5, "epochs": 2}
    assert methods.options_of(NAMED["best-of-n"]) == {} == methods.options_of(NAMED["dt-quantile"])
    assert methods.options_of(NAMED["alpha-1"]) == {"alpha": 1.0, "memory": 0.95}
    assert methods.options_of(NAMED["pcl-replay"]) == {"window": 2}
    assert methods.parsed_options(ppo, ["clip=0.1", "epochs=4"]) == {"clip": 0.1, "epochs": 4}
    assert methods.parsed_options(NAMED["rwr"], ["per_prompt=true"]) == {"per_prompt": True}
    for wrong, said in {
        "klip=1": "'klip=1' is no option; options of ppo: clip=0.2, decay=0.95, value_weight=0.5, epochs=2",
        "epochs=2.5": "epochs is a whole number; got '2.5'",
        "clip": "is not NAME=VALUE",
    }.items():
        with pytest.raises(ValueError, match=said.replace("(", r"\(")):
            methods.parsed_options(ppo, [wrong])
    with pytest.raises(ValueError, match="given twice"):
        methods.parsed_options(ppo, ["clip=1", "clip=2"])


def test_options_reach_the_algorithm():
    """A wider trust interval changes what a second epoch does."""
    ground, method = ground_with(1), NAMED["ppo"]
    batch = batch_of(method, ground, ground.base, jax.random.key(0), 8)
    posterior, found = posterior_of(method, ground.base), []
    for clip in (0.2, 0.01):
        algorithm = method.made(0.8, given(ground, SGD), {"clip": clip})
        found.append(algorithm.step(algorithm.init(ground.base), posterior, batch)[0].policy.params)
    assert not np.array_equal(*found)


def test_methods_are_found_by_name_by_family_and_in_modules(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from kl_rl.methods import method_named\nMINE = method_named('rloo')._replace(name='mine')\nNOT = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert methods.method_named("rlhf").name == "rloo"  # a family stands for its first
    assert [m.name for m in methods.methods_named(["preference", "rloo"])] == ["rloo", "dpo", "ipo"]
    assert methods.method_named("mine.py:MINE").name == "mine" == methods.method_named("mine:MINE").name
    for name, said in {
        "rlo": "did you mean rloo",
        "decision-transformer": "did you mean dt-tilted or dt-max or dt-quantile",
        "mine:NOT": "is a int, not a kl_rl.methods.Method",
        "mine:NONE": "mine has no 'NONE'",
        "nowhere:X": "cannot import nowhere",
    }.items():
        with pytest.raises(ValueError, match=said):
            methods.method_named(name)


def test_a_card_is_a_bibtex_entry():
    assert "eprint = {2305.18290}" in methods.bibtex(NAMED["dpo"])
    assert methods.bibtex(NAMED["filter"]) == ""
    assert json.dumps([m.paper for m in METHODS])
