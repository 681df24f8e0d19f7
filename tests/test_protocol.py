"""The protocol: every card, with one prompt and with three, on tables and on a decoder.

Its law is stationary, away from it is not; it is reached; and every permission in its needs is proved by an experiment.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from protocol import (
    FIRST_TOKEN,
    HORIZON,
    VOCAB,
    at_fixed_point,
    base_whose_law_is,
    batch_of,
    clearly_not_zero,
    compiled,
    given,
    ground_with,
    law,
    law_of,
    made,
    posterior_of,
    reward_fn,
    small_student,
    sparse,
    tabulated,
    updates,
    value_of,
    zero_within_errors,
)

from kl_rl import exact
from kl_rl.core.policy import Policy
from kl_rl.core.posterior import NoEvidence, Posterior, Threshold
from kl_rl.methods import METHODS, fit, fresh, in_parts, laws, logged
from kl_rl.methods.algorithm import Algorithm, Info, State
from kl_rl.methods.knobs import aim
from kl_rl.methods.needs import Feed, base_policy, frozen_policy, own_policy

pytestmark = pytest.mark.usefixtures("compile_quickly")

NAMED = {method.name: method for method in METHODS}
LAWFUL = [name for name, method in NAMED.items() if method.law is not None]
# Variants that differ by what is kept between steps have the same step.
STEPS = [name for name in LAWFUL if name not in ("rwr-logged", "vargrad-logged")]
OFTEN = ("rloo", "best-of-n", "dt-tilted", "tb-replay", "alpha-0.5", "dpo")  # one of each family
KEYS = jax.random.split(jax.random.key(5), 96)
P = (1, 3)


@functools.cache
def settled(name: str, prompts: int):
    """A card at its fixed point on tables: ground, state, posterior, compiled updates."""
    method, ground = NAMED[name], ground_with(prompts)
    algorithm = made(method, ground)
    state = at_fixed_point(method, ground, algorithm)
    return ground, state, posterior_of(method, ground.base), algorithm, updates(method, ground, algorithm)


# name, family, who draws, feed, least K, heads, memory, permissions
FACTS = """
rloo             rlhf         own    rewards 2 -     fresh  unrecorded tempered parts
rloo-free        rlhf         own    rewards 2 -     fresh  unrecorded parts
ppo              rlhf         own    rewards 1 value fresh  parts
grpo             rlhf         own    rewards 2 -     fresh  parts
filter           imitation    base   rewards 1 -     fresh  hard foreign unrecorded parts
best-of-n        imitation    base   rewards 2 -     fresh  hard foreign unrecorded parts
rwr              imitation    base   rewards 1 -     fresh  hard foreign tempered
rwr-logged       imitation    base   rewards 1 -     logged hard foreign tempered
expert-iteration imitation    frozen rewards 2 -     fresh  hard unrecorded parts
dt-tilted        conditioning base   rewards 1 -     fresh  hard foreign unrecorded parts
dt-max           conditioning base   rewards 1 -     fresh  hard foreign unrecorded parts
dt-quantile      conditioning base   rewards 1 -     fresh  hard foreign unrecorded parts
vargrad-replay   off-policy   own    rewards 2 -     replay foreign unrecorded tempered parts
vargrad-logged   off-policy   own    rewards 2 -     logged foreign unrecorded tempered parts
tb-replay        off-policy   own    rewards 1 log_z replay foreign unrecorded tempered parts
subtb-replay     off-policy   own    rewards 1 value replay foreign unrecorded tempered parts
pcl-replay       off-policy   own    rewards 1 value replay foreign unrecorded tempered parts
alpha-0.5        between      own    rewards 2 -     fresh  unrecorded tempered parts
alpha-1          between      own    rewards 2 -     fresh  unrecorded tempered parts
dpo              preference   base   pairs   2 -     rated  foreign unrecorded tempered parts
ipo              preference   base   pairs   2 -     rated  foreign unrecorded parts
"""


def facts(method) -> str:
    needs, memory = method.needs, method.memory
    who = {own_policy: "own", base_policy: "base", frozen_policy: "frozen"}[needs.behaviour]
    kept = "fresh" if not memory.filling else "replay" if memory.samples else "logged"
    said = [name for name in ("hard", "foreign", "unrecorded", "tempered", "parts") if getattr(needs, name)]
    feed = "pairs" if needs.feed is Feed.PAIRS else "rewards"
    kept = kept if feed == "rewards" else "rated"
    heads = ",".join(needs.heads) or "-"
    return " ".join([method.name, method.family, who, feed, str(needs.samples), heads, kept, *said])


def test_the_facts_of_the_first_cards_are_what_they_were():
    """As tables of names had them before there were cards; each permission is proved below."""
    before = [" ".join(line.split()) for line in FACTS.strip().splitlines()]
    assert [facts(method) for method in METHODS[: len(before)]] == before
    assert {method.name for method in METHODS if method.needs.returns} == {
        "dt-tilted",
        "dt-max",
        "dt-quantile",
    }


def test_a_card_says_what_its_algorithm_says():
    for method in METHODS:
        ground = ground_with(1)
        algorithm = made(method, ground)
        assert algorithm.needs._replace(samples=0) == method.needs._replace(samples=0), method.name
        assert algorithm.needs.samples >= method.needs.samples
        assert algorithm.behaviour is method.needs.behaviour
        assert method.function.__doc__ and method.idea and method.build and method.assumes


@pytest.mark.parametrize("name", NAMED)
def test_protocol(name):
    """A step keeps the structure of the state, gives no NaN, and is the same compiled."""
    method, ground = NAMED[name], ground_with(1)
    algorithm = made(method, ground)
    state, posterior = algorithm.init(ground.base), posterior_of(method, ground.base)
    batch = batch_of(method, ground, ground.base, jax.random.key(0), num_samples=8)
    jitted, _ = compiled(method)(state, posterior, batch)
    step = algorithm.step if name in OFTEN else compiled(method)  # one by one it takes long
    new, info = step(state, posterior, batch)
    assert isinstance(algorithm, Algorithm) and isinstance(new, State) and isinstance(info, Info)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert not any(np.isnan(x) for x in info)
    for acting in (algorithm.behaviour(new, posterior), algorithm.deploy(new, posterior)):
        assert isinstance(acting, Policy)
    for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(new), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMED)
def test_one_trace_for_any_knob_weights_and_seed(name):
    method, ground = NAMED[name], ground_with(1)
    source = fresh(ground.prompt, reward_fn, num_samples=4, horizon=HORIZON, memory=method.memory)
    chex.clear_trace_counter()  # it knows functions by their names

    def trained(base, knob, key):
        algorithm = method.made(knob, given(ground, optax.sgd(1.0)))
        posterior = posterior_of(method, base, knob)
        run = fit.start(algorithm, base, posterior, source, key)
        return fit.advance(algorithm, run, posterior, source, num_steps=2)[0].state.policy.params

    train = jax.jit(chex.assert_max_traces(trained, n=1))
    value = value_of(method)
    heavier = ground.base.with_params(ground.base.params * 1.1)
    first = train(ground.base, jnp.asarray(value), jax.random.key(0))
    second = train(heavier, jnp.asarray(value * 1.5), jax.random.key(1))
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    lanes = jax.jit(jax.vmap(trained, in_axes=(None, 0, 0)))(
        ground.base, jnp.asarray([value, value * 1.5]), keys
    )
    np.testing.assert_allclose(lanes[0], first, rtol=1e-8, atol=1e-10)
    assert not np.allclose(lanes[1], first) and np.isfinite(second).all()


@pytest.mark.parametrize("prompts", P)
@pytest.mark.parametrize("name", STEPS)
def test_the_law_is_stationary_and_away_from_it_is_not(name, prompts):
    """At the stated fixed point the mean update over many keys is zero within its own standard error."""
    ground, state, posterior, algorithm, change = settled(name, prompts)
    drawer = algorithm.behaviour(state, posterior)
    assert zero_within_errors(change(state, posterior, drawer, KEYS))
    away = state._replace(policy=state.policy.with_params(jnp.zeros_like(state.policy.params)))
    assert clearly_not_zero(change(away, posterior, algorithm.behaviour(away, posterior), KEYS[:24]))


def reached(name: str, ground, student: Policy, steps: int, rate: float, num_samples: int) -> np.ndarray:
    """The law of what is deployed after training from a student; [P, N]."""
    method = NAMED[name]
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(rate, 0.02 * rate, steps))
    )
    algorithm = method.made(value_of(method), given(ground, optimizer, steps))
    posterior = posterior_of(method, ground.base)
    options = {"num_samples": num_samples, "horizon": HORIZON, "memory": method.memory}
    source = fresh(ground.prompt, reward_fn, **options)

    @jax.jit
    def train(student, posterior, key):
        run = fit.start(algorithm, student, posterior, source, key)
        run, _ = fit.advance(algorithm, run, posterior, source, num_steps=steps)
        return algorithm.deploy(run.state, posterior)

    return law_of(train(student, posterior, jax.random.key(0)), ground)


def distance(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p || q), averaged over prompts."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        return float(np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).mean())


@pytest.mark.parametrize("name", LAWFUL)
def test_laws_and_aims_stand_prompts_without_spread_or_without_the_best_rewards(name):
    """As short samples of real prompts are: every row is a law, and the knob can be aimed."""
    method, ground = NAMED[name], sparse(ground_with(3))
    log_q = law(method, ground)
    np.testing.assert_allclose(np.exp(log_q).sum(-1), 1.0)
    if method.knob is None:
        return
    start = laws.mean_reward(ground.log_base, ground.reward)
    value = aim(method.law, ground.log_base, ground.reward, start + 0.3, method.knob)
    reached = laws.mean_reward(method.law(ground.log_base, ground.reward, value), ground.reward)
    assert reached > start + (0.01 if method.knob.candidates else 0.25)
    if method.knob.candidates is None:
        assert reached == pytest.approx(start + 0.3, abs=0.1)


def test_grpo_leaves_a_prompt_without_spread_as_it_was():
    """The law's second row, by training: the advantage is 0 there, and k2 holds q at p0."""
    ground = sparse(ground_with(3))
    paid = lambda prompt, tokens, mask: jnp.where(prompt[..., 1] == 1, 1.0, reward_fn(prompt, tokens, mask))
    method = NAMED["grpo"]
    algorithm, posterior = made(method, ground, optax.adam(0.05)), posterior_of(method, ground.base)
    source = fresh(ground.prompt, paid, num_samples=64, horizon=HORIZON)
    run = fit.start(algorithm, ground.base, posterior, source, jax.random.key(0))
    run, _ = jax.jit(lambda r: fit.advance(algorithm, r, posterior, source, num_steps=100))(run)
    moved = [distance(q, p) for q, p in zip(law_of(run.state.policy, ground), ground.log_base, strict=True)]
    assert moved[1] < 1e-6 and moved[0] > 0.01


