"""Worlds: named rewards against naive scorers, n-grams against their tables, messages about bad files."""

import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_rl import exact, worlds
from kl_rl.core.trajectories import completion_mask
from kl_rl.worlds.enumeration import walk_strings

MARKOV = {
    "kind": "markov",
    "initial": [0.5, 0.3, 0.2],
    "transition": [[0.6, 0.4, 0], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]],
}
COUNT = {"kind": "motif_count", "motif": [1, 1]}
PARITY = {"start": 0, "next": [[1, 1, 1], [0, 0, 0]], "weight": [[0, 0, 0], [1, 1, 1]]}
SPEC = {"base": MARKOV, "reward": COUNT, "horizon": 4}


def changed(path, value):
    """SPEC with one member replaced (or added)."""
    spec = json.loads(json.dumps(SPEC))
    target = spec
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return spec


def scores(world, strings, prompt=None):
    """Rewards of a list of equally long strings."""
    tokens = jnp.asarray(strings, jnp.int32)
    mask = jnp.ones(tokens.shape) if world.end is None else completion_mask(tokens, world.end)
    row = world.prompts[0] if prompt is None else prompt
    return np.asarray(world.reward(jnp.asarray(row)[None], tokens, mask))


def motif_count(y, motif):
    return sum(tuple(y[i : i + len(motif)]) == tuple(motif) for i in range(len(y) - len(motif) + 1))


def pair_match(y, distance):
    return sum(y[i] == y[i - distance] for i in range(distance, len(y)))


def sentiment(y, positive, negative, wedding, bonus):
    total = 0.0
    for i, token in enumerate(y):
        if motif_count(y[:i], wedding):
            total += bonus
        else:
            total += (token in positive) - (token in negative)
    return total


NAIVE = [
    ({"kind": "motif_count", "motif": [1, 0, 1], "weight": 0.5}, lambda y: 0.5 * motif_count(y, [1, 0, 1])),
    ({"kind": "motif_count", "motif": [0, 0, 1, 0, 0]}, lambda y: motif_count(y, [0, 0, 1, 0, 0])),
    ({"kind": "motif_count", "motif": [2, 2]}, lambda y: motif_count(y, [2, 2])),
    ({"kind": "pair_match", "distance": 2, "weight": -1.5}, lambda y: -1.5 * pair_match(y, 2)),
    ({"kind": "pair_match", "distance": 1}, lambda y: pair_match(y, 1)),
    (
        {"kind": "sentiment", "positive": [0], "negative": [1], "wedding": [2, 0, 2], "bonus": 3},
        lambda y: sentiment(y, [0], [1], [2, 0, 2], 3),
    ),
    ({"kind": "sentiment", "positive": [0, 2], "negative": []}, lambda y: sum(t in (0, 2) for t in y)),
    ({"kind": "length"}, len),
    ({"kind": "constant"}, lambda y: 0.0),
    (
        {
            "kind": "sum",
            "terms": [{"kind": "pair_match", "distance": 2}, {"kind": "motif_count", "motif": [1, 1]}],
        },
        lambda y: pair_match(y, 2) + motif_count(y, [1, 1]),
    ),
]


@pytest.mark.parametrize(("reward", "naive"), NAIVE, ids=lambda x: x["kind"] if isinstance(x, dict) else "")
def test_named_rewards_equal_naive_scores_on_every_string(reward, naive):
    world = worlds.parse_world({"base": MARKOV, "reward": reward, "horizon": 6})
    strings = list(itertools.product(range(3), repeat=6))
    np.testing.assert_allclose(scores(world, strings), [naive(y) for y in strings], atol=1e-12)


def test_a_prompt_moves_the_reward_state_but_earns_nothing():
    world = worlds.parse_world({**SPEC, "prompts": [[1, 1, 1], [0], []]})
    assert world.prompts.tolist() == [[3, 1, 1, 1], [3, 3, 3, 0], [3, 3, 3, 3]]
    assert [float(scores(world, [[1, 0, 0, 0]], row)[0]) for row in world.prompts] == [1.0, 0.0, 0.0]


def test_with_an_end_token_length_counts_tokens_before_it_and_the_party_stops():
    length = worlds.parse_world({**SPEC, "reward": {"kind": "length"}, "end": 2})
    assert scores(length, [[0, 1, 2, 0], [2, 0, 0, 0], [0, 0, 0, 0]]).tolist() == [2, 0, 4]
    party = {"kind": "sentiment", "positive": [0], "negative": [], "wedding": [1], "bonus": 10}
    world = worlds.parse_world({**SPEC, "reward": party, "end": 2})
    assert scores(world, [[1, 0, 2, 0], [0, 1, 1, 1]]).tolist() == [10, 21]


