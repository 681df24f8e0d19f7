"""The text world: reward files, the automaton against the host's score, corpus, base model, and the comparison."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_rl.compare import text as compare_text
from kl_rl.compare.catalogue import CATALOGUE
from kl_rl.compare.text_knobs import sampled_knobs, targets, tilt_to_mean
from kl_rl.compare.text_measure import measure
from kl_rl.compare.text_problem import TextPlan, make_problem, score
from kl_rl.compare.text_reference import control, log_normalizer, tilted_expectation
from kl_rl.worlds.lexicon import default_reward, load_reward
from kl_rl.worlds.text import BadText, load_text, make_corpus
from kl_rl.worlds.text_base import BasePlan, held_out_loss, load_or_train
from kl_rl.worlds.text_reward import BadReward, TextReward

SMALL = TextPlan(
    minutes=0.02, horizon=12, width=16, layers=1, steps=30, num_samples=32, num_tuned=512, num_base=768,
    learning_rate=1e-2,
)  # fmt: skip


def small_text(size=12_000):
    rng = np.random.default_rng(0)
    words = ["good", "bad", "the", "a", "cat", "dog", "don't", "so", "is", "Good"]
    return " ".join(rng.choice(words, size // 3))[:size]


def quiet(fraction, message):
    pass


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    reward = TextReward("words", (("good", 1.0), ("bad", -1.0)), unit=1.0)
    return make_problem(make_corpus(small_text(), "small"), reward, SMALL, folder, 0, quiet)


# --- rewards


@pytest.mark.parametrize("case", [False, True])
@pytest.mark.parametrize("clip", [None, 1.5])
def test_automaton_equals_host_score_on_random_strings(case, clip):
    alphabet = "\n 'abB.\u2019o"
    entries = {"a": 0.7, "ab": -1.2, "a'b": 2.0, "ba": 0.3, "B": 0.5, "bob": 1.1, "a''b": -0.4, "oa": 0.3}
    reward = TextReward("w", tuple(entries.items()), case=case, clip=clip)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, len(alphabet), (20_000, 9))
    prompt = np.concatenate(
        [np.full((20_000, 1), len(alphabet)), rng.integers(0, len(alphabet), (20_000, 3))], 1
    )
    spell = lambda row: "".join(alphabet[i] for i in row)
    host = [reward.score(spell(y), spell(x[1:])) for x, y in zip(prompt, tokens, strict=True)]
    scorer = reward.compile(alphabet)
    device = jax.jit(lambda s, x, y: s(x, y, jnp.ones(y.shape)))(
        scorer, jnp.asarray(prompt), jnp.asarray(tokens)
    )
    assert len(set(host)) > 5
    np.testing.assert_array_equal(np.asarray(device), host)


def test_what_counts_as_a_word():
    reward = TextReward("w", (("good", 1.0), ("don't", 10.0)), unit=1.0)
    assert reward.score("good") == 0.0, "a word still open at the end does not count"
    assert reward.score("good ") == 1.0
    assert reward.score("'Good', goods \u2018good\u2019 don't don\u2019t.") == 22.0
    assert reward.score("ood.", "a g") == 1.0, "a word may begin in the prompt"
    assert reward.score("x.", "good ") == 0.0, "a word of the prompt is the prompt's"


def test_patterns_match_the_host_inside_jit_and_vmap(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(
        json.dumps({"patterns": [{"pattern": "A+", "weight": 2}, {"pattern": "b$", "weight": -0.5}]})
    )
    reward, alphabet = load_reward(path), "ab "
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 50, 6)))
    scorer, prompt = reward.compile(alphabet), jnp.full((2, 1, 1), 3)
    device = jax.jit(jax.vmap(lambda x, y: scorer(x, y, jnp.ones(y.shape))))(prompt, tokens)
    host = [[reward.score("".join(alphabet[i] for i in row)) for row in part] for part in np.asarray(tokens)]
    np.testing.assert_array_equal(np.asarray(device), host)
    assert len(np.unique(host)) > 3


def test_tab_separated_word_list(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(":)\t2.0\t1.0\t[1, 2]\nGood\t1.9\t0.9\t[2]\nmeh\t-0.1\t0.3\t[0]\nso so\t1\nbad\t-2.4\n")
    reward = load_reward(path)
    assert dict(reward.words) == {"good": 2.0, "bad": -2.5}
    assert reward.skipped == 3
    assert dict(load_reward(path, round_to=0.1).words) == pytest.approx(
        {"good": 1.9, "meh": -0.1, "bad": -2.4}
    )


def test_json_word_list_with_options(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('{"lexicon": {"Good": 1, "bad": -2}, "case": true, "scale": 0.5, "clip": 0.75}')
    reward = load_reward(path)
    assert reward.score("Good good bad bad ") == -0.75
    assert reward.score("Good Good ") == 0.75
    assert reward.score("Good ") == 0.5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"lexicon": {"a": 1,}}', ["r.json", "line 1, column", "JSON"]),
        ('{"lexicon": {"a": NaN}}', ['"a"', "finite"]),
        ('{"lexicon": {"a": true}}', ['"a"', "number"]),
        ('{"lexicon": {"a": "x"}}', ['"a"', "number"]),
        ('{"lexicon": {"a": 1, "a": 2}}', ['"a"', "twice"]),
        ('{"lexicon": {"a": 1, "A": 2}}', ['"A"', "two weights"]),
        ('{"lexicon": {"a b": 1}}', ['"a b"', "patterns"]),
        ('{"lexicon": {}}', ["lexicon", "at least one"]),
        ('{"lexicon": {"a": 0}}', ["0"]),
        ('{"lexicon": {"a": 1}, "weigth": 2}', ["weigth", "known keys"]),
        ('{"lexicon": {"a": 1}, "clip": 0}', ["clip", "positive"]),
        ('{"lexicon": {"a": 1}, "case": 1}', ["case", "true or false"]),
        ("[1]", ["lexicon", "patterns"]),
        ('{"patterns": [{"pattern": "(", "weight": 1}]}', ["patterns[0].pattern", "regular expression"]),
        ('{"patterns": [{"pattern": "a"}]}', ["patterns[0]", "weight"]),
        ("", ["empty"]),
    ],
)
def test_bad_json_rewards_are_named(tmp_path, content, words):
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(BadReward) as error:
        load_reward(path)
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"good\t1\nbad minus\n", ["line 2", "tab"]),
        (b"good\t1\nbad\tx\n", ["line 2", "column 2", "number"]),
        (b"good\tinf\n", ["line 1", "finite"]),
        (b"good\t1\n\xff\t1\n", ["line 2", "UTF-8"]),
        (b":)\t1\n", ["no entry"]),
    ],
)
def test_bad_word_lists_are_named(tmp_path, content, words):
    path = tmp_path / "r.tsv"
    path.write_bytes(content)
    with pytest.raises(BadReward) as error:
        load_reward(path)
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)


def test_missing_reward_file_and_unspellable_words(tmp_path):
    with pytest.raises(BadReward, match="no such file"):
        load_reward(tmp_path / "none.json")
    with pytest.raises(BadReward, match="directory"):
        load_reward(tmp_path)
    with pytest.raises(BadReward, match="spelled"):
        TextReward("w", (("good", 1.0),)).compile("abc ")


def test_default_words_occur_in_the_default_text():
    corpus, reward = load_text(), default_reward()
    held_out = corpus.decode(corpus.held_out)
    windows = [reward.score(held_out[i : i + 48]) for i in range(0, len(held_out) - 48, 48)]
    assert np.mean(np.array(windows) != 0) > 0.05
    assert min(windows) < 0 < max(windows)


# --- corpus


def test_corpus_splits_the_text_and_replaces_rare_characters():
    rare = "".join(chr(0x4E00 + i) for i in range(200))
    text = small_text() + rare
    corpus = make_corpus(text, "t")
    assert len(corpus.alphabet) == 128
    assert len(corpus.train) + len(corpus.held_out) == len(text)
    assert 0.09 < len(corpus.held_out) / len(text) < 0.11
    assert 0 < corpus.replaced < 200 / len(text)
    assert corpus.decode(corpus.train).startswith(text[:500])
    windows = corpus.held_out_windows(5, 20)
    assert windows.shape == (5, 20)
    assert corpus.prompts(3, 4).shape == (3, 5)
    assert set(corpus.prompts(0, 4).ravel().tolist()) == {corpus.begin}


def test_windows_start_after_white_space():
    corpus = make_corpus(small_text(), "t")
    starts = corpus.starts(corpus.train, 12)
    assert {corpus.alphabet[i] for i in corpus.train[starts - 1]} == {" "}
    assert starts.max() + 12 <= len(corpus.train)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b"abc " * 100, ["400", "10000"]),
        (b"abc\0" * 4000, ["binary"]),
        (b"abc\n" * 4000 + b"\xff", ["line 4001", "UTF-8"]),
        (b"a" * 20_000, ["one single character"]),
    ],
)
def test_bad_texts_are_named(tmp_path, content, words):
    path = tmp_path / "t.txt"
    path.write_bytes(content)
    with pytest.raises(BadText) as error:
        load_text(path)
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)


def test_missing_text_is_named(tmp_path):
    with pytest.raises(BadText, match="no such file"):
        load_text(tmp_path / "none.txt")
    with pytest.raises(BadText, match="directory"):
        load_text(tmp_path)


# --- base model


def test_training_beats_the_unigram_model_and_the_saved_model_is_the_same(tmp_path):
    corpus = make_corpus(small_text(), "t")
    plan = BasePlan(window=12, minutes=0.01, width=16, layers=1)
    seen = []
    base = load_or_train(corpus, tmp_path, plan, lambda fraction, message: seen.append(fraction))
    assert base.held_out_loss < 0.8 * base.unigram_entropy
    assert seen[-1] == 1.0
    again = load_or_train(corpus, tmp_path, plan)
    assert again._replace(policy=None) == base._replace(policy=None)
    windows = corpus.held_out_windows(8, 12)
    first, second = (held_out_loss(b.policy, windows, corpus.begin) for b in (base, again))
    np.testing.assert_array_equal(first, second)
    with pytest.raises(BadText, match="other"):
        load_or_train(corpus, tmp_path, plan._replace(width=32))
    (tmp_path / "base.npz").write_bytes(b"PK damaged")
    with pytest.raises(BadText, match="cannot be read"):
        load_or_train(corpus, tmp_path, plan)


def test_number_of_steps_follows_from_the_plan_alone():
    corpus = make_corpus(small_text(), "t")
    plan = BasePlan(window=12, width=16, layers=1)
    assert plan._replace(minutes=0.01).steps(corpus) < plan._replace(minutes=0.02).steps(corpus)
    passes = plan._replace(minutes=1e6).steps(corpus) * 64 * 12 / len(corpus.train)
    assert passes <= 42


def test_a_window_longer_than_the_held_out_text_is_refused():
    corpus = make_corpus(small_text(), "t")
    with pytest.raises(ValueError, match="window"):
        load_or_train(corpus, None, BasePlan(window=5000))


# --- knobs and reference laws, against closed forms


def law(rng, size, lam=1.0):
    """Rewards 0, 1, 3 with known probabilities: samples [1, size], log Z, tilted mean, KL."""
    values, mass = np.array([0.0, 1.0, 3.0]), np.array([0.6, 0.3, 0.1])
    z = mass @ np.exp(lam * values)
    mean = (mass * np.exp(lam * values)) @ values / z
    return rng.choice(values, (1, size), p=mass), math.log(z), mean, lam * mean - math.log(z)


def test_bounds_on_log_z_hold_in_expectation_and_close():
    rng = np.random.default_rng(0)
    lower, upper = [], []
    for _ in range(200):
        reward, log_z, _, _ = law(rng, 256)
        found = log_normalizer(reward, 1.0, rng)
        lower.append(found.lower.value)
        upper.append(found.upper.value)
        assert found.particles == "rejection"
    for values, side in ((lower, -1), (upper, 1)):
        error = np.std(values) / math.sqrt(len(values))
        assert side * (np.mean(values) - log_z) > -4 * error
        assert abs(np.mean(values) - log_z) < 0.1
    assert np.mean(upper) - np.mean(lower) > 4 * np.std(np.subtract(upper, lower)) / math.sqrt(len(upper))


def test_too_few_accepted_particles_are_resampled():
    reward = np.concatenate([np.zeros((1, 511)), np.full((1, 1), 30.0)], axis=1)
    assert log_normalizer(reward, 1.0, np.random.default_rng(0)).particles == "resampling"


def test_weighted_expectations_and_their_errors():
    rng = np.random.default_rng(0)
    means, kls, errors = [], [], []
    for _ in range(200):
        reward, _, mean, kl = law(rng, 2000)
        means.append(tilted_expectation(reward, reward)[0].value)
        estimate = tilted_expectation(reward, reward)[1]
        kls.append(estimate.value)
        errors.append(estimate.stderr)
    for values, truth in ((means, mean), (kls, kl)):
        assert abs(np.mean(values) - truth) < 4 * np.std(values) / math.sqrt(len(values)) + 2e-3
    spread = np.std(kls)  # relative error of a standard deviation over 200 runs: 5 %
    assert abs(np.mean(errors) / spread - 1) < 0.2


def test_tilt_reaches_its_mean():
    reward, _, mean, _ = law(np.random.default_rng(0), 4000, lam=0.7)
    lam = tilt_to_mean(reward, mean)
    weight = np.exp(lam * reward)
    assert (weight * reward).sum() / weight.sum() == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("method", CATALOGUE, ids=lambda m: m.name)
def test_every_method_gets_knobs_that_aim_higher_and_higher(method):
    reward = law(np.random.default_rng(0), 4000)[0]
    aims = targets(reward, (0.3, 1.0))
    assert reward.mean() < aims[0] < aims[1] < reward.max()
    knobs = sampled_knobs(method, reward, aims, num_samples=64, steps=60)
    assert 1 <= len(knobs) <= 2
    assert all(math.isfinite(k) for k in knobs)
    upward = method.knob in ("n", "threshold", "steps")
    assert knobs == sorted(knobs, reverse=not upward)


def test_best_of_n_knob_matches_the_known_law():
    reward = law(np.random.default_rng(0), 200_000)[0]
    best_of_4 = 3 - (0.9**4) * 2 - (0.6**4) * 1
    method = next(m for m in CATALOGUE if m.name == "best-of-n")
    assert sampled_knobs(method, reward, (best_of_4,), num_samples=64, steps=60) == [4.0]


# --- measurements


def test_the_base_itself_shows_no_calibration_loss(problem):
    words = [frozenset()] * problem.drawn.reward.size
    row = measure(problem, problem.base.policy, jax.random.key(5), beta=None, base_words=words)
    for name in ("kl", "C", "C_fwd"):
        assert row[f"{name}_lower"] <= 1e-6 <= row[f"{name}_upper"] + 1e-5, name
        assert row[name] < 1e-5
    assert row["reward"] == pytest.approx(problem.drawn.reward.mean(), abs=5 * row["reward_stderr"])
    assert len(row["preview"]) == 3
    assert all(len(y) == SMALL.horizon for y in row["preview"])


def test_sampler_and_scorer_agree(problem):
    scored = score(problem.base.policy, problem.prompt, problem.drawn.tokens[:, :300])
    np.testing.assert_allclose(scored, problem.drawn.log_prob[:, :300], rtol=1e-9)


def test_the_control_shows_the_loss_it_was_given(problem):
    from kl_rl.calibration import calibration_budget

    made = control(problem, 3)
    found = calibration_budget(made.tuned, made.base)
    assert made.known.value > 0.02
    error = math.hypot(found.C.stderr, made.known.stderr)
    assert abs(found.C.value - made.known.value) < 4 * error
    assert abs(found.kl.value - made.known.value) < 4 * math.hypot(found.kl.stderr, made.known.stderr)


def test_a_diverged_policy_is_reported_not_measured(problem):
    policy = problem.base.policy
    broken = policy.with_params(jax.tree.map(lambda x: x * jnp.nan, policy.params))
    row = measure(problem, broken, jax.random.key(0), beta=None, base_words=[])
    assert "diverged" in row["failed"]


def test_a_reward_that_never_varies_is_refused():
    reward = TextReward("w", (("hhhhhhhh", 1.0),))
    with pytest.raises(BadReward, match="score 0"):
        make_problem(make_corpus(small_text(), "t"), reward, SMALL._replace(minutes=0.002), None, 0, quiet)


# --- the whole comparison


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "t.txt").write_text(small_text())
    (folder / "r.json").write_text('{"lexicon": {"good": 1, "bad": -1}}')
    return folder


def run(folder, **options):
    return compare_text.run_text(
        text=folder / "t.txt", reward=folder / "r.json", out=folder, plan=SMALL, **options
    )


def test_comparison_end_to_end_and_resumed(files):
    heard, fractions = [], []
    result = run(
        files,
        methods=["rloo-free", "rwr"],
        on_rows=heard.extend,
        progress=lambda fraction, message: fractions.append(fraction),
    )
    assert heard == result.rows
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    trained = [r for r in result.rows if r["family"] != "reference"]
    assert {r["method"] for r in result.rows} == {"base", "p*", "control", "rloo-free", "rwr"}
    for row in trained:
        assert row["C_lower"] <= row["C"] <= row["C_upper"]
        assert row["kl"] == pytest.approx(row["P"] + row["S"] + row["C"], abs=4 * row["kl_stderr"])
        assert row["held_out_loss"] > 0
        assert row["compile_s"] > 0
    base, tuned = result.rows[0], trained[-1]
    assert tuned["reward"] - base["reward"] > 4 * math.hypot(tuned["reward_stderr"], base["reward_stderr"])
    json.dumps(result.data, allow_nan=False)
    assert [z["beta"] for z in result.data["log_z"]] == result.data["betas"]
    keys = [(r["method"], r["knob_value"], r["seed"]) for r in result.rows]
    assert len(set(keys)) == len(keys)
    assert run(files, methods=["rloo-free", "rwr"], done=frozenset(keys)).rows == []
    last = keys[-1]
    (again,) = run(files, methods=["rwr"], done=frozenset(keys) - {last}).rows
    timed = {"wall_s", "measure_s", "compile_s"}
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in result.rows[-1].items() if k not in timed
    }


def test_unknown_method_is_named(files):
    with pytest.raises(ValueError, match="rloo"):
        run(files, methods=["rlo"])


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [0, 4])
def test_every_method_runs_on_text(files, prompts, tmp_path):
    plan = SMALL._replace(prompts=prompts, prompt_length=4)
    names = [m.name for m in CATALOGUE]
    result = compare_text.run_text(
        text=files / "t.txt", reward=files / "r.json", methods=names, out=tmp_path, plan=plan
    )
    rows = {r["method"]: r for r in result.rows}
    assert set(names) <= set(rows)
    assert not [r for r in result.rows if "failed" in r]


def test_plans_are_small_enough_to_read():
    assert len(TextPlan._fields) <= 12
    assert dataclasses.is_dataclass(TextReward)
