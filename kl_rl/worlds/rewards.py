"""Rewards of world files; named rewards compile to weighted automata."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kl_rl.exact.automaton import Automaton
from kl_rl.worlds.schema import kinds
from kl_rl.worlds.validation import Field, check_keys, integer, items, number, number_table, token_list

__all__ = ["Table", "motif_table", "parse_reward", "sum_table", "to_automaton"]

MAX_STATES = 4096


class Table(NamedTuple):
    """A weighted automaton as host arrays."""

    start: int
    next: np.ndarray  # [Q, V]
    weight: np.ndarray  # [Q, V]


def parse_reward(spec: object, vocab: int, end: int | None, field: Field) -> Table:
    """Check the "reward" part of a world and compile it to an automaton.

    Args:
      spec: the parsed JSON value.
      vocab: V, from the base process.
      end: end token, or None.
      field: its place, for messages.

    Returns:
      The automaton as a table.

    Raises:
      BadWorld: naming the field.
    """
    known = kinds("reward")
    if not isinstance(spec, dict) or ("kind" not in spec and "next" not in spec):
        field.fail(
            f'must be an object with a "kind" ({", ".join(known)}) or with "start", "next" and "weight"'
        )
    kind = spec.get("kind", "automaton")
    if not isinstance(kind, str) or kind not in known:
        (field / "kind").fail(f"must be one of {', '.join(known)}, got {kind!r}")
    return _PARSERS[kind](check_keys(spec, known[kind], field), vocab, end, field)


def _automaton(spec: dict[str, Any], vocab: int, end: int | None, field: Field) -> Table:
    rows = items(spec["next"], field / "next")
    targets = number_table(rows, field / "next", (len(rows), vocab))
    what = f" (states of an automaton of {len(rows)})"
    for q, row in enumerate(rows):
        for y, target in enumerate(row):
            integer(target, (field / "next")[q][y], low=0, high=len(rows), what=what)
    start = integer(spec["start"], field / "start", low=0, high=len(rows), what=what)
    weight = number_table(spec["weight"], field / "weight", (len(rows), vocab))
    return Table(start, targets.astype(np.int32), weight)


def _failure_links(motif: list[int]) -> list[int]:
    """Length of the longest proper border of every prefix (Knuth, Morris and Pratt 1977)."""
    border = [0, 0]
    for i in range(1, len(motif)):
        k = border[i]
        while k and motif[i] != motif[k]:
            k = border[k]
        border.append(k + 1 if motif[i] == motif[k] else 0)
    return border


def motif_table(motif: list[int], vocab: int) -> np.ndarray:
    """Matched length after each token: [m + 1, V]; row m goes on behind a full, maybe overlapping match."""
    border = _failure_links(motif)
    table = np.zeros((len(motif) + 1, vocab), np.int32)
    for state in range(len(motif) + 1):
        if state:
            table[state] = table[border[state]]
        if state < len(motif):
            table[state, motif[state]] = state + 1
    return table


def _motif_count(spec: dict[str, Any], vocab: int, end: int | None, field: Field) -> Table:
    motif = token_list(spec["motif"], field / "motif", vocab, nonempty=True)
    gain = number(spec.get("weight", 1.0), field / "weight")
    matched = motif_table(motif, vocab)
    return Table(0, matched, np.where(matched == len(motif), gain, 0.0))


def _pair_match(spec: dict[str, Any], vocab: int, end: int | None, field: Field) -> Table:
    distance = integer(spec["distance"], field / "distance", low=1)
    gain = number(spec.get("weight", 1.0), field / "weight")
    size = _window_count(vocab, distance)
    if size > MAX_STATES:
        (field / "distance").fail(f"needs {size} or more states, above {MAX_STATES}; lower the distance")
    windows = [w for k in range(distance + 1) for w in np.ndindex(*(vocab,) * k)]
    index = {window: i for i, window in enumerate(windows)}
    tokens = range(vocab)
    following = [[index[(*window, y)[-distance:]] for y in tokens] for window in windows]
    weight = [[gain * (len(w) == distance and w[0] == y) for y in tokens] for w in windows]
    return Table(0, np.array(following, np.int32), np.array(weight, float))


def _window_count(vocab: int, distance: int) -> int:
    """Strings of at most `distance` tokens, counted no further than the limit."""
    count = 0
    for k in range(distance + 1):
        count += vocab**k
        if count > MAX_STATES:
            break
    return count


def _sentiment(spec: dict[str, Any], vocab: int, end: int | None, field: Field) -> Table:
    positive = token_list(spec["positive"], field / "positive", vocab)
    negative = token_list(spec["negative"], field / "negative", vocab)
    for token in sorted(set(positive) & set(negative)):
        (field / "negative").fail(f"token {token} is also in positive; list it once")
    bonus = number(spec.get("bonus", 1.0), field / "bonus")
    lexicon = np.zeros(vocab)
    lexicon[positive], lexicon[negative] = 1.0, -1.0
    if "wedding" not in spec:
        return Table(0, np.zeros((1, vocab), np.int32), lexicon[None])
    motif = token_list(spec["wedding"], field / "wedding", vocab, nonempty=True)
    matched, party = motif_table(motif, vocab), np.full(vocab, bonus)
    matched[-1] = len(motif)
    if end is not None:
        party[end] = 0.0
    return Table(0, matched, np.concatenate([np.tile(lexicon, (len(motif), 1)), party[None]]))


def _length(spec: dict[str, Any], vocab: int, end: int | None, field: Field) -> Table:
    weight = np.ones((1, vocab))
    if end is not None:
        weight[0, end] = 0.0
    return Table(0, np.zeros((1, vocab), np.int32), weight)


def _constant(spec: dict[str, Any], vocab: int, end: int | None, field: Field) -> Table:
    return Table(0, np.zeros((1, vocab), np.int32), np.zeros((1, vocab)))


def _sum(spec: dict[str, Any], vocab: int, end: int | None, field: Field) -> Table:
    terms = items(spec["terms"], field / "terms")
    total = parse_reward(terms[0], vocab, end, (field / "terms")[0])
    for i, term in enumerate(terms[1:], 1):
        longer = sum_table(total, parse_reward(term, vocab, end, (field / "terms")[i]))
        if longer is None:
            (field / "terms").fail(f"the sum needs more than {MAX_STATES} states; use fewer or smaller terms")
        total = longer
    return total


def sum_table(first: Table, second: Table) -> Table | None:
    """Product automaton, restricted to reachable pairs of states; weights add. None if it grows too large."""
    index = {(first.start, second.start): 0}
    queue, following, weight = [(first.start, second.start)], [], []
    for a, b in queue:
        if len(index) > MAX_STATES:
            return None
        targets = list(zip(first.next[a].tolist(), second.next[b].tolist(), strict=True))
        for pair in targets:
            if pair not in index:
                index[pair] = len(index)
                queue.append(pair)
        following.append([index[pair] for pair in targets])
        weight.append(first.weight[a] + second.weight[b])
    return Table(0, np.array(following, np.int32), np.array(weight))


_Parser = Callable[[dict[str, Any], int, int | None, Field], Table]
_PARSERS: dict[str, _Parser] = {
    "automaton": _automaton,
    "motif_count": _motif_count,
    "pair_match": _pair_match,
    "sentiment": _sentiment,
    "length": _length,
    "constant": _constant,
    "sum": _sum,
}


def to_automaton(table: Table) -> Automaton:
    """The table as JAX arrays: states int32, weights in the default float type."""
    return Automaton(
        jnp.asarray(table.start, jnp.int32), jnp.asarray(table.next, jnp.int32), jnp.asarray(table.weight)
    )
