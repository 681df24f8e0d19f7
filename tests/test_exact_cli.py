"""`kl-rl exact` against a brute-force oracle in plain Python, and its messages."""

import argparse
import io
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from kl_rl import worlds
from kl_rl.cli import exact as command

KEYS = ("log_z", "reward_mean_p0", "reward_mean_pstar", "kl_pstar_p0", "entropy_p0", "entropy_pstar")


def parse(*argv):
    parser = argparse.ArgumentParser(prog="kl-rl")
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["exact", *map(str, argv)])


def execute(*argv):
    args = parse(*argv)
    return args.run(args)


@pytest.fixture
def solve(tmp_path, capsys):
    """Run the command on a spec and parse its standard output, which must be one JSON object."""

    def run(spec, *argv):
        path = tmp_path / "w.json"
        path.write_text(json.dumps(spec))
        assert execute(path, "--json", *argv) == 0
        out, err = capsys.readouterr()
        run.err = err
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    return run


def random_spec(seed):
    """A world of random shape: kind, end, prompts, integer or real weights, structural zeros."""
    rng = np.random.default_rng(seed)
    vocab, horizon = [(2, 6), (3, 4), (4, 3), (5, 3), (2, 5), (3, 5)][seed % 6]
    states = 2 + seed % 3
    weights = rng.normal(size=(3, vocab)) if seed % 2 else rng.integers(-2, 4, size=(3, vocab)) / 2
    rows = lambda n, m: rng.dirichlet(np.ones(m), n)
    size = states if seed % 3 else vocab
    base = {"kind": "markov", "initial": rows(1, size)[0].tolist()}
    transition = rows(size, size)
    if seed % 4 == 0:
        transition[0, 1:] = 0.0
        transition[0, 0] = 1.0
    base["transition"] = transition.tolist()
    if seed % 3:
        base |= {"kind": "hmm", "emission": rows(states, vocab).tolist()}
    reward = {"start": 1, "next": rng.integers(3, size=(3, vocab)).tolist(), "weight": weights.tolist()}
    spec = {"base": base, "reward": reward, "horizon": horizon}
    spec |= {"end": int(rng.integers(vocab))} if seed % 5 < 2 else {}
    return spec | ({"prompts": [[], [1], [1, 1]]} if seed % 7 in (2, 3) and seed % 4 else {})


def brute_force(spec, beta, prompt=()):
    """Every quantity by sums over all strings, from the spec alone."""
    base, reward, end = spec["base"], spec["reward"], spec.get("end")
    transition = np.array(base["transition"])
    emission = np.array(base["emission"]) if base["kind"] == "hmm" else np.eye(len(transition))
    vocab = emission.shape[1]

    def likelihood(tokens):
        belief = np.array(base["initial"])
        total = 1.0
        for token in tokens:
            joint = belief * emission[:, token]
            total, belief = total * joint.sum(), (joint / max(joint.sum(), 1e-300)) @ transition
        return total

    def walk(tokens):
        state, earned = reward["start"], []
        for token in tokens:
            earned.append(reward["weight"][state][token])
            state = reward["next"][state][token]
        return earned

    strings = set()
    for y in itertools.product(range(vocab), repeat=spec["horizon"]):
        strings.add(y if end is None or end not in y else y[: y.index(end) + 1])
    start = likelihood(prompt)
    prob = np.array([likelihood((*prompt, *y)) / start for y in sorted(strings)])
    score = np.array([math.fsum(walk((*prompt, *y))[len(prompt) :]) for y in sorted(strings)])
    keep = prob > 0
    prob, score = prob[keep], score[keep]
    top = score.max() / beta
    weight = prob * np.exp(score / beta - top)
    star = weight / math.fsum(weight)
    log_norm = math.log(math.fsum(weight))
    log_z = log_norm + top
    log_ratio = score / beta - top - log_norm

    def law(p):
        levels = []
        for r, mass in sorted(zip(score, p, strict=True)):
            if levels and abs(r - levels[-1][0]) <= 1e-9 * np.abs(score).max():
                levels[-1][1] += mass
            else:
                levels.append([r, mass])
        return levels

    return {
        "log_z": log_z,
        "reward_mean_p0": math.fsum(prob * score),
        "reward_mean_pstar": math.fsum(star * score),
        "kl_pstar_p0": math.fsum(star * log_ratio),
        "entropy_p0": -math.fsum(prob * np.log(prob)),
        "entropy_pstar": -math.fsum(star * (np.log(prob) + log_ratio)),
        "reward_distribution_p0": law(prob),
        "reward_distribution_pstar": law(star),
    }


