"""The README's example runs as printed, and its commands exist."""

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_readme_example_prints_what_it_says():
    """In a fresh process with a user's settings: float32, no strictness."""
    code = "import doctest, sys; sys.exit(doctest.testfile(sys.argv[1], module_relative=False).failed)"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", code, str(ROOT / "README.md")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout


def test_readme_has_an_example():
    examples = doctest.DocTestParser().get_examples((ROOT / "README.md").read_text())
    assert 10 <= len(examples) <= 16


COMMANDS = "compare methods exact measure pretrain train sample plan".split()


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_has_examples(command):
    line = [sys.executable, "-m", "kl_rl", *command, "--help"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "kl-rl" in done.stdout and (not command or "example" in done.stdout.lower())


def test_no_command_is_an_error():
    assert subprocess.run([sys.executable, "-m", "kl_rl"], capture_output=True, check=False).returncode == 2
