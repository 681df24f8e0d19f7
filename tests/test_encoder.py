"""Records to arrays: padding, limits, prices of every token; what does not fit is named."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from records import COMPARED, EPISODE, LETTERS, LOGGED, RANKED, Letters, but, load

from kl_rl.core.policy import Policy
from kl_rl.core.rollouts import score
from kl_rl.core.trajectories import check_trajectories
from kl_rl.data import (
    ComparisonRecord,
    DataError,
    Encoder,
    EpisodeRecord,
    Limits,
    LoggedRecord,
    PromptRecord,
    RankingRecord,
    Skipped,
    encode_comparisons,
    encode_episodes,
    encode_logged,
    encode_prompts,
    encode_rankings,
    grouped,
    ranking_pairs,
)


def encoder(limits=None, **options):
    return Encoder(LETTERS, limits, **options)


def checked(batch, shape):
    check_trajectories(batch)
    assert batch.tokens.shape == shape and batch.tokens.dtype == batch.prompt.dtype == np.int32
    said = batch.reward if batch.label is None else batch.label  # of comparisons nobody knows the reward
    leaves = jax.tree.leaves(batch._replace(prompt=None, tokens=None, reward=said))
    assert all(leaf.dtype == np.float32 and np.isfinite(leaf).all() for leaf in leaves)
    assert batch.label is None or np.isnan(batch.reward).all()
    assert set(np.unique(batch.mask)) <= {0.0, 1.0} and not np.any(batch.tokens[batch.mask == 0])
    assert not np.any(batch.log_behaviour[batch.action_mask == 0])


def no_template(messages):
    raise ValueError("no chat template")


def test_prompts_are_padded_on_the_right(tmp_path):
    rows = [{"prompt": "abc"}, {"tokens": [7]}, {"messages": [{"role": "user", "content": "d"}]}]
    records = load(tmp_path, PromptRecord, *rows)
    render = lambda messages: "x" + "".join(m["content"] for m in messages)
    expected = [[1, 2, 3, -1], [7, -1, -1, -1], [24, 4, -1, -1]]
    assert encode_prompts(records, encoder(Limits(prompt=4), render=render)).tolist() == expected
    assert encode_prompts(records[:2], encoder()).tolist() == [[1, 2, 3], [7, -1, -1]]
    assert encode_prompts(records[:2], encoder(begin=30)).tolist() == [[30, 1, 2, 3], [30, 7, -1, -1]]
    assert encode_prompts(records[2:], encoder(begin=30, render=render)).tolist() == [
        [24, 4]
    ]  # a template begins
    with pytest.raises(DataError, match=r'line 3: field "messages" cannot be rendered: no chat template'):
        encode_prompts(records, encoder(render=no_template))
    with pytest.raises(DataError, match=r'line 3: field "messages" needs a chat template'):
        encode_prompts(records, encoder())


@pytest.mark.parametrize(
    "limits, room",
    [({"prompt": 3}, 3), ({"context": 4, "completion": 2}, 2), ({"context": 5, "prompt": 1}, 1)],
)
def test_too_long_a_prompt_is_named_truncated_or_skipped(tmp_path, limits, room):
    records = load(tmp_path, PromptRecord, {"prompt": "a"}, {"prompt": "abcdefgh"})
    with pytest.raises(DataError, match=rf"line 2: the prompt has 8 tokens where there is room for {room}"):
        encode_prompts(records, encoder(Limits(**limits)))
    cut = encode_prompts(records, encoder(Limits(**limits, overflow="truncate")))
    assert cut[1].tolist() == [1, 2, 3, 4, 5, 6, 7, 8][-room:]
    if room > 1:  # a begin token stays
        begun = encode_prompts(records, encoder(Limits(**limits, overflow="truncate"), begin=30))
        assert begun[1].tolist() == [30, *[4, 5, 6, 7, 8][1 - room :]]
    else:
        with pytest.raises(DataError, match="line 1: the prompt has 2 tokens where there is room for 1"):
            encode_prompts(records, encoder(Limits(**limits, overflow="truncate"), begin=30))
    skipped = Skipped()
    assert encode_prompts(records, encoder(Limits(**limits)), skipped=skipped)[:, 0].tolist() == [1]
    assert skipped.count == 1


def test_logged_records_reach_their_arrays(tmp_path):
    """An end token where one was drawn (one log-probability more than the text has tokens), none where not."""
    cut = {
        "prompt": "z",
        "completions": ["cd", "e"],
        "rewards": [0, 2],
        "log_behaviour": [[-1, -2], [-3, -4]],
    }
    ids = {"prompt": "z", "completions": ["x", "y"], "completion_tokens": [[5, 6, 7], [8]], "rewards": [0, 1],
           "log_behaviour": [[-1, -1, 5e-7], [-2]]}  # fmt: skip
    batch = encode_logged(load(tmp_path, LoggedRecord, LOGGED, cut, ids), encoder())
    checked(batch, (3, 2, 3))
    assert batch.prompt.tolist() == [[1, 2], [26, -1], [26, -1]]
    assert batch.tokens.tolist() == [[[3, 0, 0], [4, 5, 0]], [[3, 4, 0], [5, 0, 0]], [[5, 6, 7], [8, 0, 0]]]
    assert batch.mask.sum(-1).tolist() == [[2, 3], [2, 2], [3, 1]]
    assert batch.log_behaviour.sum(-1).tolist() == [[-3, -3], [-3, -7], [-2, -2]]
    assert batch.reward.tolist() == [[1, 0.5], [0, 2], [0, 1]]
    assert np.array_equal(batch.mask, batch.controlled)


def test_lone_completions_totals_and_groups(tmp_path):
    rows = [
        {"prompt": p, "completion": c, "reward": r, "log_behaviour": b}
        for p, c, r, b in [
            ("a", "bc", 1, -3),
            ("d", "e", 2, -1),
            ("a", "f", 3, [-1, -1]),
            ("d", "g", 4, -2.0),
        ]
    ]
    records = grouped(load(tmp_path, LoggedRecord, *rows))
    batch = encode_logged(records, encoder(spread_totals=True))
    checked(batch, (2, 2, 3))
    assert batch.reward.tolist() == [[1, 3], [2, 4]]
    assert batch.log_behaviour[0].tolist() == [[-1, -1, -1], [-1, -1, 0]]
    with pytest.raises(DataError, match=r'line 1: field "log_behaviour" has a total.*spread_totals=True'):
        encode_logged(records, encoder())
    mixed = load(tmp_path, LoggedRecord, rows[0], but(rows[2], log_behaviour="absent"))
    with pytest.raises(
        DataError, match=r'line 2: missing field "log_behaviour", which .* line 1 with the same prompt'
    ):
        grouped(mixed)


def test_behaviour_of_the_base_is_filled_by_scoring(tmp_path):
    policy = constant_policy(jax.random.key(0))
    unknown = [but(LOGGED, log_behaviour="absent"), but(LOGGED, prompt="z", log_behaviour="absent")]
    batch = encode_logged(load(tmp_path, LoggedRecord, *unknown), encoder(), assume_base=True)
    filled = batch._replace(log_behaviour=np.asarray(score(policy, batch)))
    expected = jax.nn.log_softmax(policy.params)[filled.tokens] * filled.mask
    np.testing.assert_allclose(filled.log_behaviour, expected, rtol=1e-12)
    assert np.all(filled.log_behaviour[filled.mask > 0] < 0)


def constant_logits(params, prompt, tokens):
    return jnp.broadcast_to(params, (*tokens.shape, params.shape[0]))


def constant_policy(key):
    return Policy(jax.random.normal(key, (30,), jnp.float64), constant_logits)


def test_unknown_behaviour_must_be_owned_up_to(tmp_path):
    known, unknown = load(tmp_path, LoggedRecord, LOGGED, but(LOGGED, log_behaviour="absent"))
    with pytest.raises(DataError, match=r'line 2: missing field "log_behaviour".*assume_base=True'):
        encode_logged([known, unknown], encoder())
    with pytest.raises(DataError, match=r'line 1: field "log_behaviour" is there although assume_base=True'):
        encode_logged([known, unknown], encoder(), assume_base=True)
    batch = encode_logged([unknown], encoder(), assume_base=True)
    assert not batch.log_behaviour.any() and batch.mask.sum(-1).tolist() == [[2, 3]]


@pytest.mark.parametrize(
    "changes, limits, message",
    [
        (
            {"log_behaviour": [[-1] * 5, [-1] * 3]},
            {},
            '"log_behaviour" has 5 entries for the 2 tokens of completion 1',
        ),
        (
            {"log_behaviour": [[-1] * 2, [-1]]},
            {},
            '"log_behaviour" has 1 entries for the 3 tokens of completion 2',
        ),
        ({}, {"completion": 2}, "a completion has 3 tokens; the limit is 2"),
        ({}, {"context": 3}, "a completion of 3 tokens leaves no room for a prompt in a context of 3"),
        (
            {},
            {"context": 4},
            "the prompt has 2 tokens where there is room for 1 .context 4, longest completion 3",
        ),
        ({}, {"vocab": 5}, "completion 2 has token id 5, but the vocabulary has 5 entries"),
        ({"prompt": "z"}, {"vocab": 20}, "the prompt has token id 26, but the vocabulary has 20 entries"),
        ({"prompt": "!"}, {}, 'field "prompt" has no tokens'),
        (
            {"completions": ["c"], "rewards": [1], "log_behaviour": [[-1]]},
            {},
            "1 completions where .* line 1 has 2",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, limits, message):
    records = load(tmp_path, LoggedRecord, {**LOGGED, "completions": ["a", "b"], "log_behaviour": [[-1], [-1]]},
                   {**LOGGED, **changes})  # fmt: skip
    with pytest.raises(DataError, match=f"d.jsonl: line 2: (field )?{message}"):
        encode_logged(records, encoder(Limits(**limits)))


def test_truncation_leaves_the_end_of_the_prompt(tmp_path):
    (record,) = load(tmp_path, LoggedRecord, {**LOGGED, "prompt": "abcdefgh"})
    batch = encode_logged([record], encoder(Limits(context=6, completion=4, overflow="truncate")))
    assert batch.prompt.tolist() == [[6, 7, 8]] and batch.tokens.shape == (1, 2, 4)  # 6 - the 3 that are used
    with pytest.raises(DataError, match="a completion has 3 tokens"):
        encode_logged([record], encoder(Limits(completion=2, overflow="truncate")))


def test_comparisons_and_rankings(tmp_path):
    batch = encode_comparisons(
        load(tmp_path, ComparisonRecord, COMPARED, but(COMPARED, probability=0.75)), encoder()
    )
    checked(batch, (2, 2, 3))
    assert batch.tokens[0].tolist() == [[3, 0, 0], [4, 5, 0]] and batch.label.tolist() == [
        [1, 0],
        [0.75, 0.25],
    ]
    ranked = load(tmp_path, RankingRecord, RANKED, but(RANKED, ranks=[1, 3, 2]))
    whole = encode_rankings(ranked, encoder(add_end=False))
    checked(whole, (2, 3, 1))
    assert whole.label.tolist() == [[-2, -1, -2], [-1, -3, -2]]
    pairs = encode_comparisons(ranking_pairs(ranked), encoder(add_end=False))
    found = [LETTERS.decode(row.reshape(-1)) for row in pairs.tokens]
    assert found == ["dc", "de", "cd", "ce", "ed"]  # ties give no pair
    assert not batch.log_behaviour.any() and batch.mask[0].sum(-1).tolist() == [2, 3]


def test_episodes_control_their_actions_only(tmp_path):
    bare = {"steps": [{"action": "a"}, {"observation": 3, "action": 4}], "return": 1}
    records = load(tmp_path, EpisodeRecord, EPISODE)
    batch = encode_episodes(records, encoder(), encode_return=lambda value: [40 + int(value)])
    checked(batch, (1, 1, 8))
    assert batch.tokens.tolist() == [[[42, 1, 2, 3, 41, 9, 4, 5]]]
    assert batch.controlled.tolist() == [[[0, 0, 0, 1, 0, 0, 1, 1]]]
    assert batch.log_behaviour.tolist() == [[[0, 0, 0, -0.5, 0, 0, -1, -2]]]
    assert batch.reward.tolist() == [[2]] and batch.prompt.tolist() == [[26]]
    (record,) = load(tmp_path, EpisodeRecord, bare)
    batch = encode_episodes([record], encoder(begin=50), assume_base=True)
    assert (batch.prompt.tolist(), batch.tokens.tolist()) == ([[50]], [[[1, 3, 4]]])
    with pytest.raises(DataError, match=r'line 1: missing field "prompt", and there is no begin token'):
        encode_episodes([record], encoder(), assume_base=True)
    with pytest.raises(DataError, match=r'line 1: field "steps"\[0\]: missing field "log_behaviour"'):
        encode_episodes([record], encoder(begin=50))
    with pytest.raises(DataError, match="the episode has token id 42, but the vocabulary has 30"):
        encode_episodes(records, encoder(Limits(vocab=30)), encode_return=lambda value: [40 + int(value)])


def test_returns_are_written_in_their_shortest_form(tmp_path):
    seen = []

    class Spy(Letters):
        def encode(self, text):
            seen.append(text)
            return super().encode("a")

    steps = [{"return": 3.0, "action": "a"}, {"return": -1234567.25, "action": "b"}]
    encode_episodes(
        load(tmp_path, EpisodeRecord, {"steps": steps}), Encoder(Spy(), begin=1), assume_base=True
    )
    assert seen == ["3", "a", "-1234567.25", "b"]


def test_bad_limits_and_tokenizers_are_refused():
    with pytest.raises(ValueError, match="Limits.prompt must be at least 1; got 0"):
        Limits(prompt=0)
    with pytest.raises(
        ValueError, match="Limits.completion = 8 leaves no room for a prompt in a context of 8"
    ):
        Limits(completion=8, context=8)
    with pytest.raises(ValueError, match="Limits.overflow"):
        Limits(overflow="cut")
    with pytest.raises(ValueError, match="end_ids are empty"):
        Encoder(types.SimpleNamespace(end_ids=()))
    with pytest.raises(DataError, match="no record to encode"):
        encode_logged([], encoder())
    with pytest.raises(DataError, match="no prompt to encode"):
        encode_prompts([], encoder())
