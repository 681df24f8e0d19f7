"""The table of benchmarks/engine.py and benchmarks/gpu.py: target, figure, met or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from engine import Config, Race

FIRST_STEP = 20.0  # seconds
OURS = "kl_rl"


class Row(NamedTuple):
    """A line of the table; ``met`` is None where there is no target."""

    what: str
    figure: str
    target: str = ""
    met: bool | None = None


def _per_second(config: Config, name: str) -> tuple[float, str]:
    """What a step makes, and its unit."""
    return {
        "rl": (config.batch, "samples/s"),
        "dpo": (config.batch, "pairs/s"),
        "decode": (config.decode_batch * config.new, "tokens/s"),
        "train": (config.batch * config.train_length, "tokens/s"),
    }[name]


def race_rows(config: Config, race_: Race, figures: dict[str, Any]) -> list[Row]:
    """The table's lines of one race."""
    amount, unit = _per_second(config, race_.name)
    rows, peers = [], [p for p in race_.peers if p.name in figures]
    for name in (OURS, *(p.name for p in peers)):
        f = figures[name]
        text = "{:.3f} s (min {:.3f}), CPU {:.3f} s (min {:.3f}), {:.0f} {}".format(
            f["wall_median"], f["wall_min"], f["cpu_median"], f["cpu_min"], amount / f["wall_median"], unit
        )
        rows.append(Row(f"{race_.title}: {name}", text))
    for peer in peers:
        wall, cpu = (figures["ratios"][peer.name][kind] for kind in ("wall", "cpu"))
        text = "{:.2f}x [{:.2f}, {:.2f}], CPU {:.2f}x".format(
            wall["median"], wall["min"], wall["max"], cpu["median"]
        )
        rows.append(
            Row(f"  speed over {peer.name}", text, f">= {peer.target}x", wall["median"] >= peer.target)
        )
    rows += [Row(f"  speed over {name}", f"missing: {why}") for name, why in figures["missing"].items()]
    return rows + _start_rows(race_, figures, [p.name for p in peers])


def _start_rows(race_: Race, figures: dict[str, Any], peers: list[str]) -> list[Row]:
    """Peak memory and time to the first step."""
    gib = lambda name: figures[name]["peak_bytes"] / 2**30
    worst = max(gib("cold"), gib(OURS))
    text = f"{gib('cold'):.2f} GiB cold, {gib(OURS):.2f} GiB warm"
    text += "".join(f"; {name} {gib(name):.2f}" for name in peers)
    asked = race_.name == "rl" and peers
    least = min((gib(name) for name in peers), default=0.0)
    rows = [Row("  peak memory", text, "<= theirs", worst <= least) if asked else Row("  peak memory", text)]
    cold, warm = figures["cold"], figures[OURS]
    text = (
        f"{cold['until_first_step']:.1f} s after starting the process with an empty compilation cache "
        f"({cold['first_step']:.1f} s of it the step), {warm['until_first_step']:.1f} s with a full one"
    )
    rows.append(Row("  first step", text, f"< {FIRST_STEP:.0f} s", cold["until_first_step"] < FIRST_STEP))
    return rows


def table(rows: list[Row]) -> str:
    """Target, figure, met or not."""
    verdict = {True: "met", False: "NOT met", None: ""}
    width = max(len(row.what) for row in rows)
    return "\n".join(
        f"{row.what:{width}}  {row.target:>9}  {verdict[row.met]:7}  {row.figure}" for row in rows
    )