@pytest.mark.parametrize("prompts", P)
@pytest.mark.parametrize("name", LAWFUL)
def test_the_law_is_reached(name, prompts):
    """Trained from p0, what is deployed ends within a fiftieth of the initial divergence from the stated law."""
    ground = ground_with(prompts)
    learned = reached(name, ground, ground.base, steps=400, rate=0.1, num_samples=512 // prompts // 2 * 2)
    target = law(NAMED[name], ground)
    assert distance(target, learned) < distance(target, ground.log_base) / 50


# Fixed points that one decoder holds exactly: not those with zeros, nor those made of several laws.
SOFT = [
    name
    for name in STEPS
    if not NAMED[name].evidence(1.0).hard and not NAMED[name].needs.returns and name != "expert-iteration"
]


def seldom(names):
    """One card of each family in the default tests, the others when there is time."""
    return [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", seldom(SOFT))
def test_a_decoder_stays_at_the_law(name):
    """A base is made whose fixed point is a given decoder, for three prompts: there its parameters do not move."""
    method, student = NAMED[name], small_student()
    ground = base_whose_law_is(method, student, ground_with(3))
    algorithm = made(method, ground)
    on_tables = at_fixed_point(method, ground, algorithm)
    state = algorithm.init(student)._replace(heads=on_tables.heads)
    # Weights that are normalized over the batch have the law of large batches.
    size = 128 if method.needs.parts else 1024
    posterior, change = posterior_of(method, ground.base), updates(method, ground, algorithm, size)
    assert zero_within_errors(change(state, posterior, algorithm.behaviour(state, posterior), KEYS[:32]), 5.0)
    away = state._replace(policy=fitted_decoder())
    assert clearly_not_zero(change(away, posterior, algorithm.behaviour(away, posterior), KEYS[:24]))


@pytest.mark.parametrize("name", seldom(LAWFUL))
def test_a_decoder_reaches_the_law(name):
    """The same for a decoder, trained from one that was fitted to p0, for three prompts."""
    ground, noisy = ground_with(3), name in ("pcl-replay", "vargrad-logged", "dpo", "ipo")
    size = {"steps": 600, "num_samples": 256} if noisy else {"steps": 300, "num_samples": 128}
    learned = reached(name, ground, fitted_decoder(), rate=0.02, **size)
    target = law(NAMED[name], ground)
    assert distance(target, learned) < distance(target, ground.log_base) / 10


@functools.cache
def fitted_decoder() -> Policy:
    """A decoder with p0's laws, by maximum likelihood on all strings at once."""
    ground, student = ground_with(3), small_student()
    optimizer, steps = optax.adam(optax.cosine_decay_schedule(0.02, 600)), 600
    target = jnp.exp(jnp.asarray(ground.log_base))

    def loss(params):
        laws_of = jax.vmap(lambda x: exact.log_law(student.with_params(params), x, ground.strings))
        return -jnp.sum(target * laws_of(ground.prompt))

    def body(carry, _):
        params, state = carry
        updated, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updated), state), None

    first = (student.params, optimizer.init(student.params))
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(body, carry, None, length=steps))(first)
    table = params["embed"]["table"]  # return tokens start as the begin mark
    tied = params | {"embed": {"table": table.at[FIRST_TOKEN:].set(table[VOCAB])}}
    policy = student.with_params(tied)
    assert distance(ground.log_base, law_of(policy, ground)) < 1e-3
    return policy


