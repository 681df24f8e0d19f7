"""The folder of a run: who may use it, and files that were cut short at any byte."""

import json
import os
from pathlib import Path

import pytest

from kl_rl.storage.folder import OutputError, Session, opened
from kl_rl.storage.journal import Journal


def test_output_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        Session(tmp_path / "file" / "run", {}, resume=False)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="thesis.tex"):
        Session(foreign, {}, resume=False)
    first = Session(tmp_path / "run", {"a": 1}, resume=False)
    with pytest.raises(OutputError, match="another process"):
        Session(tmp_path / "run", {"a": 1}, resume=True)
    first.close()
    Session(tmp_path / "run", {"a": 1}, resume=True).close()


def test_a_full_disk_is_one_message():
    """/dev/full refuses every write."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with pytest.raises(OutputError, match="cannot write"):
        Session(Path("/dev/full/run"), {}, resume=False)


def test_a_run_that_was_killed_as_it_began_can_be_asked_for_again(tmp_path):
    (tmp_path / "run.json.tmp").write_text('{"a"')
    session = Session(tmp_path, {"a": 1}, resume=True)
    session.close()
    assert json.loads((tmp_path / "run.json").read_text()) == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "run.json"]


def test_a_new_session_that_fails_at_once_leaves_the_folder_free(tmp_path):
    """Unless something has been written, or the run was there before."""
    for write, resume in ((False, False), (True, False), (False, True)):
        with (
            pytest.raises(ValueError, match="bad text"),
            opened(tmp_path, {"a": 1}, resume=resume) as session,
        ):
            if write:
                session.append("rows.jsonl", [{"step": 1}])
            raise ValueError("bad text")
        assert (tmp_path / "run.json").exists() == (write or resume)


ROWS = [{"step": i, "loss": 0.5 * i} for i in range(3)]


def test_rows_cut_anywhere_are_those_before(tmp_path):
    """Whatever is left of a file: rows that follow are read back, and no row is made of two."""
    whole = "".join(json.dumps(row) + "\n" for row in ROWS)
    session = Session(tmp_path / "run", {}, resume=False)
    for cut in range(len(whole) + 1):
        (tmp_path / "run" / "rows.jsonl").write_text(whole[:cut])
        complete = ROWS[: whole[:cut].count("\n")]
        assert session.rows("rows.jsonl") == complete
        session.append("rows.jsonl", [{"step": 9}])
        assert session.rows("rows.jsonl") == [*complete, {"step": 9}]
    session.close()


def test_a_journal_shorter_than_its_checkpoint_goes_on_with_whole_rows(tmp_path):
    whole = "".join(json.dumps(row) + "\n" for row in ROWS)
    for cut in range(len(whole) + 1):
        (tmp_path / "rows.jsonl").write_text(whole[:cut])
        journal = Journal(tmp_path, ("rows.jsonl",), {"rows.jsonl": len(whole)})
        assert journal.shortened == (["rows.jsonl"] if cut < len(whole) else [])
        journal.write("rows.jsonl", {"step": 9})
        journal.close()
        kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        assert kept == [*ROWS[: whole[:cut].count("\n")], {"step": 9}]
