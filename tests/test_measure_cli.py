"""The measure command: output formats, strict JSON, exit status, plot."""

import argparse
import json
import subprocess
import sys

import numpy as np
import pytest

from kl_rl.cli.measure import add_parser
from kl_rl.measure.samples import Samples

ENTRIES = ("kl", "P", "S", "C", "C_fwd", "beta_fit")


def parse(*arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kl-rl")
    add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["measure", *map(str, arguments)])


def measure(*arguments) -> int:
    args = parse(*arguments)
    return args.run(args)


def save(path, samples: Samples):
    columns = {"reward": samples.reward, "logp_tuned": samples.logp_tuned, "logp_base": samples.logp_base}
    if samples.prompt is not None:
        columns["prompt"] = samples.prompt
    rows = zip(*(np.asarray(c).tolist() for c in columns.values()), strict=True)
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    """Tuned and base samples of 60 strings with 4 levels; l is not a function of the reward."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(60))
    reward = rng.integers(0, 4, 60).astype(float)
    q = p * np.exp(0.7 * reward + 0.5 * rng.normal(size=60))
    q /= q.sum()
    picks = (rng.choice(60, 1500, p=q), rng.choice(60, 1500, p=p))
    paths = (tmp_path / "tuned.jsonl", tmp_path / "base.jsonl")
    return [
        save(f, Samples(reward[i], np.log(q[i]), np.log(p[i]))) for f, i in zip(paths, picks, strict=True)
    ]


def refuse_constant(name: str):
    raise AssertionError(f"{name} is not JSON")


def as_json(capsys, *arguments) -> dict:
    assert measure(*arguments, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("\n") == 1
    return json.loads(captured.out, parse_constant=refuse_constant)


def test_json_has_the_documented_fields(files, capsys):
    tuned, base = files
    result = as_json(capsys, tuned, "--base-samples", base)
    for name in ENTRIES:
        entry = result[name]
        assert set(entry) >= {"value", "stderr", "lower", "upper"}
        assert entry["lower"] <= entry["value"] <= entry["upper"]
    assert result["n_tuned"] == result["n_base"] == 1500
    assert result["warnings"] == [] and result["bins"] == {"kind": "exact", "count": 4}
    assert set(result["C"]) == {"value", "stderr", "lower", "upper", "lower_bound", "upper_bound"}
    assert 0 < result["ess_tuned"] < 1500 and result["C_JS"]["value"] > 0 and result["C_corrected"] is None


def test_json_without_base_has_nulls(files, capsys):
    result = as_json(capsys, files[0])
    assert result["C"]["upper"] is None and result["C"]["lower"] is not None
    assert None not in (result["kl"]["lower"], result["kl"]["upper"])
    for name in ("P", "S", "C_fwd", "beta_fit"):
        assert result[name]["lower"] is None and result[name]["upper"] is None
    assert result["n_base"] == 0 and result["ess_base"] is None and result["C_JS"] is None
    assert len(result["warnings"]) == 1


def test_json_is_strict_where_nothing_can_be_fitted(tmp_path, capsys):
    rng = np.random.default_rng(0)
    constant = Samples.from_log_ratio(np.ones(9), -rng.random(9))
    result = as_json(capsys, save(tmp_path / "a.jsonl", constant))
    assert result["beta_fit"]["value"] is None and result["P"]["value"] == 0.0
    two = Samples.from_log_ratio(np.array([0.0, 1.0]), np.array([-0.1, 0.0]))
    as_json(capsys, save(tmp_path / "b.jsonl", two), "--base-samples", tmp_path / "b.jsonl")


def test_bins_and_beta_reach_the_measurement(files, capsys):
    tuned, base = files
    result = as_json(capsys, tuned, "--base-samples", base, "--bins", 2, "--beta", 1.5)
    assert result["bins"] == {"kind": "quantile", "count": 2} and result["beta_used"] == 1.5
    assert result["C_corrected"]["value"] < result["C"]["value"] and result["binning_bound"] > 0


def test_prompts_in_files(files, tmp_path, capsys):
    prompts = np.arange(1500) % 3
    paths = []
    for i, path in enumerate(files):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        columns = [np.array([r[k] for r in rows]) for k in ("reward", "logp_tuned", "logp_base")]
        paths.append(save(tmp_path / f"{i}.jsonl", Samples(*columns, prompts)))
    result = as_json(capsys, paths[0], "--base-samples", paths[1])
    assert result["num_prompts"] == 3 and result["lambda_spread"] is not None


def test_text_is_an_aligned_table_with_one_sentence(files, capsys):
    assert measure(files[0], "--base-samples", files[1]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "nats" in out and "Fine-tuning moved the model" in out
    table = out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table[1:]] == ["KL", "P", "S", "C", "C_fwd", "C_JS", "beta"]
    ends = {line.index("]") for line in table[1:]}
    assert len(ends) == 1
    assert measure(files[0]) == 0
    assert "at least" in (out := capsys.readouterr().out) and "warning: Without base samples" in out


def test_terminal_gets_the_same_numbers(files, capsys, monkeypatch):
    assert measure(files[0], "--base-samples", files[1]) == 0
    plain = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert measure(files[0], "--base-samples", files[1]) == 0
    fancy = capsys.readouterr().out
    for figure in plain.split("\n\n")[0].splitlines()[4].split()[1:3]:
        assert figure in fancy


def test_no_calibration_loss_is_said_so(tmp_path, capsys):
    rng = np.random.default_rng(0)
    weight = np.exp(np.arange(3.0))
    shift = np.log(weight.mean())
    rewards = rng.choice(3, 900, p=weight / weight.sum()), rng.integers(0, 3, 900)
    paths = [
        save(tmp_path / f"{i}.jsonl", Samples(r * 1.0, r - shift - 9.0, np.full(900, -9.0)))
        for i, r in enumerate(rewards)
    ]
    assert measure(paths[0], "--base-samples", paths[1]) == 0
    assert "no calibration loss is shown" in capsys.readouterr().out


def test_plot_is_a_png(files, tmp_path, capsys):
    for name, extra in (("both.png", ["--base-samples", files[1]]), ("one.plot", [])):
        as_json(capsys, files[0], *extra, "--plot", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/absent.jsonl"], "absent.jsonl: cannot be read (No such file or directory)"),
        (["{tmp}"], "is a directory"),
        (["{bad}"], "bad.jsonl, line 2: not valid JSON"),
        (["{tuned}", "--base-samples", "{bad}"], "bad.jsonl, line 2"),
        (["{one}"], "at least two tuned samples"),
        (["{tuned}", "--base-samples", "{named}"], "prompts are given for one of the two"),
        (["-", "--base-samples", "-"], "only one of the two"),
        (
            ["{tuned}", "--plot", "{tmp}/no/such/a.png"],
            "a.png: cannot be written (No such file or directory)",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_two(files, tmp_path, capsys, arguments, message):
    line = '{"reward": 1, "logp_tuned": -1, "logp_base": -1}\n'
    (tmp_path / "bad.jsonl").write_text(line + "{\n")
    (tmp_path / "one.jsonl").write_text(line)
    (tmp_path / "named.jsonl").write_text(line.replace("}", ', "prompt": 1}') * 2)
    places = {"tmp": tmp_path, "tuned": files[0]} | {
        n: tmp_path / f"{n}.jsonl" for n in ("bad", "one", "named")
    }
    assert measure(*(a.format(**places) for a in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("kl-rl measure: error: ") and message in captured.err


@pytest.mark.parametrize(
    "option",
    [
        *(["--beta", value] for value in ("0", "-1", "nan", "inf", "x")),
        *(["--bins", value] for value in ("0", "1.5", "all")),
    ],
)
def test_bad_options_are_refused_by_the_parser(option, capsys):
    with pytest.raises(SystemExit) as error:
        parse("samples.jsonl", *option)
    assert error.value.code == 2
    assert "must be" in capsys.readouterr().err


def test_help_has_the_format_and_two_examples(capsys):
    with pytest.raises(SystemExit) as error:
        parse("--help")
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert text.count("kl-rl measure samples.jsonl --base-samples base.jsonl") == 2
    for word in ("logp_tuned", "logp_base", "nats", "temperature 1", "JSON lines"):
        assert word in text


def test_standard_input_and_no_jax_in_the_process(files):
    code = (
        "import argparse, sys\n"
        "from kl_rl.cli.measure import add_parser\n"
        "parser = argparse.ArgumentParser(); add_parser(parser.add_subparsers())\n"
        "args = parser.parse_args(['measure', '-', '--json'])\n"
        "status = args.run(args)\n"
        "assert not {'jax', 'matplotlib', 'flax'} & set(sys.modules), 'slow imports'\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=files[0].read_bytes(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["n_tuned"] == 1500