PERMITTED = {
    permission: [name for name in NAMED if getattr(NAMED[name].needs, permission)]
    for permission in ("hard", "foreign", "unrecorded", "tempered", "parts")
}


@pytest.mark.parametrize("name", PERMITTED["hard"])
def test_hard_evidence_is_met(name):
    """The filtered law is stationary, or evidence is not read at all."""
    method, ground = NAMED[name], ground_with(1)
    algorithm, hard = made(method, ground), Posterior(ground.base, Threshold(2.0))
    batch = batch_of(method, ground, ground.base, jax.random.key(0), num_samples=8)
    state, step = algorithm.init(ground.base), compiled(method)
    moved, info = step(state, hard, batch)
    assert np.isfinite(jax.tree.leaves(moved.policy.params)[0]).all() and np.isfinite(info.loss)
    if method.evidence(1.0) == NoEvidence() or method.needs.returns:
        same, _ = step(state, Posterior(ground.base, NoEvidence()), batch)
        np.testing.assert_array_equal(moved.policy.params, same.policy.params)
        return
    filtered = tabulated(laws.filtered(ground.log_base, ground.reward, 2.0), ground)
    change = updates(method, ground, algorithm)
    assert zero_within_errors(change(state._replace(policy=filtered), hard, ground.base, KEYS))
    assert clearly_not_zero(change(state, hard, ground.base, KEYS[:24]))


