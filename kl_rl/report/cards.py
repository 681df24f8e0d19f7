"""Cards as people read them: one table of all methods, one page for each, with the budget at its fixed point."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from kl_rl.methods.card import Method, options_of
from kl_rl.methods.laws import NoFixedPoint
from kl_rl.methods.needs import Feed, base_policy, frozen_policy, own_policy

__all__ = [
    "at_fixed_point",
    "card",
    "card_text",
    "formula",
    "methods_markdown",
    "methods_table",
    "page_markdown",
]

_WHO: dict[Any, str] = {own_policy: "the policy", base_policy: "p0", frozen_policy: "an earlier policy"}
_JUDGED = {Feed.PAIRS: ", compared by raters", Feed.LABELS: ", labelled by raters"}
_PARTS = ("kl", "P", "S", "C")
# A world of 27 strings, small enough to print: texts of three letters from a Markov chain, and how many are c, plus one
# if the text ends as it began.
_INITIAL = np.array([0.5, 0.3, 0.2])
_TRANSITION = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.4, 0.2, 0.4]])


def _world() -> tuple[np.ndarray, np.ndarray]:
    """Log p0 and rewards of the 27 strings."""
    texts = np.indices((3, 3, 3)).reshape(3, -1).T
    steps = np.log(_TRANSITION)[texts[:, :-1], texts[:, 1:]].sum(1)
    return np.log(_INITIAL)[texts[:, 0]] + steps, (texts == 2).sum(1) + 1.0 * (texts[:, 0] == texts[:, -1])


def at_fixed_point(method: Method) -> dict[str, float] | None:
    """The budget ``KL = P + S + C`` of a method's law in a world of 27 strings, nats; computed, not quoted.

    The knob stands at its default; where that has no fixed point, at twice it, and so on; a threshold stands at the
    second-largest reward.

    Args:
      method: the card.

    Returns:
      ``at`` (the knob), ``kl``, ``P``, ``S``, ``C``; None without a law, or where it has no fixed point.
    """
    if method.law is None:
        return None
    import jax.numpy as jnp

    from kl_rl.exact import reward_levels
    from kl_rl.measure import exact_budget

    log_base, reward = _world()
    value = (
        float(np.unique(reward)[-2])
        if method.knob is None or method.knob.default is None
        else method.knob.default
    )
    for _ in range(20):
        try:
            log_q = method.law(log_base, reward, value)
            break
        except NoFixedPoint:
            value *= 2.0
    else:
        return None
    # float32 would leave C of a few 1e-8 where it is 0
    levels = reward_levels(jnp.asarray(reward))
    found = exact_budget(
        jnp.asarray(log_q), jnp.asarray(log_base), jnp.asarray(reward), levels, jnp.asarray(1.0)
    )
    return {"at": value, **{name: float(getattr(found, name)) for name in _PARTS}}


def formula(method: Method) -> str:
    """What the docstring of its function says, without arguments and results."""
    text = inspect.cleandoc(method.function.__doc__ or "")
    return text.split("\nArgs:")[0].strip()


def _law(method: Method) -> str:
    """The first sentence of its law's docstring."""
    if method.law is None:
        return "none"
    return inspect.cleandoc(method.law.__doc__ or "").split("\n")[0].replace("``", "`").rstrip(".")


def _source(method: Method) -> str:
    """Where the samples come from, in words."""
    who, kept = _WHO.get(method.needs.behaviour, "its own sampler"), method.memory
    if not kept.samples:
        who = "p0, drawn once" if kept.filling else "a data set"
    elif kept.filling:
        who += " and its past"
    return who + _JUDGED.get(method.needs.feed, "")


def _needs(method: Method) -> list[str]:
    """Needs and permissions, in words."""
    needs = method.needs
    said = [f"{needs.feed.value}, K >= {needs.samples} of each prompt"]
    said += [f"a head: {head.value}" for head in needs.heads]
    said += ["a token for each return"] if needs.returns else []
    words = {
        "hard": "evidence may be zero somewhere",
        "foreign": "may learn from samples that somebody else drew",
        "unrecorded": "does without log-probabilities of who drew them",
        "tempered": "keeps its fixed point at another temperature of the sampler",
        "parts": "gradients may be gathered in parts of a batch",
    }
    return said + [text for name, text in words.items() if getattr(needs, name)]


def _knob(method: Method) -> str:
    knob = method.knob
    if knob is None:
        return "none"
    where = "must be given" if knob.default is None else f"default {knob.default:g}"
    return f"{knob.option}: {knob.unit}; {knob.range}; {where}"


def _home(method: Method) -> str:
    """Where the function is."""
    return f"{method.function.__module__}.{method.function.__name__}"


