"""A small text, a word list, a tiny base model and compiled programs on disk, shared by the tests of training."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax

WORDS = {"lexicon": {"sun": 1.0, "rain": -1.0, "a": 0.5, "e": 0.25}}
SENTENCES = ("the sun is up ", "a rain fell on e ", "so it was a day ", "and a sun set ", "e a e a it ")
FILES = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "model/model.safetensors")


def knob_of(method: str) -> dict[str, float]:
    """The option that says how far a method goes, and where it stands in the tests."""
    from kl_rl.methods import METHODS

    known = [card for card in METHODS if method in (card.name, card.family)]
    knob = known[0].knob if known else None
    if knob is None or knob.default is None:
        return {}
    return {knob.option: {"beta": 0.5, "n": 2.0}.get(knob.option, knob.default)}


class World(NamedTuple):
    """Paths of a small problem."""

    folder: Path
    base: Path
    prompts: Path
    reward: Path
    cache: Path

    @property
    def environment(self) -> dict[str, str]:
        """For subprocesses: one device, the shared cache of programs, which are compiled quickly."""
        kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        return kept | cache | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "kl_rl", *map(str, arguments)]

    def kl_rl(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, check=False
        )


@contextlib.contextmanager
def programs_kept(folder: Path):
    """Compiled programs of this process are made quickly and go to a folder, until the end."""
    names = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    for name, value in before.items():
        jax.config.update(name, value)


def make_world(folder: Path) -> World:
    """Text, prompts, reward; the base model is not trained yet."""
    text = "".join(SENTENCES[(i * i + i // 3) % len(SENTENCES)] for i in range(400))
    (folder / "text.txt").write_text(text)
    lines = sorted({SENTENCES[i % 5][: 4 + i % 6] for i in range(30)})
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    (folder / "words.json").write_text(json.dumps(WORDS))
    return World(
        folder, folder / "base", folder / "prompts.jsonl", folder / "words.json", folder / "programs"
    )


def contents(folder: Path) -> dict[str, bytes]:
    """What must be the same however often a run was interrupted."""
    return {name: (folder / name).read_bytes() for name in FILES}
