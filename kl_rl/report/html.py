"""``report.html``: what was asked, the answer in two sentences, the tables, the figures.

Readable without the library.
"""

from __future__ import annotations

import base64
import html
import math
from typing import Any

__all__ = ["html_report", "number", "plain_table"]

Row = dict[str, Any]
WITH_ERROR = ("S", "C", "C_fwd", "C_JS")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2.5rem auto; padding: 0
1.2rem; } h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.answer { font-size: 1.1rem; background: #f5f3ee; border-left: 4px solid #c44e52; padding: .8rem 1rem; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; } div.wide {
overflow-x: auto; } th { text-align: right; border-bottom: 1.5px solid #444; padding: .25rem .55rem;
font-weight: 600; white-space: nowrap; } td { text-align: right; padding: .18rem .55rem; border-bottom: 1px
solid #eee; white-space: nowrap; } th.text, td.text { text-align: left; } tr.reference td { color: #666; }
tr.unreached td { color: #aaa; } span.se { color: #888; font-size: .78em; } figure { margin: 1.2rem 0; } img {
max-width: 100%; } figcaption, footer, .small { color: #666; font-size: .86rem; } code { background: #f2f2f2;
padding: 0 .25em; } @media (prefers-color-scheme: dark) { img { background: white; } }
"""


def number(value: Any, digits: int = 3) -> str:
    """A number for people: three significant digits, an infinity sign for null, 0 for rounding dust."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "\u221e"
    if abs(value) < 5e-7:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


def _cell(row: Row, name: str) -> str:
    if name not in row:
        return ""
    error = row.get(f"{name}_stderr") if name in WITH_ERROR else None
    tail = f' <span class="se">&plusmn;{number(error, 1)}</span>' if error else ""
    return number(row[name]) + tail


def _table(rows: list[Row], columns: list[tuple[str, str]], text: tuple[str, ...]) -> str:
    head = "".join(f'<th class="{"text" if key in text else ""}">{label}</th>' for key, label in columns)
    body = []
    for row in rows:
        kind = "reference" if row.get("family") == "reference" else ""
        kind = "unreached" if row.get("seeds") == 0 else kind
        cells = "".join(
            f'<td class="text">{html.escape(str(row.get(key, "")))}</td>'
            if key in text
            else f"<td>{_cell(row, key)}</td>"
            for key, _ in columns
        )
        body.append(f'<tr class="{kind}">{cells}</tr>')
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


MATCHED_COLUMNS = [
    ("method", "method"),
    ("family", "family"),
    ("reward", "reward"),
    ("kl", "KL"),
    ("P", "P"),
    ("S", "S"),
    ("C", "C"),
    ("C_fwd", "C_fwd"),
    ("C_JS", "C_JS"),
    ("entropy_gap", "entropy gap"),
    ("kl_pstar_q", "KL(p*||q)"),
]
EXTRA_COLUMNS = [
    ("method", "method"),
    ("knob_value", "knob"),
    ("reward", "reward"),
    ("C", "C"),
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
]


def _order(row: Row) -> tuple:
    return (
        row["seeds"] == 0,
        row["family"] != "reference",
        row.get("C_fwd") if row.get("C_fwd") is not None else math.inf,
    )


def _figures(figures: dict[str, tuple[bytes, str]]) -> str:
    parts = []
    for name, (png, caption) in figures.items():
        data = base64.b64encode(png).decode()
        parts.append(
            f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)} (<code>{name}.png</code>)</figcaption></figure>"
        )
    return "".join(parts)


INTERVAL_COLUMNS = ("kl", "P", "S", "C", "C_fwd", "C_JS")


def _interval_table(rows: list[Row]) -> str:
    """Each run on its own, C and its relatives as intervals."""
    shown = []
    for row in rows:
        entry = {"method": row["method"], "family": row["family"], "knob_value": row["knob_value"]}
        entry |= {"reward": row["reward"], "held_out_loss": row.get("held_out_loss")}
        for name in INTERVAL_COLUMNS:
            low, high = row.get(f"{name}_lower"), row.get(f"{name}_upper")
            middle = number(row.get(name))
            entry[name] = (
                middle if low is None and high is None else f"{middle} [{number(low)}, {number(high)}]"
            )
        shown.append({k: v if k in INTERVAL_COLUMNS else v for k, v in entry.items() if v is not None})
    columns = [("method", "method"), ("family", "family"), ("knob_value", "knob"), ("reward", "reward")]
    columns += [(name, "KL" if name == "kl" else name) for name in INTERVAL_COLUMNS]
    columns += [("held_out_loss", "held-out loss")]
    return _table(shown, columns, ("method", "family", *INTERVAL_COLUMNS))