def assert_equal(actual, expected, rtol=1e-9):
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=rtol, atol=1e-13, err_msg=key)


@pytest.mark.parametrize("seed", range(18))
def test_enumeration_equals_brute_force(solve, seed):
    spec = random_spec(seed)
    report = solve(spec, "--beta", 0.3, 1.7)
    assert report["world"]["method"] == "enumerate"
    assert [entry["beta"] for entry in report["posteriors"]] == [0.3, 1.7]
    for entry in report["posteriors"]:
        prompts = spec.get("prompts", [[]])
        truths = [brute_force(spec, entry["beta"], tuple(prompt)) for prompt in prompts]
        if len(prompts) == 1:
            assert_equal(entry, truths[0])
            assert "prompts" not in entry
            continue
        assert [row["prompt"] for row in entry["prompts"]] == prompts
        for row, truth in zip(entry["prompts"], truths, strict=True):
            assert_equal(row, truth)
        assert_equal(entry, {key: math.fsum(t[key] for t in truths) / len(truths) for key in KEYS})
        for key in ("reward_distribution_p0", "reward_distribution_pstar"):
            assert math.fsum(p for _, p in entry[key]) == pytest.approx(1, abs=1e-12)
            values = [r for r, _ in entry[key]]
            assert values == sorted(values)
            assert math.fsum(r * p for r, p in entry[key]) == pytest.approx(
                entry[f"reward_mean_{key[20:]}"], abs=1e-9
            )


@pytest.mark.parametrize("seed", [0, 2, 3, 16])
def test_dynamic_programming_equals_brute_force(solve, seed):
    spec = random_spec(seed)
    if seed % 2:
        spec["reward"]["weight"] = np.round(spec["reward"]["weight"], 1).tolist()
    for entry in solve(spec, "--beta", 0.3, 1.7, "--method", "dp")["posteriors"]:
        prompts = spec.get("prompts", [[]])
        rows = entry.get("prompts", [entry])
        for row, prompt in zip(rows, prompts, strict=True):
            assert_equal(row, brute_force(spec, entry["beta"], tuple(prompt)))


def test_dynamic_programming_without_a_lattice_keeps_everything_but_the_reward_laws(solve):
    spec = random_spec(1)
    entry = solve(spec, "--beta", 0.7, "--method", "dp")["posteriors"][0]
    truth = brute_force(spec, 0.7)
    assert_equal(entry, {key: truth[key] for key in KEYS})
    assert entry["reward_distribution_p0"] is entry["reward_distribution_pstar"] is None
    assert "no common unit" in entry["note"] and "no common unit" in solve.err


def test_a_large_world_is_solved_by_dynamic_programming_with_stated_errors(solve):
    spec = worlds.generate_world(2, vocab=3, horizon=20, states=3).spec
    report = solve(spec, "--beta", 2)
    entry = report["posteriors"][0]
    assert report["world"]["method"] == "dp"
    assert 0 < entry["entropy_p0_stderr"] < 0.1 and 0 < entry["entropy_pstar_stderr"] < 0.1
    law = np.array(entry["reward_distribution_p0"])
    assert law[:, 1].sum() == pytest.approx(1, abs=1e-12)
    log_z = math.log(math.fsum(law[:, 1] * np.exp(law[:, 0] / 2)))
    assert entry["log_z"] == pytest.approx(log_z, rel=1e-9)