@pytest.mark.parametrize("name", [n for n in NAMED if not NAMED[n].needs.hard])
def test_hard_evidence_is_refused_where_it_is_infinite(name):
    method, ground = NAMED[name], ground_with(1)
    batch = batch_of(method, ground, ground.base, jax.random.key(0), num_samples=8)
    algorithm = made(method, ground)
    with pytest.raises(ValueError, match="hard evidence"):
        algorithm.step(algorithm.init(ground.base), Posterior(ground.base, Threshold(1.0)), batch)


def drawn_by(ground, temper: float):
    """p0 with all logits divided by a temperature: a table again, with exact log-probabilities."""
    return ground.base.with_params(ground.base.params / temper)


@pytest.mark.parametrize("name", [n for n in PERMITTED["foreign"] if n in STEPS])
def test_data_of_somebody_else_lead_to_the_law_or_to_the_law_on_them(name):
    """Who corrects for the sampler keeps the law; who imitates, imitates whoever drew the data."""
    method, ground = NAMED[name], ground_with(1)
    _, state, posterior, algorithm, change = settled(name, 1)
    stranger = drawn_by(ground, 0.5)
    if not method.needs.tempered:
        state = at_fixed_point(method, ground, algorithm, law_of(stranger, ground))
    if name == "ipo":  # p0, tilted by the rate of wins against the stranger
        state = state._replace(policy=tabulated(ipo_against(ground, law_of(stranger, ground)), ground))
    assert zero_within_errors(change(state, posterior, stranger, KEYS))


@pytest.mark.parametrize("name", PERMITTED["unrecorded"])
def test_log_probabilities_of_the_sampler_are_not_read(name):
    method, ground = NAMED[name], ground_with(1)
    algorithm = made(method, ground)
    batch = batch_of(method, ground, ground.base, jax.random.key(0), num_samples=8)
    state, posterior = algorithm.init(ground.base), posterior_of(method, ground.base)
    step = lambda b: compiled(method)(state, posterior, b)[0].policy.params
    np.testing.assert_array_equal(step(batch), step(batch._replace(log_behaviour=batch.log_behaviour - 3.0)))