def _previews(previews: list[tuple[str, list[str]]]) -> str:
    parts = []
    for name, texts in previews:
        lines = "".join(f"<li><code>{html.escape(text)}</code></li>" for text in texts)
        parts.append(f"<details><summary>{html.escape(name)}</summary><ul>{lines}</ul></details>")
    return "".join(parts)


def html_report(data: dict[str, Any], figures: dict[str, tuple[bytes, str]]) -> str:
    """The whole page as one string, pictures inside.

    Args:
      data: from ``kl_rl.experiments.compare.collect``: title, question, answer, tables, settings, checks.
      figures: name -> (PNG, caption).

    Returns:
      HTML.
    """
    text = ("method", "family")
    sections = [
        f"<h1>{html.escape(data['title'])}</h1><p class='small'>{html.escape(data['subtitle'])}</p>",
        f"<p>{html.escape(data['question'])}</p><p class='answer'>{html.escape(data['answer'])}</p>",
    ]
    for target in data["targets"]:
        rows = sorted((r for r in data["matched_reward"] if r["target"] == target), key=_order)
        reached = [r for r in rows if r["seeds"]]
        missing = ", ".join(r["method"] for r in rows if not r["seeds"])
        sections.append(f"<h2>At mean reward {target:.2f}</h2>" + _table(reached, MATCHED_COLUMNS, text))
        if missing:
            sections.append(
                f"<p class='small'>No measured points around this reward: {html.escape(missing)}.</p>"
            )
    sections.append("<h2>Figures</h2>" + _figures(figures))
    for target in data["kl_targets"]:
        rows = sorted((r for r in data["matched_kl"] if r["target"] == target and r["seeds"]), key=_order)
        sections.append(f"<h2>At KL {target:.2f} nats</h2>" + _table(rows, MATCHED_COLUMNS, text))
    if data["means"]:
        columns = [c for c in EXTRA_COLUMNS if any(c[0] in r for r in data["means"])]
        title = "<h2>Calibration and queries, last checkpoint of each knob (seed means)</h2>"
        sections.append(title + _table(data["means"], columns, text))
    if data.get("intervals"):
        sections.append("<h2>Every run, with 95 % intervals</h2>" + _interval_table(data["intervals"]))
    if data.get("previews"):
        sections.append("<h2>Sample completions</h2>" + _previews(data["previews"]))
    sections.append(
        "<h2>Checks of the instrument</h2><ul>"
        + "".join(f"<li>{html.escape(c)}</li>" for c in data["checks"])
        + "</ul>"
    )
    if data.get("warnings"):
        said = "".join(f"<li>{html.escape(w)}</li>" for w in data["warnings"])
        sections.append(
            f"<details><summary>{len(data['warnings'])} warnings of the estimators</summary><ul>{said}</ul></details>"
        )
    sections.append("<h2>How to read this</h2>" + LEGEND)
    sections.append(f"<footer>{html.escape(data['footer'])}</footer>")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' "
        "content='width=device-width'>"
        f"<title>{html.escape(data['title'])}</title><style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


LEGEND = """<p>All divergences are in nats. <b>p0</b> is the base model, <b>q</b> the fine-tuned one, <b>p*</b> the
exact posterior p0 exp(r/beta)/Z. KL(q||p0) = P + S + C: <b>P</b> is the least KL that buys q's mean reward,
<b>S</b> what the shape of its reward distribution costs beyond that, and <b>C</b>, calibration loss, what
was changed <em>within</em> each reward level: zero exactly when q is p0 reweighted by some function of the
reward. <b>C_fwd</b> is its forward twin, the part of p0 that stays lost after the reward is optimally
undone; <b>C_JS</b> a symmetric version, at most log 2. At matched reward the exact optimum of KL-
regularized RL minimizes C + S in any policy class (a theorem, not a finding), so C_fwd and C_JS are the
primary outcomes. Values at matched reward are interpolated along each method's knob, seed by seed; &plusmn;
is the standard error over seeds. The entropy gap is H(p* of equal reward) - H(q). smECE: smooth calibration
error of next-token forecasts on p0 text and on p* text, never on the policy's own. Infill: KL of the
forecast of one hidden token given the rest, from p0; "undone" after the reward is undone. &infin;: infinite
or undefined.</p>"""


def plain_table(rows: list[Row], columns: tuple[str, ...]) -> list[list[str]]:
    """Cells of a table for the terminal."""
    return [
        [str(row[c]) if isinstance(row.get(c), str) else number(row.get(c)) for c in columns] for row in rows
    ]