def test_tiny_and_huge_temperatures_stay_finite_and_exact(solve):
    spec = random_spec(4)
    cold, hot = solve(spec, "--beta", 1e-3, 1e7)["posteriors"]
    truth = brute_force(spec, 1e-3)
    assert_equal(cold, truth)
    top = truth["reward_distribution_p0"][-1]
    assert cold["kl_pstar_p0"] == pytest.approx(-math.log(top[1]), rel=1e-9)
    law = np.array(hot["reward_distribution_p0"])
    variance = law[:, 1] @ (law[:, 0] - hot["reward_mean_p0"]) ** 2
    assert hot["kl_pstar_p0"] == pytest.approx(variance / 2e14, rel=1e-5)
    assert hot["log_z"] == pytest.approx(hot["reward_mean_p0"] / 1e7, rel=1e-6)


def test_scores_that_differ_by_rounding_are_one_level_and_real_ones_are_not(solve):
    base = {"kind": "markov", "initial": [0.5, 0.5], "transition": [[0.5, 0.5], [0.5, 0.5]]}
    reward = {"start": 0, "next": [[0, 0]], "weight": [[0.1, 0.3]]}
    law = solve({"base": base, "reward": reward, "horizon": 6}, "--beta", 1)["posteriors"][0]
    assert len(law["reward_distribution_p0"]) == 7
    reward["weight"] = [[1e-12, 3e-12]]
    law = solve({"base": base, "reward": reward, "horizon": 6}, "--beta", 1e-12)["posteriors"][0]
    assert len(law["reward_distribution_p0"]) == 7


def test_impossible_levels_are_omitted_and_constant_rewards_are_priced_at_nothing(solve):
    base = {"kind": "markov", "initial": [1, 0], "transition": [[1, 0], [0, 1]]}
    entry = solve({"base": base, "reward": {"kind": "motif_count", "motif": [1]}, "horizon": 3}, "--beta", 1)
    entry = entry["posteriors"][0]
    assert entry["reward_distribution_p0"] == entry["reward_distribution_pstar"] == [[0.0, 1.0]]
    assert all(entry[key] == 0.0 for key in KEYS)


def test_the_table_and_standard_input(tmp_path, capsys, monkeypatch):
    spec = worlds.default_world().spec
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(spec).encode())))
    assert execute("-", "--beta", 0.5, 2) == 0
    out, err = capsys.readouterr()
    assert err == "" and "KL(p* || p0)" in out and "log Z" in out and "nats" in out


def test_schema_and_help_need_no_world(capsys):
    assert execute("--schema") == 0
    assert json.loads(capsys.readouterr().out) == worlds.schema()
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert out.count("  kl-rl exact ") >= 2 and '"base"' in out and "exit status" in out


def test_the_parser_is_built_without_jax():
    code = "import kl_rl.cli.exact, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("beta", ["0", "-1", "nan", "inf", "x"])
def test_bad_temperatures_are_refused_by_the_parser(capsys, beta):
    with pytest.raises(SystemExit) as stop:
        parse("w.json", "--beta", beta)
    assert stop.value.code == 2
    assert "is not a temperature" in (err := capsys.readouterr().err) or "is not a number" in err


@pytest.mark.parametrize(
    ("changes", "argv", "message"),
    [
        ({}, [], "no temperature given; add --beta"),
        (
            {"horizon": 21, "vocab": 2},
            ["--beta", 1, "--method", "enumerate"],
            "too many to enumerate (limit 1048576)",
        ),
        ({"horizon": 10**6}, ["--beta", 1, "--method", "enumerate"], "use --method dp"),
        ({"horizon": 0}, ["--beta", 1], "w.json: horizon: must be at least 1"),
        ({"horizon": 10**400}, ["--beta", 1], "w.json: horizon: must be at most 1000000, got 1000"),
        ({}, ["--beta", "1e-320"], "overflows at beta"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_two(tmp_path, capsys, changes, argv, message):
    path = tmp_path / "w.json"
    spec = worlds.default_world().spec | {key: changes[key] for key in changes if key != "vocab"}
    path.write_text(json.dumps(spec))
    assert execute(path, *argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_a_missing_world_is_an_error(capsys):
    assert execute("--beta", 1) == 2
    assert "no world file given" in capsys.readouterr().err
