"""One log-prob contract: what the sampler records is what teacher forcing gives, however rows are laid out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import CONFIGS, policy_of, random_weights, scanned

from kl_rl import Trajectories, sample, score
from kl_rl.core.mixtures import mixture
from kl_rl.core.policy import token_log_probs
from kl_rl.core.sampler import begin, finish, generate, proceed, reorder
from kl_rl.core.streaming import bucket_length, cache_bytes, pad_prompts, stream
from kl_rl.core.transform import Transform, transformed
from kl_rl.models import Execution, lora_policy, packed_log_probs, table_policy
from kl_rl.sharding import make_mesh, place

pytestmark = pytest.mark.usefixtures("compile_quickly")

# Rounding: float32 has 2^-24 relative error per operation; log-probabilities here are of size 10 and go through a few
# hundred operations. bfloat16 has 2^-8: activations differ between one row and many by about that, times their size.
BOUND = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.1}
PROMPT = [[3, 5, 6], [1, 2, 3, 4, 5], [7], [8, 9]]
LEFT = jnp.asarray([[-1] * (5 - len(row)) + row for row in PROMPT], jnp.int32)
RIGHT = jnp.asarray(pad_prompts(PROMPT, 5))
K, T = 3, 7


def trajectories(prompt, drawn):
    controlled = jnp.ones_like(drawn.mask)
    reward = jnp.zeros(drawn.tokens.shape[:2])
    return Trajectories(prompt, drawn.tokens, drawn.mask, controlled, drawn.log_model, reward)


@functools.cache
def drawn_from(name, dtype, side, transform=None, stop=(), scan=False):
    policy = policy_of(name, dtype=dtype)
    policy = scanned(policy) if scan else policy
    prompt = {"left": LEFT, "right": RIGHT}[side]
    run = jax.jit(
        lambda policy, key: generate(
            policy, key, prompt, num_samples=K, horizon=T, transform=transform, stop=stop
        )
    )
    return policy, prompt, run(policy, jax.random.key(1))


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("gpt2", "left"),
        ("gpt2", "right"),
        ("llama3", "left"),
        ("qwen3", "left"),
        ("gemma2", "left"),
        ("gemma3", "right"),
    ],
)
def test_decoding_equals_teacher_forcing(name, side):
    policy, prompt, drawn = drawn_from(name, jnp.float32, side)
    scored = jax.jit(score)(policy, trajectories(prompt, drawn))
    np.testing.assert_allclose(drawn.log_model, scored, atol=BOUND["float32"], rtol=0)
    rows = jnp.asarray(PROMPT[0]), drawn.tokens[0]  # one prompt by itself, unpadded, through all logits
    alone = jax.jit(lambda policy, row, tokens: token_log_probs(policy, row[None], tokens))(policy, *rows)
    np.testing.assert_allclose(alone, scored[0], atol=BOUND["float32"], rtol=0)


def test_completions_of_one_token():
    policy = policy_of("gpt2")
    drawn = jax.jit(lambda p: generate(p, jax.random.key(0), LEFT, num_samples=K, horizon=1))(policy)
    scored = jax.jit(score)(policy, trajectories(LEFT, drawn))
    np.testing.assert_allclose(drawn.log_model, scored, atol=BOUND["float32"], rtol=0)


@pytest.mark.optimized
@pytest.mark.parametrize(("name", "dtype"), [("gpt2", jnp.float64), ("gemma3", jnp.bfloat16)])
def test_decoding_equals_teacher_forcing_in_other_precisions(name, dtype):
    policy, prompt, drawn = drawn_from(name, dtype, "left")
    scored = jax.jit(score)(policy, trajectories(prompt, drawn))
    assert scored.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    np.testing.assert_allclose(drawn.log_model, scored, atol=BOUND[jnp.dtype(dtype).name], rtol=0)


@pytest.mark.parametrize("name", ["gemma3"])
def test_scanned_layers_change_rounding_only(name):
    policy, prompt, drawn = drawn_from(name, jnp.float32, "left")
    batch = trajectories(prompt, drawn)
    looped = scanned(policy)
    run = jax.jit(score)
    np.testing.assert_allclose(run(policy, batch), run(looped, batch), atol=BOUND["float32"], rtol=0)
    _, _, again = drawn_from(name, jnp.float32, "left", scan=True)
    np.testing.assert_array_equal(drawn.tokens, again.tokens)
    np.testing.assert_allclose(drawn.log_model, again.log_model, atol=BOUND["float32"], rtol=0)


TRANSFORMS = {
    "greedy": Transform(temperature=0.0),
    "top-p": Transform(top_p=0.6),
    "all": Transform(temperature=1.5, top_k=9, top_p=0.8, min_length=2, force_end=True),
}


@pytest.mark.optimized
@pytest.mark.parametrize("kind", list(TRANSFORMS))
def test_behaviour_is_the_transformed_model(kind):
    """The recorded behaviour log-probability is the declared transform of the teacher-forced model."""
    transform, stop = TRANSFORMS[kind], (2, 30)
    policy, prompt, drawn = drawn_from("qwen3", jnp.float32, "left", transform, stop)
    logits = jax.jit(lambda policy, *ids: policy.logits(*ids))(policy, prompt[:, None], drawn.tokens)
    model = jax.nn.log_softmax(logits)
    law = transformed(transform, model, jnp.arange(T).reshape(1, 1, T), horizon=T, stop=stop)
    chosen = jnp.take_along_axis(law, drawn.tokens[..., None], axis=-1)[..., 0]
    chosen = jnp.where(drawn.mask > 0, chosen, 0.0)  # what lies behind the mask may be impossible
    np.testing.assert_allclose(drawn.log_behaviour, chosen, atol=BOUND["float32"], rtol=0)
    scored = jax.jit(lambda policy, batch: score(policy, batch, transform, stop=stop))(
        policy, trajectories(prompt, drawn)
    )
    np.testing.assert_allclose(drawn.log_behaviour, scored, atol=BOUND["float32"], rtol=0)
    assert np.isfinite(drawn.log_behaviour).all()
    np.testing.assert_allclose(jnp.exp(law).sum(-1), 1.0, atol=1e-6)
    if transform.min_length:
        assert not np.isin(drawn.tokens[..., : transform.min_length], stop).any()
    if transform.force_end:
        last = np.asarray(drawn.mask).sum(-1).astype(int) - 1
        assert np.isin(np.take_along_axis(np.asarray(drawn.tokens), last[..., None], -1), stop).all()
    if kind == "greedy":
        assert (drawn.log_behaviour == 0).all()


def test_truncations_keep_what_they_say():
    model = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1]))
    keep = lambda **parts: np.exp(transformed(Transform(**parts), model, 0, horizon=9))
    np.testing.assert_allclose(keep(top_k=2), [4 / 7, 3 / 7, 0, 0], atol=1e-12)
    np.testing.assert_allclose(keep(top_p=0.7), [4 / 7, 3 / 7, 0, 0], atol=1e-12)
    np.testing.assert_allclose(keep(top_p=0.71), [4 / 9, 3 / 9, 2 / 9, 0], atol=1e-12)
    np.testing.assert_allclose(keep(top_p=1e-9), [1, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(keep(top_k=99, top_p=1.0), [0.4, 0.3, 0.2, 0.1], atol=1e-12)
    np.testing.assert_allclose(keep(temperature=0.5), np.square([4, 3, 2, 1]) / 30, atol=1e-12)


OUT_OF_RANGE = [
    ({"temperature": -1.0}, "temperature"),
    ({"top_k": 0}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"force_end": True}, "stop"),
]


@pytest.mark.parametrize(("parts", "message"), OUT_OF_RANGE)
def test_transforms_out_of_range_are_refused(parts, message):
    policy = policy_of("gpt2")
    with pytest.raises(ValueError, match=message):
        generate(policy, jax.random.key(0), LEFT, num_samples=1, horizon=2, transform=Transform(**parts))


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_packing_changes_nothing(name):
    """Four texts in two rows, with padding between and behind, against each text by itself."""
    config, weights = CONFIGS[name], random_weights(CONFIGS[name])
    texts = [np.arange(5) + 1, np.arange(7) + 9, np.arange(3) + 4, np.arange(6) + 20]
    ids, segments = np.zeros((2, 14), np.int32), np.zeros((2, 14), np.int32)
    places = [(0, 0), (0, 6), (1, 0), (1, 4)]
    for number, (text, (row, start)) in enumerate(zip(texts, places, strict=True)):
        ids[row, start : start + len(text)] = text
        segments[row, start : start + len(text)] = number + 1
    run = jax.jit(lambda weights, *ids: packed_log_probs(config, Execution(), weights, *ids))
    packed = run(weights, jnp.asarray(ids), jnp.asarray(segments))
    for text, (row, start) in zip(texts, places, strict=True):
        alone = run(weights, jnp.asarray(text, jnp.int32)[None])[0]
        np.testing.assert_allclose(packed[row, start : start + len(text) - 1], alone, atol=1e-5, rtol=0)
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    assert (np.asarray(packed)[~inside] == 0).all()


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_device_counts_change_rounding_only(shape):
    policy, prompt, drawn = drawn_from("qwen3", jnp.float32, "left")
    mesh = make_mesh(*shape)
    placed = place(policy, mesh)
    run = jax.jit(lambda policy, key: generate(policy, key, prompt, num_samples=K, horizon=T))
    again = run(placed, jax.random.key(1))
    np.testing.assert_array_equal(drawn.tokens, again.tokens)
    np.testing.assert_allclose(drawn.log_model, again.log_model, atol=BOUND["float32"], rtol=0)
    scored = jax.jit(score)(placed, trajectories(prompt, again))
    np.testing.assert_allclose(again.log_model, scored, atol=BOUND["float32"], rtol=0)


def test_mixtures_and_adapters_keep_the_contract():
    base = policy_of("gpt2")
    adapted = lora_policy(base, jax.random.key(3), rank=2, extra=2)
    moved = adapted.with_params(jax.tree.map(lambda x: x + 0.1, adapted.params))
    tokens = jnp.array([31, 32])
    for policy in (
        moved,
        mixture(base, tokens, jnp.log(jnp.array([0.3, 0.7]))),
        mixture(moved, tokens, jnp.log(jnp.array([0.5, 0.5]))),
    ):
        drawn = jax.jit(
            lambda p: generate(p, jax.random.key(0), jnp.full((2, 1), 31), num_samples=K, horizon=T)
        )(policy)
        batch = trajectories(jnp.full((2, 1), 31), drawn)
        scored = jax.jit(score)(policy, batch)
        np.testing.assert_allclose(drawn.log_model, scored, atol=BOUND["float32"], rtol=0)
        plain = jax.jit(score)(dataclasses.replace(policy, scorer=None), batch)
        np.testing.assert_allclose(plain, scored, atol=BOUND["float32"], rtol=0)


def test_policies_without_a_decoder_sample_from_the_same_law():
    """Every string of a tiny table policy comes up as often as its probability says: chi-square within 4 sigma."""
    policy = dataclasses.replace(table_policy(jax.random.key(0), 3, 3, scale=0.7), decoder=None)
    tokens, _, log_probs = sample(policy, jax.random.key(1), jnp.array([[3]]), num_samples=4000, horizon=3)
    index = np.asarray(tokens[0] @ jnp.array([9, 3, 1]))
    strings = jnp.stack(jnp.meshgrid(*[jnp.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3)
    law = np.exp(token_log_probs(policy, jnp.full((27, 1), 3), strings).sum(-1))
    count = np.bincount(index, minlength=27)
    chi2 = (((count - 4000 * law) ** 2) / (4000 * law)).sum()
    assert abs(chi2 - 26) < 4 * np.sqrt(2 * 26)
    np.testing.assert_allclose(log_probs[0].sum(-1), np.log(law)[index], atol=1e-12)


def test_stopping_early_and_in_pieces_changes_nothing():
    """A stop token that is common: rows end at different times; the same tokens come out whole, in pieces, streamed."""
    policy, stop = policy_of("qwen2"), (3, 4, 5)
    prompt, key, horizon = jnp.asarray(pad_prompts(PROMPT)), jax.random.key(5), 40
    draw = jax.jit(lambda policy: generate(policy, key, prompt, num_samples=K, horizon=horizon, stop=stop))
    whole = draw(policy)
    lengths = np.asarray(whole.mask).sum(-1).astype(int)
    assert len(np.unique(lengths)) > 3
    progress = jax.jit(lambda p: begin(p, key, prompt, num_samples=K, horizon=horizon, stop=stop))(policy)
    further = jax.jit(lambda policy, progress: proceed(policy, progress, num_steps=3, stop=stop))
    while bool(progress.alive.any()) and int(progress.position) < horizon:
        progress = further(policy, progress)
    assert int(progress.position) == lengths.max() < horizon  # it ended with the last row
    pieces = finish(progress, K, stop)
    np.testing.assert_array_equal(whole.mask, pieces.mask)
    np.testing.assert_array_equal(whole.tokens * whole.mask, pieces.tokens * pieces.mask)
    streamed = list(stream(policy, key, PROMPT, num_samples=K, horizon=horizon, stop=stop, segment=3))
    assert len(streamed) == len(PROMPT) * K
    assert [len(c.tokens) for c in streamed[:3]] <= [len(c.tokens) for c in streamed[-3:]]
    for c in streamed:
        size = lengths[c.prompt, c.sample]
        np.testing.assert_array_equal(c.tokens, whole.tokens[c.prompt, c.sample, :size])
        np.testing.assert_allclose(c.log_model, whole.log_model[c.prompt, c.sample, :size], atol=1e-5)
        assert c.stopped == (c.tokens[-1] in stop)


@pytest.mark.parametrize("scan", [False, True])
def test_rows_go_on_from_their_ancestors(scan):
    """After regathering, the cache belongs to the new rows: what follows is scored as teacher forcing says."""
    policy = policy_of("gemma3")
    policy = scanned(policy) if scan else policy
    first = jax.jit(lambda policy: begin(policy, jax.random.key(2), LEFT, num_samples=K, horizon=T))
    further = jax.jit(lambda policy, progress, steps: proceed(policy, progress, num_steps=steps))
    progress = further(policy, first(policy), 3)
    ancestor = jnp.array([1, 1, 2, 3, 5, 5, 8, 7, 6, 9, 9, 9])
    before = np.asarray(progress.tokens[:4])
    progress = reorder(policy, progress, ancestor)
    drawn = finish(further(policy, progress, T), K)
    np.testing.assert_array_equal(drawn.tokens.reshape(-1, T)[:, :4], before.T[ancestor])
    scored = jax.jit(score)(policy, trajectories(LEFT, drawn))
    np.testing.assert_allclose(drawn.log_model, scored, atol=BOUND["float32"], rtol=0)


def test_memory_is_known_ahead_and_prompts_are_kept_once():
    policy, config = policy_of("qwen3"), CONFIGS["qwen3"]
    per_token = 2 * config.layers * config.attention.kv_heads * config.attention.head_dim * 4
    small = cache_bytes(policy, (4, 64), 1, 32)
    large = cache_bytes(policy, (4, 64), 8, 32)
    row = 32 * per_token + config.width * 4  # and the last hidden state, of which heads are read
    assert large - small == 4 * 7 * row
    assert 4 * (64 + 32) * per_token <= small < 4 * 64 * per_token + 4 * row + 4 * 64 * 8 + 64


def test_buckets_are_few_and_tight():
    sizes = {bucket_length(n) for n in range(1, 4097)}
    assert len(sizes) == 17 and sizes >= {16, 24, 32, 48, 4096}
    assert all(n <= bucket_length(n) <= max(16, 1.5 * n) for n in range(1, 4097))


def test_prompts_that_cannot_be_padded_are_named():
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        pad_prompts([[1], []])
    with pytest.raises(ValueError, match="prompt 0 has 3 tokens; the limit is 2"):
        pad_prompts([[1, 2, 3]], 2)


def test_new_transforms_lengths_and_seeds_do_not_recompile():
    policy, traces = policy_of("gpt2"), []

    @jax.jit
    def run(policy, key, prompt, transform):
        traces.append(1)
        return generate(policy, key, prompt, num_samples=2, horizon=4, transform=transform).tokens

    for seed, temperature, rows in (
        (0, 1.0, PROMPT),
        (1, 0.5, [[5], [6, 7], [8], [9] * 16]),
        (2, 0.0, PROMPT),
    ):
        run(policy, jax.random.key(seed), jnp.asarray(pad_prompts(rows)), Transform(jnp.asarray(temperature)))
    assert len(traces) == 1
