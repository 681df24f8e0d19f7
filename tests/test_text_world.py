"""The text world: reward files, the automaton against the host's score, corpus, base model, and the comparison."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_rl.experiments.compare.catalogue import CATALOGUE
from kl_rl.experiments.compare.text import run as compare_text
from kl_rl.experiments.compare.text.measure import measure
from kl_rl.experiments.compare.text.problem import TextPlan, make_problem, score
from kl_rl.experiments.compare.text.reference import control
from kl_rl.rewards.lexicon import default_reward
from kl_rl.rewards.lexicon_text import BadReward, TextReward
from kl_rl.worlds.text import BadText, load_text, make_corpus
from kl_rl.worlds.text_base import BasePlan, held_out_loss, load_or_train

pytestmark = pytest.mark.usefixtures("compile_quickly")

SMALL = TextPlan(
    minutes=0.02, horizon=12, width=16, layers=1, steps=60, num_samples=32, num_tuned=512, num_base=768,
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
    from kl_rl.measure.calibration import sampled_budget

    made = control(problem, 3)
    found = sampled_budget(made.tuned, made.base)
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
