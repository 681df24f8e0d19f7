"""Data files: every complaint names its place, every kind of record reaches its arrays, batches resume exactly."""

import gzip
import json
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_rl.data import (
    ArrayRows,
    ComparisonRecord,
    DataError,
    Encoder,
    EpisodeRecord,
    Limits,
    Loader,
    LoggedRecord,
    PromptRecord,
    RankingRecord,
    Skipped,
    TextWindows,
    encode_comparisons,
    encode_episodes,
    encode_logged,
    encode_prompts,
    encode_rankings,
    grouped,
    load_records,
    pack,
    ranking_pairs,
    read_jsonl,
    read_parquet,
    read_rows,
)
from kl_rl.policy import Policy
from kl_rl.rollout import score
from kl_rl.trajectories import Trajectories, check_trajectories


class Letters:
    """One id per character, 0 ends."""

    end_ids = (0,)

    def encode(self, text):
        return [ord(c) - ord("a") + 1 for c in text if c != "!"]

    def decode(self, ids):
        return "".join(chr(i + ord("a") - 1) for i in ids if i > 0)


LETTERS = Letters()


def write(path, *rows):
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def load(tmp_path, kind, *rows, **options):
    return load_records(write(tmp_path / "d.jsonl", *rows), kind, **options).records


LOGGED = {
    "prompt": "ab",
    "completions": ["c", "de"],
    "rewards": [1, 0.5],
    "log_behaviour": [[-1, -2], [-1, -2, 0]],
}
RANKED = {"prompt": "ab", "completions": ["c", "d", "e"], "ranks": [2, 1, 2]}
COMPARED = {"prompt": "ab", "chosen": "c", "rejected": "de"}
EPISODE = {
    "prompt": "z",
    "steps": [
        {"return": 2, "observation": "ab", "action": "c", "log_behaviour": -0.5},
        {"return": 1, "observation": [9], "action": [4, 5], "log_behaviour": [-1, -2]},
    ],
    "return": 2,
}
GOOD = {PromptRecord: {"prompt": "ab"}, LoggedRecord: LOGGED, ComparisonRecord: COMPARED, RankingRecord: RANKED,
        EpisodeRecord: EPISODE}  # fmt: skip


def but(row, **changes):
    return {k: v for k, v in {**row, **changes}.items() if v != "absent"}


def step(**changes):
    return but(EPISODE, steps=[EPISODE["steps"][0], but(EPISODE["steps"][1], **changes)])


