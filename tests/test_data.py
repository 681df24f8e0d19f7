"""Data files: every complaint names its place; JSON lines, parquet and data sets say the same."""

import gzip
import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from records import COMPARED, EPISODE, GOOD, LOGGED, RANKED, but, load, step, write

from kl_rl.data import (
    DataError,
    EpisodeRecord,
    LoggedRecord,
    PromptRecord,
    Skipped,
    TextWindows,
    load_records,
    read_jsonl,
    read_parquet,
    read_rows,
)

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
    (P, {"messages": [{"role": "u", "content": "c", "name": "x"}]}, r"\[0\]: unknown field .name.; a message has role"),
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
    (L, but(LOGGED, rewards=[1, 1e39]), r'field "rewards"\[1\]: must be at most 1e\+30 in size; found number 1e\+39'),
    (L, but(LOGGED, log_behaviour=[-1, -1e39]), r'"log_behaviour"\[1\]: must be at most 1e\+30 in size'),
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
    (R, but(RANKED, ranks=[1, 2, 10**400]), r'field "ranks"\[2\]: must be a finite number; found a huge number'),
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
        ("d.jsonl", gzip.compress(b"{}", mtime=0), "is a gzip file, not JSON lines"),
        ("d.jsonl", b'{"prompt"\0', "is a binary file"),
        ("d.jsonl", '{"prompt": "a"}'.encode("utf-16"), "is a binary file"),
        ("d.jsonl", b'{"prompt": "caf\xe9"}', r"line 1: byte 16 \(0xe9\) is not UTF-8"),
        ("d.jsonl", b'{"prompt": 1}\n{"prompt": 2}', "line 1: "),
        ("d.jsonl.gz", b'{"prompt": "a"}', "line 1: the gzip stream is damaged here"),
        ("d.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
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


def test_parquet_values_that_python_cannot_hold(tmp_path):
    """Nanoseconds, in a column that nobody asked for: the row is named, and may be skipped."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    times = pa.array([1_000, 1_001, 2_000], pa.timestamp("ns"))
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "made": times}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet: row 2: cannot be read: "):
        load_records(tmp_path / "d.parquet", PromptRecord, ignore=["made"])
    records, skipped = load_records(tmp_path / "d.parquet", PromptRecord, ignore=["made"], on_error="skip")
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


def test_text_windows_are_a_function_of_seed_and_step():
    ids = np.arange(103, dtype=np.uint16)
    windows = TextWindows(ids, 10)
    drawn = windows.sample(5, 8, seed=1)
    assert drawn.shape == (8, 10) and drawn.dtype == np.int32 and np.all(np.diff(drawn) == 1)
    others = [windows.sample(6, 8, seed=1), windows.sample(5, 8, seed=2), windows.sample(1, 8, seed=5)]
    assert not any(np.array_equal(drawn, other) for other in others)
    starts = np.concatenate([windows.sample(s, 64, seed=0)[:, 0] for s in range(64)])
    assert set(starts.tolist()) == set(range(94))  # the last window too


def test_random_orders_are_fixed_for_good():
    """A stored value: another release of NumPy must not move a resumed run to other data."""
    windows = TextWindows(np.arange(1000, dtype=np.int32), 4)
    assert windows.sample(7, 5, seed=3)[:, 0].tolist() == [933, 43, 973, 421, 681]


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


def test_readers_are_imported_when_a_file_is_read():
    code = "import sys, kl_rl.data; sys.exit(any(m in sys.modules for m in ('pyarrow', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
