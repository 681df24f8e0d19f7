"""Where numbers go besides the run's own files."""

import sys
import types

import pytest

from kl_rl.cli.train import _run_name
from kl_rl.storage.errors import RunError
from kl_rl.storage.trackers import tensorboard_sink, tracking_sink


def tracker(calls):
    """A package with the interface of wandb and trackio that talks on standard output, as trackio does."""

    def said(name):
        def call(*args, **kwargs):
            print("talk")
            calls.append((name, args, kwargs))

        return call

    package = types.ModuleType("tracker")
    package.init, package.log, package.finish = said("init"), said("log"), said("finish")
    return package


@pytest.mark.parametrize(("name", "known"), [("wandb", {"id": "run-1"}), ("trackio", {})])
def test_a_tracker_continues_the_run_of_its_name(name, known, monkeypatch, capsys):
    calls = []
    monkeypatch.setitem(sys.modules, name, tracker(calls))
    sink = tracking_sink(name, "project", "run-1", {"beta": 0.5})
    sink.write(3, {"reward": 1.0})
    sink.close()
    asked = {"project": "project", "name": "run-1", "config": {"beta": 0.5}, "resume": "allow"}
    assert calls == [
        ("init", (), asked | known),
        ("log", ({"reward": 1.0},), {"step": 3}),
        ("finish", (), {}),
    ]
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "talk\n" * 3  # standard output is for --json


def test_a_run_keeps_its_name_and_another_has_another(tmp_path):
    names = []
    for folder in (tmp_path / "a" / "rlhf", tmp_path / "b" / "rlhf"):
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        names.append(_run_name(folder))
        assert _run_name(folder) == names[-1] and names[-1].startswith("rlhf-")
    assert len(set(names)) == 2


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RunError, match=r"pip install 'kl-rl\[wandb\]'"):
        tracking_sink("wandb", "project", "run", {})


def test_event_files_of_tensorboard_hold_the_numbers(tmp_path):
    sink = tensorboard_sink(tmp_path, 0)
    sink.write(1, {"reward": 0.25})
    sink.close()
    (events,) = tmp_path.iterdir()
    assert b"reward" in events.read_bytes()
