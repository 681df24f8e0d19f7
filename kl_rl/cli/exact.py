"""`kl-rl exact`: the exact posteriors of a small world at given temperatures."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kl_rl.cli.parsing import Subparsers, add_command

if TYPE_CHECKING:
    from kl_rl.worlds.world import World

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
The exact posterior p*(y) = p0(y) exp(r(y) / beta) / Z of a world, a base process p0 with a reward r:
log Z, mean reward, KL(p* || p0), entropies and the laws of the reward. Everything is in nats."""

_EPILOG = """\
world file: one JSON object (`kl-rl exact --schema` prints the whole format)
  {"base": {"kind": "markov", "initial": [0.5, 0.5], "transition": [[0.9, 0.1], [0.2, 0.8]]},
   "reward": {"kind": "motif_count", "motif": [1, 1]}, "horizon": 8}
  base      "markov", "hmm" (adds "emission") or "ngram"; probabilities, every row sums to one
  reward    "start", "next", "weight" of a weighted automaton, or a named one: motif_count, pair_match,
            sentiment, length, constant, sum
  horizon   largest number of tokens
  end       optional end token; a string stops right after it
  prompts   optional list of token lists; averages over them are printed, and each one under "prompts"

examples:
  kl-rl exact world.json --beta 1
      a table for one temperature
  kl-rl exact world.json --beta 0.25 0.5 1 2 --json > posteriors.json
      one JSON object with an entry for each temperature, at full precision

exit status: 0, or 2 when the input cannot be used."""

_QUANTITIES = (
    ("log_z", "log Z"),
    ("reward_mean_p0", "mean reward under p0"),
    ("reward_mean_pstar", "mean reward under p*"),
    ("kl_pstar_p0", "KL(p* || p0)"),
    ("entropy_p0", "entropy of p0"),
    ("entropy_pstar", "entropy of p*"),
)
_MAX_LEVELS, _NEGLIGIBLE = 30, 1e-3
_LAWS = ("reward_distribution_p0", "reward_distribution_pstar")