def test_an_ngram_gives_the_products_of_its_tables():
    rng = np.random.default_rng(0)
    tables = [rng.dirichlet(np.ones(3), (3,) * k) for k in range(3)]
    spec = {"kind": "ngram", "order": 3, "tables": [t.tolist() for t in tables]}
    world = worlds.parse_world({**SPEC, "base": spec})
    strings = exact.enumerate_strings(3, 4)
    log_prob = exact.log_law(world.base, jnp.asarray(world.prompts[0]), strings)
    direct = [
        math.log(
            tables[0][y[0]]
            * tables[1][y[0], y[1]]
            * tables[2][y[0], y[1], y[2]]
            * tables[2][y[1], y[2], y[3]]
        )
        for y in np.asarray(strings.tokens)
    ]
    np.testing.assert_allclose(log_prob, direct, rtol=1e-12)


def test_a_bigram_is_a_markov_chain_and_a_unigram_is_independent():
    tables = [MARKOV["initial"], MARKOV["transition"]]
    bigram = worlds.parse_world({**SPEC, "base": {"kind": "ngram", "order": 2, "tables": tables}})
    for a, b in zip(bigram.process, worlds.parse_world(SPEC).process, strict=True):
        np.testing.assert_array_equal(a, b)
    unigram = worlds.parse_world({**SPEC, "base": {"kind": "ngram", "order": 1, "tables": tables[:1]}})
    leaves = walk_strings(unigram, unigram.prompts[0])
    expected = np.log([np.prod(np.take(MARKOV["initial"], y)) for y in itertools.product(range(3), repeat=4)])
    np.testing.assert_allclose(np.sort(leaves.log_prob), np.sort(expected), rtol=1e-12)


@pytest.mark.parametrize("make", [worlds.default_world, worlds.full_world])
def test_standard_worlds_have_many_strings_per_level_and_a_base_that_prefers_some(make):
    world = make()
    assert world.num_strings == {6: 4096, 8: 65536}[world.horizon]
    leaves = walk_strings(world, world.prompts[0])
    assert len(leaves.score) == world.num_strings
    prob = np.exp(leaves.log_prob)
    assert prob.sum() == pytest.approx(1.0, abs=1e-12)
    values, counts = np.unique(leaves.score, return_counts=True)
    assert np.array_equal(values, np.round(values)) and np.sum(counts >= 100) >= 8
    assert prob @ leaves.score < values.max() / 4
    for value in values[counts >= 100]:
        inside = prob[leaves.score == value]
        inside = inside / inside.sum()
        assert inside @ np.log(len(inside) * inside) > 0.1  # nats away from uniform


def test_generated_worlds_are_reproducible_and_survive_their_own_file(tmp_path):
    first = worlds.generate_world(7, kind="markov", vocab=3, end=1, prompts=[[0, 2], []])
    second = worlds.generate_world(7, kind="markov", vocab=3, end=1, prompts=[[0, 2], []])
    other = worlds.generate_world(8, kind="markov", vocab=3, end=1, prompts=[[0, 2], []])
    assert first.spec == second.spec != other.spec
    path = tmp_path / "w.json"
    path.write_text(json.dumps(first.spec))
    again = worlds.load_world(path)
    leaves = (
        jax.tree.leaves((first.process, first.automaton)),
        jax.tree.leaves((again.process, again.automaton)),
    )
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (again.name, again.end, again.prompts.tolist()) == ("markov-7", 1, [[3, 0, 2], [3, 3, 3]])


def test_rows_within_the_tolerance_are_normalized():
    world = worlds.parse_world(changed(["base", "initial"], [0.5, 0.3, 0.2000005]))
    assert float(jnp.sum(jnp.exp(world.process.log_initial))) == pytest.approx(1.0, abs=1e-15)


def automaton(**changes):
    return {"start": 0, "next": [[0, 1, 1], [1, 0, 0]], "weight": [[0, 1, 2], [1, 1, 1]], **changes}


