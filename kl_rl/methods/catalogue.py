"""All cards, in the order of the families, and how people name them."""

from __future__ import annotations

import collections
import difflib
import re
from collections.abc import Sequence

from kl_rl.core.named import object_named
from kl_rl.methods import between, conditioning, imitation, off_policy, preference, rlhf
from kl_rl.methods.card import Method

__all__ = ["METHODS", "method_named", "methods_named", "representatives"]

METHODS: tuple[Method, ...] = (
    *rlhf.METHODS,
    *imitation.METHODS,
    *conditioning.METHODS,
    *off_policy.METHODS,
    *between.METHODS,
    *preference.METHODS,
)


def representatives() -> tuple[Method, ...]:
    """The first card of each family, and those that nothing but early stopping holds back."""
    first = {method.family: method for method in reversed(METHODS)}
    stopped = lambda method: method.knob is not None and method.knob.stops
    return tuple(method for method in METHODS if method is first[method.family] or stopped(method))


def _own(spec: str) -> Method:
    """A user's card."""
    found = object_named(spec)
    if not isinstance(found, Method):
        raise ValueError(f"{spec} is a {type(found).__name__}, not a kl_rl.methods.Method")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", found.name):  # folders are called so
        raise ValueError(
            f"{spec} is called {found.name!r}: a name has letters, digits, '.', '_' and '-' only"
        )
    if found.name in ("base", "control") or found.family == "reference":
        raise ValueError(
            f"{spec} is called {found.name!r}, family {found.family!r}: reports call something else so"
        )
    return found


def _unknown(name: str) -> ValueError:
    dashed = name.lower().replace("_", "-")
    named = {m.name: [m.name] for m in METHODS} | {m.family: [m.family] for m in METHODS}
    for method in METHODS:  # by what they are made with: a decision transformer is three cards
        made = method.function.__name__.replace("_", "-")
        named.setdefault(made, [])
        named[made] += [] if method.name == made else [method.name]
    near = difflib.get_close_matches(dashed, named, 1, 0.7)
    hint = f"; did you mean {' or '.join(named[near[0]])}?" if near else ""
    families = ", ".join(dict.fromkeys(m.family for m in METHODS))
    return ValueError(
        f"unknown method {name!r}{hint} (known: {', '.join(m.name for m in METHODS)}; "
        f"families: {families}; or your own card, module:NAME)"
    )


def methods_named(names: Sequence[str] | None) -> tuple[Method, ...]:
    """Cards by name, by family, or by ``module:NAME`` for a card of one's own.

    Args:
      names: None: all of the library.

    Returns:
      The cards, those of the library in its order, then those of one's own.

    Raises:
      ValueError: an unknown name; the message lists all, and what may have been meant. Two cards of one name.
    """
    if not names:
        return METHODS
    own = {name: _own(name) for name in names if ":" in name}
    for name in names:
        if name not in own and not any(name in (m.name, m.family) for m in METHODS):
            raise _unknown(name)
    found = (*(m for m in METHODS if m.name in names or m.family in names), *own.values())
    count = collections.Counter(method.name for method in found)
    if twice := [name for name, times in count.items() if times > 1]:
        raise ValueError(f"two methods are called {twice[0]}: give your own card another name")
    return found


def method_named(name: str) -> Method:
    """One card; a family stands for its first.

    Args:
      name: of a card or a family, or ``module:NAME``.

    Returns:
      The card.

    Raises:
      ValueError: an unknown name.
    """
    found = methods_named([name])
    return next((m for m in found if m.name == name), found[0])
