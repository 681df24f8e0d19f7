"""Rewards on text: what counts, and files that cannot be used are named."""

import json

import pytest

from kl_rl.rewards.lexicon import load_lexicon
from kl_rl.rewards.lexicon_text import BadReward, TextReward


def test_what_counts_as_a_word():
    reward = TextReward("w", (("good", 1.0), ("don't", 10.0)), unit=1.0)
    assert reward.score("good") == 0.0, "a word still open at the end does not count"
    assert reward.score("good ") == 1.0
    assert reward.score("'Good', goods \u2018good\u2019 don't don\u2019t.") == 22.0
    assert reward.score("ood.", "a g") == 1.0, "a word may begin in the prompt"
    assert reward.score("x.", "good ") == 0.0, "a word of the prompt is the prompt's"


def test_patterns_are_counted(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(
        json.dumps({"patterns": [{"pattern": "A+", "weight": 2}, {"pattern": "b$", "weight": -0.5}]})
    )
    reward = load_lexicon(path)
    assert reward.score("aa b") == 1.5 and reward.score("aAxa b ") == 4.0 and reward.score("") == 0.0


def test_tab_separated_word_list(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(":)\t2.0\t1.0\t[1, 2]\nGood\t1.9\t0.9\t[2]\nmeh\t-0.1\t0.3\t[0]\nso so\t1\nbad\t-2.4\n")
    reward = load_lexicon(path)
    assert dict(reward.words) == {"good": 2.0, "bad": -2.5}
    assert reward.skipped == 3
    assert dict(load_lexicon(path, round_to=0.1).words) == pytest.approx(
        {"good": 1.9, "meh": -0.1, "bad": -2.4}
    )


def test_json_word_list_with_options(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('{"lexicon": {"Good": 1, "bad": -2}, "case": true, "scale": 0.5, "clip": 0.75}')
    reward = load_lexicon(path)
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
        load_lexicon(path)
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
        load_lexicon(path)
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)


def test_missing_reward_file(tmp_path):
    with pytest.raises(BadReward, match="no such file"):
        load_lexicon(tmp_path / "none.json")
    with pytest.raises(BadReward, match="directory"):
        load_lexicon(tmp_path)
