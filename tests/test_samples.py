"""Reading samples: every kind of bad line is named by file, line and field."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from kl_rl.measure.samples import BadSamples, Samples, read_samples

GOOD = '{"reward": 1.0, "logp_tuned": -2.5, "logp_base": -3}'
NAMED = '{"reward": 1, "logp_tuned": -2.5, "logp_base": -3.0, "prompt": "p"}'


def write(tmp_path, *lines: str, end: str = "\n"):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(("\n".join(lines) + end).encode())
    return path


def test_values_arrive_in_order_with_prompts_of_both_kinds(tmp_path):
    rows = [dict(reward=i, logp_tuned=-1.5 * i, logp_base=-2.0 * i, prompt=i % 3 or "a") for i in range(50)]
    samples = read_samples(write(tmp_path, *map(json.dumps, rows)))
    assert samples.reward.tolist() == [float(i) for i in range(50)]
    assert samples.logp_tuned.tolist() == [-1.5 * i for i in range(50)]
    assert samples.log_ratio.tolist() == [0.5 * i for i in range(50)]
    assert samples.prompt.tolist() == [i % 3 or "a" for i in range(50)]
    assert all(x.dtype == np.float64 for x in samples[:3])


def test_more_than_one_chunk_and_a_late_fault(tmp_path):
    lines = [GOOD] * 45_000
    assert len(read_samples(write(tmp_path, *lines)).reward) == 45_000
    lines[41_233] = GOOD.replace("-2.5", "NaN")
    with pytest.raises(BadSamples, match='line 41234: field "logp_tuned" must be finite'):
        read_samples(write(tmp_path, *lines))
    with pytest.raises(BadSamples, match='line 20001: field "prompt" is given here but missing on line 1'):
        read_samples(write(tmp_path, *[GOOD] * 20_000, NAMED))


@pytest.mark.parametrize("end", ["", "\n", "\n\n  \n", "\r\n"])
def test_blank_lines_at_the_end_and_other_newlines_are_fine(tmp_path, end):
    assert read_samples(write(tmp_path, GOOD, GOOD + "\r", end=end)).prompt is None


def test_byte_order_mark_and_line_separator_inside_a_string(tmp_path):
    path = tmp_path / "s.jsonl"
    line = json.dumps(dict(reward=0, logp_tuned=0, logp_base=1e-7, prompt="a\u2028b"), ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\n{line}".encode())
    assert read_samples(path).prompt.tolist() == ["a\u2028b"] * 2


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(f"{GOOD}\n{GOOD}\n".encode())))
    assert read_samples("-").reward.tolist() == [1.0, 1.0]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"{")))
    with pytest.raises(BadSamples, match="standard input, line 1"):
        read_samples("-")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "not valid JSON"),
        ("[1, 2]", "not a JSON object but list"),
        ("3.5", "not a JSON object but float"),
        ("", "blank line"),
        (GOOD + ",", "not valid JSON"),
        (f"{GOOD}, {GOOD}", "not valid JSON"),
        ('{"reward": 1.0, "logp_tuned": -2.5}', 'field "logp_base" is missing'),
        (GOOD.replace("}", ', "weight": 2}'), 'unknown field "weight"'),
        (GOOD.replace("reward", "rewards"), 'field "reward" is missing'),
        (GOOD.replace("1.0", "true"), 'field "reward" must be a number, got True'),
        (GOOD.replace("1.0", '"1.0"'), 'field "reward" must be a number'),
        (GOOD.replace("1.0", "null"), 'field "reward" must be a number, got None'),
        (GOOD.replace("-2.5", "[-2.5]"), 'field "logp_tuned" must be a number'),
        (GOOD.replace("1.0", "Infinity"), 'field "reward" must be finite'),
        (GOOD.replace("1.0", "1" + "0" * 400), 'field "reward" must be finite'),
        (GOOD.replace("1.0", "1e999"), 'field "reward" must be finite'),
        (GOOD.replace("-3", "-Infinity"), 'field "logp_base" must be finite'),
        (GOOD.replace("-2.5", "NaN"), 'field "logp_tuned" must be finite'),
        (GOOD.replace("-3", "0.25"), r'field "logp_base" is 0.25 > 0'),
        (NAMED, 'field "prompt" is given here but missing on line 1'),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path, GOOD, GOOD, line, GOOD)
    with pytest.raises(BadSamples, match=message) as error:
        read_samples(path)
    assert str(error.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize("prompt", ["true", "1.5", "null", "[1]", "{}"])
def test_prompt_of_another_type_is_refused(tmp_path, prompt):
    with pytest.raises(BadSamples, match='line 2: field "prompt" must be an integer or a string'):
        read_samples(write(tmp_path, NAMED, NAMED.replace('"p"', prompt)))


def test_prompt_missing_on_a_line(tmp_path):
    with pytest.raises(BadSamples, match='line 2: field "prompt" is missing here but given on line 1'):
        read_samples(write(tmp_path, NAMED, GOOD))


def test_first_line_bad(tmp_path):
    with pytest.raises(BadSamples, match="line 1: not a JSON object"):
        read_samples(write(tmp_path, "[]", GOOD))
    with pytest.raises(BadSamples, match='line 1: field "reward" must be a number'):
        read_samples(write(tmp_path, GOOD.replace("1.0", "false"), GOOD))


def test_truncated_last_line(tmp_path):
    with pytest.raises(BadSamples, match="line 2: not valid JSON.*cut off"):
        read_samples(write(tmp_path, GOOD, GOOD[:30], end=""))


def test_an_object_split_over_two_lines_does_not_hide_behind_a_line_with_two(tmp_path):
    with pytest.raises(BadSamples, match="line 2: not valid JSON"):
        read_samples(
            write(tmp_path, GOOD, '{"reward": 1,', '"logp_tuned": -1, "logp_base": -1}', f"{GOOD},{GOOD}")
        )


def test_files_that_are_none(tmp_path):
    with pytest.raises(BadSamples, match="No such file"):
        read_samples(tmp_path / "absent.jsonl")
    with pytest.raises(BadSamples, match="is a directory"):
        read_samples(tmp_path)
    for content in (b"", b"\n \n"):
        (tmp_path / "empty").write_bytes(content)
        with pytest.raises(BadSamples, match="is empty"):
            read_samples(tmp_path / "empty")
    (tmp_path / "binary").write_bytes(f"{GOOD}\n".encode() + b"\xff\xfe{}\n")
    with pytest.raises(BadSamples, match="line 2: not valid UTF-8"):
        read_samples(tmp_path / "binary")


def test_from_log_ratio_keeps_the_difference():
    samples = Samples.from_log_ratio(np.array([1, 2]), np.array([0.5, -0.25]))
    assert samples.log_ratio.tolist() == [0.5, -0.25] and samples.prompt is None