def add_parser(subparsers: Subparsers) -> None:
    """Add ``exact`` to the commands."""
    parser = add_command(subparsers, run, "exact", "exact posteriors of a small world", _DESCRIPTION, _EPILOG)
    parser.add_argument("world", metavar="W.json", nargs="?", help='the world; "-": standard input')
    parser.add_argument(
        "--beta", type=_temperature, nargs="+", metavar="B", help="temperatures > 0, reward units per nat"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of world files and exit")
    parser.add_argument(
        "--method",
        choices=("auto", "enumerate", "dp"),
        default="auto",
        help="enumerate all strings, or dynamic programming (dp), or auto: enumerate up to 2**20 strings",
    )


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a temperature: give a finite number above 0")
    return value


def run(args: argparse.Namespace) -> int:
    """Compute, print and return the exit status. Enables 64-bit floats in JAX.

    Args:
      args: parsed arguments of the `exact` command.

    Returns:
      0, or 2 after one line on standard error when the input cannot be used.
    """
    import jax

    from kl_rl.worlds import load_world, schema

    if args.schema:
        print(json.dumps(schema(), indent=2))
        return 0
    jax.config.update("jax_enable_x64", True)
    try:
        if args.world is None:
            raise ValueError("no world file given; see `kl-rl exact --help`")
        if not args.beta:
            raise ValueError("no temperature given; add --beta B [B ...]")
        world = load_world(args.world)
        report = _solve(world, args.beta, args.method)
    except ValueError as error:
        print(f"kl-rl exact: error: {error}", file=sys.stderr)
        return 2
    for note in dict.fromkeys(entry["note"] for entry in report["posteriors"] if "note" in entry):
        print(f"kl-rl exact: note: no reward distributions: {note}", file=sys.stderr)
    print(json.dumps(report, allow_nan=False) if args.json else _as_text(report))
    return 0


def _solve(world: World, betas: Sequence[float], method: str) -> dict[str, Any]:
    from kl_rl.worlds.solve import (
        ENUMERATION_LIMIT,
        solve_by_dynamic_programming,
        solve_by_enumeration,
    )

    _check_temperatures(world, betas)
    size = world.num_strings
    if method == "enumerate" and size > ENUMERATION_LIMIT:
        raise ValueError(
            f"{world.name}: {world.vocab}**{world.horizon} = {_count(size)} strings are too many to "
            f"enumerate (limit {ENUMERATION_LIMIT}); use --method dp"
        )
    if method == "auto":
        method = "enumerate" if size <= ENUMERATION_LIMIT else "dp"
    solve = solve_by_enumeration if method == "enumerate" else solve_by_dynamic_programming
    solutions = [solve(world, prompt, list(betas)) for prompt in world.prompts]
    prompts = [[token for token in row.tolist() if token < world.vocab] for row in world.prompts]
    about = {"name": world.name, "vocab": world.vocab, "horizon": world.horizon, "end": world.end}
    about |= {"prompts": prompts, "method": method}
    return {
        "world": about,
        "posteriors": [_average(list(rows), prompts) for rows in zip(*solutions, strict=True)],
    }


def _count(size: int) -> str:
    return str(size) if size < 10**15 else f"about 1e{int(math.log10(size))}"


def _check_temperatures(world: World, betas: Sequence[float]) -> None:
    """Refuse temperatures at which r / beta leaves the range of floating-point numbers."""
    import numpy as np

    largest = float(np.abs(np.asarray(world.automaton.weight)).max()) * world.horizon
    for beta in betas:
        if not math.isfinite(largest / beta):
            raise ValueError(f"{world.name}: reward / beta overflows at beta = {beta:g}; use a larger beta")


def _average(rows: list[dict[str, Any]], prompts: list[list[int]]) -> dict[str, Any]:
    """The entry of one temperature: itself for one prompt, else uniform averages and all prompts."""
    if len(rows) == 1:
        return rows[0]
    entry = {"beta": rows[0]["beta"]}
    for key, _ in _QUANTITIES:
        entry[key] = math.fsum(row[key] for row in rows) / len(rows)
    for key in ("entropy_p0_stderr", "entropy_pstar_stderr"):
        if key in rows[0]:
            entry[key] = math.hypot(*(row[key] for row in rows)) / len(rows)
    for key in _LAWS:
        entry[key] = None if rows[0][key] is None else _mixture([row[key] for row in rows])
    entry |= {"note": rows[0]["note"]} if "note" in rows[0] else {}
    listed = [{"prompt": prompt, **row} for prompt, row in zip(prompts, rows, strict=True)]
    return entry | {"prompts": listed}


def _mixture(laws: list[list[list[float]]]) -> list[list[float]]:
    """Uniform mixture of laws; scores that differ by less than 1e-9 of the largest are one level."""
    pairs = sorted((value, mass / len(laws)) for law in laws for value, mass in law)
    scale = max(abs(value) for value, _ in pairs)
    merged: list[list[float]] = []
    previous = -math.inf
    for value, mass in pairs:
        if value - previous <= 1e-9 * scale:
            merged[-1][1] += mass
        else:
            merged.append([value, mass])
        previous = value
    return merged


def _as_text(report: dict[str, Any]) -> str:
    world, entries = report["world"], report["posteriors"]
    end = "" if world["end"] is None else f", end token {world['end']}"
    prompts = f", average over {len(world['prompts'])} prompts" if len(world["prompts"]) > 1 else ""
    about = f"{world['name']}: {world['vocab']} tokens, horizon {world['horizon']}"
    lines = [f"{about}{end}{prompts} ({world['method']})"]
    lines += ["", _line("beta", [f"{entry['beta']:g}" for entry in entries])]
    lines += [_line(label, [_cell(entry, key) for entry in entries]) for key, label in _QUANTITIES]
    if entries[0][_LAWS[0]] is not None:
        lines += ["", *_law_lines(entries)]
    return "\n".join([*lines, "", "log Z, KL and entropies in nats; mean rewards in reward units"])


def _law_lines(entries: list[dict[str, Any]]) -> list[str]:
    """One line for each level: its probability under p0 and under p* at every temperature."""
    law, columns = entries[0][_LAWS[0]], [entry[_LAWS[1]] for entry in entries]
    lines = [_line("reward: p0 -> p*", [])]
    for i, (value, mass) in enumerate(law):
        masses = [column[i][1] for column in columns]
        if len(law) <= _MAX_LEVELS or max(mass, *masses) >= _NEGLIGIBLE:
            lines.append(_line(f"  {value:<10.6g} {mass:.3e}", [f"{x:.3e}" for x in masses]))
    if len(lines) <= len(law):
        left = len(law) + 1 - len(lines)
        lines.append(f"  ({left} levels below {_NEGLIGIBLE:g} everywhere left out; --json has all)")
    return lines


def _line(label: str, cells: list[str]) -> str:
    return f"{label:<24}" + "".join(f"{cell:>22}" for cell in cells).rstrip()


def _cell(entry: dict[str, Any], key: str) -> str:
    stderr = entry.get(f"{key}_stderr")
    return f"{entry[key]:.8g}" if stderr is None else f"{entry[key]:.5f} +- {stderr:.1g}"