@pytest.mark.parametrize("name", [n for n in NAMED if not NAMED[n].needs.unrecorded])
def test_log_probabilities_of_the_sampler_are_read(name):
    """The experiment above can fail."""
    method, ground = NAMED[name], ground_with(1)
    algorithm = made(method, ground)
    batch = batch_of(method, ground, ground.base, jax.random.key(0), num_samples=8)
    state, posterior = algorithm.init(drawn_by(ground, 0.8)), posterior_of(method, ground.base)
    step = lambda b: compiled(method)(state, posterior, b)[0].policy.params
    shifted = batch._replace(log_behaviour=batch.log_behaviour * jnp.linspace(0.5, 1.5, 8)[None, :, None])
    assert not np.array_equal(step(batch), step(shifted))


@pytest.mark.parametrize("name", STEPS)
def test_tempered_samples_move_the_law_unless_the_card_says_not(name):
    """Mean update at the fixed point for samples at temperature 0.6: zero within its standard error, or clearly not."""
    ground, state, posterior, algorithm, change = settled(name, 1)
    acting = algorithm.behaviour(state, posterior)
    found = change(state, posterior, acting.with_params(acting.params / 0.6), KEYS)
    if NAMED[name].needs.tempered:
        assert zero_within_errors(found)
    elif name != "ipo":  # whose target hardly moves in this world; see below
        assert clearly_not_zero(found)


def ipo_against(ground, log_opponent):
    """p0 tilted by the rate of wins against somebody else; one prompt."""
    gap = ground.reward[0][:, None] - ground.reward[0][None, :]
    win = (1.0 / (1.0 + np.exp(-gap))) @ np.exp(log_opponent[0])
    return laws.normalized(ground.log_base + win / value_of(NAMED["ipo"]))


def test_the_target_of_ipo_follows_its_opponents():
    ground = ground_with(1)
    own, other = (ipo_against(ground, x) for x in (ground.log_base, law_of(drawn_by(ground, 0.6), ground)))
    np.testing.assert_allclose(own, law(NAMED["ipo"], ground), rtol=1e-10)
    assert distance(own, other) > 1e-9


@pytest.mark.parametrize("name", PERMITTED["parts"])
def test_gradients_in_parts_are_the_gradient(name):
    method, ground = NAMED[name], ground_with(3)
    batch = batch_of(method, ground, ground.base, jax.random.key(0), num_samples=8)
    algorithm, posterior = (
        made(method, ground, in_parts(optax.sgd(1.0), 3)),
        posterior_of(method, ground.base),
    )
    steps = (jax.jit(algorithm.step), compiled(method, 3))
    parts, whole = (step(algorithm.init(ground.base), posterior, batch)[0].policy.params for step in steps)
    np.testing.assert_allclose(parts, whole, rtol=1e-9, atol=1e-12)


def test_parts_are_refused_where_the_batch_is_looked_at_as_a_whole():
    for name in set(NAMED) - set(PERMITTED["parts"]):
        with pytest.raises(ValueError, match="looks at its batch as a whole"):
            made(NAMED[name], ground_with(1), in_parts(optax.sgd(1.0), 3))


@pytest.mark.parametrize("name", [n for n in NAMED if NAMED[n].needs.samples > 1])
def test_one_sample_is_refused_where_two_are_needed(name):
    method, ground = NAMED[name], ground_with(1)
    algorithm = made(method, ground)
    batch = batch_of(
        method._replace(needs=method.needs._replace(feed=Feed.REWARDS)),
        ground,
        ground.base,
        jax.random.key(0),
        1,
    )
    with pytest.raises(ValueError, match="needs K >= "):
        algorithm.step(algorithm.init(ground.base), posterior_of(method, ground.base), batch)


@pytest.mark.parametrize("name", [n for n in NAMED if not NAMED[n].needs.foreign])
def test_a_source_that_keeps_samples_is_refused_where_fresh_ones_are_needed(name):
    method, ground = NAMED[name], ground_with(1)
    source = fresh(ground.prompt, reward_fn, num_samples=8, horizon=HORIZON, memory=logged())
    with pytest.raises(ValueError, match="learns from samples of its own"):
        fit.start(
            made(method, ground), ground.base, posterior_of(method, ground.base), source, jax.random.key(0)
        )