BAD = [
    ([], "must be an object in braces"),
    (changed(["horizn"], 3), 'unknown key "horizn"; did you mean "horizon"?'),
    ({"base": MARKOV, "reward": COUNT}, 'key "horizon" is missing'),
    (changed(["horizon"], 0), "horizon: must be at least 1"),
    (changed(["horizon"], 2.5), "horizon: must be an integer, got 2.5"),
    (changed(["horizon"], True), "horizon: must be an integer, got True"),
    (changed(["end"], 3), "end: must be between 0 and 2 (tokens of a vocabulary of 3), got 3"),
    (changed(["name"], 5), "name: must be a string"),
    (changed(["base"], [1]), 'base: must be an object with a "kind"'),
    (changed(["base", "kind"], "markow"), "base.kind: must be one of markov, hmm, ngram"),
    (changed(["base", "emision"], []), 'base: unknown key "emision"'),
    (
        changed(["base", "initial"], [0.5, 0.3, 0.1]),
        "base.initial: sums to 0.9, not to 1; divide its entries",
    ),
    (changed(["base", "initial"], []), "base.initial: is an empty list"),
    (changed(["base", "initial"], 1.0), "base.initial: must be a list in brackets"),
    (changed(["base", "transition", 2], [0.3, 0.3]), "base.transition[2]: must have 3 entries, got 2"),
    (
        changed(["base", "transition", 2], [0.3, 0.9, -0.2]),
        "base.transition[2][2]: is a negative probability, -0.2",
    ),
    (changed(["base", "transition", 1, 0], float("nan")), "base.transition[1][0]: must be finite, got nan"),
    (changed(["base", "transition", 1, 0], "0.1"), "base.transition[1][0]: must be a number, got '0.1'"),
    (changed(["base", "transition", 1, 0], 10**400), "base.transition[1][0]: must be finite"),
    (changed(["base", "transition"], [[1, 0, 0]]), "base.transition: must have 3 rows, got 1"),
    (
        changed(["base"], {"kind": "hmm", "initial": [1.0], "transition": [[1.0]]}),
        'base: key "emission" is missing',
    ),
    (
        changed(
            ["base"],
            {
                "kind": "hmm",
                "initial": [0.5, 0.5],
                "transition": [[1, 0], [0, 1]],
                "emission": [[1], [0.5, 0.5]],
            },
        ),
        "base.emission[1]: must have 1 entries, got 2",
    ),
    (changed(["base"], {"kind": "ngram", "order": 2, "tables": [[1.0]]}), "base.tables: must have 2 tables"),
    (
        changed(["base"], {"kind": "ngram", "order": 2, "tables": [[0.5, 0.5], [[1, 0]]]}),
        "base.tables[1]: must have 2 rows, got 1",
    ),
    (
        changed(["base"], {"kind": "ngram", "order": 14, "tables": [[0.5, 0.5]] * 14}),
        "base.tables[1][0]: must be a list",
    ),
    (changed(["reward"], 3), 'reward: must be an object with a "kind"'),
    (changed(["reward", "kind"], "motiv_count"), "reward.kind: must be one of automaton, motif_count"),
    (changed(["reward", "wieght"], 1), 'reward: unknown key "wieght"; did you mean "weight"?'),
    (changed(["reward", "motif"], [1, 3]), "reward.motif[1]: must be between 0 and 2"),
    (changed(["reward", "motif"], []), "reward.motif: is an empty list"),
    (changed(["reward", "weight"], float("inf")), "reward.weight: must be finite, got inf"),
    (changed(["reward"], {"kind": "pair_match", "distance": 0}), "reward.distance: must be at least 1"),
    (changed(["reward"], {"kind": "pair_match", "distance": 50}), "reward.distance: needs"),
    (
        changed(["reward"], {"kind": "sentiment", "positive": [1], "negative": [1]}),
        "reward.negative: token 1 is also in positive",
    ),
    (
        changed(["reward"], {"kind": "sum", "terms": [COUNT, {"kind": "x"}]}),
        "reward.terms[1].kind: must be one of",
    ),
    (
        changed(["reward"], {"kind": "sum", "terms": [{"kind": "pair_match", "distance": 7}, PARITY]}),
        "reward.terms: the sum needs more than 4096 states",
    ),
    (changed(["reward"], automaton(start=2)), "reward.start: must be between 0 and 1"),
    (
        changed(["reward"], automaton(next=[[0, 1, 2], [1, 0, 0]])),
        "reward.next[0][2]: must be between 0 and 1",
    ),
    (changed(["reward"], automaton(next=[[0, 1], [1, 0, 0]])), "reward.next[0]: must have 3 entries"),
    (changed(["reward"], automaton(next=[[0, 1, 0.5], [1, 0, 0]])), "reward.next[0][2]: must be an integer"),
    (changed(["reward"], automaton(weight=[[0, 1, 0]])), "reward.weight: must have 2 rows, got 1"),
    (
        changed(["reward"], automaton(weight=[[0, 1, None], [0, 0, 0]])),
        "reward.weight[0][2]: must be a number",
    ),
    (
        changed(["reward"], automaton(weight=[[0, 1, 1e308], [0, 0, 0]])),
        "reward: weights times horizon exceed",
    ),
    ({**SPEC, "prompts": []}, "prompts: is an empty list"),
    ({**SPEC, "prompts": [[0], 1]}, "prompts[1]: must be a list"),
    ({**SPEC, "prompts": [[0, 3]]}, "prompts[0][1]: must be between 0 and 2"),
    ({**SPEC, "prompts": [[], [1, 0, 2]]}, "prompts[1][2]: token 2 has probability zero here"),
]