def card(method: Method) -> dict[str, Any]:
    """All that is known about a method, as plain data."""
    knob, found = method.knob, at_fixed_point(method)
    return {
        "name": method.name,
        "family": method.family,
        "idea": method.idea,
        "function": _home(method),
        "formula": formula(method),
        "samples_from": _source(method),
        "needs": _needs(method),
        "knob": knob
        and {"option": knob.option, "unit": knob.unit, "default": knob.default, "range": knob.range},
        "options": options_of(method),
        "law": None if found is None else {"formula": _law(method), **found},
        "assumes": list(method.assumes),
        "theorems": list(method.theorems),
        "paper": method.paper and method.paper._asdict(),
    }


def _cost(found: dict[str, float] | None) -> list[str]:
    return ["-"] * len(_PARTS) if found is None else [f"{found[name]:z.3f}" for name in _PARTS]


def methods_table(methods: Sequence[Method]) -> str:
    """One line a method, for a terminal."""
    rows = [["name", "family", "knob", "samples of", "KL", "P", "S", "C", "idea"]]
    for method in methods:
        found = at_fixed_point(method)
        at = "-" if method.knob is None or found is None else f"{method.knob.option} = {found['at']:g}"
        rows.append([method.name, method.family, at, _source(method), *_cost(found), method.idea])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    line = lambda row: "  ".join(
        cell.rjust(width) if 4 <= i <= 7 else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "\n".join(line(row).rstrip() for row in rows)


def _cite(method: Method) -> str:
    paper = method.paper
    if paper is None:
        return ""
    where = f"arXiv {paper.arxiv}" if paper.arxiv else paper.venue
    return f"{paper.authors} {paper.year}, {paper.title}" + (f" ({where})" if where else "")


def _budget_line(method: Method, found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    at = "" if method.knob is None else f" at {method.knob.option} = {found['at']:g}"
    cost = "{:.3f} = P {:.3f} + S {:z.3f} + C {:z.3f}".format(*(found[name] for name in _PARTS))
    return f"KL(q||p0) {cost} nats{at}, in a world of 27 strings"


def _options(method: Method) -> str:
    return " ".join(
        name if value is None else f"{name}={value}" for name, value in options_of(method).items()
    )


def card_text(method: Method) -> str:
    """One card, for a terminal."""
    facts = [
        ("samples of", _source(method)),
        ("needs", "; ".join(_needs(method))),
        ("knob", _knob(method)),
        ("options", _options(method) or "none"),
        ("fixed point", _law(method).replace("`", "")),
        ("costs there", _budget_line(method, at_fixed_point(method))),
        ("assumes", "; ".join(method.assumes)),
        ("theorems", ", ".join(method.theorems)),
        ("paper", _cite(method)),
        ("in Python", _home(method)),
    ]
    said = [
        textwrap.fill(text, 110, initial_indent=f"{name:<13}", subsequent_indent=" " * 13)
        for name, text in facts
        if text
    ]
    return "\n".join([f"{method.name} ({method.family}): {method.idea}", "", formula(method), "", *said])


def methods_markdown(methods: Sequence[Method]) -> str:
    """The table of the README: generated, compared by a test."""
    lines = [
        "| method | family | in kl_rl | idea | samples of | fixed point | P + S + C there |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        found = at_fixed_point(method)
        cost = "" if found is None else " + ".join(f"{found[name]:z.2f}" for name in _PARTS[1:])
        law = _law(method).split(": ")[0].replace("|", "\\|")
        cells = [
            f"`{method.name}`",
            method.family,
            f"`{method.function.__name__}`",
            method.idea,
            _source(method),
            law,
            cost,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page_markdown(methods: Sequence[Method]) -> str:
    """The pages of the documentation, in one file: generated, compared by a test."""
    parts = ["# Methods", "", "Generated from the cards by `kl-rl methods --markdown`; do not edit."]
    family = None
    for method in methods:
        if method.family != family:
            family = method.family
            parts += ["", f"## {family}"]
        facts = [
            ("Samples of", _source(method)),
            ("Needs", "; ".join(_needs(method))),
            ("Knob", _knob(method)),
            ("Options", f"`{_options(method)}`" if _options(method) else ""),
            ("Fixed point", _law(method)),
            ("Costs there", _budget_line(method, at_fixed_point(method))),
            ("Assumes", "; ".join(method.assumes)),
            ("Theorems", ", ".join(f"[{t}](../theory_notes/README.md)" for t in method.theorems)),
            ("Paper", _cite(method)),
        ]
        parts += ["", f"### {method.name}", "", f"{method.idea}. `{_home(method)}`", ""]
        parts += [formula(method).replace("``", "`"), ""]
        parts += [f"- **{name}**: {text}" for name, text in facts if text]
    return "\n".join(parts) + "\n"
