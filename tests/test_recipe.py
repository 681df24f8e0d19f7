"""The recipe of CONTRIBUTING.md, walked: its card is one more method for the protocol, the commands and the pages."""

import re
from pathlib import Path

import numpy as np
import pytest
import test_protocol as protocol

from kl_rl import methods
from kl_rl.cli import main
from kl_rl.report import cards

pytestmark = pytest.mark.usefixtures("compile_quickly")
NAME = "robust-vargrad"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The block of code as a file, and its card."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    path = tmp_path_factory.mktemp("recipe") / "mine.py"
    path.write_text(code)
    return path, methods.method_named(f"{path}:ROBUST_VARGRAD")


@pytest.fixture
def enrolled(recipe, monkeypatch):
    """In the table of the protocol."""
    monkeypatch.setitem(protocol.NAMED, NAME, recipe[1])


@pytest.mark.parametrize(
    "check",
    [
        protocol.test_protocol,
        protocol.test_one_trace_for_any_knob_weights_and_seed,
        protocol.test_log_probabilities_of_the_sampler_are_not_read,
        protocol.test_tempered_samples_move_the_law_unless_the_card_says_not,
        protocol.test_data_of_somebody_else_lead_to_the_law_or_to_the_law_on_them,
        protocol.test_gradients_in_parts_are_the_gradient,
        protocol.test_one_sample_is_refused_where_two_are_needed,
    ],
    ids=lambda check: check.__name__,
)
def test_the_protocol_takes_one_more_card(check, enrolled):
    check(NAME)


@pytest.mark.parametrize("prompts", [1, 3])
def test_its_law_is_stationary_and_reached(prompts, enrolled):
    protocol.test_the_law_is_stationary_and_away_from_it_is_not(NAME, prompts)
    protocol.test_the_law_is_reached(NAME, prompts)


def test_the_commands_know_it(recipe, capsys):
    path, card = recipe
    assert main(["methods", f"{path}:ROBUST_VARGRAD"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("robust-vargrad (off-policy)") and "width=1.0" in said and "huber" in said
    assert methods.parsed_options(card, ["width=0.5"]) == {"width": 0.5}
    assert "`robust-vargrad`" in cards.methods_markdown([card])
    assert cards.page_markdown([card]).count("###") == 1
    found = cards.at_fixed_point(card)
    assert abs(found["C"]) < 1e-12 and np.isfinite(found["kl"])


def test_every_card_has_a_public_function():
    """The second file that a method touches."""
    for method in methods.METHODS:
        assert getattr(methods, method.function.__name__) is method.function