P, L, C, R, E = GOOD
BAD = [
    (P, "{", r"column 2: not valid JSON"),
    (P, '{"prompt": "a"', r"column 15: not valid JSON: Expecting ',' delimiter"),
    (P, '[{"prompt": "a"},', r"not valid JSON.*one object on each line, not one list"),
    (P, "[1]", "must be a JSON object in braces; found a list"),
    (P, "3", "found a number"),
    (P, "true", "found true or false"),
    (P, '{"prompt": "a", "prompt": "b"}', 'field "prompt" appears twice'),
    (P, '{"prompt": "a", "n": ' + "1" * 5000 + "}", "not valid JSON: Exceeds the limit"),
    (P, "[" * 100_000, "not valid JSON"),
    (P, '{"prompt": "\\ud800"}', 'field "prompt": half of a surrogate pair at character 1'),
    (P, {}, r'missing field "prompt" \(or instruction, question, query\); fields found: none'),
    (P, {"prompt": None}, 'missing field "prompt"'),
    (P, {"prompt": "a", "colour": 1}, 'unknown field "colour"; known fields: prompt .*messages'),
    (P, {"prompt": "a", "query": "b"}, 'fields "prompt" and "query" are two names of the same thing'),
    (P, {"prompt": 3}, 'field "prompt": must be text; found number 3'),
    (P, {"query": 3}, 'field "query": must be text'),
    (P, {"prompt": " \n"}, 'field "prompt": is empty'),
    (P, {"messages": []}, 'field "messages": is an empty list'),
    (P, {"messages": "hi"}, 'field "messages": must be a list; found text .hi.'),
    (P, {"messages": ["hi"]}, r'field "messages"\[0\]: must be an object with "role" and "content"'),
    (P, {"messages": [{"role": "user"}]}, r'field "messages"\[0\]: missing field "content"'),
    (P, {"messages": [{"role": "user", "content": 1}]}, r'"messages"\[0\].content: must be text'),
    (P, {"prompt": "a", "messages": [{"role": "u", "content": "c"}]}, 'there is a field "prompt" too'),
    (P, {"tokens": [3, -1]}, r'field "tokens"\[1\]: must be a token id, 0 or more; found number -1'),
    (P, {"tokens": [3.0]}, r'field "tokens"\[0\]: must be a token id'),
    (P, {"tokens": [True]}, r'"tokens"\[0\]: must be a token id, 0 or more; found true'),
    (P, {"tokens": [2**31]}, r'"tokens"\[0\]: must be a token id'),
    (L, but(LOGGED, rewards="absent"), r'missing field "rewards" \(or scores\)'),
    (L, but(LOGGED, completions="absent"), 'missing field "completion"'),
    (L, but(LOGGED, completion="x"), 'field "completions": there is field "completion" too'),
    (L, but(LOGGED, reward=1), 'field "rewards": there is field "reward" too'),
    (L, but(LOGGED, rewards=[1]), 'field "rewards": must have one entry for each of 2 completions; found 1'),
    (L, but(LOGGED, rewards=[1, "2"]), r'field "rewards"\[1\]: must be a number; found text'),
    (L, but(LOGGED, rewards=[1, None]), r'field "rewards"\[1\]: must be a number; found null'),
    (L, but(LOGGED, rewards=[True, 1]), r'field "rewards"\[0\]: must be a number; found true'),
    (L, but(LOGGED, rewards=[1, float("nan")]), r'field "rewards"\[1\]: must be a finite number; found number nan'),
    (L, but(LOGGED, rewards=[10**400, 1]), r'field "rewards"\[0\]: must be a finite number; found a huge number'),
    (L, '{"prompt": "a", "completion": "b", "score": 1e999}', 'field "score": must be a finite number'),
    (L, but(LOGGED, completions=["a", ""]), r'field "completions"\[1\]: is empty'),
    (L, but(LOGGED, completions="a"), 'field "completions": must be a list'),
    (L, but(LOGGED, completion_tokens=[[1]]), "must have one entry for each of 2 completions; found 1"),
    (L, but(LOGGED, completion_tokens=3), 'field "completion_tokens": must be a list; found number 3'),
    (L, but(LOGGED, log_behaviour=[-1]), 'field "log_behaviour": must have one entry for each of 2'),
    (L, but(LOGGED, log_behaviour=[-1, 1e-3]), r'"log_behaviour"\[1\]: must be a log-prob.*found number 0.001'),
    (L, but(LOGGED, log_behaviour=[[-1], [0.5]]), r'"log_behaviour"\[1\]\[0\]: must be a log-probability in nats'),
    (L, but(LOGGED, log_behaviour=[-1, float("-inf")]), r'"log_behaviour"\[1\]: must be a finite number'),
    (L, but(LOGGED, completion_tokens=[[1], [2]]), r'"log_behaviour"\[0\]: must have one entry for each of 1 tokens'),
    (C, but(COMPARED, rejected="absent"), 'missing field "rejected"'),
    (C, but(COMPARED, chosen=["x"]), 'field "chosen": must be text; found a list of 1'),
    (C, but(COMPARED, probability=1.5), 'field "probability": must lie between 0 and 1; found 1.5'),
    (R, but(RANKED, ranks=[1, 2]), 'field "ranks": must have one entry for each of 3 completions; found 2'),
    (R, but(RANKED, ranks=[1, 2, 0]), r'field "ranks"\[2\]: must be a rank, a whole number from 1'),
    (R, but(RANKED, completions=["a"], ranks=[1]), 'field "ranks": a ranking needs at least 2 completions'),
    (R, but(RANKED, completions="absent"), 'missing field "completions"'),
    (E, but(EPISODE, steps=[]), 'field "steps": is an empty list'),
    (E, but(EPISODE, steps=[3]), r'field "steps"\[0\]: must be an object with "action"; found number 3'),
    (E, step(action="absent"), r'field "steps"\[1\]: missing field "action"'),
    (E, step(action=None), r'field "steps"\[1\]: missing field "action"'),
    (E, step(action={}), r'"steps"\[1\]: field "action": must be text or token ids; found an object'),
    (E, step(observation=[-3]), r'"steps"\[1\]: field "observation"\[0\]: must be a token id'),
    (E, step(mood=1), r'"steps"\[1\]: unknown field "mood"; known fields: return .*action'),
    (E, step(log_behaviour=[-1]), r'"steps"\[1\]: field "log_behaviour": must have one entry for each of 2 tokens'),
    (E, {"steps": [{"action": "a"}]}, r'missing field "return" \(or return_to_go\)'),
]  # fmt: skip


