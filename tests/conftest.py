"""Stricter than users: x64, no silent rank promotion, eight simulated CPU devices, warnings as errors.

(pyproject.toml).
"""

import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path

# XLA's older fusion emitters compile in half the time; later versions have them no more and stop at the flag. Tests
# marked "optimized" also run with the default ones (see `make test`), as do the processes of command-line tests.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import pytest

from kl_rl import exact
from kl_rl.models import table_from_law, table_policy

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def compile_quickly(request):
    """Less compile time, for tests in which nothing depends on how good the machine code is (mark: optimized)."""
    if request.node.get_closest_marker("optimized"):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Tiny:
    """A world of 27 strings with four reward levels, a random full-table base, and a few return tokens."""

    vocab, horizon, extra = 3, 3, 6

    def __init__(self, seed: int = 0):
        self.strings = exact.enumerate_strings(self.vocab, self.horizon)
        self.prompt = jnp.array([[self.vocab]])
        self.base = table_policy(jax.random.key(seed), self.vocab, self.horizon, extra=self.extra, scale=0.7)
        self.log_base = exact.log_law(self.base, self.prompt[0], self.strings)
        self.reward = self.reward_fn(None, self.strings.tokens, self.strings.mask)
        self.levels = exact.reward_levels(self.reward)

    @staticmethod
    def reward_fn(prompt, tokens, mask):
        """Number of twos, plus one if the string starts and ends alike."""
        same = tokens[..., 0] == tokens[..., -1]
        return (jnp.sum(tokens == 2, axis=-1) + same).astype(jnp.float64)

    def tabulate(self, log_law, prompt=None):
        """A full-table policy with this law."""
        prompt = self.prompt[0] if prompt is None else prompt
        return table_from_law(log_law, prompt, self.strings.tokens, self.base)

    def law(self, policy):
        return exact.log_law(policy, self.prompt[0], self.strings)

    def tilt(self, beta):
        return exact.log_posterior(self.log_base, self.reward / beta)


@pytest.fixture(scope="session")
def tiny():
    return Tiny()


NOTES = Path(__file__).parents[1] / "theory_notes"
HEADING = re.compile(r"^### ([TC]\d+\.\d+)\b", re.MULTILINE)
checked: set[str] = set()


def pytest_collection_modifyitems(items) -> None:
    """Attach the theorem ids of a test to its report."""
    for item in items:
        for mark in item.iter_markers("theorem"):
            item.user_properties.extend(("theorem", name) for name in mark.args)


def pytest_runtest_logreport(report) -> None:
    """Count the statements whose tests ran and passed."""
    if report.when == "call" and report.passed:
        checked.update(value for key, value in report.user_properties if key == "theorem")


def pytest_terminal_summary(terminalreporter) -> None:
    """One line: how much of the theory this run has checked."""
    stated = {name for path in NOTES.glob("*.md") for name in HEADING.findall(path.read_text("utf-8"))}
    terminalreporter.write_line(
        f"theorems checked: {len(checked & stated)} (of {len(stated)} in theory_notes)"
    )


@pytest.fixture
def copy(tmp_path):
    """A copy of a stored checkpoint, by name, that may be damaged."""

    def make(name):
        return Path(shutil.copytree(Path(__file__).parent / "checkpoints" / name, tmp_path / name))

    return make
