"""`kl-rl measure`: the calibration budget of a fine-tune from files of rewards and log-probabilities."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence

from kl_rl.cli.parsing import Subparsers, add_command
from kl_rl.core.estimate import Estimate
from kl_rl.measure.calibration import Bounded, SampledBudget, sampled_budget
from kl_rl.measure.samples import BadSamples, read_samples

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Split KL(tuned || base) = P + S + C: the price P of the mean reward, the shape S of the reward distribution,
and the calibration loss C, what fine-tuning did to the model beyond updating on the reward. Only rewards and
log-probabilities
are needed. All divergences are in nats."""

_EPILOG = """\
file format: JSON lines; each line one sampled sequence, scored under both models:
  {"reward": 1.0, "logp_tuned": -12.25, "logp_base": -14.5, "prompt": "p7"}
  reward       the reward of the sequence
  logp_tuned   natural log of its probability under the fine-tuned model (sum over its tokens)
  logp_base    the same under the base model
  prompt       optional: an integer or a string naming the prompt; on every line or on none
Sample at temperature 1 without top-p or top-k: the log-probabilities must be those of the sampler.
samples.jsonl holds sequences drawn from the tuned model, base.jsonl sequences drawn from the base model.

examples:
  kl-rl measure samples.jsonl --base-samples base.jsonl
      the whole budget, with two-sided 95 % intervals; levels are the distinct rewards if these are few
  kl-rl measure samples.jsonl --base-samples base.jsonl --bins 20 --beta 0.1 --json > budget.json
      a continuous reward in 20 bins, corrected for bin width at the temperature 0.1; one JSON object

exit status: 0, or 2 when the input cannot be used."""

_ROWS = (
    ("kl", "KL", "divergence of tuned from base"),
    ("P", "P", "price of the mean reward"),
    ("S", "S", "shape of the reward distribution"),
    ("C", "C", "calibration loss"),
    ("C_fwd", "C_fwd", "forward twin of C"),
    ("C_JS", "C_JS", "symmetric version of C"),
    ("C_corrected", "C_corrected", "C against the exact posterior in bins"),
    ("beta_fit", "beta", "tilt with the same mean reward"),
)