@pytest.mark.parametrize(
    "kind, row, message", BAD, ids=[f"{k.__name__}-{i}" for i, (k, *_) in enumerate(BAD)]
)
def test_a_bad_line_is_named_with_file_line_and_field(tmp_path, kind, row, message):
    path = write(tmp_path / "d.jsonl", GOOD[kind], "", row, GOOD[kind])
    with pytest.raises(DataError) as error:
        load_records(path, kind)
    assert re.match(rf"{re.escape(str(path))}: line 3: .*{message}", str(error.value)), error.value
    assert len(str(error.value)) < len(str(path)) + 400 and "\n" not in str(error.value)
    records, skipped = load_records(path, kind, on_error="skip")
    assert [r.where for r in records] == [f"{path}: line 1", f"{path}: line 4"]
    assert skipped.count == 1 and str(error.value) in skipped.summary()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("d.jsonl", b"", "is empty; write one JSON object on each line"),
        ("d.jsonl", b"\n \n", "is empty"),
        ("d.jsonl", b"PAR1\x15\x04", "is a parquet file, not JSON lines"),
        ("d.jsonl", gzip.compress(b"{}"), "is a gzip file, not JSON lines"),
        ("d.jsonl", b'{"prompt"\0', "is a binary file"),
        ("d.jsonl", '{"prompt": "a"}'.encode("utf-16"), "is a binary file"),
        ("d.jsonl", b'{"prompt": "caf\xe9"}', r"line 1: byte 16 \(0xe9\) is not UTF-8"),
        ("d.jsonl", b'{"prompt": 1}\n{"prompt": 2}', "line 1: "),
        ("d.jsonl.gz", b'{"prompt": "a"}', "line 1: the gzip stream is damaged here"),
        ("d.jsonl.gz", gzip.compress(b""), "is empty"),
        ("d.parquet", b"", "not a parquet file, or damaged"),
        ("d.parquet", b"PAR1" * 10, "not a parquet file, or damaged"),
        ("d.csv", b"a,b", "not a known kind of data; give a file ending in .jsonl"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: {message}"):
        load_records(path, PromptRecord)


def test_a_missing_file_is_the_file_system_s_matter(tmp_path):
    for name in ("no.jsonl", "no.jsonl.gz", "no.parquet"):
        with pytest.raises(FileNotFoundError, match=name):
            load_records(tmp_path / name, PromptRecord)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        load_records(tmp_path / "folder.jsonl", PromptRecord)


def test_all_skipped_is_an_error_and_the_summary_stays_short(tmp_path):
    path = write(tmp_path / "d.jsonl", *[{"prompt": i} for i in range(30)])
    with pytest.raises(DataError, match="no usable record; skipped 30 records:") as error:
        load_records(path, PromptRecord, on_error="skip")
    assert "line 20" in str(error.value) and "line 21" not in str(error.value)
    assert str(error.value).endswith("and 10 more")
    assert Skipped().summary() == ""


def test_fields_may_be_ignored_renamed_and_rows_limited(tmp_path):
    rows = [{"id": i, "text": "ab", "meta": {"a": 1}} for i in range(5)]
    options = {"ignore": ("id", "meta"), "rename": {"text": "prompt"}}
    records = load(tmp_path, PromptRecord, *rows, **options, limit=3)
    assert [r.prompt.text for r in records] == ["ab"] * 3
    with pytest.raises(ValueError, match="on_error"):
        load(tmp_path, PromptRecord, *rows, on_error="ignore")


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b\xe2\x80\xa8c"}\r\n')
    records = load_records(tmp_path / "d.jsonl", PromptRecord).records
    assert [r.prompt.text for r in records] == ["a", "b\u2028c"]


@pytest.mark.parametrize("kind", GOOD, ids=lambda k: k.__name__)
def test_changed_bytes_never_end_in_another_error(tmp_path, kind):
    rng = np.random.default_rng(0)
    line = json.dumps(GOOD[kind]).encode()
    path, refused = tmp_path / "d.jsonl", 0
    for _ in range(300):
        changed = bytearray(line)
        for at in rng.integers(0, len(line), size=rng.integers(1, 4)):
            changed[at] = rng.choice(list(b'0-9.[]{}",:eE\\nul t\xff\n'))
        path.write_bytes(line + b"\n" + bytes(changed) + b"\n")
        records, skipped = load_records(path, kind, on_error="skip")
        assert records[0].where == f"{path}: line 1"
        refused += skipped.count > 0
        for record in records[1:]:  # what still passes is well formed
            assert type(record) is kind
    assert 100 < refused < 300


@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_cut_anywhere_keeps_its_complete_lines(tmp_path, zipped):
    """Cut at every byte: what precedes the cut arrives, and the complaint, if any, is the library's own."""
    rows = [{"prompt": "héé 🙂"}, {"prompt": "b" * 20}, {"prompt": "c\n"}]
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    whole = b"".join(lines)
    if zipped:  # one member per line, so that a cut leaves whole members behind
        lines = [gzip.compress(line) for line in lines]
        whole = b"".join(lines)
    ends = np.cumsum([len(line) for line in lines])
    path = tmp_path / ("d.jsonl.gz" if zipped else "d.jsonl")
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        complete = int(np.sum(ends <= cut))
        seen, failed = [], None
        try:
            for _, row in read_jsonl(path):
                seen.append(row)
        except DataError as error:
            failed = str(error)
        assert seen[:complete] == rows[:complete] and seen == rows[: len(seen)]
        at_an_end = cut in ends or (not zipped and cut + 1 in ends)  # all but the line end is a whole line
        assert (failed is None) == at_an_end
        if failed is not None and seen:
            assert failed.startswith(f"{path}: line {len(seen) + 1}: ")
        if seen:
            skipped = Skipped()
            assert [row for _, row in read_jsonl(path, skipped=skipped)] == seen
            assert skipped.count == (failed is not None)


def test_a_long_gzip_stream_cut_short_yields_what_it_holds(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"prompt": rng.bytes(40).hex()} for _ in range(4000)]
    data = gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode())
    path = tmp_path / "d.jsonl.gz"
    damaged = bytearray(data)
    damaged[-6] ^= 1  # the checksum: everything before it is good
    for content, least in ((data[: len(data) // 2], 1900), (bytes(damaged), 4000)):
        path.write_bytes(content)
        seen = []
        with pytest.raises(DataError, match=r"line \d+: the gzip stream"):
            for _, row in read_jsonl(path):
                seen.append(row)
        assert len(seen) >= least and seen == rows[: len(seen)]


def table(tmp_path, rows):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "d.parquet"
    names = list(dict.fromkeys(name for row in rows for name in row))
    pq.write_table(pa.table({n: [row.get(n) for row in rows] for n in names}), path, row_group_size=2)
    return path


@pytest.mark.parametrize("kind", GOOD, ids=lambda k: k.__name__)
def test_parquet_equals_json_lines(tmp_path, kind):
    """Absent fields are nulls in a table, which has all columns in every row."""
    rows = [GOOD[kind]] * 3
    if kind is PromptRecord:
        rows = [{"prompt": "ab"}, {"prompt_tokens": [1, 2]}, {"messages": [{"role": "user", "content": "x"}]}]
    if kind is EpisodeRecord:
        rows = [
            {**EPISODE, "steps": [{"observation": "a", "action": "b"}, {"return": 0.5, "action": "c"}]}
        ] * 3
    path = table(tmp_path, rows)
    zipped = tmp_path / "z.jsonl.gz"
    zipped.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    strip = lambda records: [r.__class__(**{**r.__dict__, "where": ""}) for r in records]
    parquet = load_records(path, kind).records
    assert parquet[1].where == f"{path}: row 2"
    assert strip(parquet) == strip(load(tmp_path, kind, *rows)) == strip(load_records(zipped, kind).records)


def test_parquet_complaints_name_row_and_field(tmp_path):
    path = table(tmp_path, [{"prompt": "a"}, {"prompt": "b"}, {"prompt": ""}])
    with pytest.raises(DataError, match=r'd.parquet: row 3: field "prompt": is empty'):
        load_records(path, PromptRecord)
    with pytest.raises(DataError, match=r"d.parquet: is empty; it has no rows"):
        list(read_parquet(table(tmp_path, [{"prompt": "a"}][:0])))
    with pytest.raises(DataError, match=r'row 1: field "prompt": must be text; found bytes'):
        load_records(table(tmp_path, [{"prompt": b"\xff"}]), PromptRecord)


def test_parquet_text_that_is_not_utf8(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    binary = pa.array([b"ok", b"\xff\xfe", b"ok"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    pq.write_table(pa.table({"prompt": text}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match="row 2: holds text that is not UTF-8"):
        load_records(tmp_path / "d.parquet", PromptRecord)
    records, skipped = load_records(tmp_path / "d.parquet", PromptRecord, on_error="skip")
    assert len(records) == 2 and skipped.count == 1


def test_a_parquet_file_cut_anywhere_is_an_error(tmp_path):
    whole = table(tmp_path, [{"prompt": "a"}, {"prompt": "b"}]).read_bytes()
    for cut in range(0, len(whole), 7):
        (tmp_path / "d.parquet").write_bytes(whole[:cut])
        with pytest.raises(DataError, match="not a parquet file, or damaged"):
            load_records(tmp_path / "d.parquet", PromptRecord)


def test_hugging_face_names(monkeypatch, tmp_path):
    """With a stand-in for the package: names are taken apart, failures become one line, no package says what to do."""
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "org/none":
            raise RuntimeError("offline")
        return [{"prompt": "ab"}] if split != "empty" else []

    fake = types.SimpleNamespace(
        load_dataset=load_dataset, load_from_disk=lambda _: [{"prompt": "z"}], DatasetDict=dict
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert (
        load_records("hf:org/name:train[:9]", PromptRecord).records[0].where == "hf:org/name:train[:9]: row 1"
    )
    load_records("hf:org/name:small:test", PromptRecord)
    assert asked == [("org/name", None, "train[:9]"), ("org/name", "small", "test")]
    assert load_records(f"hf:{tmp_path}:train", PromptRecord).records[0].prompt.text == "z"
    for name, message in (("hf:org/name", "must be hf:NAME:SPLIT"), ("hf:org/name:empty", "has no rows"),
                          ("hf:org/none:x", "cannot be loaded: RuntimeError: offline")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            list(read_rows(name))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'kl-rl\[datasets\]'"):
        list(read_rows("hf:org/name:train"))


@pytest.mark.peer
def test_a_saved_data_set_equals_json_lines(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_list([LOGGED] * 2)}).save_to_disk(tmp_path / "saved")
    (record, _) = load_records(f"hf:{tmp_path / 'saved'}:train", LoggedRecord).records
    (expected,) = load(tmp_path, LoggedRecord, LOGGED)
    assert record.completions == expected.completions and record.log_behaviour == expected.log_behaviour


# --- records to arrays -------------------------------------------------------------------------------------------


def encoder(limits=None, **options):
    return Encoder(LETTERS, limits, **options)


def checked(batch, shape):
    check_trajectories(batch)
    assert batch.tokens.shape == shape and batch.tokens.dtype == batch.prompt.dtype == np.int32
    assert all(leaf.dtype == np.float32 for leaf in batch[2:])
    assert all(np.isfinite(leaf).all() for leaf in batch)
    assert set(np.unique(batch.mask)) <= {0.0, 1.0} and not np.any(batch.tokens[batch.mask == 0])
    assert not np.any(batch.log_behaviour[batch.action_mask == 0])


def no_template(messages):
    raise ValueError("no chat template")


def test_prompts_are_padded_on_the_left(tmp_path):
    rows = [{"prompt": "abc"}, {"tokens": [7]}, {"messages": [{"role": "user", "content": "d"}]}]
    records = load(tmp_path, PromptRecord, *rows)
    render = lambda messages: "x" + "".join(m["content"] for m in messages)
    expected = [[-1, 1, 2, 3], [-1, -1, -1, 7], [-1, -1, 24, 4]]
    assert encode_prompts(records, encoder(Limits(prompt=4), render=render)).tolist() == expected
    assert encode_prompts(records[:2], encoder()).tolist() == [[1, 2, 3], [-1, -1, 7]]
    assert encode_prompts(records[:2], encoder(begin=30)).tolist() == [[30, 1, 2, 3], [-1, -1, 30, 7]]
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
    assert encode_prompts(records, encoder(Limits(**limits)), skipped=skipped)[:, -1].tolist() == [1]
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
    assert batch.prompt.tolist() == [[1, 2], [-1, 26], [-1, 26]]
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
    loader = Loader(ArrayRows(batch._replace(log_behaviour=np.asarray(score(policy, batch)))), 2, seed=0)
    filled = next(loader)
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
    assert batch.tokens[0].tolist() == [[3, 0, 0], [4, 5, 0]] and batch.reward.tolist() == [
        [1, 0],
        [0.75, 0.25],
    ]
    ranked = load(tmp_path, RankingRecord, RANKED, but(RANKED, ranks=[1, 3, 2]))
    whole = encode_rankings(ranked, encoder(add_end=False))
    checked(whole, (2, 3, 1))
    assert whole.reward.tolist() == [[-2, -1, -2], [-1, -3, -2]]
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


# --- batches -----------------------------------------------------------------------------------------------------


def logged_batch(size):
    tokens = np.arange(size * 2 * 3, dtype=np.int32).reshape(size, 2, 3)
    ones = np.ones_like(tokens, np.float32)
    return Trajectories(np.arange(size, dtype=np.int32)[:, None], tokens, ones, ones, -ones, ones[..., 0])


@pytest.mark.parametrize("drop_remainder", [False, True])
def test_resuming_at_every_position_equals_not_stopping(drop_remainder):
    make = lambda: Loader(ArrayRows(logged_batch(10)), 4, seed=3, drop_remainder=drop_remainder)
    uninterrupted = make()
    batches = [next(uninterrupted) for _ in range(12)]
    for stop in range(12):
        first = make()
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.state()))
        second = make()
        second.restore(state)
        assert second.step == stop
        for expected in batches[stop:]:
            for a, b in zip(next(second), expected, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_row_comes_once_an_epoch_in_full_batches(shuffle):
    loader = Loader(ArrayRows(np.arange(100)), 30, seed=0, shuffle=shuffle)
    stream = np.concatenate([next(loader) for _ in range(10)])
    epochs = stream.reshape(3, 100)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(100), (3, 1)))
    assert loader.epoch == 3.0
    distinct = {tuple(epoch) for epoch in epochs.tolist()} | {tuple(range(100))}
    assert len(distinct) == (4 if shuffle else 1)
    dropped = Loader(ArrayRows(np.arange(100)), 30, seed=0, shuffle=shuffle, drop_remainder=True)
    epochs = np.concatenate([next(dropped) for _ in range(6)]).reshape(2, 90)
    assert all(len(set(epoch)) == 90 for epoch in epochs.tolist()) and dropped.epoch == 2.0


def test_neighbouring_seeds_share_no_epoch():
    """Grain's own rule, seed + epoch, would give seed 1 the second epoch of seed 0."""
    orders = [
        tuple(Loader(ArrayRows(np.arange(50)), 50, seed=s).batch(e)) for s in range(3) for e in range(3)
    ]
    assert len(set(orders)) == 9


@pytest.mark.parametrize("hosts", [1, 2, 3, 6])
def test_hosts_share_out_a_batch_that_does_not_depend_on_them(hosts):
    rows = ArrayRows(np.arange(20))
    whole = Loader(rows, 6, seed=1)
    loaders = [Loader(rows, 6, seed=1, shard_index=h, shard_count=hosts) for h in range(hosts)]
    for _ in range(7):
        parts = [next(loader) for loader in loaders]
        assert all(len(part) == 6 // hosts for part in parts)
        assert np.array_equal(np.concatenate(parts), next(whole))
    states = [loader.state() for loader in loaders]
    assert all(state == whole.state() for state in states)
    resumed = Loader(rows, 6, seed=1)
    resumed.restore(states[-1])
    assert np.array_equal(next(resumed), next(whole))


def test_a_position_of_something_else_is_refused():
    state = Loader(ArrayRows(np.arange(20)), 4, seed=1).state()
    others = {
        "rows": Loader(ArrayRows(np.arange(21)), 4, seed=1),
        "contents": Loader(ArrayRows(np.arange(20)[::-1]), 4, seed=1),
        "batch_size": Loader(ArrayRows(np.arange(20)), 5, seed=1),
        "seed": Loader(ArrayRows(np.arange(20)), 4, seed=2),
        "drop_remainder": Loader(ArrayRows(np.arange(20)), 4, seed=1, drop_remainder=True),
    }
    for name, loader in others.items():
        with pytest.raises(ValueError, match=f"data position: {name} was .* and is now"):
            loader.restore(state)
        assert loader.step == 0
    for bad in ({}, {**state, "step": -1}, {**state, "step": "3"}, {**state, "step": True}):
        with pytest.raises(ValueError, match="step must be a whole number"):
            Loader(ArrayRows(np.arange(20)), 4, seed=1).restore(bad)
    with pytest.raises(ValueError, match="another release .grain"):
        Loader(ArrayRows(np.arange(20)), 4, seed=1).restore({**state, "order": 0})


@pytest.mark.parametrize(
    "size, options, message",
    [
        (0, {}, "no rows to load"),
        (5, {"batch_size": 0}, "batch_size must be a positive multiple of 1 hosts; got 0"),
        (5, {"batch_size": 3, "shard_count": 2}, "batch_size must be a positive multiple of 2 hosts; got 3"),
        (
            5,
            {"shard_index": 2, "shard_count": 2},
            "shard_index must lie between 0 and shard_count - 1 = 1; got 2",
        ),
        (3, {"drop_remainder": True}, "3 rows do not fill one batch of 4"),
    ],
)
def test_bad_sizes_are_refused(size, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(ArrayRows(np.arange(size)), **{"batch_size": 4, "seed": 0, **options})
    with pytest.raises(ValueError, match="one leading axis of the same length"):
        ArrayRows((np.zeros(3), np.zeros(4)))


def test_grain_is_imported_when_a_loader_is_made():
    code = "import sys, kl_rl.data; sys.exit(any(m in sys.modules for m in ('grain', 'pyarrow', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_text_windows_are_a_function_of_seed_and_step():
    ids = np.arange(103, dtype=np.uint16)
    windows = TextWindows(ids, 10)
    assert len(windows) == 10 and windows.take(np.array([0, 9]))[:, 0].tolist() == [0, 90]
    drawn = windows.sample(5, 8, seed=1)
    assert drawn.shape == (8, 10) and drawn.dtype == np.int32 and np.all(np.diff(drawn) == 1)
    parts = [windows.sample(5, 8, seed=1, shard_index=h, shard_count=4) for h in range(4)]
    assert np.array_equal(np.concatenate(parts), drawn)
    others = [windows.sample(6, 8, seed=1), windows.sample(5, 8, seed=2), windows.sample(1, 8, seed=5)]
    assert not any(np.array_equal(drawn, other) for other in others)
    starts = np.concatenate([windows.sample(s, 64, seed=0)[:, 0] for s in range(64)])
    assert set(starts.tolist()) == set(range(94))  # the last window too
    loader = Loader(windows, 4, seed=0)
    seen = np.concatenate([next(loader) for _ in range(5)])
    assert np.array_equal(np.sort(seen[:10, 0]), np.arange(0, 100, 10))
    with pytest.raises(ValueError, match="contents was"):
        Loader(TextWindows(ids + 1, 10), 4, seed=0).restore(loader.state())


def test_random_orders_are_fixed_for_good():
    """A stored value: another release of NumPy must not move a resumed run to other data."""
    windows = TextWindows(np.arange(1000, dtype=np.int32), 4)
    assert windows.sample(7, 5, seed=3)[:, 0].tolist() == [933, 43, 973, 421, 681]
    assert Loader(ArrayRows(np.arange(7)), 7, seed=3).batch(2).tolist() == [2, 3, 6, 4, 1, 5, 0]


@pytest.mark.parametrize(
    "ids, window, message",
    [
        (np.zeros(3), 2, "ids must be integers"),
        (np.zeros((2, 2), int), 2, "ids must be integers"),
        (np.zeros(3, int), 4, "the text has 3 tokens, fewer than one window of 4"),
        (np.zeros(3, int), 0, "window must be at least 1"),
    ],
)
def test_bad_texts_are_refused(ids, window, message):
    with pytest.raises(ValueError, match=message):
        TextWindows(ids, window)


def test_packing_keeps_every_document_whole():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50, size=rng.integers(1, 17)).tolist() for _ in range(200)]
    packed = pack(documents, 16)
    found = []
    for ids, segments in zip(packed.ids, packed.segments, strict=True):
        assert np.array_equal(ids >= 0, segments > 0)
        numbers = segments[segments > 0]
        assert np.all(np.diff(numbers) >= 0) and set(numbers) == set(range(1, numbers.max() + 1))
        assert np.all(segments[len(numbers) :] == 0)
        found += [ids[segments == n].tolist() for n in range(1, numbers.max() + 1)]
    assert sorted(found) == sorted(documents)
    assert len(packed.ids) <= 11 / 9 * np.ceil(sum(map(len, documents)) / 16) + 1 and packed.fill > 0.95
    assert all(np.array_equal(a, b) for a, b in zip(packed, pack(documents, 16), strict=True))


def test_long_documents_are_split_when_asked():
    with pytest.raises(ValueError, match="document 1 has 5 tokens for rows of 4"):
        pack([[1], [1, 2, 3, 4, 5]], 4)
    packed = pack([[9], [1, 2, 3, 4, 5]], 4, split=True)
    assert packed.ids.tolist() == [[1, 2, 3, 4], [9, 5, -1, -1]]
    assert packed.segments.tolist() == [[1, 1, 1, 1], [1, 2, 0, 0]]
    for bad, message in (([[]], "document 0 is empty"), ([], "no documents to pack")):
        with pytest.raises(ValueError, match=message):
            pack(bad, 4)
