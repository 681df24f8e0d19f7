"""How fast? Ratios within one run: vmapped seeds, traces, dynamic programming's growth, a million lines of `measure`.

python benchmarks/throughput.py            # prints a table; --json adds a line to benchmarks/results/throughput.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kl_rl
from kl_rl import exact, models, worlds
from kl_rl.exact.automaton import Automaton
from kl_rl.exact.hidden_markov import HiddenMarkov


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the benchmark."""

    seeds: int = 8
    steps: int = 100
    num_samples: int = 16
    repeats: int = 5
    horizons: tuple[int, ...] = (32, 64, 128, 256)
    automaton_states: tuple[int, ...] = (64, 128, 256, 512)
    lines: int = 1_000_000


def seconds(call, repeats: int) -> float:
    """Median wall time of a call that returns arrays, after one warm-up."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def vmapped_seeds(config: Config) -> dict[str, float]:
    """Wall time of 8 vmapped seeds over that of 1, for a full table and a small transformer.

    And traces of the program.
    """
    world = worlds.default_world()
    prompt = jnp.asarray(world.prompts)
    source = kl_rl.fresh(prompt, world.reward, num_samples=config.num_samples, horizon=world.horizon)
    method = kl_rl.reinforce(optimizer=optax.adam(1e-2))
    context = world.horizon + 1
    bases = {
        "table": models.table_policy(jax.random.key(0), world.vocab, world.horizon),
        "transformer": models.transformer_policy(jax.random.key(0), world.vocab, context=context, layers=1),
    }
    out: dict[str, float] = {}
    for name, base in bases.items():
        traces = []

        def train(base, beta, key, traces=traces):
            traces.append(1)
            posterior = kl_rl.Posterior(base, kl_rl.Tilt(beta))
            run = kl_rl.start(method, base, posterior, source, key)
            return kl_rl.advance(method, run, posterior, source, num_steps=config.steps)[1].reward

        lanes = jax.jit(jax.vmap(train, in_axes=(None, None, 0)))
        timed, beta = {}, jnp.asarray(1.5)
        for number in (1, config.seeds):
            keys = jax.random.split(jax.random.key(number), number)
            started = time.perf_counter()
            jax.block_until_ready(lanes(base, beta, keys))
            first = time.perf_counter() - started
            steady = seconds(functools.partial(lanes, base, beta, keys), config.repeats)
            timed[number] = (first, steady)
        out[f"{name}: 8 seeds / 1 seed, running"] = timed[config.seeds][1] / timed[1][1]
        out[f"{name}: 8 seeds / 1 seed, with compilation"] = timed[config.seeds][0] / timed[1][0]
        before = len(traces)
        for i in range(3):
            heavier = base.with_params(jax.tree.map(lambda x, i=i: x * (1 + 0.1 * i), base.params))
            lanes(heavier, jnp.asarray(0.5 + i), jax.random.split(jax.random.key(i), config.seeds))
        out[f"{name}: traces for 3 further betas, weights and seeds"] = len(traces) - before
    return out


def _random_problem(states: int, vocab: int, automaton_states: int):
    rng = np.random.default_rng(0)
    log = lambda *shape: jnp.log(jnp.asarray(rng.dirichlet(np.ones(shape[-1]), shape[:-1])))
    process = HiddenMarkov(log(states), log(states, states), log(states, vocab))
    table = rng.integers(automaton_states, size=(automaton_states, vocab))
    weight = rng.integers(-1, 2, size=(automaton_states, vocab)).astype(float)
    return process, Automaton(jnp.asarray(0), jnp.asarray(table), jnp.asarray(weight))


def _exponent(sizes, times) -> float:
    """Slope of log time against log size."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def dynamic_programming(config: Config) -> dict[str, float]:
    """Log Z at S = 16, V = 32: how its time grows with T and with the automaton's states."""
    solve = jax.jit(
        lambda p, a, prompt, beta, horizon: exact.lattice_log_partition(p, a, prompt, horizon, beta),
        static_argnums=4,
    )
    prompt, beta = jnp.array([32]), jnp.asarray(1.0)

    def timed(horizon, states):
        process, automaton = _random_problem(16, 32, states)
        return seconds(lambda: solve(process, automaton, prompt, beta, horizon), config.repeats)

    over_time = [timed(t, 64) for t in config.horizons]
    over_states = [timed(64, q) for q in config.automaton_states]
    return {
        "dynamic programming: seconds at S=16, V=32, T=64, Q=64": over_states[0],
        "dynamic programming: exponent in T": _exponent(config.horizons, over_time),
        "dynamic programming: exponent in product states": _exponent(config.automaton_states, over_states),
    }


def measure_lines(config: Config) -> dict[str, float]:
    """Seconds of `kl-rl measure` on a million lines, as a whole process; memory is the interpreter's."""
    rng = np.random.default_rng(0)
    reward = rng.integers(0, 10, config.lines)
    log_base = -20 - rng.exponential(5, config.lines)
    log_tuned = np.minimum(log_base + 0.2 * reward + 0.3 * rng.normal(size=config.lines) - 1.0, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tuned.jsonl"
        with open(path, "w") as file:
            for r, a, b in zip(reward, log_tuned, log_base, strict=True):
                file.write(f'{{"reward": {r}, "logp_tuned": {a:.6f}, "logp_base": {b:.6f}}}\n')
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "kl_rl", "measure", str(path), "--json"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return {f"measure: seconds for {config.lines} lines": time.perf_counter() - started}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", action="store_true", help="append the figures to benchmarks/results/throughput.jsonl"
    )
    args = parser.parse_args()
    config = Config()
    figures = vmapped_seeds(config) | dynamic_programming(config) | measure_lines(config)
    for name, value in figures.items():
        print(f"{value:10.3f}  {name}")
    if args.json:
        about = {"device": jax.devices()[0].device_kind, "cpu_count": __import__("os").cpu_count()}
        about |= {name: version(name) for name in ("kl-rl", "jax", "flax")} | {
            "python": platform.python_version()
        }
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
        )
        row = about | {
            "commit": commit.stdout.strip() or None,
            "config": dataclasses.asdict(config),
            "figures": figures,
        }
        with open(Path(__file__).parent / "results" / "throughput.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
