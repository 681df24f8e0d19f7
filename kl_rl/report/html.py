"""``report.html``: what was asked, the answer in two sentences, the tables, the figures; the page is page.html."""

from __future__ import annotations

import base64
import functools
import math
from pathlib import Path
from typing import Any

import jinja2

__all__ = ["html_report", "number", "plain_table"]

Row = dict[str, Any]
TEXT = ("method", "family")
WITH_ERROR = ("reward", "S", "C", "C_fwd", "C_JS", "kl_q_law", "kl_base")
LAW = ("law_C", "law_S", "kl_q_law")
MATCHED = (
    ("method", "method"),
    ("family", "family"),
    ("reward", "reward"),
    ("kl", "KL"),
    ("P", "P"),
    ("S", "S"),
    ("C", "C"),
    ("C_fwd", "C_fwd"),
    ("C_JS", "C_JS"),
    ("kl_q_law", "KL(q||law)"),
    ("entropy_gap", "entropy gap"),
    ("kl_pstar_q", "KL(p*||q)"),
)
FURTHER = (
    ("method", "method"),
    ("knob_value", "knob"),
    ("reward", "reward"),
    ("C", "C"),
    ("law_C", "C of its law"),
    ("law_S", "S of its law"),
    ("kl_q_law", "KL(q||law)"),
    ("smece_p0", "smECE p0"),
    ("smece_pstar", "smECE p*"),
    ("temperature_p0", "best T"),
    ("smece_p0_tempered", "smECE at best T"),
    ("brier_p0", "Brier p0"),
    ("query_infill_p0", "infill p0"),
    ("query_infill_undone", "infill undone"),
    ("latent_tv", "latent TV"),
    ("latent_bound", "bound"),
    ("attractor_lift", "lift"),
)
INTERVALS = (
    ("method", "method"),
    ("family", "family"),
    ("knob_value", "knob"),
    ("reward", "reward"),
    ("kl", "KL"),
    ("P", "P"),
    ("S", "S"),
    ("C", "C"),
    ("C_fwd", "C_fwd"),
    ("C_JS", "C_JS"),
    ("kl_q_law", "KL(q||law)"),
    ("kl_base", "KL(p0||q)"),
)


def number(value: Any, digits: int = 3) -> str:
    """A number for people: three significant digits, an infinity sign for null, 0 for rounding dust."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "\u221e"
    if abs(value) < 5e-7:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


def _order(row: Row) -> tuple:
    return (
        row["seeds"] == 0,
        row["family"] != "reference",
        row.get("C_fwd") if row.get("C_fwd") is not None else math.inf,
    )


@functools.cache
def _page() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = number
    return environment.get_template("page.html")


def _shown(columns: tuple[tuple[str, str], ...], rows: list[Row]) -> list[tuple[str, str]]:
    """The columns that some row has."""
    return [column for column in columns if any(row.get(column[0]) is not None for row in rows)]


def _of_laws(row: Row) -> Row:
    """Without the columns about its law, if a method has none: null is infinite elsewhere."""
    return row if row.get("law_C") is not None else {k: v for k, v in row.items() if k not in LAW}


def html_report(data: dict[str, Any], figures: dict[str, tuple[bytes, str]]) -> str:
    """The whole page as one string, pictures inside.

    Args:
      data: from ``kl_rl.experiments.compare.collect``: title, question, answer, tables, settings, checks.
      figures: name -> (PNG, caption).

    Returns:
      HTML.
    """
    of = lambda table, target: sorted((r for r in data[table] if r["target"] == target), key=_order)
    reached = lambda rows: [row for row in rows if row["seeds"]]
    missing = lambda rows: [row["method"] for row in rows if not row["seeds"]]
    at_reward = [
        (t, reached(of("matched_reward", t)), missing(of("matched_reward", t))) for t in data["targets"]
    ]
    at_kl = [(t, reached(of("matched_kl", t))) for t in data["kl_targets"]]
    return _page().render(
        data=data,
        at_reward=at_reward,
        at_kl=at_kl,
        figures=[(name, base64.b64encode(png).decode(), caption) for name, (png, caption) in figures.items()],
        means=list(map(_of_laws, data["means"])),
        FURTHER=_shown(FURTHER, data["means"]),
        MATCHED=_shown(MATCHED, data["matched_reward"]),
        INTERVALS=_shown(INTERVALS, data.get("intervals") or []),
        TEXT=TEXT,
        WITH_ERROR=WITH_ERROR,
    )


def plain_table(rows: list[Row], columns: tuple[str, ...]) -> list[list[str]]:
    """Cells of a table for the terminal; C and C_fwd with their limits, if they are estimates."""

    def cell(row: Row, name: str) -> str:
        if isinstance(row.get(name), str):
            return str(row[name])
        limits = [number(row[f"{name}_{side}"]) for side in ("lower", "upper") if f"{name}_{side}" in row]
        shown = f" [{', '.join(limits)}]" if limits and name in ("C", "C_fwd") else ""
        return number(row.get(name)) + shown

    return [[cell(row, name) for name in columns] for row in rows]
