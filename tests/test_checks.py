"""Borders: a model of one's own is checked, and what cannot be right is refused with a sentence that helps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoders import CONFIGS, policy_of, random_weights, scanned
from flax import nnx

import kl_rl
from kl_rl import Policy, Posterior, Tilt, check_policy, methods
from kl_rl.core.mixtures import mixture
from kl_rl.core.policy import Decoder
from kl_rl.models import decoder_twist, lora_policy, small_policy, table_policy, table_twist

SGD = optax.sgd(0.1)
pytestmark = pytest.mark.usefixtures("compile_quickly")


def table():
    return table_policy(jax.random.key(0), 4, 9, scale=0.7)


def small():
    """What follows the last token, in a context that the prompt sets."""
    return Policy(jnp.asarray(np.random.default_rng(0).normal(size=(5, 4))), markov, MARKOV)


def markov(params, prompt, tokens):
    before = jnp.concatenate([prompt[..., -1:], tokens[..., :-1]], axis=-1)
    return params[before] + params[prompt[..., :1]]


def markov_init(params, prompt, horizon):
    return params[prompt[:, -1]] + params[prompt[:, 0]], prompt[:, 0]


def markov_step(params, cache, token):
    return params[token] + params[cache], cache


def markov_gather(cache, ancestor):
    return cache[ancestor]


MARKOV = Decoder(markov_init, markov_step, None, markov_gather)


def own_twist(policy):
    """A head on the frozen decoder, moved off zero."""
    twist = decoder_twist(CONFIGS["qwen3"], policy.params)
    return twist.with_params(jax.tree.map(lambda x: x + 0.1, twist.params))


def test_what_the_library_makes_keeps_the_contract():
    base = policy_of("gpt2")
    lora = lora_policy(base, jax.random.key(3), rank=2, extra=2)
    moved = lora.with_params(jax.tree.map(lambda x: x + 0.1, lora.params))
    check_policy(table(), twist=table_twist(4, 9))
    check_policy(small())
    check_policy(mixture(moved, jnp.array([31, 32]), jnp.log(jnp.array([0.3, 0.7]))), trained=False)
    qwen = policy_of("qwen3")
    check_policy(qwen, twist=own_twist(qwen))


def peeking(params, prompt, tokens):
    return markov(params, prompt, tokens) + (tokens[..., -1:, None] == 0)


def stale_step(params, cache, token):
    return params[cache], cache


def growing_step(params, cache, token):
    return params[token], jnp.concatenate([cache, cache])


class Fresh:
    """Equal to nothing."""

    __hash__ = None

    def __call__(self, params, prompt, tokens):
        return markov(params, prompt, tokens)


def lost_gather(cache, ancestor):
    return cache[::-1]


def undefined(params, prompt, tokens):
    return jnp.where(tokens[..., None] == 1, jnp.nan, markov(params, prompt, tokens))


def impossible(params, prompt, tokens):
    return jnp.where(tokens[..., None] >= 0, -jnp.inf, markov(params, prompt, tokens))


def flat(params, prompt, tokens):
    return markov(params, prompt, tokens).sum(-1)


def raw_scorer(params, prompt, tokens):
    """Logits that nobody normalized."""
    logits = markov(params, jnp.broadcast_to(prompt[:, None], (*tokens.shape[:2], prompt.shape[1])), tokens)
    return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]


WRONG = {
    "policy.apply sees the future: token 4 changes the rows before it": {"apply": peeking},
    "policy.decoder does not say what policy.apply says": {"decoder": Decoder(markov_init, stale_step)},
    "policy.decoder.step must return a cache like the one it is given": {
        "decoder": Decoder(markov_init, growing_step)
    },
    "policy.decoder.gather does not go on": {"decoder": Decoder(markov_init, markov_step, None, lost_gather)},
    "policy.scorer does not say what policy.apply says": {"scorer": raw_scorer},
    "NaN": {"apply": undefined, "decoder": None},
    "leaves no token possible in row": {"apply": impossible, "decoder": None},
    r"must give floating-point logits \[..., T, V\]": {"apply": flat},
    r"policy.params\[0\] is int32: gradients are taken of floating-point": {
        "params": [jnp.zeros(3, jnp.int32)]
    },
    "policy.apply must be hashable and equal by value": {"apply": Fresh()},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_decoder_keeps_the_contract(name):
    check_policy(policy_of(name))
    check_policy(scanned(policy_of(name)))


@pytest.mark.parametrize("said", WRONG)
def test_what_breaks_the_contract_is_named(said):
    with pytest.raises(ValueError, match=said):
        check_policy(dataclasses.replace(small(), **WRONG[said]), prompt=jnp.array([[0], [3]]))


def test_a_twist_that_breaks_the_contract_is_named():
    qwen = policy_of("qwen3")
    twist = own_twist(qwen)
    other = decoder_twist(CONFIGS["qwen3"], random_weights(CONFIGS["qwen3"], 9)).with_params(twist.params)
    with pytest.raises(ValueError, match=r"twist.beside does not say what twist.apply says"):
        check_policy(qwen, twist=other)  # on hidden states of another trunk
    with pytest.raises(ValueError, match=r"twist.apply gives"):
        check_policy(small(), twist=kl_rl.Twist(jnp.zeros(()), lambda params, prompt, tokens: params))


class Own(nnx.Module):
    """A module with dropout and a counter of calls."""

    def __init__(self, rngs):
        self.embed, self.out = nnx.Embed(6, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)
        self.drop, self.norm = nnx.Dropout(0.1, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, prompt, tokens):
        ids = jnp.concatenate([prompt[..., -1:], tokens[..., :-1]], axis=-1)
        return self.out(self.norm(self.drop(self.embed(ids))))


def test_a_flax_module_with_dropout_and_statistics_is_trained():
    """In evaluation mode; keys and statistics are no parameters."""
    module = Own(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"is in training mode: .* call .eval\(\)"):
        kl_rl.from_nnx(module)
    module.eval()
    policy = kl_rl.from_nnx(module)
    check_policy(policy)
    assert set(policy.params) == {"embed", "out", "norm"} and set(policy.shared) == {"drop", "norm"}
    source = kl_rl.fresh(jnp.array([[5]]), lambda p, t, m: t.sum(-1) * 1.0, num_samples=4, horizon=3)
    algorithm = kl_rl.reinforce(optimizer=optax.sgd(0.1))
    posterior = Posterior(policy, Tilt(1.0))
    run = kl_rl.start(algorithm, policy, posterior, source, jax.random.key(0))
    run, info = jax.jit(lambda r: kl_rl.advance(algorithm, r, posterior, source, num_steps=2))(run)
    assert np.isfinite(info.loss).all()
    head = kl_rl.from_nnx(module, trained=nnx.PathContains("out"))
    assert set(head.params) == {"out"}


def test_a_student_of_another_vocabulary_is_refused():
    base = small_policy(jax.random.key(0), 5, context=8, width=8, layers=1, heads=2)
    student = small_policy(jax.random.key(0), 4, context=8, width=8, layers=1, heads=2)
    algorithm = kl_rl.reinforce(optimizer=optax.sgd(0.1))
    source = kl_rl.fresh(jnp.array([[3]]), lambda p, t, m: t.sum(-1) * 1.0, num_samples=4, horizon=3)
    posterior = Posterior(base, Tilt(1.0))
    run = kl_rl.start(algorithm, student, posterior, source, jax.random.key(0))
    with pytest.raises(ValueError, match="the policy has a vocabulary of 4 tokens, the base of 5"):
        kl_rl.advance(algorithm, run, posterior, source, num_steps=1)


def test_one_prompt_is_a_batch_of_one():
    with pytest.raises(
        ValueError, match=r"prompt must be \[P, L\]; got shape \(1,\): one prompt is prompt\[None\]"
    ):
        kl_rl.sample(table(), jax.random.key(0), jnp.array([4]), num_samples=2, horizon=2)


def test_base_and_evidence_in_the_wrong_order_are_refused():
    with pytest.raises(TypeError, match="Posterior"):
        Posterior(Tilt(1.0), table())


def test_policies_print_in_one_line():
    assert repr(table()).count("\n") == 0 and "parameters" in repr(table())
    assert len(repr(policy_of("gemma3"))) < 100


def test_numbers_out_of_range_are_refused_by_name():
    head = table_twist(3, 3)
    table = {
        "epochs must be at least 1; got 0": lambda: methods.ppo(optimizer=SGD, twist=head, epochs=0),
        "clip must be above 0; got -1": lambda: methods.grpo(optimizer=SGD, clip=-1.0),
        "decay must be at least 0 and at most 1; got nan": lambda: methods.ppo(
            optimizer=SGD, twist=head, decay=np.nan
        ),
        "window must be at least 1; got 0": lambda: methods.path_consistency(
            optimizer=SGD, twist=head, window=0
        ),
        "alpha must be at least 0 and at most 1; got 5": lambda: methods.alpha_divergence(5.0, optimizer=SGD),
        "n must be at least 1; got 0": lambda: methods.best_of_n(0, optimizer=SGD),
        "share must be at least 0 and at most 1; got 7": lambda: methods.replay(share=7),
        "batches must be at least 1; got 0": lambda: methods.logged(0),
    }
    for message, call in table.items():
        with pytest.raises(ValueError, match=message):
            call()
    for n in (np.int64(9), jnp.float32(9.0)):
        assert methods.best_of_n(n, optimizer=SGD).needs.samples == 9


def test_batches_with_values_that_cannot_be_are_refused():
    policy = table_policy(jax.random.key(0), 3, 3)
    batch = kl_rl.core.rollout(
        policy, jax.random.key(1), jnp.zeros((1, 1), jnp.int32), lambda p, t, m: t.sum(-1) * 1.0,
        num_samples=4, horizon=2,
    )  # fmt: skip
    posterior, rwr = Posterior(policy, Tilt(1.0)), methods.reward_weighted(optimizer=SGD)
    wrong = {
        r"tokens\[0, 0, 0\] is 7: it must be an id from 0 to 2": {"tokens": batch.tokens.at[0, 0, 0].set(7)},
        "tokens must be whole numbers; got float": {"tokens": batch.tokens * 1.0},
        r"log_behaviour\[0, 1, 0\] is nan": {"log_behaviour": batch.log_behaviour.at[0, 1, 0].set(np.nan)},
        r"reward\[0, 2\] is nan": {"reward": batch.reward.at[0, 2].set(np.nan)},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            rwr.step(rwr.init(policy), posterior, batch._replace(**change))
    dpo = methods.dpo(optimizer=SGD)
    with pytest.raises(ValueError, match=r"label\[0, 0\] is nan"):
        dpo.step(dpo.init(policy), posterior, batch._replace(label=jnp.full((1, 4), np.nan)))
    for evidence in (1.0, Tilt):
        with pytest.raises(TypeError, match="must be evidence such as Tilt"):
            rwr.step(rwr.init(policy), Posterior(policy, evidence), batch)


def test_slow_copies_share_what_is_shared_and_follow_at_a_rate():
    head = dataclasses.replace(table_twist(3, 3), shared=jax.random.key(0))
    needs = methods.Needs(heads=(methods.Head.VALUE,))
    made = lambda targets: methods.gradient_algorithm(
        lambda *_: None, optimizer=SGD, needs=needs, heads={methods.Head.VALUE: head}, targets=targets
    )
    state = made({methods.Head.VALUE: 0.5}).init(table_policy(jax.random.key(0), 3, 3))
    assert state.targets["value"].shared is head.shared and state.targets["value"].params is not head.params
    for targets, message in (
        ({methods.Head.VALUE: 5.0}, "at most 1"),
        ({methods.Head.Q: 0.5}, "none called"),
    ):
        with pytest.raises(ValueError, match=message):
            made(targets)


def test_attention_in_training_mode_is_refused():
    class Attends(nnx.Module):
        def __init__(self, rngs):
            self.attend = nnx.MultiHeadAttention(
                2, 4, dropout_rate=0.5, deterministic=False, decode=False, rngs=rngs
            )

    with pytest.raises(ValueError, match=r"attend \(MultiHeadAttention\) is in training mode"):
        kl_rl.from_nnx(Attends(nnx.Rngs(0)))
