"""`kl-rl methods`, and what is generated from cards in the documentation."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kl_rl.cli import main
from kl_rl.methods import METHODS, NoFixedPoint, method_named
from kl_rl.report import cards

ROOT = Path(__file__).parents[1]


def said(capsys, *arguments):
    assert main(["methods", *arguments]) == 0
    return capsys.readouterr().out


def test_one_line_for_each_method(capsys):
    lines = said(capsys).splitlines()
    assert [line.split()[0] for line in lines[3:]] == [method.name for method in METHODS]
    assert len({line.index("-" if "rloo-free" in line else "0.") > 0 for line in lines[3:]}) == 1


def test_a_card_says_everything(capsys):
    text = said(capsys, "grpo")
    for part in (
        "k2 in the loss",
        "beta_x",
        "K >= 2",
        "clip=0.2 epochs=1",
        "lambda std_lambda",
        "C 0.000",
        "2402.03300",
    ):
        assert part in text


def test_cards_as_json(capsys):
    found = json.loads(said(capsys, "--json"))
    assert [card["name"] for card in found] == [method.name for method in METHODS]
    for card in found:
        law = card["law"]
        assert (law is None) == (method_named(card["name"]).law is None)
        if law is not None:
            assert law["kl"] == pytest.approx(law["P"] + law["S"] + law["C"], abs=1e-12) and law["kl"] > 0.01
    assert len(json.loads(said(capsys, "preference", "--json"))) == 2


def test_papers_as_bibtex(capsys):
    entries = said(capsys, "--bibtex").strip().split("\n\n")
    keys = [entry.split("{")[1].split(",")[0] for entry in entries]
    assert len(set(keys)) == len(keys) and all(entry.count("{") == entry.count("}") for entry in entries)
    assert "2305.18290" in said(capsys, "dpo", "--bibtex")


def test_unknown_methods_are_named(capsys):
    assert main(["methods", "rlop"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("kl-rl methods: unknown method 'rlop'; did you mean rloo?")
        and error.count("\n") == 1
    )


def test_the_knob_moves_to_where_there_is_a_fixed_point():
    """Rewards over their spread have none below a critical value; the table says where it looked."""
    grpo = method_named("grpo")
    low = grpo._replace(knob=grpo.knob._replace(default=0.01))
    with pytest.raises(NoFixedPoint):
        grpo.law(np.log([0.5, 0.5]), np.array([0.0, 1.0]), 0.01)
    assert cards.at_fixed_point(low)["at"] > 0.01


def test_the_documentation_is_what_the_cards_say():
    command = [sys.executable, ROOT / "docs" / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


UNTOUCHED = """
from jax._src import xla_bridge
from kl_rl.methods import METHODS
from kl_rl.runs import Learning, Sizes, Task
from kl_rl.runs.choice import choose
for method in METHODS:
    knob = {} if method.knob is None or method.knob.default is not None else {method.knob.option: 1.0}
    choose(Task(method.name, "base", "prompts", "reward", **knob), Sizes(), Learning())
assert not xla_bridge.backends_are_initialized()
"""


def test_choosing_a_method_leaves_the_devices_alone():
    """A run may still split the CPU, or join other processes."""
    done = subprocess.run([sys.executable, "-c", UNTOUCHED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