def add_parser(subparsers: Subparsers) -> None:
    """Add ``measure`` to the commands."""
    parser = add_command(
        subparsers,
        run,
        "measure",
        "calibration loss of a fine-tune from log-probabilities alone",
        _DESCRIPTION,
        _EPILOG,
    )
    parser.add_argument(
        "samples", metavar="samples.jsonl", help='samples of the tuned model; "-": standard input'
    )
    parser.add_argument("--base-samples", metavar="base.jsonl", help="samples of the base model, same format")
    parser.add_argument(
        "--beta",
        type=_positive,
        metavar="B",
        help="KL temperature of the fine-tune (for binned rewards; default: fitted)",
    )
    parser.add_argument(
        "--bins",
        type=_bins,
        default="auto",
        metavar="auto|N|exact",
        help="reward levels: distinct rewards (exact), N bins of equal mass, or auto (default)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--plot", metavar="FILE.png", help="write a scatter plot of log q/p0 against the reward"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print and return the exit status.

    Args:
        args: parsed arguments of the `measure` command.

    Returns:
        0, or 2 after one line on standard error when the input cannot be used.
    """
    try:
        if args.samples == "-" and args.base_samples == "-":
            raise BadSamples("only one of the two sample files can be standard input")
        tuned = read_samples(args.samples)
        base = None if args.base_samples is None else read_samples(args.base_samples)
        budget = sampled_budget(tuned, base, bins=args.bins, beta=args.beta)
        if args.plot:
            from kl_rl.report.scatter import scatter

            scatter(tuned, base, args.bins, args.plot)
    except (ValueError, OSError) as error:
        print(f"kl-rl measure: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(_as_json(budget), allow_nan=False) if args.json else _as_text(budget))
    return 0


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}") from None
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def _bins(text: str) -> int | str:
    if text in ("auto", "exact"):
        return text
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be auto, exact or a positive whole number, got {text!r}")
    return count


def _number(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else float(x)


def _entry(b: Bounded | None) -> dict | None:
    """A quantity as JSON; missing numbers are null."""
    if b is None:
        return None
    entry: dict = {name: _number(getattr(b, name)) for name in ("value", "stderr", "lower", "upper")}
    for name in ("lower_bound", "upper_bound"):
        bound: Estimate | None = getattr(b, name)
        if bound is not None:
            entry[name] = {"value": _number(bound.value), "stderr": _number(bound.stderr)}
    return entry


def _as_json(budget: SampledBudget) -> dict:
    """The budget as a JSON object."""
    return {
        **{name: _entry(getattr(budget, name)) for name, _, _ in _ROWS},
        "n_tuned": budget.n_tuned,
        "n_base": budget.n_base,
        "num_prompts": budget.num_prompts,
        "mean_reward_tuned": _number(budget.mean_reward[0]),
        "mean_reward_base": _number(budget.mean_reward[1]),
        "ess_tuned": _number(budget.ess_tuned),
        "ess_base": _number(budget.ess_base),
        "bins": {"kind": budget.bins, "count": budget.num_levels},
        "binning_bound": _number(budget.binning_bound),
        "beta_used": _number(budget.beta),
        "lambda_spread": _number(budget.lambda_spread),
        "unreached": _number(budget.unreached),
        "unit": "nats",
        "warnings": budget.warnings,
    }


def _figure(x: float | None) -> str:
    return "-" if x is None or not math.isfinite(x) else ("0" if abs(x) < 5e-8 else f"{x:.4g}")


def _table(budget: SampledBudget) -> list[tuple[str, ...]]:
    """Rows of the table: quantity, value, stderr, interval, stochastic bounds, meaning."""
    rows: list[tuple[str, ...]] = [("", "value", "stderr", "95 % interval", "stochastic bounds", "")]
    for name, label, meaning in _ROWS:
        b: Bounded | None = getattr(budget, name)
        if b is None or b.value is None:
            continue
        interval = f"[{_figure(b.lower)}, {_figure(b.upper)}]"
        pair = (b.lower_bound, b.upper_bound)
        bounds = (
            "" if pair == (None, None) else " / ".join("-" if e is None else _figure(e.value) for e in pair)
        )
        rows.append((label, _figure(b.value), _figure(b.stderr), interval, bounds, meaning))
    return rows


def _facts(budget: SampledBudget) -> list[str]:
    """Lines below the table."""
    levels = f"{budget.num_levels} {'distinct rewards' if budget.bins == 'exact' else 'bins of equal mass'}"
    total = sum(b.value or 0.0 for b in (budget.P, budget.S, budget.C))
    lines = [
        f"P + S + C = {_figure(total)}: KL from the pooled samples (KL above: mean of l over the tuned ones)",
        f"samples: {budget.n_tuned} tuned, {budget.n_base} base, {budget.num_prompts} prompt(s); levels: "
        f"{levels}",
        f"mean reward: {budget.mean_reward[0]:.4g} tuned, {budget.mean_reward[1]:.4g} base",
        f"effective sample size of importance weights: {budget.ess_tuned:.1f} (tuned), "
        f"{_figure(budget.ess_base)} (base)",
    ]
    if budget.bins != "exact" and budget.beta is not None:
        lines.append(
            f"bins alone can account for C up to {budget.binning_bound:.3g} at beta = {budget.beta:.4g}"
        )
    if budget.lambda_spread is not None:
        lines.append(
            f"spread over prompts of the fitted 1/beta: {budget.lambda_spread:.3g} (sampling noise included)"
        )
    return lines


def _meaning(budget: SampledBudget) -> str:
    """One sentence that says what the budget means."""
    kl, p, s, c = (b.value or 0.0 for b in (budget.kl, budget.P, budget.S, budget.C))
    start = (
        f"Fine-tuning moved the model {kl:.3g} nats from its base: {_figure(p)} is the least that this "
        "mean reward "
        f"costs, {_figure(s)} the shape of the reward distribution,"
    )
    least = budget.C.lower or 0.0
    if least <= budget.binning_bound:
        why = (
            "no calibration loss is shown"
            if least <= 0
            else "the calibration loss is no more than bins can cause"
        )
        most = "no upper limit without base samples" if budget.C.upper is None else _figure(budget.C.upper)
        return f"{start} and {why} (at most: {most}); the model may be its base updated on the reward."
    if budget.C.upper is None:
        return f"{start} and at least {least:.3g} is calibration loss (no upper limit without base samples)."
    share = c / max(p + s + c, 1e-300)
    return (
        f"{start} and {c:.3g} ({share:.0%}) is calibration loss: change to what the model says *given* "
        "the reward, "
        "which updating on the reward does not explain."
    )


def _as_text(budget: SampledBudget) -> str:
    """Aligned plain text; on a terminal the headings are set off by rich."""
    rows = _table(budget)
    if sys.stdout.isatty():
        table = _rich_table(rows)
    else:
        widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
        table = "\n".join(
            "  ".join(
                c.ljust(w) if j in (0, 5) else c.rjust(w)
                for j, (c, w) in enumerate(zip(r, widths, strict=True))
            ).rstrip()
            for r in rows
        )
    parts = [table, "", *_facts(budget), *(f"warning: {w}" for w in budget.warnings), "", _meaning(budget)]
    return "\n".join([*parts, "All divergences are in nats."])


def _rich_table(rows: Sequence[tuple[str, ...]]) -> str:
    """The table with bold headings; the descriptions are left out on a narrow terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    columns = 6 if console.width >= 110 else 5
    table = Table(box=None, header_style="bold", pad_edge=False)
    for j, heading in enumerate(rows[0][:columns]):
        table.add_column(heading, justify="left" if j in (0, 5) else "right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row[:columns])
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")