@pytest.mark.parametrize(("spec", "message"), BAD, ids=lambda x: x[:40] if isinstance(x, str) else "")
def test_every_bad_world_names_file_field_and_remedy(spec, message):
    with pytest.raises(worlds.BadWorld) as caught:
        worlds.parse_world(spec, "w.json")
    assert str(caught.value).startswith("w.json: ")
    assert message in str(caught.value)


def test_too_many_ngram_states_are_refused():
    tables = [np.full((2,) * (k + 1), 0.5).tolist() for k in range(13)]
    with pytest.raises(worlds.BadWorld, match=r"base.order: needs 8190 states, above 4096; lower the order"):
        worlds.parse_world({**SPEC, "base": {"kind": "ngram", "order": 13, "tables": tables}}, "w.json")


FILES = [
    (b"", "is empty"),
    (b'{"base": 1,}', "line 1, column 12: not valid JSON"),
    (b'{"base": 1\n "horizon": 2}', "line 2, column 2: not valid JSON"),
    (b'{"horizon": 2, "horizon": 3}', 'the key "horizon" appears twice'),
    (b"\xff\xfe{}", "not UTF-8 text (byte 0)"),
    (b"[" * 100_000, "not valid JSON"),
]


@pytest.mark.parametrize(("content", "message"), FILES, ids=lambda x: x[:20] if isinstance(x, str) else "")
def test_every_unreadable_file_is_named(tmp_path, content, message):
    path = tmp_path / "w.json"
    path.write_bytes(content)
    with pytest.raises(worlds.BadWorld) as caught:
        worlds.load_world(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_missing_files_and_directories_are_named(tmp_path):
    with pytest.raises(worlds.BadWorld, match=r"none.json: no such file"):
        worlds.load_world(tmp_path / "none.json")
    with pytest.raises(worlds.BadWorld, match="is a directory"):
        worlds.load_world(tmp_path)


def test_the_schema_is_fresh_json_and_describes_the_standard_world():
    schema = worlds.schema()
    assert json.loads(json.dumps(schema)) == schema
    schema["properties"].clear()
    assert worlds.schema()["properties"]
    assert _conforms(worlds.default_world().spec, worlds.schema(), worlds.schema())
    assert _conforms(changed(["reward"], automaton()), worlds.schema(), worlds.schema())
    assert not _conforms(changed(["reward"], {"kind": "motif_count"}), worlds.schema(), worlds.schema())
    assert not _conforms(changed(["horizn"], 1), worlds.schema(), worlds.schema())


def _conforms(value, schema, root):
    """The part of JSON schema that the world schema uses."""
    if "$ref" in schema:
        keys = schema["$ref"].removeprefix("#/").split("/")
        return _conforms(value, functools.reduce(lambda part, key: part[key], keys, root), root)
    if "oneOf" in schema and sum(_conforms(value, s, root) for s in schema["oneOf"]) != 1:
        return False
    if "anyOf" in schema and not any(_conforms(value, s, root) for s in schema["anyOf"]):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    names = {
        "object": dict,
        "array": list,
        "number": (int, float),
        "integer": int,
        "string": str,
        "null": type(None),
    }
    listed = schema.get("type", [])
    listed = [listed] if isinstance(listed, str) else listed
    if listed and not any(isinstance(value, names[name]) for name in listed):
        return False
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        if not set(schema["required"]) <= set(value) or not set(value) <= set(known):
            return False
        return all(_conforms(value[key], known[key], root) for key in value)
    if isinstance(value, list):
        items = schema.get("items", {})
        return len(value) >= schema.get("minItems", 0) and all(_conforms(v, items, root) for v in value)
    return not isinstance(value, int | float) or value >= schema.get("minimum", -math.inf)
